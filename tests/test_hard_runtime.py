"""Runtimes and language models: only what is understood is converted; answers depend on their own prompt; bad input."""
import copy
import functools
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FNetConfig,
    FNetForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from ecomopt import (
    Classifier,
    EcomoptError,
    LanguageModel,
    best_runtime,
    convert,
    convert_language_model,
    load,
    load_language_model,
    quantize_language_model,
    save,
)
from ecomopt.accelerate import runtime, runtime_llm
from ecomopt.accelerate.runtime_llm import prompt_lookup_decoding
from ecomopt.core.generate import generation_speed, greedy_decoding, losses, paired_perplexity, perplexity

pytestmark = pytest.mark.xdist_group("hard_runtime")  # its fixtures are costly

TEXTS = ["bad", "the battery is great", "a phone works very good not bad", "screen broke", " ".join(tiny.WORDS)]
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, initializer_range=0.2)
ENCODERS = {
    "RoBERTa": (RobertaForSequenceClassification, RobertaConfig, SIZES | dict(max_position_embeddings=40)),
    "FNet": (FNetForSequenceClassification, FNetConfig, SIZES),
}


@functools.cache
def encoder(name: str) -> Classifier:
    cls, config, sizes = ENCODERS[name]
    torch.manual_seed(0)
    words, labels = tiny.tokenizer(), {0: "negative", 1: "positive"}
    config = config(
        vocab_size=len(words), id2label=labels, label2id={v: k for k, v in labels.items()}, pad_token_id=0, **sizes
    )
    return Classifier(cls(config).eval(), words, max_length=32)


@functools.cache
def small(): return tiny.classifier(layers=1)


@functools.cache
def converted(name: str, architecture: str | None = None):
    return convert(encoder(architecture) if architecture else small(), name, "float32")


# ---------------------------------------------------------------- what is converted

@pytest.mark.slow
@pytest.mark.parametrize("name, architecture", [("openvino", "RoBERTa"), ("onnxruntime", "RoBERTa"),
                                                ("onnxruntime", "FNet")])  # others: test_architectures
def test_an_architecture_is_converted_right_or_refused(name, architecture):
    model = encoder(architecture)
    try: other = converted(name, architecture)
    except EcomoptError as error:
        assert f"{name} cannot run the model in float32" in error.what
        assert architecture == "FNet", error
        return
    for batch_size in (1, 2, 3, 5):
        assert torch.allclose(other.logits(TEXTS, batch_size), model.logits(TEXTS, batch_size), atol=1e-3)


def other_row(logits, inputs): return logits[::-1].copy()
def all_nan(logits, inputs): return np.full_like(logits, np.nan)
def one_infinite(logits, inputs): return np.where(np.arange(len(logits))[:, None] == 0, np.inf, logits)
def padding_counts(logits, inputs): return logits + (inputs["attention_mask"] == 0).sum(1, keepdims=True)
def long_is_wrong(logits, inputs): return logits + (inputs["input_ids"].shape[1] > 20)
def single_is_wrong(logits, inputs): return logits + (len(logits) == 1)
def odd_batch_is_wrong(logits, inputs): return logits + (len(logits) == 3)


FAULTS = [other_row, all_nan, one_infinite, padding_counts, long_is_wrong, single_is_wrong, odd_batch_is_wrong]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_what_answers_otherwise_is_refused(fault, monkeypatch):
    """A runtime with a fault, at some length or number of texts alone."""
    files = converted("onnxruntime").model
    monkeypatch.setattr(runtime.GraphRuntime, "from_model", lambda *arguments: copy.deepcopy(files))
    write, real = runtime._GRAPHS["onnxruntime"]
    def open_files(*arguments):
        session = real(*arguments)
        return lambda inputs: fault(session(inputs), inputs)
    assert convert(small(), "onnxruntime", "float32").predict(TEXTS) == small().predict(TEXTS)
    monkeypatch.setitem(runtime._GRAPHS, "onnxruntime", (write, open_files))
    with pytest.raises(EcomoptError, match="cannot run the model"): convert(small(), "onnxruntime", "float32")


class WithLength(nn.Module):
    """A head whose trace would contain the length of the example."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x): return self.head(x) * np.log(float(x.shape[0]))


@pytest.mark.slow
def test_a_trace_that_contains_its_example_is_refused():
    odd = copy.deepcopy(small())
    odd.model.classifier = WithLength(odd.model.classifier)
    for name in ("openvino", "onnxruntime"):
        with pytest.raises(EcomoptError, match="cannot run"): convert(odd, name, "float32")
    with pytest.raises(EcomoptError, match="cannot run"): convert(odd, "onnxruntime", "int8")


@pytest.mark.parametrize("runtime_name, precision", [
    ("eager", "float32"), ("sdpa", "int8"), ("onnxruntime", "float32"), ("openvino", "int8"),
])
def test_a_model_without_finite_logits_is_not_converted(runtime_name, precision):
    broken = copy.deepcopy(small())
    broken.model.classifier.weight.data[0, 0] = float("nan")
    with pytest.raises(EcomoptError): convert(broken, runtime_name, precision, TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_converted_model_without_finite_logits_does_not_predict(value, monkeypatch):
    model = converted("onnxruntime")
    monkeypatch.setattr(type(model.model), "session", lambda self: lambda inputs: np.full((1, 2), value, np.float32))
    for call in (model.logits, model.predict):
        with pytest.raises(EcomoptError, match="not finite"): call(["bad"])


@pytest.mark.slow
def test_a_variant_without_finite_logits_is_not_chosen(monkeypatch):
    write, real = runtime._GRAPHS["onnxruntime"]
    def open_files(*arguments): return lambda inputs: np.full((len(inputs["input_ids"]), 2), np.nan, np.float32)
    monkeypatch.setitem(runtime._GRAPHS, "onnxruntime", (write, open_files))
    few = dict(runtimes="onnxruntime", precisions="float32", rounds=np.int64(1))
    choice = best_runtime(small(), tiny.task(), **few)
    assert choice.runtime == "eager" and "not finite" in choice.table.loc["onnxruntime float32", "note"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_text_longer_than_the_positions_is_refused(name, tmp_path):
    for model, limit in ((converted(name), 512), (converted(name, "RoBERTa"), 39)):
        for one in (model, load(save(model, tmp_path / f"{limit}"))):
            assert one.model(torch.full((1, limit), 5)).logits.isfinite().all()
            with pytest.raises(EcomoptError, match=f"{limit} positions"): one.model(torch.full((1, limit + 1), 5))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openvino", "onnxruntime", "eager"])
def test_pairs_of_texts_are_refused(name):
    ids = torch.tensor([[2, 5, 6, 3]])
    plain = converted(name).model(ids, torch.ones_like(ids))
    zeros = converted(name).model(ids, torch.ones_like(ids), token_type_ids=torch.zeros_like(ids))
    assert torch.equal(zeros.logits, plain.logits)
    with pytest.raises(EcomoptError, match="token types"):
        converted(name).model(ids, torch.ones_like(ids), token_type_ids=torch.ones_like(ids))


# ---------------------------------------------------------------- language models

def writer(cls, config, **sizes) -> LanguageModel:
    torch.manual_seed(0)
    words = tiny.language_model().tokenizer
    ends = dict(pad_token_id=0, bos_token_id=None, eos_token_id=None)
    return LanguageModel(cls(config(vocab_size=len(words), **ends, **sizes)).eval(), words)


WIDE = SIZES | dict(num_key_value_heads=2, initializer_range=0.3)
WRITERS = {
    "LLaMA": lambda: tiny.language_model(),
    "GPT-2": lambda: writer(GPT2LMHeadModel, GPT2Config, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
    "Qwen2": lambda: writer(Qwen2ForCausalLM, Qwen2Config, **WIDE),
    "Mistral": lambda: writer(MistralForCausalLM, MistralConfig, **WIDE, sliding_window=4),
    "OPT": lambda: writer(
        OPTForCausalLM, OPTConfig, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, init_std=0.3),
    "GPT-NeoX": lambda: writer(GPTNeoXForCausalLM, GPTNeoXConfig, **SIZES | dict(initializer_range=0.3)),
    "BLOOM": lambda: writer(BloomForCausalLM, BloomConfig, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
}
PROMPTS = ["the battery is very good", "not", "a phone a phone works and the screen was awful", "great", "bad not bad"]


@functools.cache
def language_model(name: str): return WRITERS[name]()


@functools.cache
def converted_writer(): return convert_language_model(tiny.language_model(), 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WRITERS, "converted"])
def test_an_answer_does_not_depend_on_the_other_prompts(name):
    lm = converted_writer() if name == "converted" else language_model(name)
    alone = [lm.generate([prompt], 8)[0] for prompt in PROMPTS]
    assert len(set(alone)) > 2
    for batch_size in (2, 3, 5):
        assert lm.generate(PROMPTS, 8, batch_size=batch_size) == alone
        assert lm.generate(PROMPTS[::-1], 8, batch_size=batch_size) == alone[::-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_language_model_is_converted_right_or_refused(name):
    lm = language_model(name)
    try: other = convert_language_model(lm, 32)
    except EcomoptError:
        assert name in ("Mistral", "GPT-2", "OPT", "GPT-NeoX", "BLOOM")
        return
    assert other.generate(PROMPTS, 8) == lm.generate(PROMPTS, 8)
    assert abs(losses(other, PROMPTS) - losses(lm, PROMPTS)).max() < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("change", [lambda z: z * np.nan, lambda z: z[::-1], lambda z: np.roll(z, 1, -1)])
def test_a_language_model_that_answers_otherwise_is_refused(change, bits, monkeypatch):
    real = runtime_llm.LanguageRuntime.forward
    def forward(self, *arguments, **options):
        out = real(self, *arguments, **options)
        out.logits = torch.from_numpy(change(out.logits.numpy()).copy())
        return out
    monkeypatch.setattr(runtime_llm.LanguageRuntime, "forward", forward)
    with pytest.raises(EcomoptError, match="cannot run"): convert_language_model(tiny.language_model(), bits)


def broken_writer(convert_it: bool):
    lm = copy.deepcopy(converted_writer() if convert_it else tiny.language_model())
    model, real = lm.model, lm.model.forward
    @functools.wraps(real)
    def forward(*arguments, **options):
        out = real(*arguments, **options)
        out.logits = out.logits * float("nan")
        return out
    model.forward = forward
    return lm


@pytest.mark.parametrize("convert_it", [False, True])
def test_a_language_model_without_finite_logits_does_not_answer(convert_it):
    lm = broken_writer(convert_it)
    ids = lm.encode(PROMPTS[:1])[0]
    calls = [
        lambda: lm.generate(PROMPTS, 2),
        lambda: greedy_decoding(lm.model, [ids], 2),
        lambda: losses(lm, PROMPTS),
        lambda: prompt_lookup_decoding(lm.model, ids, 2, num_draft_tokens=0),
    ]
    for call in calls:
        with pytest.raises(EcomoptError, match="not finite"): call()


def test_two_texts_at_once_in_a_converted_model():
    """Each has its own keys and values."""
    model, torch_model = converted_writer().model, tiny.language_model().model
    first, second = (torch.tensor([ids]) for ids in converted_writer().encode(PROMPTS[:2]))
    one, two = model(first), model(second)
    for ids, past in ((first, one), (second, two)):
        out = model(ids[:, :1], past_key_values=past.past_key_values)
        with torch.inference_mode(): wanted = torch_model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
        assert torch.allclose(out.logits, wanted, atol=1e-3)
    other = copy.deepcopy(model)
    with pytest.raises(EcomoptError, match="another model"): other(first, past_key_values=one.past_key_values)


def test_a_model_without_a_cache_is_refused():
    lm = writer(MambaForCausalLM, MambaConfig, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(EcomoptError, match="no KV cache"): lm.generate(PROMPTS, 2)


# ---------------------------------------------------------------- prompts and numbers

@pytest.mark.parametrize("collection", [
    list, tuple, iter, np.array, pd.Series, lambda rows: (row for row in rows), lambda rows: dict.fromkeys(rows).keys(),
])
def test_any_ordered_collection_of_prompts(collection):
    lm = tiny.language_model()
    for chat in (False, True): assert lm.generate(collection(PROMPTS), 3, chat=chat) == lm.generate(PROMPTS, 3)
    assert np.array_equal(losses(lm, collection(PROMPTS)), losses(lm, PROMPTS))
    assert lm.encode(collection(PROMPTS)) == lm.encode(PROMPTS)


WRONG_PROMPTS = {
    "Row 1": [["good", None], ["good", 3], ["good", b"bad"], ["good", "\ud800"], ["good", ("a", "b")], ("good", ["b"]),
              ["good", float("nan")], pd.Series(["good", np.nan])],
    "list": ["good", b"good", {"good": 1}, {"good"}, None, 5],
}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("match, prompts", [(match, one) for match, rows in WRONG_PROMPTS.items() for one in rows])
def test_what_is_no_text_is_named(match, prompts, chat):
    lm = tiny.language_model()
    if chat: lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for call in (lambda: lm.generate(prompts, 2), lambda: losses(lm, prompts), lambda: lm.encode(prompts, chat)):
        with pytest.raises(EcomoptError, match=match): call()


def test_a_prompt_without_tokens_is_named():
    with pytest.raises(EcomoptError) as caught: tiny.language_model().generate(["good", "bad", ""])
    assert caught.value.where == "prompt 2"


NUMBERS = [0, -1, True, 2.0, 2.5, "2", None, float("nan"), np.float64(2)]


@pytest.mark.parametrize("number", NUMBERS)
def test_wrong_numbers(number):
    lm = tiny.language_model()
    calls = {
        "max_new_tokens": lambda: lm.generate(["good"], number),
        "batch_size": lambda: lm.generate(["good"], 2, batch_size=number),
        "window": lambda: losses(lm, PROMPTS, window=number),
        "max_length": lambda: LanguageModel(lm.model, lm.tokenizer, number),
        "rounds": lambda: generation_speed({"one": lm}, "good", 2, rounds=number),
        "ngram_size": lambda: prompt_lookup_decoding(lm.model, [5, 6], 2, ngram_size=number),
    }
    for name, call in calls.items():
        with pytest.raises(EcomoptError, match=name): call()
    with pytest.raises(EcomoptError, match="batch_size"): losses(lm, PROMPTS, batch_size=number)
    if number == 0: return  # no new tokens and no draft tokens are possible
    with pytest.raises(EcomoptError): greedy_decoding(lm.model, [[5, 6]], number)
    with pytest.raises(EcomoptError): prompt_lookup_decoding(lm.model, [5, 6], 2, num_draft_tokens=number)


def test_integers_of_numpy():
    lm, two = tiny.language_model(), np.int64(2)
    assert lm.generate(PROMPTS, two, batch_size=two) == lm.generate(PROMPTS, 2)
    assert np.allclose(losses(lm, PROMPTS, two, two), losses(lm, PROMPTS, 2, 2))
    assert LanguageModel(lm.model, lm.tokenizer, two).encode(PROMPTS) == replace(lm, max_length=2).encode(PROMPTS)


def test_edges_of_greedy_decoding():
    lm = tiny.language_model()
    assert greedy_decoding(lm.model, [], 3) == [] and greedy_decoding(lm.model, [[5], [5, 6]], 0) == [[], []]
    with pytest.raises(EcomoptError, match="no tokens"): greedy_decoding(lm.model, [[5], []], 3)


@pytest.mark.parametrize("name", ["LLaMA", "GPT-2", "converted"])
def test_a_prompt_longer_than_the_positions(name):
    short = dict(max_position_embeddings=12)
    if name == "GPT-2":
        lm = writer(GPT2LMHeadModel, GPT2Config, n_positions=12, n_embd=32, n_layer=2, n_head=4)
    else: lm = tiny.language_model(**short)
    if name == "converted": lm = convert_language_model(lm, 32)
    long = "good " * 30
    assert len(lm.encode([long])[0]) == 12  # is cut, max_length is larger
    assert losses(lm, [long])[0, 1] == 11 and len(lm.generate(["good " * 9], 4)) == 1
    for prompts, new in (([long], 2), (["good", "good " * 9], 5), (["good"], 13)):
        with pytest.raises(EcomoptError, match="12 positions") as caught: lm.generate(prompts, new)
        assert caught.value.where == f"prompt {len(prompts) - 1}"
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(EcomoptError, match="Prompt 1 has 30 tokens"): lm.generate(["good", long], 2)


@pytest.mark.parametrize("wrong", [[], [[1, 2, 3]], [1, 2], "losses", None, [[np.nan, 3]], [[np.inf, 3]], [[0.0, 0]]])
def test_what_is_no_losses(wrong):
    right = np.array([[2.0, 3]])
    for call in (lambda: perplexity(wrong), lambda: paired_perplexity(right, wrong), lambda:
                 paired_perplexity(wrong, right)):
        with pytest.raises(EcomoptError): call()
    assert perplexity(right.tolist()) == perplexity(right)


@pytest.mark.parametrize("wrong", [
    lambda lm: generation_speed({}, "good", 2, 1),
    lambda lm: generation_speed({"one": lm}, ["good"], 2, 1),
    lambda lm: generation_speed({"one": lm}, None, 2, 1),
    lambda lm: generation_speed({"one": lm}, "good", True, 1),
])
def test_wrong_arguments_of_generation_speed(wrong):
    with pytest.raises(EcomoptError): wrong(tiny.language_model())


# ---------------------------------------------------------------- arguments of the converters

@pytest.mark.parametrize("wrong", [
    dict(runtime=["openvino"]), dict(runtime=None), dict(runtime={"eager": 1}), dict(precision=("float32",)),
    dict(precision=32), dict(timeout="10"), dict(timeout=0), dict(timeout=None), dict(timeout=True),
    dict(timeout=float("inf")), dict(precision="int8", runtime="openvino", calibration_texts="bad"),
    dict(precision="int8", runtime="openvino", calibration_texts=["bad", None]),
    dict(precision="int8", runtime="openvino", calibration_texts=[]), dict(classifier="model"), dict(classifier=None),
])
def test_wrong_arguments_of_convert(wrong):
    arguments = dict(classifier=small(), runtime="eager", precision="float32") | wrong
    with pytest.raises(EcomoptError): convert(**arguments)


@pytest.mark.parametrize("texts", [tuple, iter, pd.Series, np.array, lambda rows: (row for row in rows)])
def test_any_collection_of_calibration_texts(texts):
    assert convert(small(), "sdpa", "int8", texts(TEXTS)).logits(TEXTS).isfinite().all()


@pytest.mark.parametrize("wrong", [
    dict(task=["bad"]), dict(task=None), dict(min_agreement="0.9"), dict(min_agreement=True),
    dict(min_agreement=float("nan")), dict(rounds=0), dict(rounds="3"), dict(rounds=True), dict(by=None),
    dict(timeout="1"), dict(classifier="model"),
])
def test_wrong_arguments_of_best_runtime(wrong):
    arguments = dict(classifier=small(), task=tiny.task(), runtimes=["eager"], precisions=["float32"]) | wrong
    with pytest.raises(EcomoptError): best_runtime(**arguments)


@pytest.mark.parametrize("wrong", [
    dict(bits="4"), dict(bits=True), dict(bits=4.0), dict(bits=None), dict(timeout="1"), dict(timeout=-1),
    dict(lm="model"), dict(lm=None),
])
def test_wrong_arguments_of_convert_language_model(wrong):
    with pytest.raises(EcomoptError): convert_language_model(**dict(lm=tiny.language_model(), bits=32) | wrong)


@pytest.mark.slow
def test_bits_of_numpy_are_saved(tmp_path):
    model = convert_language_model(tiny.language_model(), np.int64(8))
    assert load(save(model, tmp_path / "model")).generate(PROMPTS, 3) == model.generate(PROMPTS, 3)


# ---------------------------------------------------------------- checkpoints of language models

@pytest.fixture
def checkpoint(tmp_path):
    return tiny.written(tiny.language_model(), tmp_path / "model")


@pytest.mark.parametrize("missing", ["layers.1.", "embed_tokens", "model.norm", "layers.2.mlp.up_proj"])
def test_missing_weights_are_not_drawn(checkpoint, missing):
    tiny.edit_weights(checkpoint, lambda tensors: {k: v for k, v in tensors.items() if missing not in k})
    with pytest.raises(EcomoptError, match="not in the checkpoint"): load_language_model(checkpoint)


def test_weights_that_the_model_has_not_are_refused(checkpoint):
    tiny.edit_weights(checkpoint, lambda tensors: tensors | {"model.layers.9.mlp.up_proj.weight": torch.ones(96, 64)})
    with pytest.raises(EcomoptError, match="not part of the model"): load_language_model(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_weights_that_are_not_finite_are_refused(checkpoint, name, value):
    def change(tensors):
        tensors[name].flatten()[0] = value
        return tensors
    tiny.edit_weights(checkpoint, change)
    with pytest.raises(EcomoptError, match="not finite"): load_language_model(checkpoint)


def test_a_classifier_is_no_language_model(tmp_path):
    tiny.classifier().model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(EcomoptError): load_language_model(tmp_path)


def test_code_beside_a_checkpoint_is_not_run(checkpoint, tmp_path):
    mark = tmp_path / "executed"
    (checkpoint / "mine.py").write_text(f"open({str(mark)!r}, 'w')\nclass Mine: pass\n")
    config = json.loads((checkpoint / "config.json").read_text())
    del config["model_type"]
    code = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}
    (checkpoint / "config.json").write_text(json.dumps(config | {"auto_map": code, "model_type": "mine"}))
    with pytest.raises(EcomoptError): load_language_model(checkpoint)
    assert not mark.exists()


def test_a_home_directory_in_a_path(checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert load_language_model("~/model").generate(PROMPTS, 3) == load_language_model(checkpoint).generate(PROMPTS, 3)


def test_an_artifact_is_loaded_by_load(tmp_path):
    path = save(quantize_language_model(tiny.language_model(), 8), tmp_path / "model")
    with pytest.raises(EcomoptError, match="artifact"): load_language_model(path)


@pytest.mark.parametrize("name", [None, 5, ["model"], "", "~/there/is/nothing", {"a": 1}])
def test_names_that_are_none(name):
    with pytest.raises(EcomoptError): load_language_model(name)


@pytest.mark.parametrize("length", [0, -3, True, "12", 1.5, None])
def test_wrong_lengths(checkpoint, length):
    with pytest.raises(EcomoptError, match="max_length"): load_language_model(checkpoint, length)


def test_a_tokenizer_with_more_tokens_than_the_model(checkpoint):
    words = tiny.tokenizer()
    words.add_tokens([f"word{i}" for i in range(9)])
    words.save_pretrained(checkpoint)
    with pytest.raises(EcomoptError, match="embeddings"): load_language_model(checkpoint)
