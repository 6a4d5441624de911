"""The server: right answers under load, a status for every wrong request, and an end that loses nothing."""
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import tiny
import torch
from chromium import CHROMIUM, DRIVER, headless
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from ecomopt import EcomoptError, load, quantize, save
from ecomopt.optimize import serve as serving
from ecomopt.optimize.batching import Batcher, _encode, token_batches
from ecomopt.optimize.serve import Limits, create_app, serve

ROOT = Path(__file__).resolve().parents[1]
WORDS = tiny.WORDS
TEXTS = [" ".join(WORDS[(i + j * j) % len(WORDS)] for j in range(1 + i % 13)) + f" {i}" for i in range(400)]
LABELS = ("<b>negative</b>", "positive & good")


# ---------------------------------------------------------------- batches

@given(st.lists(st.integers(1, 200), max_size=60), st.integers(1, 400), st.integers(0, 300))
def test_no_batch_exceeds_the_budget_and_no_text_is_lost(lengths, budget, overhead):
    batches = token_batches(lengths, budget, overhead)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget for b in batches)
    flat = [(lengths[i], i) for batch in batches for i in batch]
    assert flat == sorted(flat), "by length, and equal ones in their order"


@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(1, 400))
def test_no_text_adds_more_padding_than_a_batch_costs(lengths, overhead):
    for batch in token_batches(lengths, 10**6, overhead):
        steps = zip(batch, batch[1:])
        assert all(n * (lengths[j] - lengths[i]) <= overhead for n, (i, j) in enumerate(steps, 1))


def test_a_batcher_can_be_started_again():
    batcher = Batcher(tiny.classifier())
    async def twice():
        for _ in range(2):
            async with batcher: logits = await batcher.logits((await batcher.encode(["good"]))[0])
        return logits
    assert asyncio.run(twice()).shape == (1, 2)


def answers(model, texts, *settings, cancelled=()):
    """What a batcher gives each of many callers, and what it observed; some callers go away at once."""
    seen = []

    async def ask(batcher, text):
        ids, _ = await batcher.encode([text])
        return await batcher.logits(ids)

    async def run():
        async with Batcher(model, *settings, observe=lambda *pair: seen.append(pair)) as batcher:
            tasks = [asyncio.create_task(ask(batcher, text)) for text in texts]
            await asyncio.sleep(0)
            for i in cancelled: tasks[i].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(run()), seen


@pytest.mark.parametrize("settings", [(1024,), (1,), (64, 5.0), (10**6, 0.0)])
def test_many_callers_get_their_own_answers(settings):
    model = tiny.classifier()
    found, seen = answers(model, TEXTS[:100], *settings)
    assert torch.allclose(torch.cat(found), model.logits(TEXTS[:100]), atol=1e-5)
    sizes = [value for name, value in seen if name == "batch_texts"]
    tokens = [value for name, value in seen if name == "batch_tokens"]
    assert sum(sizes) == 100 and all(n == 1 or t <= settings[0] for n, t in zip(sizes, tokens))


def test_a_list_keeps_its_order():
    model = tiny.classifier()

    async def run():
        async with Batcher(model, 40) as batcher:
            ids, truncated = await batcher.encode(TEXTS)
            return await batcher.logits(ids), truncated

    logits, truncated = asyncio.run(run())
    assert torch.allclose(logits, model.logits(TEXTS), atol=1e-5) and not any(truncated)


def test_a_bad_text_fails_alone():
    model = tiny.classifier()
    bad = model.tokenizer.convert_tokens_to_ids("hate")

    def break_down(module, arguments, inputs):
        if (inputs["input_ids"] == bad).any(): raise RuntimeError("broken down")

    model.model.register_forward_pre_hook(break_down, with_kwargs=True)
    texts = ["good", "hate", "bad", "love", "very hate", "slow"]
    found, _ = answers(model, texts)
    assert [isinstance(one, RuntimeError) for one in found] == ["hate" in text for text in texts]
    good = [i for i, text in enumerate(texts) if "hate" not in text]
    assert torch.allclose(torch.cat([found[i] for i in good]), model.logits([texts[i] for i in good]), atol=1e-5)


def test_callers_that_went_away_are_not_answered():
    model = tiny.classifier()
    found, seen = answers(model, TEXTS[:20], 1, cancelled=range(5, 20))
    assert all(isinstance(one, asyncio.CancelledError) for one in found[5:])
    assert torch.allclose(torch.cat(found[:5]), model.logits(TEXTS[:5]), atol=1e-5)
    assert sum(value for name, value in seen if name == "batch_texts") == 5


def test_a_stopped_batcher_says_so():
    batcher = Batcher(tiny.classifier())
    with pytest.raises(EcomoptError, match="does not run"): asyncio.run(batcher.logits([[2, 3]]))


@pytest.mark.parametrize("words", [0, 1, 5, 6, 7, 20])
def test_truncated_texts_are_known(words):
    model = tiny.classifier()
    model.max_length = 8  # with two special tokens
    rows, truncated = _encode(model, [" ".join(WORDS[:words]), "good"])
    assert truncated == [words > 6, False] and rows == model.encode([" ".join(WORDS[:words]), "good"])


# ---------------------------------------------------------------- bad input, before any work

@pytest.mark.parametrize("wrong", [
    dict(max_queue=0), dict(max_batch_tokens=1.5), dict(max_texts=True), dict(max_body_bytes="1"),
    dict(timeout_s=0), dict(timeout_s=float("inf")), dict(max_wait_ms=-1), dict(max_wait_ms=None),
])
def test_wrong_limits(wrong):
    with pytest.raises(EcomoptError, match=next(iter(wrong))): Limits(**wrong)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "shop.example", "localhost.example"])
def test_other_machines_need_a_token(host):
    with pytest.raises(EcomoptError, match="no token"): serve("nothing", host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_needs_none(host): serving._check_host(host, None)


@pytest.mark.parametrize("options, what", [
    (dict(host=""), "host"), (dict(host=7), "host"), (dict(port=-1), "port"), (dict(port=65536), "port"),
    (dict(port="80"), "port"), (dict(token=""), "token"), (dict(token="a b"), "token"), (dict(token="ä"), "token"),
    (dict(host="no.such.host.invalid", token="x"), "cannot be opened"), (dict(port=0), "not an artifact"),
])
def test_wrong_arguments(options, what, tmp_path):
    with pytest.raises(EcomoptError, match=what): serve(tmp_path, **options)


def test_a_port_in_use_is_known_before_the_model_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(EcomoptError, match="cannot be opened"): serve(tmp_path, port=taken.getsockname()[1])


def test_answers_are_sent_without_delay():
    """asyncio sets TCP_NODELAY on sockets that say they are TCP; on others, each answer takes 40 ms longer."""
    with serving._listen("127.0.0.1", 0) as listener: assert listener.proto == socket.IPPROTO_TCP


def test_what_is_no_classifier(tmp_path):
    path = save(tiny.language_model(), tmp_path / "model")
    with pytest.raises(EcomoptError, match="no classifier"): create_app(path)
    with pytest.raises(EcomoptError, match="no classifier"): create_app(7)


def test_a_teacher_of_other_labels():
    with pytest.raises(EcomoptError, match="other labels"):
        create_app(tiny.classifier(), tiny.classifier(labels=("a", "b")))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    with pytest.raises(EcomoptError, match="no fastapi"): create_app(tiny.classifier())


# ---------------------------------------------------------------- answers of the application

@pytest.fixture(scope="module")
def client():
    """A client of an application in this process."""
    model = tiny.classifier()
    model.max_length = 16
    app = create_app(model, tiny.classifier(seed=1), Limits(max_texts=50, max_body_bytes=5000))
    with TestClient(app) as client: yield client


LONG = " ".join(WORDS)


@pytest.mark.parametrize("body, status, kind", [
    (b"", 400, "empty"), (b" \n", 400, "empty"), (b'{"texts": []}', 400, "empty"), (b'{"texts": ""}', 400, "empty"),
    (b'{"texts": ["good", " \\t"]}', 400, "empty"),
    (b"{", 400, "malformed"), (b"\xff\xfe\x00", 400, "malformed"), (b"[" * 4000, 400, "malformed"),
    (b'{"texts": ' + b"1" * 4900 + b"}", 400, "malformed"), (b'{"texts": "good"} {}', 400, "malformed"),
    (b"[]", 422, "invalid"), (b'"good"', 422, "invalid"), (b"null", 422, "invalid"), (b"{}", 422, "invalid"),
    (b'{"texts": 7}', 422, "not_text"), (b'{"texts": null}', 422, "not_text"),
    (b'{"texts": {"a": 1}}', 422, "not_text"),
    (b'{"texts": ["good", ["bad"]]}', 422, "not_text"), (b'{"texts": ["good", "\\ud800"]}', 422, "not_text"),
    (b'{"texts": "good", "truncat": true}', 422, "invalid"), (b'{"texts": "good", "truncate": 1}', 422, "invalid"),
    (b'{"texts": "good", "raw_scores": "yes"}', 422, "invalid"), (b'{"texts": "good", "\\ud800": 1}', 422, "invalid"),
    (b'{"texts": "good", "model": "other"}', 422, "invalid"), (b'{"texts": "good", "model": []}', 422, "invalid"),
    (json.dumps({"texts": ["good"] * 51}).encode(), 413, "too_large"), (b" " * 5001, 413, "too_large"),
    (json.dumps({"texts": ["good", LONG], "truncate": False}).encode(), 413, "too_large"),
])
def test_what_is_refused(client, body, status, kind):
    found = client.post("/predict", content=body)
    assert (found.status_code, found.json()["error_type"]) == (status, kind)
    assert found.json().keys() == {"error", "error_type"} and found.json()["error"]


def test_the_row_that_is_wrong_is_named(client):
    found = client.post("/predict", json={"texts": ["good", "bad", 7]})
    assert "Text 2" in found.json()["error"]
    assert "truncate" in client.post("/predict", json={"texts": "good", "truncat": True}).json()["error"]


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/nothing", 404), ("GET", "/predict", 405), ("POST", "/info", 405), ("PUT", "/", 405), ("POST", "/x", 404),
])
def test_other_paths_and_methods(client, method, path, status):
    found = client.request(method, path)
    assert found.status_code == status and found.json().keys() == {"error", "error_type"}


def test_options(client):
    app = client.app.state.service
    model, teacher = app.models["optimized"], app.models["teacher"]
    raw = client.post("/predict", json={"texts": ["good", LONG], "raw_scores": True}).json()
    assert raw["truncated"] == [False, True] and raw["labels"] == model.predict(["good", LONG])
    scores = torch.tensor([[row[label] for label in model.labels] for row in raw["scores"]])
    assert torch.allclose(scores, model.logits(["good", LONG]), atol=1e-5)
    found = client.post("/predict", json={"texts": "good", "model": "teacher"}).json()
    assert found["labels"] == teacher.predict(["good"]) and found["milliseconds"] > 0
    assert sum(found["scores"][0].values()) == pytest.approx(1)


def test_any_content_type_is_read_as_json(client):
    found = client.post("/predict", content=b'{"texts": "good"}', headers={"Content-Type": "text/plain"})
    assert found.status_code == 200


def test_info_and_states(client):
    info = client.get("/info").json()
    assert [*info["models"]] == ["optimized", "teacher"] and info["limits"]["max_texts"] == 50
    assert info["models"]["optimized"]["max_length"] == 16 and info["models"]["optimized"]["disk_bytes"] > 1000
    assert client.get("/health").json() == {"status": "alive"} and client.get("/ready").status_code == 200


def test_the_interface_is_described_without_a_network(client):
    api = client.get("/openapi.json").json()
    assert {"/predict", "/info", "/metrics", "/health", "/ready"} <= api["paths"].keys()
    assert {"400", "413", "422", "429", "503"} <= api["paths"]["/predict"]["post"]["responses"].keys()
    for path in ("/", "/docs"):
        page = client.get(path).text
        assert "//" not in page.replace("<!--", "") and "POST" in page


def test_a_model_that_fails_is_an_error_of_the_server():
    model = tiny.classifier()
    with TestClient(create_app(model)) as client:
        def break_down(*_): raise RuntimeError("broken down")
        handle = model.model.register_forward_pre_hook(break_down)
        found = client.post("/predict", json={"texts": "good"})
        assert found.status_code == 500 and found.json() == {
            "error": "The model failed: broken down", "error_type": "inference"}
        handle.remove()
        assert client.post("/predict", json={"texts": "good"}).status_code == 200


# ---------------------------------------------------------------- real processes

SERVER = """
import json, sys, time
from ecomopt import load
from ecomopt.optimize.serve import Limits, serve
path, seconds, options = sys.argv[1], float(sys.argv[2]), json.loads(sys.argv[3])
options["limits"] = Limits(**options.get("limits", {}))
if seconds:
    path = load(path)
    path.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
serve(path, port=0, **options)
"""


def wait_for(is_so: Callable[[], bool], otherwise: Callable[[], str], seconds: float = 30) -> None:
    """Look again and again until it is so, or say what is instead."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, otherwise()
        time.sleep(0.02)


@dataclass
class Server:
    """A process that serves."""

    process: subprocess.Popen
    port: int

    @property
    def url(self) -> str: return f"http://127.0.0.1:{self.port}"

    def post(self, body: object, **options) -> httpx.Response:
        return httpx.post(f"{self.url}/predict", json=body, timeout=60, **options)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        return sum(s.value for family in families for s in family.samples if s.name == f"ecomopt_{name}")

    def wait_until(self, name: str, value: float) -> None:
        """Wait for a metric to have a value."""
        wait_for(lambda: self.metric(name) == value, lambda: f"{name} is {self.metric(name)}, not {value}")

    def is_closed(self) -> bool:
        """Can nobody connect?"""
        try: self.send(b"").close()
        except OSError: return True
        return False

    def send(self, content: bytes) -> socket.socket:
        """An open connection that has sent this."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(content)
        return connection


def raw(body: bytes, length: int | None = None) -> bytes:
    """A request as it is sent; the length may be that of a longer body."""
    length = len(body) if length is None else length
    return b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length + body


def status(connection: socket.socket) -> int:
    """The status that a server sends."""
    return int(connection.makefile("rb").readline().split()[1])


@contextmanager
def started(path: Path, seconds: float = 0.0, **options):
    """A server as a process of its own, each batch of which takes so many seconds longer."""
    command = [sys.executable, "-c", SERVER, str(path), str(seconds), json.dumps(options)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("Serving on http://"), line
        server = Server(process, int(line.split(":")[2].split()[0]))
        assert httpx.get(f"{server.url}/ready", timeout=60).status_code == 200
        yield server
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Artifacts of a teacher and of an optimized model, whose labels are HTML."""
    folder, teacher = tmp_path_factory.mktemp("serve"), tiny.classifier(labels=LABELS)
    return SimpleNamespace(teacher=save(teacher, folder / "teacher"), small=save(quantize(teacher), folder / "small"))


@pytest.fixture(scope="module")
def server(paths):
    with started(paths.small, teacher=str(paths.teacher)) as server: yield server


@pytest.fixture(scope="module")
def slow(paths):
    limits = dict(max_queue=4, max_batch_tokens=1, timeout_s=5)
    with started(paths.small, seconds=0.3, limits=limits) as server: yield server


pytestmark = pytest.mark.xdist_group("serve")


def ask_many(server: Server, asked: list, **options) -> list[dict]:
    """The answers to requests of 64 clients at once."""
    def ask(texts):
        found = client.post("/predict", json={"texts": texts, **options})
        assert found.status_code == 200, found.text
        return found.json()

    with httpx.Client(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=64)) as client:
        with ThreadPoolExecutor(64) as pool: return list(pool.map(ask, asked))


@pytest.mark.slow
@pytest.mark.parametrize("name, tolerance", [("teacher", 1e-5), ("optimized", 1e-3)])
def test_64_clients_get_the_answers_of_predict(server, paths, name, tolerance):
    """In int8, a rounding may go another way in another batch."""
    model = load(paths.teacher if name == "teacher" else paths.small)
    asked = [TEXTS[i] if i % 3 else TEXTS[i:i + 1 + i % 7] for i in range(300)]
    before = server.metric("batch_texts_sum"), server.metric("batch_texts_count")
    for texts, answer in zip(asked, ask_many(server, asked, model=name)):
        texts = [texts] if isinstance(texts, str) else texts
        logits = model.logits(texts)
        scores = torch.tensor([[row[label] for label in model.labels] for row in answer["scores"]])
        assert torch.allclose(scores, logits.softmax(1), atol=tolerance)
        is_clear = (logits.softmax(1).amax(1) - 0.5 > tolerance).tolist()
        for label, expected, clear in zip(answer["labels"], model.predict(texts), is_clear, strict=True):
            assert label == expected or not clear
    n = server.metric("batch_texts_sum") - before[0]
    assert n == sum(1 if isinstance(texts, str) else len(texts) for texts in asked)
    assert server.metric("batch_texts_count") - before[1] < n / 2, "batches of several"


@pytest.mark.slow
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_of_10_mb(server, is_chunked):
    parts = [b"x" * 100_000] * 100
    content = iter(parts) if is_chunked else b"".join(parts)
    found = httpx.post(f"{server.url}/predict", content=content, timeout=60)
    assert found.status_code == 413 and found.json()["error_type"] == "too_large"
    assert server.post({"texts": "good"}).status_code == 200


@pytest.mark.slow
def test_clients_that_hang_up_change_nothing(server):
    body = json.dumps({"texts": TEXTS[:50]}).encode()
    for sent in (b"", b"POST /pre", raw(b"", 10), raw(body[:40], len(body)), raw(body), b"\x00\xff\r\n\r\n"):
        for _ in range(5): server.send(sent).close()
    server.wait_until("requests_running", 0)
    server.wait_until("queue_texts", 0)
    assert server.post({"texts": "good"}).status_code == 200


@pytest.mark.slow
def test_a_client_that_is_killed_changes_nothing(server):
    code = "import httpx, sys\nwhile True: httpx.post(sys.argv[1], json={'texts': ['good', 'bad'] * 200})"
    asked = server.metric("requests_total")
    clients = [subprocess.Popen([sys.executable, "-c", code, f"{server.url}/predict"]) for _ in range(2)]
    try:
        wait_for(lambda: server.metric("requests_total") >= asked + 2, lambda: "they ask nothing", seconds=60)
    finally:
        for client in clients:
            client.kill()
            client.wait()
    server.wait_until("requests_running", 0)
    assert server.post({"texts": "good"}).status_code == 200


@pytest.mark.slow
def test_texts_of_clients_that_went_away_are_not_classified(slow):
    before = slow.metric("batch_texts_count")
    body = json.dumps({"texts": ["good"] * 8}).encode()
    busy = slow.send(raw(body))
    slow.wait_until("requests_running", 1)
    gone = [slow.send(raw(json.dumps({"texts": ["bad"] * 20}).encode())) for _ in range(3)]
    slow.wait_until("requests_running", 4)
    for connection in gone: connection.close()
    assert status(busy) == 200
    slow.wait_until("requests_running", 0)
    assert slow.metric("batch_texts_count") - before <= 10


@pytest.mark.slow
def test_a_full_server_says_so(slow):
    bodies = [json.dumps({"texts": texts}).encode() for texts in (TEXTS[:6], *TEXTS[6:9])]
    waiting = [slow.send(raw(body)) for body in bodies]
    slow.wait_until("requests_running", 4)
    assert httpx.get(f"{slow.url}/ready").status_code == 503 and httpx.get(f"{slow.url}/health").status_code == 200
    found = slow.post({"texts": "good"})
    assert (found.status_code, found.json()["error_type"]) == (429, "overloaded")
    assert int(found.headers["Retry-After"]) >= 1
    assert [status(one) for one in waiting] == [200] * 4
    assert slow.post({"texts": "good"}).status_code == 200


@pytest.mark.slow
def test_time_limits(slow):
    found = slow.post({"texts": TEXTS[:30]})  # 0.3 s each
    assert (found.status_code, found.json()["error_type"]) == (503, "timeout") and "Retry-After" in found.headers
    assert status(slow.send(raw(b"{", 100))) == 408
    assert slow.post({"texts": "good"}).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_stop_answers_what_it_took(paths, number):
    with started(paths.small, seconds=0.5, limits=dict(max_batch_tokens=1)) as server:
        taken = [server.send(raw(json.dumps({"texts": text}).encode())) for text in (TEXTS[:6], *TEXTS[6:9])]
        body = json.dumps({"texts": "late"}).encode()
        late = server.send(raw(body[:5], len(body)))
        server.wait_until("requests_running", 5)
        server.process.send_signal(number)
        wait_for(server.is_closed, lambda: "it still takes connections")
        late.sendall(body[5:])
        assert [status(one) for one in taken] == [200] * 4
        assert status(late) == 503
        assert server.process.wait(timeout=30) == 0
        with pytest.raises(OSError): server.send(b"")


@pytest.mark.slow
def test_a_token_guards_answers_and_metrics(paths):
    with started(paths.small, host="0.0.0.0", token="s3cret") as server:
        for path in ("/health", "/ready", "/", "/docs"): assert httpx.get(server.url + path).status_code == 200
        for token in (None, "Bearer wrong", "Bearer", "Basic s3cret", "Bearer s3cret1", b"Bearer \xff"):
            headers = {} if token is None else {"Authorization": token}
            found = server.post({"texts": "good"}, headers=headers)
            assert found.status_code == 401 and found.headers["WWW-Authenticate"] == "Bearer"
            assert found.json()["error_type"] == "unauthorized"
            for path in ("/info", "/metrics"):
                assert httpx.get(server.url + path, headers=headers).status_code == 401
        headers = {"Authorization": "Bearer s3cret"}
        assert server.post({"texts": "good"}, headers=headers).status_code == 200
        metrics = httpx.get(f"{server.url}/metrics", headers=headers)
        assert metrics.status_code == 200 and 'requests_total{status="401"} 18.0' in metrics.text


# ---------------------------------------------------------------- the page in a browser

@pytest.fixture(scope="module")
def browser():
    """Chromium with the width of a phone."""
    if not (CHROMIUM and DRIVER): pytest.skip("needs chromium and chromedriver on the PATH")
    with headless("400,900") as driver: yield driver


def classify(browser, text: str) -> list[list[str]]:
    """Type a text, and read the rows of the table."""
    area = browser.find_element(By.ID, "text")
    area.clear()
    area.send_keys(text)
    browser.find_element(By.ID, "send").click()
    WebDriverWait(browser, 20).until(lambda _: browser.find_element(By.ID, "send").is_enabled())
    rows = browser.find_elements(By.CSS_SELECTOR, "tbody tr")
    return [[cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td")] for row in rows]


def foreign(browser, url: str) -> list[str]:
    """Requests to other servers, and errors in the console."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    return [one for one in asked if one.startswith(("http", "ws")) and not one.startswith(url)] + severe


@pytest.mark.slow
def test_the_page_shows_both_models(server, paths, browser):
    text = "the <b>battery</b> & screen 'broke'"
    browser.get(server.url)
    rows = classify(browser, text)
    assert [row[0] for row in rows] == ["optimized", "teacher"]
    for row, path in zip(rows, (paths.small, paths.teacher)):
        model, bytes_on_disk = load(path), sum(file.stat().st_size for file in path.iterdir())
        assert row[1] == model.predict([text])[0], "shown as text, though it is HTML"
        assert float(row[2]) == pytest.approx(model.logits([text]).softmax(1).max().item(), abs=1e-3)
        assert float(row[3]) > 0 and int(row[4].replace(",", "")) == bytes_on_disk
    assert "truncated" in classify(browser, "good " * 200)[0][1]
    assert not foreign(browser, server.url)
    assert browser.find_element(By.CSS_SELECTOR, "[aria-live=polite]") and not browser.find_elements(
        By.XPATH, "//textarea[not(@id=//label/@for)] | //input[not(@id=//label/@for)]"
    )


@pytest.mark.slow
def test_the_pages_fit_a_phone_and_the_dark(server, browser):
    for path in ("/", "/docs"):
        browser.get(server.url + path)
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        colours = []
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            colours.append(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
        assert len(set(colours)) == 2
        assert not foreign(browser, server.url)


@pytest.mark.slow
def test_the_page_asks_for_a_token_and_tells_errors(paths, browser):
    with started(paths.small, token="s3cret", limits=dict(max_body_bytes=200)) as server:
        browser.get(server.url)
        assert classify(browser, "good") == [] and "Bearer" in browser.find_element(By.ID, "error").text
        browser.find_element(By.ID, "token").send_keys("s3cret")
        assert [row[0] for row in classify(browser, "good")] == ["optimized"], "alone, where there is no teacher"
        classify(browser, "good " * 100)
        assert "larger than 200 bytes" in browser.find_element(By.ID, "error").text


def test_nothing_of_a_failed_start_stays(tmp_path):
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    with pytest.raises(EcomoptError): serve(tmp_path, port=0)
    assert before in (0, len(os.listdir("/proc/self/fd")))
