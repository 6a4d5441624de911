"""The server on loopback, teacher and optimized model, beside a plain FastAPI loop: rate, latency, and what gets lost.

The servers are processes of their own, `python -m benchmarks.serve plain DIR` and `… ecomopt DIR`, and so are the
clients (`tools/load.py`).
"""
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from ecomopt import Recipe, finetune, load, load_task, save
from ecomopt.core.train import Classifier
from ecomopt.optimize.serve import serve
from tools.bench import report
from tools.load import answer, request

SEEDS, THREADS = [0], 2
ROUNDS = int(os.environ.get("ROUNDS", 3))
SECONDS = float(os.environ.get("SECONDS", 10))
CLIENTS, DISTURBED = (1, 8, 64), 8
RECIPE = [
    {"prune_structured": {"layers": 4, "first_token": True}},
    {"distill": {"augment": 16_000, "epochs": 4}},
    {"quantize": {"embedding_bits": 4}},
    {"calibrate": {}},  # scales that do not depend on the other texts of a batch
]
NOTES = (
    f"Loopback, {THREADS} threads, clients in a process of their own on the same cores. Each client sends one review "
    "of the test split, waits for the answer, and sends the next. Plain: a FastAPI handler that calls "
    f"model.logits([text]) in the thread pool. Requests a second: median of {ROUNDS} rounds of {SECONDS:g} s, in each "
    "of which all servers were measured in turn; percentiles of all rounds. Lost: no answer, or another status than "
    "200; mixed: scores more than 0.05 from those of the text. Disturbances, beside "
    f"{DISTURBED} clients: SIGKILL of other clients, malformed bodies, texts of 10 MB, clients that hang up."
)


# ---------------------------------------------------------------- models and servers

def teacher() -> Classifier:
    """MiniLM, fine-tuned on the reviews, in float32."""
    return finetune("minilm", load_task("reviews"), epochs=4, seed=SEEDS[0])


def optimized() -> Classifier:
    """The artifact that OPTIMIZED names, or the result of a recipe."""
    if path := os.environ.get("OPTIMIZED"): return load(path)
    return Recipe(RECIPE, SEEDS[0]).run(load_task("reviews"), teacher(), measure=False).model


def plain(path: str) -> None:
    """What one writes first."""
    import uvicorn
    from fastapi import Body, FastAPI
    model, app = load(path), FastAPI()

    @app.post("/predict")
    def predict(texts: str = Body(embed=True)) -> dict:
        scores = model.logits([texts]).softmax(1)[0].tolist()
        by_class = dict(zip(model.labels, scores))
        return {"labels": [max(by_class, key=by_class.get)], "scores": [by_class]}

    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    print(f"Serving on http://127.0.0.1:{listener.getsockname()[1]} ", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).run([listener])


@contextlib.contextmanager
def started(kind: str, path: Path) -> Iterator[int]:
    """The port of a server in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.serve", kind, str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try: yield int(process.stdout.readline().split(":")[2].split()[0])
    finally:
        process.terminate()
        process.wait()


# ---------------------------------------------------------------- clients and disturbances

def clients(port: int, number: int, seconds: float, file: Path) -> subprocess.Popen:
    """Clients in a process of their own."""
    command = [sys.executable, "-m", "tools.load", str(port), str(number), str(seconds), str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


async def send(port: int, content: bytes, waits: bool) -> None:
    """Send bytes, and hang up at once, or after the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(OSError, EOFError):
        writer.write(content)
        await writer.drain()
        if waits: await answer(reader)
    writer.close()


def malformed(port: int, file: Path) -> None:
    for body in (b"", b"{", b"\xff", b"[" * 10_000, b'{"texts": 7}', b'{"texts": "\\ud800"}', b"1" * 10_000):
        asyncio.run(send(port, request(body), waits=True))
    asyncio.run(send(port, b"\x00\x01\x02\r\n\r\n", waits=False))


def large(port: int, file: Path) -> None:
    asyncio.run(send(port, request(json.dumps({"texts": "good " * 2_000_000}).encode()), waits=True))


def hang_up(port: int, file: Path) -> None:
    body = json.dumps({"texts": "a review that nobody waits for"}).encode()
    for content in (request(body), request(body[:9], len(body)), request(body)[:30]):
        asyncio.run(send(port, content, waits=False))


def kill(port: int, file: Path) -> None:
    process = clients(port, 8, 60, file)
    time.sleep(3)
    process.kill()
    process.wait()


DISTURBANCES = {"SIGKILL of clients": kill, "malformed bodies": malformed, "10 MB texts": large, "hang-ups": hang_up}


# ---------------------------------------------------------------- the measurement

def expected(model: Classifier, file: Path) -> Path:
    """The distinct texts of the test split, with what the model answers, in a file."""
    texts = [*dict.fromkeys(load_task("reviews").test["text"])]
    rows = model.logits(texts).softmax(1).tolist()
    scores = [dict(zip(model.labels, row)) for row in rows]
    file.write_text(json.dumps([{"text": text, "scores": row} for text, row in zip(texts, scores)]), "utf8")
    return file


def finished(process: subprocess.Popen) -> dict:
    """What clients found."""
    out, _ = process.communicate()
    return json.loads(out)


def row(name: str, number: int, during: str, found: list[dict]) -> dict:
    """A row of the table, of all rounds."""
    ms = [one for part in found for one in part["ms"]] or [float("nan")]
    return {
        "server": name, "clients": number, "during": during,
        "requests/s": round(float(np.median([part["rate"] for part in found])), 1),
        "p50 ms": round(float(np.percentile(ms, 50)), 2), "p99 ms": round(float(np.percentile(ms, 99)), 2),
        "answers": sum(len(part["ms"]) for part in found),
        "lost": sum(part["lost"] for part in found), "mixed": sum(part["mixed"] for part in found),
    }


def disturbed(port: int, file: Path, disturb) -> dict:
    """What clients found while others disturbed."""
    end, process = time.monotonic() + SECONDS, clients(port, DISTURBED, SECONDS, file)
    while time.monotonic() < end:
        disturb(port, file)
        time.sleep(0.05)
    return finished(process)


def measure(servers: dict[str, tuple[int, Path]]) -> list[dict]:
    """All rows: servers by name, with their ports and expected answers."""
    found = {}
    for port, file in servers.values(): finished(clients(port, 1, 1, file))  # warm-up
    for _ in range(ROUNDS):
        for number in CLIENTS:
            for name, (port, file) in servers.items():
                found.setdefault((name, number), []).append(finished(clients(port, number, SECONDS, file)))
    rows = [row(name, number, "", parts) for (name, number), parts in found.items()]
    for name, (port, file) in servers.items():
        if name.startswith("plain"): continue
        for during, disturb in DISTURBANCES.items():
            rows.append(row(name, DISTURBED, during, [disturbed(port, file, disturb)]))
    return rows


def main() -> None:
    """Save the models, start the servers, measure, report."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        servers = {}
        for name, model in {"teacher": teacher(), "optimized": optimized()}.items():
            path = save(model, Path(folder) / name)
            file = expected(model, Path(folder) / f"{name}.json")
            for kind in ("plain", "ecomopt"):
                servers[f"{kind}, {name}"] = stack.enter_context(started(kind, path)), file
        report("serve", pd.DataFrame(measure(servers)), SEEDS, NOTES)


if __name__ == "__main__":
    if len(sys.argv) == 1: main()
    elif sys.argv[1] == "plain": plain(sys.argv[2])
    else: serve(sys.argv[2], port=0)
