"""The steps of compression on models that they do not understand, that other steps have changed, or that are not in
float32: the result computes what it should, or the step raises and says why. The model that is passed never changes."""
import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)
from transformers.models.bert.modeling_bert import BertLayer as TransformersBertLayer

from ecomopt import EcomoptError
from ecomopt.accelerate.runtime import GraphRuntime, TorchRuntime
from ecomopt.compress.calibrate import calibrate
from ecomopt.compress.prune import MaskCallback, compute_sparsity, prune
from ecomopt.compress.qat import FakeQuantLinear, prepare_qat
from ecomopt.compress.quantize import Int8Layer, Int8Linear, QuantizedEmbedding, quantize
from ecomopt.compress.quantize_llm import quantize_language_model, weight_only_linear
from ecomopt.compress.share import SharedEmbedding, SharedLinear, codebooks_to_int8, share_weights
from ecomopt.compress.structured import prune_structured
from ecomopt.core.artifact import load, save
from ecomopt.core.generate import LanguageModel
from ecomopt.core.train import Classifier

TEXTS = ["good", "the battery is very good", "a phone a phone works and the screen was awful", "not bad"]
SIZE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
T5 = dict(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, initializer_factor=1.0)
BART = dict(d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=200, init_std=0.2)
GEMMA = dict(num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16)
OTHERS = {  # model type and what its configuration needs
    "albert": dict(embedding_size=64),
    "bart": BART,
    "deberta-v2": dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
    "electra": dict(embedding_size=64),
    "gemma": dict(num_key_value_heads=2, head_dim=16),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "llama": dict(num_key_value_heads=2),
    "mbart": BART | dict(scale_embedding=True),
    "modernbert": dict(global_attn_every_n_layers=2, pad_token_id=0),
    "mpnet": {},
    "roberta": dict(pad_token_id=0),
    "t5": T5,
    "umt5": T5,
}
ENDS = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=2)


@cache
def architecture(kind: str) -> Classifier:
    """A random classifier of any architecture with the words of `tiny`, whose logits tell texts apart."""
    torch.manual_seed(0)
    words, size = tiny.tokenizer(), SIZE if kind not in ("t5", "umt5", "bart", "mbart") else {}
    options = dict(vocab_size=len(words), initializer_range=0.15, num_labels=3, **ENDS) | size | OTHERS[kind]
    config = AutoConfig.for_model(kind, **options)
    return Classifier(AutoModelForSequenceClassification.from_config(config).eval(), words)


def bert(**others) -> Classifier:
    torch.manual_seed(0)
    words = tiny.tokenizer()
    config = BertConfig(vocab_size=len(words), initializer_range=0.15, **SIZE | others)
    return Classifier(BertForSequenceClassification(config).eval(), words)


def error(small: Classifier, expected: torch.Tensor) -> float:
    return ((small.logits(TEXTS) - expected).norm() / expected.norm()).item()


def state(classifier: Classifier) -> dict:
    """All that a step might change."""
    model = classifier.model
    kinds = {name: type(m) for name, m in model.named_modules(remove_duplicate=False)}
    tensors = {name: x.clone() for name, x in model.state_dict().items()}
    needs = {name: p.requires_grad for name, p in model.named_parameters()}
    return dict(kinds=kinds, tensors=tensors, needs=needs, training=model.training, config=model.config.to_dict())


def same(a: dict, b: dict) -> bool:
    tensors = a["tensors"].keys() == b["tensors"].keys() and all(
        torch.equal(x, b["tensors"][name]) and x.dtype == b["tensors"][name].dtype for name, x in a["tensors"].items()
    )
    return tensors and all(a[name] == b[name] for name in a.keys() - {"tensors"})


NEAR = {  # steps that may only round: how far the logits may move, as a fraction
    "quantize": (lambda c: quantize(c), 0.25),
    "quantize, words": (lambda c: quantize(c, linear=False), 0.1),
    "share_weights": (lambda c: share_weights(c, 8, 8), 0.25),
    "prepare_qat": (lambda c: prepare_qat(c, 8), 0.1),
    "prune": (lambda c: prune(c, 0.0), 1e-5),
}


def near_or_refused(classifier: Classifier, step: str) -> Classifier | None:
    """The result, if there is one: it is near the float model, and can be saved and loaded."""
    work, bound = NEAR[step]
    expected = classifier.logits(TEXTS)  # a table with max_norm changes at the first use
    before = state(classifier)
    try: small = work(classifier)
    except EcomoptError as refused:
        assert "unsupported architecture" in str(refused) or "no list of" in str(refused)
        assert same(state(classifier), before)
        return None
    assert same(state(classifier), before)
    assert error(small, expected) <= bound
    assert not same(state(small), before) or step == "prune"
    return small


# architectures

@pytest.mark.slow
@pytest.mark.parametrize("step", NEAR)
@pytest.mark.parametrize("kind", OTHERS)
def test_any_architecture_is_computed_rightly_or_refused(tmp_path, kind, step):
    small = near_or_refused(architecture(kind), step)
    if small is None or step == "prune": return
    again = load(save(small, tmp_path / "small"))
    assert torch.allclose(again.logits(TEXTS), small.logits(TEXTS), atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["albert", "deberta-v2", "electra", "gemma2", "llama", "modernbert", "mpnet", "roberta"]
)
def test_most_architectures_are_not_refused(kind):
    small = quantize(architecture(kind))
    assert sum(isinstance(m, (Int8Linear, Int8Layer)) for m in small.model.modules()) > 4


def test_t5_is_quantized_saved_and_loaded(tmp_path):
    model = architecture("t5")
    small = quantize(model)
    again = load(save(small, tmp_path / "small"))
    assert torch.equal(again.logits(TEXTS), small.logits(TEXTS)) and error(small, model.logits(TEXTS)) < 0.25
    words = [m for m in again.model.modules() if isinstance(m, QuantizedEmbedding) and m.num_embeddings > 50]
    assert len(words) == 3 and len({m.weight.data_ptr() for m in words}) == 1  # one table, under three names


def test_where_nothing_can_be_changed_that_is_said():
    for kind in ("gemma2", "gemma3_text"):  # a table that scales its rows
        with pytest.raises(EcomoptError, match="nothing to quantize"): quantize(architecture(kind), 4, linear=False)
    model = bert()
    model.model.bert.embeddings.word_embeddings = Scaled.of(model.model.bert.embeddings.word_embeddings)
    with pytest.raises(EcomoptError, match="nothing to quantize"): quantize(model, linear=False)


# modules of another kind inside a known architecture

class Doubled(nn.Linear):
    """A subclass that computes something else."""
    def forward(self, x): return 2 * super().forward(x)


class Scaled(nn.Embedding):
    """As Gemma's and BART's tables."""
    def forward(self, ids): return 8 * super().forward(ids)

    @classmethod
    def of(cls, old):
        new = cls(*old.weight.shape)
        new.weight = old.weight
        return new


class Reader(nn.Module):
    """Reads the weight of a linear layer that it does not call."""
    def __init__(self, dense):
        super().__init__()
        self.dense = dense

    def forward(self, x): return torch.tanh(F.linear(x[:, 0], self.dense.weight, self.dense.bias))


class Both(Reader):
    """Reads it and calls it: the two must agree."""
    def forward(self, x): return super().forward(x) + self.dense(x[:, 0])


class BertLayer(TransformersBertLayer):
    """A class of a known name that computes something else."""
    def forward(self, x, *args, **kwargs): return 3 * x + super().forward(x, *args, **kwargs)


def scaled_words(model):
    table = model.bert.embeddings
    table.word_embeddings = Scaled.of(table.word_embeddings)


def doubled_linear(model):
    old = model.bert.encoder.layer[0].intermediate.dense
    new = model.bert.encoder.layer[0].intermediate.dense = Doubled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())


def read_weight(model): model.bert.pooler = Reader(model.bert.pooler.dense)


def read_and_called(model): model.bert.pooler = Both(model.bert.pooler.dense)


def other_layer(model): model.bert.encoder.layer[1].__class__ = BertLayer


def tied_layers(model):
    one, two = (layer.attention.output.dense for layer in model.bert.encoder.layer)
    two.weight = one.weight


def one_layer_twice(model): model.bert.encoder.layer[1].output.dense = model.bert.encoder.layer[0].output.dense


def limited_norm(model): model.bert.embeddings.word_embeddings.max_norm = 0.5


def hooked(model):
    model.bert.pooler.dense.register_forward_hook(lambda module, inputs, output: 3 * output)


def weight_norm(model): nn.utils.parametrizations.weight_norm(model.bert.pooler.dense)


def own_forward(model):
    dense = model.bert.pooler.dense
    dense.forward = lambda x: F.linear(x, dense.weight).relu()


CHANGES = [scaled_words, doubled_linear, read_weight, read_and_called, other_layer, tied_layers, one_layer_twice,
    limited_norm, hooked, weight_norm, own_forward]


@pytest.mark.slow
@pytest.mark.parametrize("step", NEAR)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_understood_is_left_alone_or_refused(change, step):
    model = bert()
    change(model.model)
    near_or_refused(model, step)


def test_the_rest_is_converted():
    for change in (scaled_words, doubled_linear, read_weight, hooked):
        model = bert()
        change(model.model)
        small = quantize(model)
        assert sum(isinstance(m, Int8Linear) for m in small.model.modules()) >= 8, change.__name__


def test_tied_weights_are_pruned_and_counted_once():
    model = bert()
    tied_layers(model.model)
    small = prune(model, 0.6)
    assert abs(compute_sparsity(small.model) - 0.6) < 1e-3
    one, two = (layer.attention.output.dense for layer in small.model.bert.encoder.layer)
    assert one.weight is two.weight


@pytest.mark.parametrize("work, kind", [
    (quantize, QuantizedEmbedding), (lambda c: share_weights(c, 8, 8), SharedEmbedding),
])
def test_the_padding_row_keeps_its_meaning(work, kind):
    model = bert()
    table = work(model).model.get_input_embeddings()
    assert isinstance(table, kind) and model.model.get_input_embeddings().padding_idx == 0
    row = table(torch.tensor([0]))
    assert (row - model.model.get_input_embeddings().weight[0]).abs().max() < 0.02


def test_a_model_with_weights_that_are_not_finite_is_refused():
    model = bert()
    model.model.bert.pooler.dense.weight.data[3, 5] = float("nan")
    for work in (quantize, lambda c: prune(c, 0.1), prepare_qat, lambda c: prune_structured(c, heads=2)):
        with pytest.raises(EcomoptError, match="not finite"): work(model)


# language models

KEYS = dict(num_key_value_heads=2, head_dim=16)
CAUSAL = {"gemma": KEYS, "gemma2": GEMMA, "llama": KEYS, "qwen2": KEYS, "mistral": KEYS, "gpt_neox": {},
    "opt": dict(ffn_dim=96, word_embed_proj_dim=64)}


def causal(kind: str, **others) -> LanguageModel:
    torch.manual_seed(0)
    words = tiny.language_model().tokenizer
    options = CAUSAL[kind] | SIZE | dict(max_position_embeddings=64, initializer_range=0.15)
    config = AutoConfig.for_model(kind, vocab_size=len(words), **ENDS, **options | others)
    return LanguageModel(AutoModelForCausalLM.from_config(config).eval(), words)


@torch.inference_mode()
def next_logits(lm: LanguageModel) -> torch.Tensor:
    rows = tiny.language_model().encode(TEXTS)
    return torch.cat([lm.model(torch.tensor(ids)[None]).logits[0] for ids in rows])


@pytest.mark.parametrize("kind", CAUSAL)
def test_language_models_are_computed_rightly_or_refused(tmp_path, kind):
    lm = causal(kind)
    before, expected = state(lm), next_logits(lm)
    try: small = quantize_language_model(lm, 8)
    except EcomoptError: assert kind not in ("gemma2", "llama", "qwen2", "mistral")
    else:
        assert (next_logits(small) - expected).norm() < 0.25 * expected.norm()
        again = load(save(small, tmp_path / "small"))
        assert torch.allclose(next_logits(again), next_logits(small), atol=1e-4)
    assert same(state(lm), before)


# models that another step has changed

def graph(classifier: Classifier) -> Classifier:
    pytest.importorskip("onnxruntime")
    sizes = dict(runtime="onnxruntime", precision="float32", macs=[0, 0, 0], weights=0)
    return replace(classifier, model=GraphRuntime(classifier.model.config, {"onnx": 8}, **sizes))


def in_torch(classifier: Classifier) -> Classifier:
    return replace(classifier, model=TorchRuntime(classifier.model, "eager", "float32").eval())


CHANGED = {
    "pruned": lambda: prune(tiny.classifier(), 0.5),
    "structured": lambda: prune_structured(tiny.classifier(), heads=[4, 2, 2], neurons=[90, 40, 7]),
    "first token": lambda: prune_structured(tiny.classifier(), first_token=True),
    "int8 words": lambda: quantize(tiny.classifier(), linear=False),
    "shared": lambda: share_weights(tiny.classifier()),
    "shared words": lambda: share_weights(tiny.classifier(), bits=None),
    "qat": lambda: prepare_qat(tiny.classifier()),
    "int8": lambda: quantize(tiny.classifier()),
    "static": lambda: calibrate(quantize(tiny.classifier()), TEXTS),
    "codebooks": lambda: codebooks_to_int8(share_weights(tiny.classifier())),
    "torch": lambda: in_torch(tiny.classifier()),
    "torch int8": lambda: in_torch(quantize(tiny.classifier())),
    "graph": lambda: graph(tiny.classifier()),
}
STEPS = {
    "prune_structured": lambda c: prune_structured(c, heads=1, neurons=5),
    "prune_structured, layers": lambda c: prune_structured(c, layers=2),
    "prune_structured, first token": lambda c: prune_structured(c, first_token=True),
    "prune_structured, texts": lambda c: prune_structured(c, texts=TEXTS),
    "prune": lambda c: prune(c, 0.9),
    "prepare_qat": prepare_qat,
    "share_weights": share_weights,
    "share_weights, layers": lambda c: share_weights(c, embedding_bits=None),
    "quantize": quantize,
    "quantize, words": lambda c: quantize(c, linear=False),
    "codebooks_to_int8": codebooks_to_int8,
    "calibrate": lambda c: calibrate(c, TEXTS),
}
FLOAT = {"pruned", "structured", "first token"}
WORKS = {  # what each step can follow
    "prune_structured": FLOAT | {"int8 words", "shared words"},
    "prune_structured, layers": FLOAT | {"int8 words", "shared words"},
    "prune_structured, first token": FLOAT | {"int8 words", "shared words"},
    "prune_structured, texts": FLOAT,
    "prune": FLOAT | {"int8 words", "shared words", "qat"},
    "prepare_qat": FLOAT | {"int8 words", "shared words"},
    "share_weights": FLOAT,
    "share_weights, layers": FLOAT | {"int8 words", "shared words"},
    "quantize": FLOAT | {"int8 words", "shared words", "shared", "qat"},
    "quantize, words": FLOAT | {"qat"},
    "codebooks_to_int8": {"shared"},
    "calibrate": {"int8"},
}


@pytest.fixture(scope="module")
def changed():
    """Each changed model, made once."""
    made = {}
    def get(kind):
        if kind not in made: made[kind] = CHANGED[kind]()
        return made[kind]
    return get


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHANGED)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_works_on_a_changed_model_or_says_what_to_do(changed, step, kind):
    model = changed(kind)
    before = state(model)
    if kind in WORKS[step]:
        small = STEPS[step](model)
        assert small.logits(TEXTS).isfinite().all() and small.model is not model.model
    else:
        with pytest.raises(EcomoptError) as refused: STEPS[step](model)
        names = ("prune", "quantize", "share", "qat", "calibrate", "convert")
        assert any(name in str(refused.value).lower() for name in names) and refused.value.do
    assert same(state(model), before)


@pytest.mark.parametrize("kind", ["int8", "codebooks", "torch", "graph", "shared"])
def test_sparsity_and_masks_of_a_changed_model_are_refused(changed, kind):
    with pytest.raises(EcomoptError, match="nothing to prune"): compute_sparsity(changed(kind).model)
    with pytest.raises(EcomoptError, match="nothing to prune"):
        MaskCallback().on_train_begin(None, None, None, model=changed(kind).model)


@pytest.mark.parametrize("make", [
    lambda lm: quantize_language_model(lm), lambda lm: quantize_language_model(lm, 4),
    lambda lm: replace(lm, model=graph(lm).model),
])
def test_a_language_model_is_quantized_once_and_before_it_is_converted(make):
    lm = make(tiny.language_model())
    with pytest.raises(EcomoptError, match=r"already.\n.*\n.*as it was before"): quantize_language_model(lm)
    with pytest.raises(EcomoptError, match="nothing to prune"): prune_structured(lm, neurons=5)


# half precision

HALF = {
    "quantize": quantize,
    "quantize, words": lambda c: quantize(c, 4, linear=False),
    "share_weights": share_weights,
    "prepare_qat": prepare_qat,
    "prune": lambda c: prune(c, 0.5),
    "prune_structured": lambda c: prune_structured(c, heads=2, neurons=40),
    "prune_structured, taylor": lambda c: prune_structured(c, heads=2, importance="taylor", task=tiny.task(8)),
    "first token": lambda c: prune_structured(c, layers=2, first_token=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("step", HALF)
def test_checkpoints_in_another_precision_are_converted(tmp_path, step, dtype):
    model = tiny.classifier()
    model.model.to(dtype).config.dtype = dtype
    before = state(model)
    small = HALF[step](model)
    again = load(save(small, tmp_path / "small"))
    whole = replace(model, model=copy.deepcopy(model.model).float())
    assert torch.allclose(small.logits(TEXTS), HALF[step](whole).logits(TEXTS), atol=1e-5)
    assert torch.allclose(again.logits(TEXTS), small.logits(TEXTS), atol=1e-6)
    assert {p.dtype for p in small.model.parameters()} <= {torch.float32} and same(state(model), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_language_models_in_another_precision_are_converted(dtype, bits):
    lm = tiny.language_model()
    lm.model.to(dtype)
    before = state(lm)
    whole = replace(lm, model=copy.deepcopy(lm.model).float())
    half, full = (next_logits(quantize_language_model(one, bits)) for one in (lm, whole))
    assert torch.equal(half, full)
    assert same(state(lm), before)


# texts

@pytest.mark.parametrize("texts, what", [
    ([], "no calibration texts"), ("good", "no calibration texts"), (["good", None], "row 1 is of type NoneType"),
    ([1.5], "row 0 is of type float"), (["a", "b", float("nan")], "row 2 is of type float"),
    (iter([]), "no calibration texts"),
])
def test_rows_that_are_no_texts_are_named(changed, texts, what):
    with pytest.raises(EcomoptError, match=what): calibrate(changed("int8"), texts)
    if isinstance(texts, list) and texts:
        with pytest.raises(EcomoptError, match=what): prune_structured(changed("pruned"), texts=texts)


def test_texts_of_numpy_are_texts(changed):
    assert calibrate(changed("int8"), np.array(TEXTS)).logits(TEXTS).isfinite().all()


# batches

@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [1, 5, 17, 40, 130])
@pytest.mark.parametrize("shape", [(64, 48), (256, 96)])
def test_a_text_s_products_do_not_depend_on_the_rest_of_the_batch(bits, tokens, shape):
    torch.manual_seed(0)
    layer, x = weight_only_linear(nn.Linear(*shape), bits=bits), torch.randn(33, tokens, shape[0])
    whole = layer(x)
    for size in (1, 2, 8, 20):
        assert torch.equal(layer(x[:size]), whole[:size])
    assert torch.equal(layer(x[7:8]), whole[7:8])


@torch.inference_mode()
def batch_logits(lm: LanguageModel, rows: list[list[int]], length: int) -> torch.Tensor:
    """Logits of the last token, padded on the left."""
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return lm.model(ids, attention_mask=mask, position_ids=positions).logits[:, -1]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("length", [12, 30])
def test_a_language_model_s_logits_do_not_depend_on_the_rest_of_the_batch(bits, length):
    lm = quantize_language_model(tiny.language_model(), bits)
    rows = [ids * 2 for ids in lm.encode(TEXTS)] * 4
    rows = [row[:length - 1] for row in rows]
    whole = batch_logits(lm, rows, length)
    for i, row in enumerate(rows[:4]):
        assert torch.equal(batch_logits(lm, [row], length)[0], whole[i])


@pytest.mark.parametrize("make", [tiny.classifier, tiny.distilbert, bert])
def test_static_ranges_do_not_depend_on_the_rest_of_the_batch(make):
    """Dynamic ranges do, in the last digits: the kernel has one scale for the whole batch."""
    static = calibrate(quantize(make()), TEXTS)
    texts = ["good", "slow", "bad", "love"]  # all of one length
    whole = static.logits(texts)
    for i, text in enumerate(texts): assert torch.allclose(static.logits([text])[0], whole[i], atol=1e-5)


def test_linear_layers_that_are_shared_or_faked_are_as_many_as_before():
    model = bert()
    assert sum(isinstance(m, SharedLinear) for m in share_weights(model, 4).model.modules()) == 2 * 6 + 1 + 1
    assert sum(isinstance(m, FakeQuantLinear) for m in prepare_qat(model).model.modules()) == 2 * 6 + 1 + 1
