"""Saving and loading under stress: kills, other processes, bad disks, bad numbers, torn and generated manifests."""
import copy
import errno
import importlib
import json
import os
import pkgutil
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ecomopt
from ecomopt import EcomoptError, load, save
from ecomopt.compress.quantize import quantize
from ecomopt.compress.structured import prune_structured
from ecomopt.core import artifact, assets
from ecomopt.core.artifact import _check_target, disk_bytes
from ecomopt.core.train import Classifier, fingerprint

CASES = int(os.environ.get("ECOMOPT_CASES", 200))
MODELS = [tiny.classifier(seed, layers=1, hidden=16) for seed in range(3)]
MARKS = [fingerprint(model) for model in MODELS]


@pytest.fixture
def path(tmp_path): return save(MODELS[0], tmp_path / "model")


def names(folder): return sorted(file.name for file in folder.iterdir())


# an earlier artifact is replaced whole, or not at all

FOREIGN = {
    "a note": lambda path: (path / "notes.txt").write_text("x"),
    "a folder": lambda path: (path / "logs").mkdir(),
    "a hidden file": lambda path: (path / ".secret").write_text("x"),
    "a file like the artifact's": lambda path: (path / "vocab.txt").write_text("x"),
    "a link": lambda path: (path / "link.json").symlink_to("config.json"),
    "a damaged manifest": lambda path: (path / "artifact.json").write_text("{"),
    "no manifest": lambda path: (path / "artifact.json").unlink(),
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_a_directory_with_anything_else_in_it_is_left_as_it_is(path, change):
    change(path)
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    with pytest.raises(EcomoptError): save(MODELS[1], path)
    assert {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()} == before
    assert names(path.parent) == ["model"]


@pytest.mark.parametrize("change", list(FOREIGN.values())[:3], ids=list(FOREIGN)[:3])
def test_the_file_that_is_in_the_way_is_named(path, change):
    before = set(names(path))
    change(path)
    (name,) = set(names(path)) - before
    with pytest.raises(EcomoptError, match=re.escape(repr(name))): save(MODELS[1], path)


def test_a_path_that_is_a_file_is_left_as_it_is(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(EcomoptError, match="something else"): save(MODELS[0], tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


@pytest.mark.parametrize("exchange", [True, False])
def test_a_new_model_takes_the_place_of_the_old(path, monkeypatch, exchange):
    if not exchange: monkeypatch.setattr(artifact, "_exchange", lambda one, other: False)
    for model, mark in zip(MODELS, MARKS):
        assert save(model, path) == path and fingerprint(load(path)) == mark
        assert names(path.parent) == ["model"]


def test_a_link_to_an_artifact_stays_a_link(path):
    link = path.with_name("latest")
    link.symlink_to(path.name)
    assert save(MODELS[1], link) == link and link.is_symlink()
    assert fingerprint(load(path)) == fingerprint(load(link)) == MARKS[1]
    assert names(path.parent) == ["latest", "model"]


def test_a_model_that_was_moved_aside_is_found(path):
    """A process was killed between two renames, where folders cannot be exchanged."""
    path.rename(path.with_name(".model.0123abcd.old"))
    assert fingerprint(load(path)) == MARKS[0]
    save(MODELS[1], path)
    assert fingerprint(load(path)) == MARKS[1] and names(path.parent) == ["model"]


@pytest.mark.parametrize("name", ["config", "tokenizer", "weights", "manifest", "rename"])
def test_an_error_while_saving_leaves_the_old_model(path, monkeypatch, name):
    def fail(*args, **kwargs): raise OSError(errno.EIO, "Input/output error")

    targets = {
        "config": (type(MODELS[1].model.config), "save_pretrained"),
        "tokenizer": (type(MODELS[1].tokenizer), "save_pretrained"),
        "weights": (artifact, "save_file"),
        "manifest": (Path, "write_text"),
        "rename": (Path, "rename"),
    }
    monkeypatch.setattr(*targets[name], fail)
    with pytest.raises(EcomoptError, match="fault"): save(MODELS[1], path)
    monkeypatch.undo()
    assert fingerprint(load(path)) == MARKS[0] and names(path.parent) == ["model"]


# processes that are killed, and several at once

PROCESSES = """
import json, os, random, signal, sys, time
sys.path.insert(0, sys.argv[2])
import tiny
from pathlib import Path
from ecomopt import load, save
from ecomopt.core import artifact
from ecomopt.core.train import fingerprint
models = [tiny.classifier(seed, layers=1, hidden=16) for seed in range(3)]
marks = [fingerprint(model) for model in models]
exchange = artifact._exchange

def start(work):
    child = os.fork()
    if child: return child
    try: work()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

def kill(work, most):
    child = start(work)
    time.sleep(random.random() * most)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

def save_again(path, times, pause=0, first=0):
    for i in range(times):
        save(models[(first + i) % 3], path)
        time.sleep(pause)

def replaced(folder, kills, most):
    "How many kills while an artifact is replaced lose it, and what is left in its folder in the end."
    save(models[0], folder / "model")
    lost, end = 0, time.perf_counter() + 40  # fewer kills where the disk is slow
    for _ in range(kills):
        if time.perf_counter() > end: break
        kill(lambda: save_again(folder / "model", 1000), 3 * most)
        lost += fingerprint(load(folder / "model")) not in marks
    save(models[1], folder / "model")
    return lost, os.listdir(folder)

def new(folder, kills, most):
    "How many kills of a first save leave something else than nothing or a model, how many were in time, and of what."
    lost, finished, end = 0, 0, time.perf_counter() + 40
    for i in range(kills):
        path, is_last = folder / str(i), i == kills - 1 or time.perf_counter() > end
        if is_last: os.waitpid(start(lambda: save(models[0], path)), 0)  # one is not killed
        else: kill(lambda: save(models[0], path), 2 * most * min(i, 1))  # the first one at once
        if path.exists():
            finished += 1
            lost += fingerprint(load(path)) != marks[0]
        if is_last: return lost, finished, i + 1

def together(folder):
    "The exit codes of three processes that save to one path, what is in its folder, and whether it is a model."
    children = [start(lambda i=i: save_again(folder / "model", 10, first=i)) for i in range(3)]
    codes = [os.waitpid(child, 0)[1] for child in children]
    return codes, os.listdir(folder), fingerprint(load(folder / "model")) in marks

def read(folder):
    "How often a model was loaded while others were saved, and how often it was none of them."
    save(models[0], folder / "model")
    child, wrong, reads = start(lambda: save_again(folder / "model", 10_000, 0.03)), 0, 0
    while reads < 20:
        wrong += fingerprint(load(folder / "model")) not in marks
        reads += 1
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return wrong, reads

def folder(name):
    (Path(sys.argv[1]) / name).mkdir()
    return Path(sys.argv[1]) / name

random.seed(0)
begun = time.perf_counter()
save_again(folder("first") / "model", 5)
most, found = (time.perf_counter() - begun) / 5, {}
for how, kills in ("exchange", 60), ("renames", 10):
    artifact._exchange = exchange if how == "exchange" else lambda one, other: False
    found |= {f"replaced {how}": replaced(folder(f"replaced {how}"), kills, most)}
    found |= {f"together {how}": together(folder(f"together {how}"))}
    found |= {f"read {how}": read(folder(f"read {how}"))}
found["new"] = new(folder("new"), 60, most)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What came of processes that were killed, or worked at the same time; all are forked from one."""
    command = [sys.executable, "-c", PROCESSES, tmp_path_factory.mktemp("processes"), Path(tiny.__file__).parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exchange", "renames"])
def test_a_process_that_is_killed_leaves_the_old_model_or_the_new(processes, how):
    assert processes[f"replaced {how}"] == [0, ["model"]]


@pytest.mark.slow
def test_a_process_that_is_killed_in_its_first_save_leaves_nothing_or_the_model(processes):
    lost, finished, tried = processes["new"]
    assert lost == 0 and 0 < finished < tried  # some were killed before the end, some after it


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exchange", "renames"])
def test_of_three_processes_that_save_to_one_path_one_wins(processes, how):
    assert processes[f"together {how}"] == [[0, 0, 0], ["model"], True]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exchange", "renames"])
def test_a_process_that_loads_while_another_saves_gets_one_of_the_models(processes, how):
    wrong, reads = processes[f"read {how}"]
    assert wrong == 0 and reads > 5


def test_threads_can_save_to_one_path(tmp_path):
    errors = []

    def work(i):
        try: save(MODELS[i], tmp_path / "model")
        except Exception as error: errors.append(error)

    threads = [threading.Thread(target=work, args=(i % 3,)) for i in range(6)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert errors == [] and fingerprint(load(tmp_path / "model")) in MARKS and names(tmp_path) == ["model"]


# numbers that are none

def spoiled(model, name, value):
    model = copy.deepcopy(model)
    model.model.state_dict()[name].view(-1)[-1] = value
    return model


QUANTIZED = quantize(MODELS[0])
SPOILED = [
    (MODELS[0], "classifier.bias"),
    (MODELS[0], "bert.embeddings.word_embeddings.weight"),
    (QUANTIZED, "classifier.scale"),
    (QUANTIZED, "bert.embeddings.word_embeddings.scale"),
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("model, name", SPOILED, ids=[name for _, name in SPOILED])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path, monkeypatch, model, name, value):
    bad = spoiled(model, name, value)
    with pytest.raises(EcomoptError, match=f"'{name}' holds NaN or infinity"): save(bad, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "_check_tensors", lambda *args: None)
        save(bad, tmp_path / "model")
    with pytest.raises(EcomoptError, match=f"'{name}' holds NaN or infinity"): load(tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_read_as_they_were_written(tmp_path, dtype):
    model = Classifier(copy.deepcopy(MODELS[0].model).to(dtype), MODELS[0].tokenizer)
    again = load(save(model, tmp_path / "model"))
    saved, found = model.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(t, found[name]) and t.dtype == found[name].dtype for name, t in saved.items())
    assert all(t.data_ptr() % 64 == 0 for t in found.values())


# what cannot be saved is said before anything is written

def test_a_model_without_data(tmp_path):
    bare = Classifier(copy.deepcopy(MODELS[0].model).to("meta"), MODELS[0].tokenizer)
    with pytest.raises(EcomoptError, match="no data"): save(bare, tmp_path / "model")


class Own(torch.nn.Linear):
    def spec(self): return {"in_features": self.in_features, "out_features": self.out_features}


def with_length(length):
    model = copy.copy(MODELS[0])
    model.max_length = length
    return model


def with_own_layer():
    model = copy.deepcopy(MODELS[0])
    model.model.classifier = Own(16, 2)
    return model


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(recipe=[{1, 2}]), "not plain data"),
        (dict(measurements=[torch.ones(1)]), "not plain data"),
        (dict(recipe="quantized"), "recipe is 'quantized'"),
        (dict(model=with_length(0)), "max_length is 0"),
        (dict(model=with_length(12.5)), "max_length is 12.5"),
        (dict(model=with_own_layer()), "not one of ecomopt"),
        (dict(model=MODELS[0].model), "cannot be saved"),
        (dict(model="minilm"), "cannot be saved"),
        (dict(path=None), "not a path"),
    ],
    ids=str,
)
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path, change, text):
    with pytest.raises(EcomoptError, match=text): save(**dict(model=MODELS[0], path=tmp_path / "model") | change)
    assert not list(tmp_path.iterdir())


def test_every_module_that_can_be_rebuilt_is_listed():
    for module in pkgutil.walk_packages(ecomopt.__path__, "ecomopt."): importlib.import_module(module.name)

    def below(cls): return {cls}.union(*map(below, cls.__subclasses__()))

    listed = {f"{module}.{name}" for module, all_names in artifact._CLASSES.items() for name in all_names.split()}
    ours = {f"{cls.__module__}.{cls.__qualname__}" for cls in below(artifact.Rebuildable)}
    bases = {"Rebuildable", "PackedModule", "ConvertedModel", "RuntimeFiles"}
    public = {name for name in ours if name.startswith("ecomopt.") and not name.split(".")[-1].startswith("_")}
    assert {name for name in public if name.split(".")[-1] not in bases} == listed


# a target is looked at before a training

def test_a_good_target_is_left_as_it_is(path, tmp_path):
    assert _check_target(path) == path and _check_target(tmp_path / "new" / "model") == tmp_path / "new" / "model"
    assert names(tmp_path) == ["model"] and fingerprint(load(path)) == MARKS[0]


@pytest.mark.parametrize("name", ["file", "file/model", "mine", "n" * 300, "new/" + "n" * 300])
def test_a_bad_target_is_refused_by_the_check_and_by_save(tmp_path, name):
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("precious")
    for check in (_check_target, lambda target: save(MODELS[0], target)):
        with pytest.raises(EcomoptError): check(tmp_path / name)
    assert names(tmp_path) == ["file", "mine"] and (tmp_path / "mine" / "letter.txt").read_text() == "precious"


@pytest.mark.parametrize("number, text", [(errno.ENOSPC, "full"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only")])
def test_a_bad_disk_is_named_with_advice_for_the_users_path(tmp_path, monkeypatch, number, text):
    monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path / "cache"))

    def fail(*args, **kwargs): raise OSError(number, os.strerror(number))

    monkeypatch.setattr(artifact, "save_file", fail)
    with pytest.raises(EcomoptError, match=text) as error: save(MODELS[0], tmp_path / "model")
    assert "ECOMOPT_CACHE" not in error.value.do and "another path" in error.value.do
    assert error.value.where == str(tmp_path / "model") and not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_known_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    monkeypatch.setattr(artifact, "save_file", lambda *args, **kwargs: pytest.fail("writes"))
    with pytest.raises(EcomoptError, match="full"): save(MODELS[0], tmp_path / "model")


def test_the_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert save(MODELS[0], "~/model") == tmp_path / "model"
    assert fingerprint(load("~/model")) == MARKS[0] and disk_bytes("~/model") == disk_bytes(tmp_path / "model") > 0


# manifests that are torn, changed or made up

def edited(path, change):
    manifest = json.loads((path / "artifact.json").read_text())
    change(manifest)
    (path / "artifact.json").write_text(json.dumps(manifest))


BAD = {
    "format": [True, 1.0, "1", None, 2, -1, [1]],
    "kind": [None, [], {}, "classifier", "os.system", 1],
    "max_length": [0, -1, 1.5, "128", None, True, 10**30, [], float("nan")],
    "modules": [None, [], "x", {"classifier": None}, {"classifier": {}}, {"classifier": {"class": 1, "spec": {}}},
                {"classifier": {"class": "ecomopt.core.artifact.load", "spec": {}}},
                {"classifier": {"class": "ecomopt.core.artifact.Rebuildable", "spec": {}}},
                {"classifier": {"class": "ecomopt.compress.quantize.Int8Linear", "spec": []}},
                {"nowhere": {"class": "ecomopt.compress.quantize.Int8Linear", "spec": {}}}],
    "same": [None, [], {"a": 1}, {"a": "b"}, {"classifier.bias": "classifier.bias"},
             {"classifier.bias": "classifier.weight"}],
    "recipe": [None, "x", 1],
    "measurements": [None, "x", 1],
    "files": [None, [], {}, "x", {"config.json": "0" * 64}, {"model.safetensors": "0" * 64},
              {"config.json": 1, "model.safetensors": "0" * 64}, {"artifact.json": "0" * 64}],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values], ids=repr)
def test_a_wrong_part_of_a_manifest(path, name, value):
    edited(path, lambda manifest: manifest.update({name: value}))
    with pytest.raises(EcomoptError): load(path)


@pytest.mark.parametrize("name", ["format", "max_length", "modules", "files"])
def test_a_missing_part_of_a_manifest(path, name):
    edited(path, lambda manifest: manifest.pop(name))
    with pytest.raises(EcomoptError): load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"1", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"{}", b'{"format": 1}', b"NaN",
     b"1" * 5000, b'{"format": 1, "files": ' + b"[" * 5000 + b"]" * 5000 + b"}", b"\x00" * 100],
    ids=lambda content: repr(content[:12]),
)
def test_a_torn_manifest(path, content):
    (path / "artifact.json").write_bytes(content)
    with pytest.raises(EcomoptError): load(path)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    small = prune_structured(tiny.classifier(layers=2, hidden=16), neurons=[20, 24])
    return save(quantize(small), tmp_path_factory.mktemp("quantized") / "model")


SPECS = {
    "group": [0, -1, 0.5, "16", None, 10**12],
    "bits": [0, 1, -8, None, "8", True],
    "in_features": [0, -1, 17, 10**9, 1e300, None, [16]],
    "heads": [0, -4, 3, 10**9, None],
    "neurons": [0, 10**7, -1, "a" * 1000],
    "eps": [None, "x", [], {}],
    "activation": [None, 5, [1]],
    "device": ["meta", "cuda", None],
    "dtype": ["float64"],
    "training": [True],
    "_modules": [{}],
    "old": [1],
    "cls": [1],
    "self": [1],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in SPECS.items() for value in values], ids=repr)
def test_a_wrong_spec(quantized, tmp_path, name, value):
    path = Path(shutil.copytree(quantized, tmp_path / "model"))

    def change(manifest):
        for entry in manifest["modules"].values():
            if name in entry["spec"] or name in ("device", "dtype", "training", "_modules", "old", "cls", "self"):
                entry["spec"][name] = value

    edited(path, change)
    with pytest.raises(EcomoptError): load(path)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["ecomopt.compress.quantize.Int8Linear", "ecomopt.compress.structured.PrunedLinear", "0" * 64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value, way=()):
    """The ways to all parts of a manifest."""
    yield way
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children: yield from places(child, (*way, key))


def mutate(manifest, data):
    """Change, remove, swap or add one part."""
    way = data.draw(st.sampled_from(list(places(manifest))))
    if not way: return data.draw(PLAIN)
    *above, last = way
    owner = manifest
    for key in above: owner = owner[key]
    how = data.draw(st.sampled_from(["change", "remove", "copy", "rename", "near"]))
    if how == "remove": del owner[last]
    elif how == "copy": owner[last] = copy.deepcopy(manifest[data.draw(st.sampled_from(sorted(manifest)))])
    elif how == "rename" and isinstance(owner, dict): owner[data.draw(st.text(max_size=8))] = owner.pop(last)
    elif how == "near" and isinstance(owner[last], (int, float)): owner[last] += data.draw(st.integers(-2, 2))
    else: owner[last] = data.draw(PLAIN)
    return manifest


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=CASES, suppress_health_check=list(HealthCheck))
def test_a_manifest_of_any_kind_is_refused_or_gives_the_model(quantized, data):
    """Only what a reader could have meant is accepted: without changes of the model's own parts, it is the model."""
    file = quantized / "artifact.json"
    original = file.read_bytes()
    before = json.loads(original)
    mark = fingerprint(load(quantized)) if not hasattr(mutate, "mark") else mutate.mark
    mutate.mark = mark
    if data.draw(st.integers(0, 3)):
        manifest = copy.deepcopy(before)
        for _ in range(data.draw(st.integers(1, 3))):
            manifest = mutate(manifest, data)
            if not isinstance(manifest, dict): break
        content = json.dumps(manifest).encode()
    else:
        content = bytearray(original)
        start = data.draw(st.integers(0, len(content)))
        content[start:start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=5))
    file.write_bytes(content)
    try: model = load(quantized)
    except EcomoptError: return
    finally: file.write_bytes(original)
    now = json.loads(content)
    if all(now.get(name) == before[name] for name in ("modules", "max_length", "kind")):
        assert fingerprint(model) == mark
    tensors = model.model.state_dict()
    expected = load(quantized).model.state_dict()
    assert tensors.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in tensors.items())


def test_every_cut_of_a_manifest_is_refused(path):
    content = (path / "artifact.json").read_bytes()
    rng = random.Random(0)
    for end in sorted(rng.sample(range(len(content)), min(CASES, len(content) - 1))):
        (path / "artifact.json").write_bytes(content[:end])
        with pytest.raises(EcomoptError): load(path)


def test_an_artifact_of_version_0_1_0_can_be_replaced(tmp_path):
    old = shutil.copytree(Path(__file__).parent / "artifacts_0_1_0" / "int8", tmp_path / "model")
    assert assets._scratch_folders(Path(old), "part") == []
    save(MODELS[0], old)
    assert fingerprint(load(old)) == MARKS[0]
