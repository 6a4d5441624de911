"""Hostile artifacts: what was not verified is not read, no code of theirs is run, and a few bytes cost little."""
import hashlib
import json
import re
import shutil
import struct
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from ecomopt import EcomoptError, load, save
from ecomopt.compress.quantize import quantize
from ecomopt.compress.share import share_weights
from ecomopt.core import artifact
from ecomopt.core.train import fingerprint

MODEL = tiny.classifier(layers=1, hidden=16)
MARK = fingerprint(MODEL)


@pytest.fixture(scope="module")
def saved(tmp_path_factory): return save(MODEL, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def path(saved, tmp_path): return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path, name, change):
    """Change a JSON file of an artifact."""
    data = json.loads((path / name).read_text())
    change(data)
    (path / name).write_text(json.dumps(data))


def sign(path):
    """What an attacker can do: hashes that fit all files that are there."""
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}
    del files["artifact.json"]
    edit(path, "artifact.json", lambda manifest: manifest.update(files=files))


# exactly the files of the manifest are read

@pytest.mark.parametrize(
    "name",
    ["added_tokens.json", "special_tokens_map.json", "vocab.txt", "merges.txt", "chat_template.jinja",
     "generation_config.json", "modeling_evil.py", "pytorch_model.bin", "model.safetensors.index.json", "README.md",
     ".DS_Store", "tokenizer.model", "adapter_config.json"],
)
def test_a_file_that_the_manifest_does_not_name_is_refused(path, name):
    (path / name).write_text('{"good": 3}')
    with pytest.raises(EcomoptError, match="not one of the artifact's") as error: load(path)
    assert name in error.value.what and "Move" in error.value.do


@pytest.mark.parametrize("name", ["additional_chat_templates", "__pycache__", ".git"])
def test_a_folder_that_the_manifest_does_not_name_is_refused(path, name):
    (path / name).mkdir()
    with pytest.raises(EcomoptError, match="not one of the artifact's"): load(path)


def test_the_tokens_are_those_that_were_saved(path):
    (path / "added_tokens.json").write_text('{"awful": 999}')
    with pytest.raises(EcomoptError): load(path)
    (path / "added_tokens.json").unlink()
    assert load(path).encode(["awful"]) == MODEL.encode(["awful"])


@pytest.mark.parametrize("left", [[], ["config.json"], ["model.safetensors"], ["tokenizer.json", "config.json"]])
def test_weights_and_configuration_must_be_verified(path, left):
    weights = load_file(path / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, path / "model.safetensors")
    sign(path)
    edit(path, "artifact.json", lambda m: m.update(files={name: m["files"][name] for name in left}))
    with pytest.raises(EcomoptError): load(path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_not_in_the_manifest_any_more(path, name):
    edit(path, "artifact.json", lambda m: m["files"].pop(name))
    with pytest.raises(EcomoptError): load(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_changed_while_it_is_loaded(path, monkeypatch, name):
    read = artifact._read_weights

    def change(*args):
        (path / name).write_text((path / name).read_text() + " ")
        return read(*args)

    monkeypatch.setattr(artifact, "_read_weights", change)
    with pytest.raises(EcomoptError, match=f"'{name}' was altered"): load(path)


def test_a_file_that_is_added_while_it_is_loaded(path, monkeypatch):
    read = artifact._read_weights

    def add(*args):
        (path / "added_tokens.json").write_text('{"awful": 999}')
        return read(*args)

    monkeypatch.setattr(artifact, "_read_weights", add)
    with pytest.raises(EcomoptError, match="added_tokens.json"): load(path)


def test_weights_that_are_changed_after_they_were_read_do_no_harm(path, monkeypatch):
    build = artifact._build

    def change(*args):
        content = bytearray((path / "model.safetensors").read_bytes())
        content[-100:] = bytes(100)
        (path / "model.safetensors").write_bytes(content)
        return build(*args)

    monkeypatch.setattr(artifact, "_build", change)
    assert fingerprint(load(path)) == MARK


def test_files_may_be_links_as_in_the_cache_of_a_hub(path):
    for name in ("config.json", "model.safetensors"):
        (path / name).rename(path.parent / name)
        (path / name).symlink_to(path.parent / name)
    assert fingerprint(load(path)) == MARK


@pytest.mark.parametrize("name", ["artifact.json", "config.json", "model.safetensors"])
def test_a_pipe_or_a_device_is_not_read(path, name):
    import os
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(EcomoptError): load(path)
    (path / name).unlink()
    (path / name).symlink_to("/dev/zero")
    with pytest.raises(EcomoptError): load(path)


# no code of an artifact is run, and no question is asked

EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').write_text('')\n"
AUTO = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModelForSequenceClassification": "evil.Evil",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
}


@pytest.mark.parametrize(
    "name, change",
    [
        ("config.json", dict(model_type="evil", auto_map=AUTO)),
        ("config.json", dict(model_type="evil", auto_map={k: f"someone/evil--{v}" for k, v in AUTO.items()})),
        ("config.json", dict(model_type=None, auto_map=AUTO)),
        ("config.json", dict(model_type=["bert"])),
        ("config.json", dict(model_type="Bert")),
        ("tokenizer_config.json", dict(tokenizer_class="EvilTokenizer", auto_map=AUTO)),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_file", [True, False])
def test_code_of_an_artifact_is_refused_at_once(path, monkeypatch, name, change, with_file):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asks"))
    edit(path, name, lambda data: data.update(change))
    if name == "tokenizer_config.json": edit(path, "config.json", lambda data: data.update(model_type="gpt2"))
    sign(path)
    if with_file: (path / "evil.py").write_text(EVIL)
    with pytest.raises(EcomoptError): load(path)
    assert not (path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_known_model_that_offers_code_is_loaded_without_it(path, monkeypatch, name):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asks"))
    edit(path, name, lambda data: data.update(auto_map=AUTO))
    sign(path)
    assert torch.equal(load(path).logits(["good"]), MODEL.logits(["good"]))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_of_the_hub_are_not_asked_for(path, key):
    edit(path, "config.json", lambda data: data.update({key: "someone/evil-kernel"}))
    sign(path)
    again = load(path)
    assert "evil" not in str(again.model.config._attn_implementation)
    assert torch.equal(again.logits(["good"]), MODEL.logits(["good"]))


def test_kernels_of_the_hub_are_not_asked_for_by_a_part_of_a_configuration():
    parts = dict(text_config=dict(attn_implementation="someone/evil-kernel"), auto_map=AUTO)
    config = artifact._config(json.dumps(dict(model_type="gemma3", **parts)).encode(), {"a": torch.ones(300_000)})
    assert config.text_config._attn_implementation is None and not hasattr(config, "auto_map")


@pytest.mark.parametrize(
    "name",
    ["os.system", "ecomopt.core.artifact.load", "ecomopt.core.assets.fetch", "ecomopt.compress.quantize._replace",
     "ecomopt.compress.quantize.nn.Linear", "ecomopt.compress.quantize.copy", "ecomopt.evil.Int8Linear",
     "ecomopt.compress.quantize.PackedModule", "ecomopt..compress.quantize.Int8Linear", "Int8Linear", "", "."],
)
def test_only_listed_classes_are_rebuilt(path, name):
    edit(path, "artifact.json", lambda m: m.update(modules={"classifier": {"class": name, "spec": {}}}))
    with pytest.raises(EcomoptError, match="not one of ecomopt"): load(path)


# a few bytes cost little time and memory

def limited(path, seconds=5, megabytes=300):
    """Loading is refused, soon and with little memory."""
    def peak(): return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak of this process begins again
    before, start = peak(), time.process_time()
    with pytest.raises(EcomoptError): load(path)
    assert time.process_time() - start < seconds
    assert peak() - before < 1000 * megabytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        dict(num_hidden_layers=20_000),
        dict(num_hidden_layers=900),
        dict(num_hidden_layers=10**12),
        dict(num_hidden_layers=-1),
        dict(hidden_size=10**6),
        dict(hidden_size=10**9),
        dict(intermediate_size=10**8),
        dict(vocab_size=10**9),
        dict(vocab_size=2**63),
        dict(max_position_embeddings=10**8),
        dict(type_vocab_size=2**24),
        dict(num_labels=10**9),
        dict(num_attention_heads=0),
        dict(model_type="gpt2", n_positions=2**17),
        dict(model_type="gpt2", n_layer=10**6),
        dict(model_type="gpt_neo", max_position_embeddings=2**17),
        dict(model_type="llama", num_hidden_layers=10**5),
        dict(model_type="distilbert", n_layers=10**5),
        dict(layer_types=["a"] * 10, num_hidden_layers=10**8),
        dict(extra={"deep": {"num_hidden_layers": 10**9}}),
    ],
    ids=str,
)
def test_a_configuration_of_a_giant(path, change):
    edit(path, "config.json", lambda data: data.update(change))
    sign(path)
    limited(path)


NOT_JSON = {"deep": b"[" * 10**6, "deep tables": b'{"a":' * 10**5, "a list": b"[]", "null": b"null", "no text": b"\xff",
            "nothing": b""}


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_of_nonsense(path, name, content):
    (path / name).write_bytes(content)
    sign(path)
    limited(path)


@pytest.fixture(scope="module")
def int8(tmp_path_factory): return save(quantize(MODEL), tmp_path_factory.mktemp("int8") / "model")


@pytest.fixture(scope="module")
def shared(tmp_path_factory): return save(share_weights(MODEL), tmp_path_factory.mktemp("shared") / "model")


def giant(cls, **spec): return {"class": f"ecomopt.compress.{cls}", "spec": spec}


LINEAR = "quantize.Int8Linear"
GIANTS = {
    "linear": {"classifier": giant(LINEAR, in_features=10**6, out_features=2000)},
    "long linear": {"classifier": giant(LINEAR, in_features=16, out_features=10**10)},
    "packed linear": {"classifier": giant(LINEAR, in_features=10**5, out_features=10**5, bits=2)},
    "embedding": {
        "bert.embeddings.word_embeddings": giant("quantize.QuantizedEmbedding", num_embeddings=10**9, embedding_dim=64)
    },
    "layer": {
        "bert.encoder.layer.0": giant(
            "quantize.Int8Layer", width=10**5, heads=10**3, size=10**3, neurons=10**5, eps=1e-12
        )
    },
    "llama": {
        "bert.encoder.layer.0": giant(
            "quantize_llm.WeightOnlyLayer",
            width=10**5,
            heads=10**4,
            kv_heads=10**4,
            size=10**3,
            neurons=10**6,
            eps=1e-12,
            number=0,
        )
    },
    "signs": {
        "bert.encoder.layer.0": giant(
            "quantize_llm.WeightOnlyLayer", width=0, heads=0, kv_heads=0, size=10**10, neurons=0, eps=1e-12, number=0
        )
    },
    "pruned": {"classifier": giant("structured.PrunedLinear", in_features=10**6, out_features=10**6, bias=True)},
    "fake": {"classifier": giant("qat.FakeQuantLinear", in_features=16, out_features=10**9, bias=False, bits=4)},
    "shared": {
        "classifier": giant(
            "share.SharedInt8Linear",
            in_features=10**6,
            out_features=10**5,
            activation="none",
            bits=8,
            entries=16,
            group=10**11,
            size=16,
        )
    },
    "files": {
        "": {
            "class": "ecomopt.accelerate.runtime.GraphRuntime",
            "spec": dict(sizes={"bin": 10**11}, runtime="openvino", precision="int8", macs=[1, 1, 1], weights=1),
        }
    },
}


@pytest.mark.parametrize("modules", GIANTS.values(), ids=GIANTS)
def test_a_spec_of_a_giant(path, modules):
    edit(path, "artifact.json", lambda m: m.update(modules=modules))
    limited(path)


@pytest.mark.parametrize(
    "name, value", [("in_features", 10**7), ("out_features", 10**7), ("group", 1), ("entries", 2**20), ("size", 10**10)]
)
def test_a_shared_layer_of_a_giant(shared, tmp_path, name, value):
    path = Path(shutil.copytree(shared, tmp_path / "model"))

    def change(manifest):
        for entry in manifest["modules"].values():
            if name in entry["spec"]: entry["spec"][name] = value

    edit(path, "artifact.json", change)
    limited(path)


def test_many_tiny_modules(path):
    one = giant(LINEAR, in_features=16, out_features=2)
    names = {f"bert.encoder.layer.{i}": one for i in range(100_000)}
    edit(path, "artifact.json", lambda m: m.update(modules=names))
    limited(path)


def test_long_texts(path):
    edit(path, "artifact.json", lambda m: m.update(modules={"x" * 10**7: giant(LINEAR)}, kind="y" * 10**7))
    limited(path)
    with pytest.raises(EcomoptError) as error: load(path)
    assert len(str(error.value)) < 1000


# weights of nonsense

def weights(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape=(2,), start=0, stop=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


NONSENSE = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "a long header": weights({}, length=2**63),
    "a header longer than the file": weights({}, length=100),
    "no JSON": weights(b"{{{{"),
    "deep JSON": weights(b"[" * 10**6),
    "a list": weights([]),
    "no tensors": weights({}),
    "a tensor without data": weights({"a": tensor()}),
    "data without a tensor": weights({}, bytes(8)),
    "a giant": weights({"a": tensor((10**6, 10**6), 0, 4 * 10**12)}),
    "a giant shape": weights({"a": tensor((10**9, 10**9))}, bytes(8)),
    "a negative size": weights({"a": tensor((-1, -2))}, bytes(8)),
    "a negative place": weights({"a": tensor((2,), -8, 0)}, bytes(8)),
    "overlapping": weights({"a": tensor(), "b": tensor()}, bytes(8)),
    "a hole": weights({"a": tensor(), "b": tensor((2,), 16, 24)}, bytes(24)),
    "an unknown type": weights({"a": tensor(dtype="F3")}, bytes(8)),
    "no type": weights({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "a size of text": weights({"a": tensor(("2",))}, bytes(8)),
    "fractions": weights({"a": tensor((2.0,), 0.0, 8.0)}, bytes(8)),
    "a table for an offset": weights({"a": {"dtype": "F32", "shape": [2], "data_offsets": {"0": 8}}}, bytes(8)),
}


@pytest.mark.parametrize("content", NONSENSE.values(), ids=NONSENSE)
def test_weights_of_nonsense(path, content):
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(EcomoptError, match="'model.safetensors' was altered"): load(path)
    sign(path)
    limited(path)


@pytest.mark.parametrize("name", ["classifier.bias", "bert.embeddings.word_embeddings.weight"])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[:-1],
        lambda t: t.unsqueeze(0),
        lambda t: t.int(),
        lambda t: t.flatten()[:0],
        lambda t: t.flatten()[:1],
        None,
    ],
    ids=["shorter", "more dimensions", "integers", "empty", "one number", "missing"],
)
def test_tensors_that_do_not_fit(path, name, change):
    tensors = load_file(path / "model.safetensors")
    old = tensors.pop(name)
    if change: tensors[name] = change(old).contiguous()
    save_file(tensors, path / "model.safetensors")
    sign(path)
    with pytest.raises(EcomoptError, match="does not fit together"): load(path)


def test_tensors_that_the_model_does_not_have(path):
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"more": torch.ones(3)}, path / "model.safetensors")
    sign(path)
    with pytest.raises(EcomoptError, match="'more'"): load(path)


def test_good_artifacts_are_far_from_the_limits(monkeypatch, path, int8, shared):
    """The least that is left of the limits, over models of all kinds."""
    left = []

    class Watched(artifact._Limited):
        def __exit__(self, *args):
            left.append((self.operations, self.bytes))
            return super().__exit__(*args)

    monkeypatch.setattr(artifact, "_Limited", Watched)
    for good in (path, int8, shared): load(good)
    assert all(operations > 10_000 and size > 2**29 for operations, size in left)
