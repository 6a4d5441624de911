"""Static ranges: what is chosen, what is clipped, what is saved; and bad input."""
import copy
import json
import subprocess
import sys

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomopt import EcomoptError
from ecomopt.compress.calibrate import (
    METHODS,
    Histogram,
    StaticLinear,
    activation_histograms,
    calibrate,
    static_range,
)
from ecomopt.compress.quantize import Int8Linear, quantize
from ecomopt.compress.structured import prune_structured
from ecomopt.core.artifact import save
from ecomopt.core.train import fingerprint

TEXTS = tiny.task(40).train["text"][:]


def int8_layers(classifier) -> dict[str, Int8Linear]:
    return {name: m for name, m in classifier.model.named_modules() if isinstance(m, Int8Linear)}


def histogram(x: torch.Tensor, bins: int = 2048) -> Histogram:
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    return Histogram(torch.histc(x, bins, low, high), low, high)


def squared_error(x: torch.Tensor, low: float, high: float) -> float:
    scale = (high - low) / 254
    return ((x.clamp(low, high) / scale).round() * scale - x).square().mean().item()


@pytest.fixture(scope="module")
def quantized():
    return quantize(tiny.classifier())


@given(st.integers(0, 999), st.floats(-50, 50), st.floats(1e-3, 1e3), st.floats(1, 200))
@settings(max_examples=60)
def test_every_range_contains_zero_and_lies_inside_of_the_histogram(seed, middle, size, outlier):
    x = (torch.randn(500, generator=torch.Generator().manual_seed(seed)) + middle) * size
    x[0] *= outlier
    seen = histogram(x)
    width = (seen.high - seen.low) / len(seen.counts)
    for method in METHODS:
        low, high = static_range(seen, method)
        assert seen.low - width <= low <= 0 <= high <= seen.high + width and low < high
    assert static_range(seen, "minmax") == (seen.low, seen.high)


@given(st.integers(0, 999), st.floats(1, 100))
@settings(max_examples=40)
def test_the_mse_range_is_not_worse_than_the_whole_one(seed, outlier):
    x = torch.randn(4000, generator=torch.Generator().manual_seed(seed))
    x[0] *= outlier
    seen = histogram(x)
    assert squared_error(x, *static_range(seen, "mse")) <= 1.05 * squared_error(x, seen.low, seen.high)


@pytest.mark.parametrize("percentile", [51, 90, 99, 99.9])
def test_a_percentile_leaves_out_what_it_says(percentile):
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    seen = histogram(x)
    low, high = static_range(seen, "percentile", percentile)
    width = (seen.high - seen.low) / len(seen.counts)
    def inside(low, high): return 100 * ((x >= low) & (x <= high)).double().mean().item()
    assert inside(low + width, high - width) < percentile <= inside(low, high) + 1e-3  # in whole bins


def test_an_unknown_method_has_no_range():
    with pytest.raises(EcomoptError, match="'max' is not known"): static_range(histogram(torch.randn(9)), "max")


def test_all_of_the_numbers_is_the_whole_range():
    seen = histogram(torch.randn(1000))
    assert static_range(seen, "percentile", 100) == pytest.approx((seen.low, seen.high))


def test_the_histograms_count_every_number_once(quantized):
    one = ["the battery is awful"]
    tokens = len(quantized.encode(one)[0])
    seen = activation_histograms(quantized, one, bins=64)
    assert seen.keys() == int8_layers(quantized).keys()
    for name, layer in int8_layers(quantized).items():
        rows = tokens if "encoder" in name else 1  # pooler and classifier read one token
        assert seen[name].counts.sum() == rows * layer.in_features and seen[name].low <= 0 <= seen[name].high


def test_observing_leaves_nothing_behind(quantized):
    def attributes(): return [set(vars(layer)) for layer in int8_layers(quantized).values()]
    before, keys = quantized.logits(TEXTS), attributes()
    activation_histograms(quantized, TEXTS)
    assert torch.equal(quantized.logits(TEXTS), before) and attributes() == keys


def test_a_text_that_fails_leaves_nothing_behind(quantized):
    with pytest.raises(Exception): activation_histograms(quantized, [None])
    assert not any("quantize_input" in vars(layer) for layer in int8_layers(quantized).values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "make", [tiny.classifier, tiny.distilbert, lambda: prune_structured(tiny.classifier(), first_token=True)]
)
def test_the_logits_stay_nearly_the_same_and_the_given_model_is_untouched(make, method):
    small = quantize(make())
    before, same = small.logits(TEXTS), fingerprint(small)
    static = calibrate(small, TEXTS, method)
    assert all(isinstance(layer, StaticLinear) for layer in int8_layers(static).values())
    assert (static.logits(TEXTS) - before).abs().max() < 0.05
    assert fingerprint(small) == same and not any(isinstance(m, StaticLinear) for m in small.model.modules())


def test_logits_do_not_depend_on_the_rest_of_the_batch(quantized):
    static = calibrate(quantized, TEXTS)
    short, long = "good", "the battery is awful and it broke slow slow slow"
    assert torch.allclose(static.logits([short]), static.logits([short, long])[:1], atol=1e-4)


def test_what_lies_outside_is_clipped_and_the_input_is_left_alone():
    layer = StaticLinear(8, 4)
    layer.range.copy_(torch.tensor([-1.0, 2.0]))
    x = torch.linspace(-5, 5, 16).view(2, 8)
    kept = x.clone()
    integers, scale, zero = layer.quantize_input(x)
    assert ((integers.float() - zero) * scale - x.clamp(-1, 2)).abs().max() <= scale / 2 * 1.001
    assert torch.equal(x, kept)


@pytest.mark.parametrize("x", [torch.full((2, 8), 1e30), torch.full((2, 8), -1e30), torch.full((2, 8), torch.inf)])
def test_huge_inputs_go_to_the_ends(x):
    layer = StaticLinear(8, 4)
    layer.range.copy_(torch.tensor([-1.0, 2.0]))
    integers, scale, zero = layer.quantize_input(x)
    assert torch.allclose((integers.float() - zero) * scale, x.clamp(-1, 2), atol=scale)


def test_where_all_inputs_are_zero_the_range_stays_dynamic():
    small = quantize(tiny.classifier())
    layer = small.model.bert.encoder.layer[1]
    layer.norm1.weight.data.zero_()
    layer.norm1.bias.data.zero_()  # the input of `up` is zero
    static = calibrate(small, TEXTS)
    layer = static.model.bert.encoder.layer[1]
    assert type(layer.up) is Int8Linear and type(layer.qkv) is StaticLinear
    assert static.logits(TEXTS).isfinite().all()


def test_an_iterable_of_texts_will_do(quantized):
    assert fingerprint(calibrate(quantized, (text for text in TEXTS))) == fingerprint(calibrate(quantized, TEXTS))


@pytest.mark.slow
def test_loads_in_a_fresh_process(tmp_path, quantized):
    static = calibrate(quantized, TEXTS)
    save(static, tmp_path / "static")
    code = (
        "import json, sys, ecomopt\n"
        "print(json.dumps(ecomopt.load(sys.argv[1]).logits(json.loads(sys.argv[2])).tolist()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "static"), json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), static.logits(TEXTS), atol=1e-5)


@pytest.mark.parametrize("wrong, what", [
    (dict(texts=[]), "no calibration texts"),
    (dict(texts="one text"), "no calibration texts"),
    (dict(texts=[None]), "no calibration texts"),
    (dict(method="median"), "'median'"),
    (dict(percentile=50), "percentile is 50"),
    (dict(percentile=101), "percentile is 101"),
    (dict(percentile=float("nan")), "percentile is nan"),
    (dict(quantized=None), "no int8 classifier"),
])
def test_bad_input_is_refused_before_any_work(monkeypatch, quantized, wrong, what):
    monkeypatch.setattr(copy, "deepcopy", lambda model: pytest.fail("work was begun"))
    with pytest.raises(EcomoptError, match=what): calibrate(**{"quantized": quantized, "texts": TEXTS} | wrong)


def test_only_int8_models_with_dynamic_ranges(quantized):
    with pytest.raises(EcomoptError, match="no int8 classifier"): calibrate(tiny.classifier(), TEXTS)
    with pytest.raises(EcomoptError, match="fixed already"): calibrate(calibrate(quantized, TEXTS), TEXTS)
