"""Mixed precision: what is refused, what is rounded, and a training that float16 does not spoil."""
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from ecomopt import EcomoptError
from ecomopt.accelerate import precision
from ecomopt.accelerate.precision import Imitated, check_precision, fit, has_float16, precision_arguments


@given(st.floats(-60000, 60000, width=32), st.sampled_from([torch.float16, torch.bfloat16]))
def test_rounding_is_torchs_both_ways(value, dtype):
    x = torch.tensor([[value]], requires_grad=True)
    one = torch.ones(1, 1)
    with Imitated(dtype): y = F.linear(x, one)
    assert torch.equal(y, x.detach().to(dtype).float())
    y.backward(torch.tensor([[1e-9]]))
    assert torch.equal(x.grad, torch.tensor([[1e-9]]).to(dtype).float())


def test_only_products_are_rounded():
    x = torch.tensor([1e-9, 1.0])
    with Imitated(torch.float16):
        assert torch.equal(x + x, 2 * x) and torch.equal(x.exp(), torch.exp(x))
        assert (x[None] @ torch.eye(2)).flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("has", [True, False])
def test_a_precision_is_asked_of_the_device(monkeypatch, has):
    monkeypatch.setattr(precision, "has_float16", lambda device="cpu": has)
    monkeypatch.setattr(precision, "has_bf16", lambda: has)
    check_precision("float32")
    for name in ("float16", "bfloat16"):
        if has: check_precision(name)
        else:
            with pytest.raises(EcomoptError, match=name): check_precision(name)
    if has: assert precision_arguments("bfloat16", "cpu") == {"bf16": True, "fp16": False}
    with pytest.raises(EcomoptError): precision_arguments("float16", "cpu")  # no `Trainer` does
    assert isinstance(has_float16(), bool)


@pytest.mark.parametrize("wrong", [dict(precision="float8"), dict(epochs=0), dict(learning_rate=-1.0), dict(factor=0.0), dict(max_norm=0.0)])
def test_bad_input(wrong):
    with pytest.raises(EcomoptError): fit(tiny.classifier(layers=1), tiny.task(), **wrong)


def trained(**settings):
    start = tiny.classifier(layers=1)
    before = [p.clone() for p in start.model.parameters()]
    model, steps = fit(start, tiny.task(), epochs=12, batch_size=10, learning_rate=3e-3, imitate=True, **settings)
    assert all(torch.equal(a, b) for a, b in zip(before, start.model.parameters()))
    assert all(p.dtype == torch.float32 for p in model.model.parameters())
    return model, steps


@pytest.mark.parametrize("settings", [dict(precision="float32"), dict(precision="bfloat16"), dict(precision="float16"), dict(precision="float16", factor=2.0**-20)])
def test_it_learns(settings):
    model, steps = trained(**settings)
    assert steps["loss"].iloc[-6:].mean() < 0.3 * steps["loss"].iloc[0]


def test_float16_without_a_scale_does_not():
    model, steps = trained(precision="float16", factor=2.0**-30, scaled=False)
    assert abs(steps["loss"].iloc[-6:].mean() - steps["loss"].iloc[:6].mean()) < 0.1 and (steps["gradient"] < 0.05).all()


def test_overflow_skips_and_halves():
    _, steps = trained(precision="float16", factor=2.0**6)
    skipped = steps["skipped"].to_numpy()
    assert skipped[0] and not skipped[-1] and (steps["scale"].diff().dropna() <= 0).all()
    assert (steps["scale"].to_numpy()[1:][skipped[:-1]] == steps["scale"].to_numpy()[:-1][skipped[:-1]] / 2).all()


def test_the_same_seed_is_the_same_training():
    (a, first), (b, second) = trained(precision="float16"), trained(precision="float16")
    assert first.equals(second) and all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters()))


def test_a_factor_changes_nothing_in_float32():
    (_, first), (_, second) = trained(factor=2.0**-20), trained()
    assert torch.allclose(torch.tensor(first["loss"][:6]), torch.tensor(second["loss"][:6]), rtol=1e-3)


def test_clipping_sees_the_gradient_without_the_scale():
    start, task = tiny.classifier(layers=1), tiny.task()
    runs = [fit(start, task, max_norm=1e-3, scaled=scaled)[1]["loss"] for scaled in (True, False)]
    assert torch.allclose(*(torch.tensor(run) for run in runs), rtol=1e-4)
