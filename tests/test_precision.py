"""Mixed precision: what is refused, what is rounded, and a training that float16 does not spoil."""
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from ecomopt import EcomoptError
from ecomopt.accelerate import precision
from ecomopt.accelerate.precision import (
    EmulatedPrecision,
    _check_precision,
    fit,
    precision_arguments,
    supports_precision,
)

LOW = [torch.float16, torch.bfloat16]


@given(st.floats(-60000, 60000, width=32), st.sampled_from(LOW))
def test_rounding_is_torchs_both_ways(value, dtype):
    x = torch.tensor([[value]], requires_grad=True)
    with EmulatedPrecision(dtype): y = F.linear(x, torch.ones(1, 1))
    assert torch.equal(y, x.detach().to(dtype).float())
    y.backward(torch.tensor([[1e-9]]))
    assert torch.equal(x.grad, torch.tensor([[1e-9]]).to(dtype).float())


PRODUCTS = {
    "linear": F.linear,
    "matmul": torch.matmul,
    "@": lambda a, b: a @ b,
    "bmm": lambda a, b: torch.bmm(a[None], b[None])[0],
    "attention": lambda a, b: F.scaled_dot_product_attention(a[None], b[None], b[None])[0],
}


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_takes_and_gives_16_bits(name, dtype):
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with EmulatedPrecision(dtype): y = PRODUCTS[name](a, b)
    rounded = PRODUCTS[name](a.to(dtype).float(), b.to(dtype).float())
    assert torch.equal(y, rounded.to(dtype).float()) and not torch.equal(y, PRODUCTS[name](a, b))


@pytest.mark.parametrize(
    "call",
    [
        torch.exp,
        torch.sum,
        lambda x: x + x,
        lambda x: x * x,
        lambda x: x.softmax(0),
        lambda x: F.layer_norm(x, x.shape),
    ],
)
def test_all_else_is_left_alone(call):
    x = torch.tensor([1e-9, 1.0001, 300.0])
    with EmulatedPrecision(torch.float16): inside = call(x)
    assert torch.equal(inside, call(x))


@pytest.mark.parametrize(
    "flags, has",
    [
        ("fma amx_bf16", "bfloat16"),
        ("fma avx512_fp16", "float16"),
        ("asimd asimdhp", "float16"),
        ("fma avx512_bf16_but_other f16c", None),
        ("", None),
    ],
)
def test_the_flags_of_a_cpu_decide(monkeypatch, flags, has):
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path, encoding=None: f"model name\t: Some\nflags\t\t: {flags}\n")
    for name in ("float16", "bfloat16"):
        assert supports_precision(name) is (name == has)
        if name == has: _check_precision(name)
        else:
            with pytest.raises(EcomoptError, match=name): _check_precision(name)
            _check_precision(name, emulate=True)
            with pytest.raises(EcomoptError, match=name): fit(tiny.classifier(layers=1), tiny.task(), name)
    assert supports_precision("float32")


@pytest.mark.parametrize("bf16", [True, False])
def test_an_accelerator_is_asked(monkeypatch, bf16):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert (
        supports_precision("float32", "cuda")
        and supports_precision("float16", "cuda:0")
        and supports_precision("bfloat16", "cuda") is bf16
    )
    assert not supports_precision("float16", "mps")
    assert precision_arguments("float16") == {"bf16": False, "fp16": True}
    if bf16: assert precision_arguments("bfloat16") == {"bf16": True, "fp16": False}
    else:
        with pytest.raises(EcomoptError, match="bfloat16"): precision_arguments("bfloat16")


@pytest.mark.parametrize("name", precision.PRECISIONS)
@pytest.mark.parametrize("device", ["cuda", "gpu", ""])
def test_a_device_that_is_not_there(monkeypatch, name, device):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert not supports_precision(name, device)
    with pytest.raises(EcomoptError, match=name): _check_precision(name, device)


def test_no_trainer_takes_float16_on_a_cpu(monkeypatch):
    monkeypatch.setattr(precision, "supports_precision", lambda precision, device: True)
    with pytest.raises(EcomoptError, match="float16"): precision_arguments("float16", "cpu")
    assert precision_arguments("bfloat16", "cpu") == {"bf16": True, "fp16": False}


WRONG = [
    *({"precision": name} for name in ("float8", "", None, torch.float16)),
    {"precision": "float8", "emulate": True},
    *(
        {name: value}
        for name in ("epochs", "learning_rate", "batch_size", "loss_weight", "max_norm")
        for value in (0, -1, float("nan"), float("inf"))
    ),
    {"epochs": 1.5},
    {"batch_size": 2.5},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_bad_hyperparameters(wrong):
    with pytest.raises(EcomoptError, match=next(iter(wrong))): fit(tiny.classifier(layers=1), tiny.task(), **wrong)


def test_a_task_that_does_not_fit():
    task = tiny.task()
    with pytest.raises(EcomoptError, match="no sentence"):
        fit(tiny.classifier(layers=1), replace(task, train=task.train.select([])))
    with pytest.raises(EcomoptError, match="labels"): fit(tiny.classifier(layers=1, labels=("a", "b", "c")), task)


def trained(**hyperparameters):
    start = tiny.classifier(layers=1)
    before = [p.clone() for p in start.model.parameters()]
    model, steps = fit(
        start,
        tiny.task(),
        **{"epochs": 12, "batch_size": 10, "learning_rate": 3e-3, "emulate": True, **hyperparameters},
    )
    assert all(torch.equal(a, b) for a, b in zip(before, start.model.parameters()))  # the start is left as it was
    assert all(p.dtype == torch.float32 for p in model.model.parameters())
    return model, steps


def weights(classifier): return torch.cat([p.detach().flatten() for p in classifier.model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize(
    "hyperparameters",
    [
        dict(precision="float32"),
        dict(precision="bfloat16"),
        dict(precision="float16"),
        dict(precision="float16", loss_weight=2.0**-20),
    ],
)
def test_it_learns(hyperparameters):
    model, steps = trained(**hyperparameters)
    assert steps["loss"].iloc[-6:].mean() < 0.3 * steps["loss"].iloc[0] and not steps["skipped"].any()
    test = tiny.task().test
    assert (model.logits(test["text"][:]).argmax(1) == torch.tensor(test["label"][:])).float().mean() > 0.9


def test_float16_without_a_scale_does_not():
    _, steps = trained(precision="float16", loss_weight=2.0**-30, loss_scaling=False)
    assert (
        abs(steps["loss"].iloc[-6:].mean() - steps["loss"].iloc[:6].mean()) < 0.1 and (steps["gradient"] < 0.05).all()
    )


def test_overflow_skips_and_halves():
    _, steps = trained(precision="float16", loss_weight=2.0**6)
    skipped = steps["skipped"].to_numpy()
    assert skipped[0] and not skipped[-1] and (steps["scale"].diff().dropna() <= 0).all()
    assert (steps["scale"].to_numpy()[1:][skipped[:-1]] == steps["scale"].to_numpy()[:-1][skipped[:-1]] / 2).all()


def test_a_skipped_step_changes_nothing():
    model, steps = trained(precision="float16", loss_weight=2.0**40, epochs=1)
    assert steps["skipped"].all() and torch.equal(weights(model), weights(tiny.classifier(layers=1)))


def test_autocast_is_used_where_nothing_is_emulated(monkeypatch):
    monkeypatch.setattr(precision, "supports_precision", lambda precision, device: True)
    (real, _), (emulated, _), (exact, _) = (
        trained(precision=name, emulate=emulate, epochs=1)
        for name, emulate in (("bfloat16", False), ("bfloat16", True), ("float32", False))
    )
    way = weights(exact) - weights(tiny.classifier(layers=1))
    assert not torch.equal(weights(real), weights(emulated))  # the lists differ in small operations
    for model in (real, emulated): assert 1e-4 < (weights(model) - weights(exact)).norm() / way.norm() < 0.5


@pytest.mark.slow
def test_the_same_seed_is_the_same_training():
    (a, first), (b, second), (_, third) = (trained(precision="float16", seed=seed) for seed in (0, 0, 1))
    assert first.equals(second) and torch.equal(weights(a), weights(b)) and not first.equals(third)


@pytest.mark.slow
def test_a_loss_weight_changes_nothing_in_float32():
    (_, first), (_, second) = trained(loss_weight=2.0**-20), trained()
    assert torch.allclose(torch.tensor(first["loss"][:6]), torch.tensor(second["loss"][:6]), rtol=1e-3)


def test_clipping_sees_the_gradient_without_the_scale():
    start, task = tiny.classifier(layers=1), tiny.task()
    runs = [
        fit(start, task, max_norm=1e-9, loss_scaling=loss_scaling) for loss_scaling in (True, False)
    ]  # so short that AdamW's epsilon counts
    free, _ = fit(start, task)
    moved = [(weights(model) - weights(start)).norm() for model in (*(model for model, _ in runs), free)]
    assert torch.allclose(moved[0], moved[1], rtol=1e-2) and moved[0] < 0.5 * moved[2]
