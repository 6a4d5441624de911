"""Quantization: bounds, packing, and a model whose logits stay nearly the same."""
import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from ecomopt import EcomoptError
from ecomopt.compress.quantize import (
    Int8Linear,
    int8_linear,
    pack_bits,
    quantize,
    quantize_per_channel,
    quantized_embedding,
    unpack_bits,
)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(2, 8), st.floats(1e-6, 1e4), st.integers(0, 999))
def test_the_error_is_at_most_half_a_scale(rows, columns, bits, size, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    integers, scale = quantize_per_channel(weight, bits)
    assert integers.abs().max() <= 2 ** (bits - 1) - 1
    assert ((integers * scale[:, None] - weight).abs() <= scale[:, None] / 2 * (1 + 1e-9) + 1e-12).all()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_packing_loses_nothing(rows, pairs, seed):
    integers = torch.randint(-8, 8, (rows, 2 * pairs), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_bits(pack_bits(integers, 4), 4, 2 * pairs), integers)


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (2, 5, 48)])
def test_an_int8_layer_is_near_the_float_one(shape, activation):
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 64), torch.randn(shape)
    expected = linear(x) if activation == "none" else nn.functional.gelu(linear(x))
    assert (int8_linear(linear, activation=activation)(x) - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 48), torch.full((3, 48), 5.0), -torch.rand(3, 48), 1e6 * torch.randn(3, 48)]
)
def test_ranges_that_do_not_straddle_zero(x):
    linear = nn.Linear(48, 64)
    expected = linear(x)
    assert (int8_linear(linear)(x) - expected).norm() <= 0.02 * expected.norm() + 1e-5


def test_a_layer_without_bias():
    linear, x = nn.Linear(48, 64, bias=False), torch.randn(2, 48)
    assert (int8_linear(linear)(x) - linear(x)).norm() / linear(x).norm() < 0.02


def test_an_input_changed_in_place_is_quantized_again():
    layer, x = int8_linear(nn.Linear(48, 64)), torch.randn(2, 48)
    before = layer(x)
    x.mul_(2)
    assert not torch.allclose(layer(x), before)


def test_threads_do_not_mix_their_inputs():
    layer = int8_linear(nn.Linear(48, 64))
    inputs = [torch.randn(2, 48) for _ in range(4)]
    expected = [copy.deepcopy(layer)(x) for x in inputs]
    def work(i): return all(torch.equal(layer(inputs[i]), expected[i]) for _ in range(200))
    with ThreadPoolExecutor(4) as pool: assert list(pool.map(work, range(4))) == [True] * 4


@pytest.mark.parametrize("bits, bound", [(8, 0.01), (4, 0.15)])
def test_embeddings(bits, bound):
    table = nn.Embedding(50, 64)
    ids = torch.arange(50)
    small = quantized_embedding(table, bits)
    assert (small(ids) - table(ids)).norm() / table(ids).norm() < bound
    assert small.weight.nbytes == 50 * 64 * bits // 8


def test_the_logits_stay_nearly_the_same_and_the_given_model_is_untouched():
    model, texts = tiny.classifier(), tiny.task(40).train["text"]
    before = model.logits(texts)
    small = quantize(model)
    assert torch.equal(model.logits(texts), before)
    assert (small.logits(texts) - before).abs().max() < 0.05
    assert sum(isinstance(m, Int8Linear) for m in small.model.modules()) == 3 * 4 + 2


def test_nothing_float_remains_but_norms_scales_and_biases():
    state = quantize(tiny.classifier(), embedding_bits=4).model.state_dict()
    assert not [k for k, v in state.items() if v.is_floating_point() and v.dim() > 1 and not k.endswith("scale")]


@pytest.mark.parametrize("wrong", [lambda c: quantize(quantize(c)), lambda c: quantize(c, embedding_bits=9)])
def test_errors(wrong):
    with pytest.raises(EcomoptError): wrong(tiny.classifier())


def test_unsupported_models_are_refused():
    gpt2 = GPT2ForSequenceClassification(GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(EcomoptError, match="unsupported architecture GPT2"):
        quantize(replace(tiny.classifier(), model=gpt2))
    with pytest.raises(EcomoptError, match="no classifier"): quantize(tiny.language_model())


def test_numbers_loaded_later_are_seen():
    first, second = tiny.classifier(seed=0), tiny.classifier(seed=1)
    texts = tiny.task(8).train["text"]
    small, other = quantize(first, embedding_bits=4), quantize(second, embedding_bits=4)
    small.logits(texts)
    small.model.load_state_dict(other.model.state_dict())
    assert torch.equal(small.logits(texts), other.logits(texts))


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [tiny.classifier, tiny.distilbert])
def test_padding_changes_nothing(make, kind):
    model = make()
    model.model.set_attn_implementation(kind)
    short, long = "good", "the battery is awful and it broke slow slow slow"
    small = quantize(model)
    alone, padded = small.logits([short]), small.logits([short, long])[:1]
    assert torch.allclose(alone, padded, atol=0.01)  # the range of a batch is shared, so the last digits differ
    assert (padded - model.logits([short])).abs().max() < 0.05
