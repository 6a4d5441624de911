"""Runtimes: the same predictions, also after save and load; clear errors; timeouts."""
import copy
import functools
import subprocess
import sys
import time

import numpy as np
import onnxruntime
import openvino
import pandas as pd
import pytest
import tiny
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from ecomopt import EcomoptError
from ecomopt.accelerate import runtime
from ecomopt.accelerate.runtime import GraphRuntime, best_runtime, convert
from ecomopt.compress.quantize import quantize
from ecomopt.core.artifact import load, save
from ecomopt.core.measure import count_macs, count_parameters
from ecomopt.core.train import Classifier, fingerprint, supports_bfloat16

pytestmark = pytest.mark.xdist_group("runtime")  # its fixtures are costly

TEXTS = ["the battery is great", "bad", "a phone works very good not bad", "screen broke", "love it"]
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "int8": 2e-2, "int8_weight_only": 2e-2}
SAVED = [
    ("sdpa", "int8"), ("openvino", "int8_weight_only"),
    *[(name, precision) for name in ("openvino", "onnxruntime") for precision in ("float32", "int8")],
]
SAVED += [("eager", "bfloat16"), ("openvino", "bfloat16")] if supports_bfloat16() else []


@pytest.fixture(scope="module")
def small(): return tiny.classifier(layers=1)


@pytest.fixture(scope="module")
def made(small):
    """Converted models; each takes seconds, so it is made once."""
    return functools.cache(lambda name, precision: convert(small, name, precision, TEXTS))


@pytest.mark.slow
@pytest.mark.parametrize("name, precision", SAVED)
def test_predictions_stay_the_same_after_save_and_load(small, made, name, precision, tmp_path):
    before, wanted = fingerprint(small), small.logits(TEXTS)
    converted = made(name, precision)
    logits = converted.logits(TEXTS)
    assert (logits - wanted).abs().max() < TOLERANCE[precision] and fingerprint(small) == before
    again = load(save(converted, tmp_path / "model"))
    assert torch.equal(again.logits(TEXTS), logits)
    assert torch.equal(again.logits(TEXTS[:1]), converted.logits(TEXTS[:1]))
    assert count_macs(again.model) == count_macs(small.model) and again.predict(TEXTS) == converted.predict(TEXTS)
    assert fingerprint(again) == fingerprint(converted) != before
    copied = copy.deepcopy(converted)
    assert torch.equal(copied.logits(TEXTS), logits)


@pytest.mark.slow
@pytest.mark.parametrize("texts", [TEXTS, None])
def test_int8_in_onnx_runtime_has_the_scales_of_the_calibration_texts(small, texts):
    import onnx
    converted = convert(small, "onnxruntime", "int8", texts)
    graph = onnx.load_model_from_string(converted.model.files()["onnx"].tobytes()).graph
    kinds = [node.op_type for node in graph.node]
    assert ("DynamicQuantizeLinear" in kinds) == (texts is None)
    if texts is None: return
    together = converted.logits([*TEXTS, "bad " * 60], batch_size=9)[:5]
    assert torch.equal(converted.logits(TEXTS, batch_size=1), together)


@pytest.mark.slow
def test_a_fresh_process_loads_it(made, tmp_path):
    converted = made("openvino", "float32")
    path = save(converted, tmp_path / "model")
    code = "import sys; from ecomopt import load; print(*load(sys.argv[1]).logits(sys.argv[2:]).flatten().tolist())"
    command = [sys.executable, "-c", code, path, *TEXTS]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert np.allclose(np.array(printed, float), converted.logits(TEXTS).flatten().numpy(), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("bits", [4, 2])
def test_quantized_embeddings_are_converted(name, bits):
    small = quantize(tiny.classifier(layers=1), embedding_bits=bits, linear=False)
    assert torch.allclose(convert(small, name, "float32").logits(TEXTS), small.logits(TEXTS), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_openvino_unpacks_the_words_when_it_opens_a_graph(bits):
    small = quantize(tiny.classifier(layers=1), embedding_bits=bits, linear=False)
    files, words = convert(small, "openvino", "float32").model.files(), small.model.get_input_embeddings()
    graph = openvino.Core().read_model(files["xml"].tobytes(), openvino.Tensor(files["bin"]))
    tables = [op.input_value(0) for op in graph.get_ops() if op.get_type_name() == "Gather"]
    shape, floats = [words.num_embeddings, words.embedding_dim], openvino.Type.f32
    tables = [one for one in tables if one.partial_shape.is_static and one.element_type == floats]
    [table] = [one for one in tables if list(one.shape) == shape]
    assert table.get_node().get_type_name() != "Constant", "the file would hold floats"
    part = openvino.Model([table], graph.get_parameters(), "table")
    found = openvino.compile_model(part, "CPU")([np.ones((1, 1), int)] * len(part.inputs))[0]
    assert np.allclose(found, words(torch.arange(shape[0])), atol=1e-6)


@pytest.mark.slow
def test_distilbert_is_converted():
    small = tiny.distilbert()
    assert torch.allclose(convert(small, "openvino", "float32").logits(TEXTS), small.logits(TEXTS), atol=1e-5)


@pytest.mark.slow
def test_counts_are_those_of_the_model(small, made):
    model = made("onnxruntime", "float32").model
    assert count_parameters(model) == count_parameters(small.model)
    for tokens in (1, 5, 32): assert count_macs(model, tokens) == count_macs(small.model, tokens)


@pytest.mark.slow
def test_threads_of_onnxruntime_sleep_after_a_call(made, monkeypatch, tmp_path):
    create, given = onnxruntime.InferenceSession, []
    def noted(model, options, **more):
        given.append(options.get_session_config_entry("session.force_spinning_stop"))
        return create(model, options, **more)
    monkeypatch.setattr(onnxruntime, "InferenceSession", noted)
    load(save(made("onnxruntime", "float32"), tmp_path / "model")).logits(TEXTS)
    assert set(given) == {"1"}


@pytest.mark.slow
def test_another_number_of_threads_creates_another_session(made):
    converted, before = made("openvino", "float32"), torch.get_num_threads()
    first = converted.logits(TEXTS)
    try:
        torch.set_num_threads(before + 1)
        assert torch.allclose(converted.logits(TEXTS), first, atol=1e-5)
        assert converted.model._session[0] == before + 1
    finally: torch.set_num_threads(before)


def test_weight_only_int8_is_openvinos(small):
    for name in ("onnxruntime", "sdpa"):
        with pytest.raises(EcomoptError, match="no precision 'int8_w"): convert(small, name, "int8_weight_only")


@pytest.mark.slow
def test_weights_alone_need_no_calibration_and_a_quarter_of_the_bytes(small, made):
    whole, rounded = (sum(one.model.sizes.values()) for one in (
        made("openvino", "float32"), convert(small, "openvino", "int8_weight_only")))
    assert rounded < 0.6 * whole  # so small a graph is mostly operators


@pytest.mark.slow
def test_a_mask_is_optional(small, made):
    converted, ids = made("openvino", "float32"), torch.tensor([[2, 5, 6, 3]])
    assert torch.allclose(converted.model(ids).logits, small.model(ids).logits, atol=1e-5)


def test_bfloat16_is_not_emulated(small, monkeypatch):
    monkeypatch.setattr(runtime, "supports_precision", lambda precision, device: False)
    for name in runtime.RUNTIMES:
        with pytest.raises(EcomoptError, match="does not compute in bfloat16"): convert(small, name, "bfloat16")


@pytest.mark.slow
def test_compiled_by_torch(small, tmp_path):
    converted = convert(small, "compile", "float32")
    assert torch.allclose(converted.logits(TEXTS), small.logits(TEXTS), atol=1e-5)
    assert load(save(converted, tmp_path / "model")).model.runtime == "compile"


@pytest.mark.slow
def test_no_telemetry_is_sent(small, monkeypatch):
    """OpenVINO's tools would report how they are used."""
    ga4 = pytest.importorskip("openvino_telemetry.backend.backend_ga4")
    sent = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(ga4.GA4Backend, "send", lambda self, message: sent.append(message))
    convert(small, "openvino", "int8", TEXTS)
    assert sent == []


WRONG = [dict(runtime="abacus"), dict(precision="fp64"), dict(runtime="openvino", precision="int8")]


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input(small, wrong):
    with pytest.raises(EcomoptError): convert(small, **wrong)


def test_a_converted_or_quantized_model_is_refused(small, made):
    for done in (made("eager", "float32"), quantize(small)):
        with pytest.raises(EcomoptError): convert(done, "sdpa", "float32")
    with pytest.raises(EcomoptError): convert(small.model, "sdpa", "float32")
    with pytest.raises(EcomoptError): quantize(made("openvino", "float32"))


@pytest.mark.parametrize("missing", ["openvino", "nncf"])
def test_a_runtime_that_is_not_installed(small, made, monkeypatch, missing, tmp_path):
    path, real = save(made("openvino", "float32"), tmp_path / "model"), runtime.version
    def version(package):
        if package == missing: raise runtime.PackageNotFoundError(package)
        return real(package)
    monkeypatch.setattr(runtime, "version", version)
    with pytest.raises(EcomoptError, match=f"no {missing}"): convert(small, "openvino", "float32")
    if missing == "nncf": assert load(path).predict(TEXTS)  # it was needed to convert
    else:
        with pytest.raises(EcomoptError, match="not installed"): load(path)
    few = dict(runtimes=["sdpa", "openvino"], precisions=["float32"], rounds=1)
    choice = best_runtime(small, tiny.task(), min_agreement=0.9, **few)
    assert "not installed" in choice.table.loc["openvino float32", "note"] and choice.runtime in ("eager", "sdpa")


class Odd(nn.Module):
    """Its control flow depends on the data, which no graph can represent."""

    def forward(self, x):
        return x.flip(-1) if x.sum().item() > 0 else x


@pytest.mark.slow
def test_an_operator_that_a_runtime_lacks(small):
    odd = copy.deepcopy(small)
    odd.model.classifier = nn.Sequential(odd.model.classifier, Odd())
    for name in ("openvino", "onnxruntime"):
        with pytest.raises(EcomoptError, match=f"{name} cannot run"): convert(odd, name, "float32")
    assert convert(odd, "eager", "float32").predict(TEXTS) == odd.predict(TEXTS)


def test_timeout(small, monkeypatch):
    monkeypatch.setattr(runtime, "_make", lambda *arguments: time.sleep(30))
    start = time.perf_counter()
    with pytest.raises(EcomoptError, match="longer than 0.2 s"): convert(small, "eager", "float32", timeout=0.2)
    assert time.perf_counter() - start < 10
    print("visible")  # output is no longer suppressed


@pytest.mark.slow
def test_altered_files_are_refused(made, tmp_path):
    path = save(made("onnxruntime", "float32"), tmp_path / "model")
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(EcomoptError, match="altered"): load(path)


@pytest.mark.slow
def test_a_far_too_slow_variant_is_not_measured(small, monkeypatch):
    real = runtime._make
    def make(classifier, name, *others):
        made = real(classifier, name, *others)
        if name == "sdpa": made.model.register_forward_pre_hook(lambda *_: time.sleep(0.3))
        return made
    monkeypatch.setattr(runtime, "_make", make)
    choice = best_runtime(small, tiny.task(), runtimes=["sdpa"], precisions=["float32"], rounds=1)
    assert choice.runtime == "eager" and "not measured further" in choice.table.loc["sdpa float32", "note"]


@pytest.mark.slow
def test_the_choice_has_a_reason(small):
    few = dict(runtimes=["sdpa", "onnxruntime"], precisions=["float32", "bfloat16"], rounds=1)
    choice = best_runtime(small, tiny.task(), min_agreement=0.5, **few)
    assert choice.table.index[0] == "eager float32" and f"{choice.runtime} {choice.precision}" in choice.why
    kept = choice.table[choice.table["note"] == ""]
    assert choice.table.loc["onnxruntime bfloat16", "note"]
    assert {"eager float32", "sdpa float32", "onnxruntime float32"} <= set(kept.index)
    assert kept["× sentences/s"].astype(float).idxmax() == f"{choice.runtime} {choice.precision}"
    assert not isinstance(small.model, GraphRuntime)


@pytest.mark.parametrize("wrong", [dict(by="beauty"), dict(min_agreement=1.5), dict(runtimes=["abacus"])])
def test_best_runtime_refuses(small, wrong):
    if "runtimes" in wrong:
        choice = best_runtime(small, tiny.task(), precisions=["float32"], rounds=1, **wrong)
        assert "abacus" in choice.table.iloc[1]["note"]
    else:
        with pytest.raises(EcomoptError): best_runtime(small, tiny.task(), **wrong)


def test_only_what_is_slow_in_batches_and_alone_is_dropped(monkeypatch):
    rates = {runtime._BASELINE: 100.0, "slow": 40.0, "fast alone": 40.0}
    ms = {runtime._BASELINE: 10.0, "slow": 30.0, "fast alone": 5.0}
    timed = pd.concat({"sentences/s": pd.DataFrame([rates]), "p50 ms": pd.DataFrame([ms])}, axis=1)
    monkeypatch.setattr(runtime, "time_interleaved", lambda *arguments: (timed, None))
    models, failed = dict.fromkeys(rates), {}
    runtime._drop_slow(models, failed, ["good"])
    assert [*models] == [runtime._BASELINE, "fast alone"] and [*failed] == ["slow"]


def test_frequencies_of_positions_are_not_rounded():
    words, sizes = tiny.tokenizer(), dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(words), intermediate_size=96, pad_token_id=0, **sizes)
    llama = Classifier(LlamaForSequenceClassification(config).eval(), words)
    rounded = runtime._in_torch(llama, "bfloat16")
    exact, found = (model.model.rotary_emb.inv_freq for model in (llama.model, rounded))
    assert torch.equal(exact, found) and found.dtype == torch.float32
    assert rounded.score.weight.dtype == torch.bfloat16 and llama.model.score.weight.dtype == torch.float32
