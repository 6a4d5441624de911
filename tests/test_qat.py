"""Quantization-aware training: stored weights are the trained ones, also after training and loading."""
import json
import subprocess
import sys

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ecomopt import EcomoptError
from ecomopt.compress.distill import distill
from ecomopt.compress.qat import FakeQuantLinear, fake_quant_linear, fake_quantize_per_channel, mse_scale, prepare_qat
from ecomopt.compress.quantize import Int8Linear, int8_linear, quantize, unpack_bits
from ecomopt.compress.structured import prune_structured
from ecomopt.core.artifact import load, save

TEXTS = tiny.task(20).train["text"][:]


def weights(rows: int, columns: int, size: float, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size


@given(st.integers(1, 9), st.integers(1, 40), st.integers(2, 8), st.floats(1e-3, 1e3), st.integers(0, 999))
def test_few_levels_a_second_rounding_changes_nothing_and_the_mse_scale_is_best(rows, columns, bits, size, seed):
    W, limit = weights(rows, columns, size, seed), 2 ** (bits - 1) - 1
    scale = mse_scale(W, bits)
    once = fake_quantize_per_channel(W, scale, bits)
    assert all(len(row.unique()) <= 2 * limit + 1 for row in once)
    assert torch.allclose(fake_quantize_per_channel(once, scale, bits), once, atol=1e-5 * size)
    widest = fake_quantize_per_channel(W, W.abs().amax(1).clamp(min=1e-12) / limit, bits)
    assert ((once - W).square().sum(1) <= (widest - W).square().sum(1) * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_gradient_passes_where_nothing_is_clipped(bits):
    W = weights(6, 30, 1.0, 0).requires_grad_()
    limit, scale = 2 ** (bits - 1) - 1, mse_scale(W.detach(), bits)
    upstream = weights(6, 30, 1.0, 1)
    (fake_quantize_per_channel(W, scale, bits) * upstream).sum().backward()
    inside = (W.detach() / scale[:, None]).round().abs() <= limit
    assert torch.equal(W.grad, upstream * inside)


@pytest.mark.parametrize("bits", range(2, 9))
def test_what_is_trained_with_is_what_is_stored(bits):
    layer, x = fake_quant_linear(nn.Linear(48, 32), bits), torch.randn(7, 48)
    small = int8_linear(layer)
    assert small.bits == bits
    stored = unpack_bits(small.weight, bits, 48) * small.scale[:, None]
    assert torch.allclose(stored, fake_quantize_per_channel(layer.weight, layer.scale, bits), atol=1e-6)
    assert (small(x) - layer(x)).norm() < 0.02 * layer(x).norm()  # inputs are rounded to eight bits


def test_a_row_of_zeros():
    linear = nn.Linear(8, 2)
    with torch.no_grad(): linear.weight[0] = 0
    assert torch.isfinite(int8_linear(fake_quant_linear(linear, 2))(torch.randn(3, 8))).all()


@pytest.mark.slow
@pytest.mark.parametrize("start", [
    tiny.classifier,
    tiny.distilbert,
    lambda: prune_structured(tiny.classifier(), heads=2, neurons=[50, 20, 30]),
])
def test_a_trained_model_keeps_its_integers(start):
    teacher, task, original = tiny.classifier(), tiny.task(), start()
    before = original.logits(TEXTS)
    student = distill(teacher, task, prepare_qat(original, 4), epochs=2, learning_rate=1e-3, bf16=False)
    assert torch.equal(original.logits(TEXTS), before)
    small = quantize(student)
    assert all(m.bits == 4 for m in small.model.modules() if isinstance(m, Int8Linear))
    assert (small.logits(TEXTS) - student.logits(TEXTS)).abs().max() < 0.05


@pytest.mark.slow
def test_training_moves_the_latent_weights_and_beats_rounding_at_the_end():
    teacher, task = tiny.classifier(), tiny.task(120)
    rounded = prepare_qat(tiny.classifier(), 2)
    student = prepare_qat(tiny.classifier(), 2)
    aware = distill(teacher, task, student, epochs=8, learning_rate=1e-3, alpha=1.0, bf16=False)
    def off(model): return (model.logits(TEXTS) - teacher.logits(TEXTS)).square().mean()
    assert off(aware) < 0.5 * off(rounded)
    for one, other in zip(aware.model.modules(), rounded.model.modules()):
        if not isinstance(one, FakeQuantLinear): continue
        assert torch.equal(one.scale, other.scale) and not torch.equal(one.weight, other.weight)


@pytest.mark.slow
@pytest.mark.parametrize("stored", [lambda c: c, quantize])
def test_a_fresh_process_answers_the_same(stored, tmp_path):
    model = stored(prepare_qat(tiny.classifier(), 3))
    path = save(model, tmp_path / "model")
    assert torch.equal(load(path).logits(TEXTS), model.logits(TEXTS))
    code = "import json, sys, ecomopt; print(ecomopt.load(sys.argv[1]).logits(json.loads(sys.argv[2])).tolist())"
    command = [sys.executable, "-c", code, str(path), json.dumps(TEXTS)]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert torch.allclose(torch.tensor(json.loads(there)), model.logits(TEXTS), atol=1e-5)


@pytest.mark.parametrize("bits", [0, 1, 9, 4.0, None, "4"])
def test_impossible_bits(bits):
    with pytest.raises(EcomoptError, match="bits"): prepare_qat(tiny.classifier(), bits)


def test_what_cannot_be_trained():
    with pytest.raises(EcomoptError, match="no classifier"): prepare_qat(tiny.classifier().model)
    with pytest.raises(EcomoptError, match="already"): prepare_qat(quantize(tiny.classifier()))
    with pytest.raises(EcomoptError, match="already"): prepare_qat(prepare_qat(tiny.classifier()))
