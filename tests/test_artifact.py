"""Artifacts: what is saved is what is loaded, and nothing else is ever read."""
import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ecomopt
from ecomopt import EcomoptError, load, save
from ecomopt.compress.quantize import quantize
from ecomopt.core import artifact, hardware
from ecomopt.core.train import fingerprint

TEXTS = ["good", "the battery is awful", "not bad"]


@pytest.fixture
def path(tmp_path): return save(tiny.classifier(), tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [lambda c: c, quantize, lambda c: quantize(c, embedding_bits=4)],
    ids=["float", "int8", "int4"],
)
def test_a_fresh_process_gives_the_same_logits(tmp_path, change):
    model = change(tiny.classifier())
    path = save(model, tmp_path / "model", recipe=[{"step": "test"}], measurements=[{"accuracy": 0.5}])
    code = "import json, sys, ecomopt; print(json.dumps(ecomopt.load(sys.argv[1]).logits(sys.argv[2:]).tolist()))"
    done = subprocess.run([sys.executable, "-c", code, str(path), *TEXTS], capture_output=True, text=True, check=True)
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), model.logits(TEXTS), atol=1e-6)
    assert fingerprint(load(path)) == fingerprint(model)


def test_only_plain_data_is_written(path):
    assert {file.suffix for file in path.iterdir()} <= artifact._SUFFIXES


def test_texts_are_kept_beside_a_model(tmp_path):
    model, text = tiny.classifier(), "# Größe\n\n> 很好 😀\n"
    path = save(model, tmp_path / "model", files={"README.md": text, "notes.md": ""})
    assert (path / "README.md").read_text(encoding="utf8") == text and fingerprint(load(path)) == fingerprint(model)
    assert {"README.md", "notes.md"} <= json.loads((path / "artifact.json").read_text())["files"].keys()
    save(model, path)  # replaces all of it
    assert not (path / "README.md").exists()
    save(model, path, files={"README.md": text})
    (path / "README.md").write_text("altered")
    with pytest.raises(EcomoptError, match="'README.md' was altered"): load(path)
    (path / "README.md").unlink()
    with pytest.raises(EcomoptError, match="'README.md' is missing"): load(path)


@pytest.mark.parametrize("files", [
    {"../README.md": "a"}, {"docs/README.md": "a"}, {"README.txt": "a"}, {"config.json": "{}"}, {"artifact.json": "{}"},
    {".md": "a"}, {"run.py": "a"}, {"README.md": None}, {"README.md": b"a"}, {"README.md": "\ud800"}, {1: "a"},
    ["README.md"], "README.md", {"README.md\n": "a"},
], ids=str)
def test_files_that_cannot_be_kept(tmp_path, files):
    with pytest.raises(EcomoptError) as caught: save(tiny.classifier(), tmp_path / "model", files=files)
    assert "md" in caught.value.do and not list(tmp_path.iterdir())


def test_info_reads_no_weights(tmp_path):
    recipe, measurements = [{"seed": 0}, {"quantize": {}}], [{"accuracy": 0.5}]
    path = save(tiny.classifier(), tmp_path / "model", recipe, measurements, {"README.md": "a"})
    (path / "model.safetensors").write_bytes(b"not read")
    info = artifact.artifact_info(str(path))
    expected = dict(kind="Classifier", ecomopt=ecomopt.__version__, recipe=recipe, measurements=measurements)
    expected |= dict(max_length=128, bytes=sum(file.stat().st_size for file in path.iterdir()))
    assert info == expected


@pytest.mark.parametrize("change, message", [
    (lambda path: (path / "artifact.json").unlink(), "not an artifact"),
    (lambda path: (path / "artifact.json").write_text("{"), "damaged"),
    (lambda path: (path / "config.json").unlink(), "'config.json' is missing"),
    (lambda path: (path / "more.txt").write_text(""), "not one of the artifact's"),
])
def test_info_of_what_is_no_artifact(path, change, message):
    change(path)
    with pytest.raises(EcomoptError, match=message): artifact.artifact_info(path)


def test_an_earlier_artifact_is_replaced(path):
    other = tiny.classifier(seed=1)
    save(other, path)
    assert fingerprint(load(path)) == fingerprint(other)


def test_another_directory_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("precious")
    with pytest.raises(EcomoptError, match="something else"): save(tiny.classifier(), tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_missing_file(path, name):
    (path / name).unlink()
    with pytest.raises(EcomoptError, match=f"'{name}' is missing"): load(path)


@given(data=st.data())
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_altered_byte_is_detected(path, data):
    name = data.draw(st.sampled_from(["model.safetensors", "config.json", "tokenizer.json"]))
    original = (path / name).read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    altered = bytearray(original)
    altered[position] ^= data.draw(st.integers(1, 255))
    (path / name).write_bytes(altered)
    with pytest.raises(EcomoptError, match=f"'{name}' was altered"): load(path)
    (path / name).write_bytes(original)


@pytest.mark.parametrize(
    "name", ["model.bin", "model.pkl", "model.pt", "../config.json", "/etc/passwd", "sub/config.json"]
)
def test_files_that_are_not_plain_data_of_its_own(path, name):
    manifest = json.loads((path / "artifact.json").read_text())
    files = {**manifest["files"], name: "0"}
    (path / "artifact.json").write_text(json.dumps({**manifest, "files": files}))
    with pytest.raises(EcomoptError, match="not plain data"): load(path)


def test_modules_of_other_packages_are_not_imported(path, monkeypatch):
    manifest = json.loads((path / "artifact.json").read_text())
    manifest["modules"] = {"classifier": {"class": "os.system", "spec": {}}}
    (path / "artifact.json").write_text(json.dumps(manifest))
    with pytest.raises(EcomoptError, match="not one of ecomopt"): load(path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2}', '{"format": 1}'])
def test_a_damaged_manifest(path, content):
    (path / "artifact.json").write_text(content)
    with pytest.raises(EcomoptError): load(path)


def test_no_artifact(tmp_path):
    with pytest.raises(EcomoptError, match="not an artifact"): load(tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(artifact, "save_file", full)
    with pytest.raises(EcomoptError, match="disk is full"): save(tiny.classifier(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


# artifacts of version 0.1.0

OLD = Path(__file__).parent / "artifacts_0_1_0"
# Integer kernels round activations differently on other CPUs; bfloat16 and its products do, too.
TOLERANCE = {
    **dict(pruned=1e-5, shared=1e-5, qat=1e-5, torch=1e-5, onnxruntime=1e-5),
    **dict(int8=1e-3, static=1e-3, shared_int8=1e-3, openvino=1e-3),
    **dict(llm=0.1, llm_openvino=0.1),
}


def expected_logits(name):
    """Those recorded. With VNNI, OpenVINO rounds activations to int8 before a product; elsewhere it does not."""
    logits = {key: torch.tensor(value) for key, value in json.loads((OLD / "logits.json").read_text()).items()}
    with_int8 = any("vnni" in instruction for instruction in hardware._cpu()[1])
    return logits[name if with_int8 else f"{name} in floats"] if name == "llm_openvino" else logits[name]


def logits_of(model):
    """The logits that logits.json has: of three texts, or of the last of five tokens."""
    if hasattr(model, "logits"): return model.logits(TEXTS)
    with torch.no_grad(): return model.model(input_ids=torch.tensor([[4, 5, 6, 7, 8]])).logits[0, -1].float()


def test_every_old_artifact_has_a_tolerance():
    assert {path.name for path in OLD.iterdir() if path.is_dir()} == TOLERANCE.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", TOLERANCE)
def test_an_artifact_of_version_0_1_0_loads_and_is_saved_by_its_new_names(name, tmp_path):
    model = load(OLD / name)
    expected, logits = expected_logits(name), logits_of(model)
    assert torch.allclose(logits, expected, rtol=0, atol=TOLERANCE[name])
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))

    path = save(model, tmp_path / "new")
    modules = json.loads((path / "artifact.json").read_text())["modules"].values()
    assert artifact._RENAMED.keys().isdisjoint(entry["class"] for entry in modules)
    assert artifact._PRECISIONS.keys().isdisjoint(entry["spec"].get("precision") for entry in modules)
    assert torch.equal(logits_of(load(path)), logits)


def test_what_could_not_be_loaded_again_is_not_written(path, monkeypatch):
    monkeypatch.setattr(artifact, "_LARGEST", 5000)
    before = (path / "artifact.json").read_bytes()
    with pytest.raises(EcomoptError, match="exceed"): save(tiny.classifier(), path, measurements=[{"text": "x" * 6000}])
    assert (path / "artifact.json").read_bytes() == before
