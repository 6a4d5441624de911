"""Few-bit weights in training: what is computed, what moves, what is saved; and bad input."""
import copy
import json
import subprocess
import sys

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from ecomopt import EcomoptError
from ecomopt.compress.distill import distill
from ecomopt.compress.qat import (
    FakeQuantLinear,
    best_scale,
    fake_quant_linear,
    fake_quantize,
    fake_quantize_rows,
)
from ecomopt.compress.quantize import Int8Linear, int8_linear, quantize, quantize_rows, unpack
from ecomopt.compress.shrink import shrink
from ecomopt.core.artifact import load, save
from ecomopt.core.train import Classifier, fingerprint

TEXTS = tiny.task(20).train["text"][:]


@given(st.integers(1, 8), st.integers(1, 12), st.integers(2, 8), st.floats(1e-4, 1e3), st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_few_values_that_stay_and_a_step_not_worse_than_the_widest(rows, columns, bits, size, seed):
    weight = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    scale, limit = best_scale(weight, bits), 2 ** (bits - 1) - 1
    rounded = fake_quantize_rows(weight, scale, bits)
    assert (rounded / scale[:, None]).abs().max() <= limit + 1e-3
    assert torch.allclose(fake_quantize_rows(rounded, scale, bits), rounded, rtol=1e-4)
    integers, widest = quantize_rows(weight, bits)
    assert ((rounded - weight).square().sum(1) <= 1.001 * (integers * widest[:, None] - weight).square().sum(1) + 1e-12).all()


@given(st.integers(2, 8), st.integers(0, 999))
@settings(deadline=None, max_examples=30)
def test_gradients_pass_where_nothing_is_clipped(bits, seed):
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    scale, limit = best_scale(weight.detach(), bits), 2 ** (bits - 1) - 1
    fake_quantize_rows(weight, scale, bits).sum().backward()
    steps = (weight.detach() / scale[:, None]).abs()
    sure = (steps - limit - 0.5).abs() > 1e-4  # at the very edge rounding may go either way
    assert torch.equal(weight.grad[sure], (steps < limit + 0.5).float()[sure])


def test_a_row_of_zeros():
    scale = best_scale(torch.zeros(2, 5), 4)
    assert (scale > 0).all() and not fake_quantize_rows(torch.zeros(2, 5), scale, 4).any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_int8_layer_has_exactly_the_weights_that_were_trained_with(bits, bias):
    torch.manual_seed(0)
    layer, x = fake_quant_linear(nn.Linear(48, 32, bias=bias), bits), torch.randn(4, 48)
    with torch.no_grad(): layer.weight += 0.02 * torch.randn(32, 48)  # as training does: away from where the step was chosen
    small = int8_linear(layer, bits=8)
    assert small.bits == bits
    assert torch.equal(unpack(small.weight, bits, 48) * small.scale[:, None], fake_quantize_rows(layer.weight, layer.scale, bits))
    assert (small(x) - layer(x)).norm() < 0.02 * layer(x).norm()


def test_stacked_layers_keep_their_own_scales():
    layers = [fake_quant_linear(nn.Linear(16, 8), 4) for _ in range(3)]
    stacked = int8_linear(*layers)
    assert torch.equal(stacked.scale, torch.cat([layer.scale for layer in layers])) and stacked.bits == 4


@pytest.mark.parametrize("make", [tiny.classifier, tiny.distilbert, lambda: shrink(tiny.classifier(), neurons=[40, 20, 10], first_token=True)])
def test_every_linear_layer_and_the_given_model_is_untouched(make):
    given_one = make()
    same, before = fingerprint(given_one), given_one.logits(TEXTS)
    aware = fake_quantize(given_one, 8)
    linears = [m for m in aware.model.modules() if isinstance(m, nn.Linear)]
    assert linears and all(isinstance(m, FakeQuantLinear) for m in linears)
    assert fingerprint(given_one) == same and (aware.logits(TEXTS) - before).abs().max() < 0.05
    small = quantize(aware)
    assert not any(isinstance(m, nn.Linear) for m in small.model.modules())
    assert (small.logits(TEXTS) - aware.logits(TEXTS)).abs().max() < 0.05


@pytest.mark.parametrize("bits", [2, 4])
def test_training_moves_the_weights_beneath_and_the_integers_follow(bits):
    teacher = tiny.classifier()
    aware = fake_quantize(teacher, bits)
    student = distill(teacher, tiny.task(30), aware, learning_rate=1e-2)
    old, new = (c.model.bert.encoder.layer[0].output.dense for c in (aware, student))
    assert isinstance(new, FakeQuantLinear) and new.bits == bits and torch.equal(new.scale, old.scale)
    assert not torch.equal(new.weight, old.weight) and not torch.equal(new.integers()[0], old.integers()[0])
    down = quantize(student).model.bert.encoder.layer[0].down
    assert isinstance(down, Int8Linear) and torch.equal(unpack(down.weight, bits, down.in_features), new.integers()[0])


def test_embeddings_may_be_quantized_before():
    aware = fake_quantize(quantize(tiny.classifier(), embedding_bits=4, linear=False))
    assert quantize(aware).logits(TEXTS).isfinite().all()


def test_fake_quantizing_again_changes_the_bits():
    again = fake_quantize(fake_quantize(tiny.classifier(), 4), 3)
    assert {m.bits for m in again.model.modules() if isinstance(m, FakeQuantLinear)} == {3}


def test_a_fingerprint_tells_the_bits():
    assert fingerprint(fake_quantize(tiny.classifier(), 4)) != fingerprint(fake_quantize(tiny.classifier(), 3))


def test_both_load_in_a_fresh_process(tmp_path):
    aware = fake_quantize(tiny.classifier(), 3)
    both = {"aware": aware, "small": quantize(aware)}
    for name, model in both.items(): save(model, tmp_path / name)
    code = ("import json, sys, ecomopt; texts = json.loads(sys.argv[1]);"
            "print(json.dumps([ecomopt.load(path).logits(texts).tolist() for path in sys.argv[2:]]))")
    paths = [str(tmp_path / name) for name in both]
    done = subprocess.run([sys.executable, "-c", code, json.dumps(TEXTS), *paths], capture_output=True, text=True, check=True)
    for model, there in zip(both.values(), json.loads(done.stdout)): assert torch.allclose(torch.tensor(there), model.logits(TEXTS), atol=1e-5)
    assert quantize(load(tmp_path / "aware")).logits(TEXTS).equal(both["small"].logits(TEXTS))


def gpt2() -> Classifier:
    config = GPT2Config(vocab_size=60, n_positions=8, n_embd=64, n_layer=1, n_head=2, pad_token_id=0)
    return Classifier(GPT2ForSequenceClassification(config).eval(), tiny.tokenizer())


@pytest.mark.parametrize("wrong, what", [
    (dict(bits=1), "1 bits"), (dict(bits=9), "9 bits"), (dict(bits=4.0), "4.0 bits"), (dict(classifier=None), "no classifier"),
    (dict(classifier=gpt2()), "unsupported architecture GPT2"), (dict(classifier=quantize(tiny.classifier())), "quantized already"),
])
def test_bad_input_is_refused_before_anything_is_copied(monkeypatch, wrong, what):
    asked = {"classifier": tiny.classifier()} | wrong
    monkeypatch.setattr(copy, "deepcopy", lambda model: pytest.fail("work was begun"))
    with pytest.raises(EcomoptError, match=what): fake_quantize(**asked)
