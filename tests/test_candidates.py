"""What can be tried: goals, budgets, the space of recipes, costs before training, gates."""
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from ecomopt import EcomoptError, Goal, Recipe
from ecomopt.core.steps import step_kinds
from ecomopt.optimize.candidates import (
    RecipeSpace,
    _is_lost,
    _label_order,
    _no_lost_class,
    _reloads,
    _same_labels,
    _small,
    apply_steps,
    build_untrained,
    file_bytes,
    measure_costs,
    parse_budget,
    rung,
    search_space,
)
from ecomopt.optimize.recipe import StepContext


@pytest.mark.parametrize("text, seconds", [
    ("90s", 90), ("20min", 1200), ("1.5h", 5400), (30, 30), ("5 m", 300), ("2 sec", 2), (" .5h ", 1800),
])
def test_budgets(text, seconds): assert parse_budget(text) == seconds


@pytest.mark.parametrize("wrong", ["soon", 0, "0min", -5, "5 days", "", None, "1e9h", float("nan"), float("inf"), [5]])
def test_wrong_budgets_are_refused(wrong):
    with pytest.raises(EcomoptError, match="budget"): parse_budget(wrong)


@pytest.mark.parametrize("wrong", [
    {"max_drop": 0}, {"max_drop": 1}, {"max_drop": -0.1}, {"max_drop": "1"}, {"max_latency_ms": 0}, {"max_bytes": -1},
    {"minimize": "latencies"}, {"minimize": None}, {"max_class_drop": 2}, {"max_perplexity": 0},
    {"max_latency_ms": float("nan")},
])
def test_impossible_goals_are_refused(wrong):
    with pytest.raises(EcomoptError): Goal(**wrong)


@pytest.fixture(scope="module")
def context(): return StepContext(tiny.task(), tiny.classifier())


@pytest.fixture(scope="module")
def space(): return RecipeSpace({name: kind.ranges(StepContext(tiny.task(), tiny.classifier()))
                                 for name, kind in step_kinds().items() if kind.ranges(StepContext(
                                     tiny.task(), tiny.classifier()))})


@settings(max_examples=100)
@given(st.integers(0, 2**31))
def test_a_point_is_a_recipe_and_back(space, seed):
    for point, steps in space.propose(np.random.default_rng(seed), [], 30):
        assert space.point(steps) == pytest.approx(point) and ((point >= 0) & (point <= 1)).all()
        assert Recipe(steps).steps == steps == space.fit(steps)
        assert space.steps(point) == steps


def test_variations_are_near_what_is_good(space):
    good = space.fit([{"prune_structured": {"layers": 2}}, {"distill": {}}, {"quantize": {}}])
    near = space.propose(np.random.default_rng(0), [good], 200)
    base = space.point(good)
    distances = [np.abs(point - base).sum() for point, _ in near]
    far = [np.abs(point - base).sum() for point, _ in space.propose(np.random.default_rng(0), [], 200)]
    assert np.median(distances) < np.median(far)


def test_a_recipe_of_other_kinds_does_not_fit(space):
    assert space.fit([{"prune": {}}]) is None
    assert space.fit([{"quantize": {}}, {"convert": {}}]) is None
    assert space.fit([]) == []


def test_rungs_divide_the_texts():
    steps = [{"prune_structured": {"layers": 2}}, {"distill": {"augment": 5}}, "quantize"]
    parts = [step["distill"] for step in rung(Recipe(steps).steps, 1.0) if "distill" in step]
    assert [(p["start"], p["stop"]) for p in parts] == [(0.0, 0.1), (0.1, 1 / 3), (1 / 3, 1.0)]
    assert all(p["augment"] == 5 for p in parts)


@pytest.mark.slow
def test_parts_of_a_training_use_each_text_once(context):
    from ecomopt.optimize.recipe import _part
    seen = []
    for start, stop in ((0.0, 0.1), (0.1, 1 / 3), (1 / 3, 1.0)):
        part = _part(context, 10, start, stop)
        seen += [*part.train["text"], *part.transfer["text"]]
    own = Counter([*context.task.train["text"], *context.task.transfer["text"]])
    assert not own - Counter(seen) and len(seen) == own.total() + 10
    with pytest.raises(EcomoptError, match="start"): _part(context, 0, 0.5, 0.5)


@pytest.mark.slow
def test_cost_does_not_depend_on_training(context):
    steps = [{"prune_structured": {"layers": 2}}, {"distill": {"stop": 0.5}}, {"quantize": {}}]
    untrained, trained = build_untrained(steps, context), apply_steps(context.teacher, steps, context)
    assert abs(file_bytes(untrained) - file_bytes(trained)) < 1000  # the configuration says a little more
    costs = measure_costs(untrained, context.teacher, context.task.valid["text"], 10.0, 100.0, 1, 3)
    assert costs["disk_bytes"] == file_bytes(untrained) and min(costs.values()) > 0


def test_the_teacher_itself_is_a_recipe(context):
    assert build_untrained([], context) is context.teacher


@pytest.mark.slow
def test_what_a_teacher_does_not_support_is_left_out():
    for teacher in (tiny.classifier(), tiny.distilbert()):
        found, left_out = search_space(StepContext(tiny.task(), teacher))
        assert {"quantize", "distill", "keep_layers"} <= found.kinds.keys()
        assert all(one["why"] and one["what"] for one in left_out)
        for name in found.kinds: assert name not in [one["what"] for one in left_out]


# ---------------------------------------------------------------- gates

class OneClass(torch.nn.Module):
    """A model that says the same for every text."""
    device = torch.device("cpu")

    def __init__(self, config): super().__init__(); self.config = config  # noqa: E702

    def forward(self, input_ids, **others):
        from types import SimpleNamespace
        return SimpleNamespace(logits=torch.tensor([[0.0, 1.0]]).repeat(len(input_ids), 1))


class Padded(OneClass):
    """A model whose answer depends on the padding."""

    def forward(self, input_ids, **others):
        from types import SimpleNamespace
        n = input_ids.shape[1]
        return SimpleNamespace(logits=torch.tensor([[0.0, 1.0 if n % 2 else -1.0]]).repeat(len(input_ids), 1))


def test_answers_that_depend_on_the_batch_fail_a_gate(context):
    texts = context.task.valid["text"][:]
    good = context.teacher
    assert _same_labels(good, texts)["passed"]
    texts = ["good", "the battery broke", "a b c d e f"]
    assert not _same_labels(replace(good, model=Padded(good.model.config)), texts)["passed"]


def test_a_class_that_is_given_up_fails_a_gate():
    actual = np.array([0] * 95 + [1] * 5)
    teacher = actual.copy()
    assert not _no_lost_class(np.zeros(100, int), teacher, actual, ("a", "b"), 0.1)["passed"]
    assert _no_lost_class(actual, teacher, actual, ("a", "b"), 0.1)["passed"]
    assert _no_lost_class(np.zeros(100, int), np.zeros(100, int), actual, ("a", "b"), 0.1)["passed"]
    few = np.array([0, 1] * 10 + [2])
    assert _no_lost_class(few % 2, few, few, ("a", "b", "c"), 0.1)["passed"], "one lost text may be chance"
    few = np.append(few, [2, 2])
    assert not _no_lost_class(few % 2, few, few, ("a", "b", "c"), 0.1)["passed"]
    worse = actual.copy()
    worse[:60] = 1
    assert "a" in _no_lost_class(worse, teacher, actual, ("a", "b"), 0.1)["detail"]


def test_labels_are_found_by_name(context):
    assert _label_order(context.teacher, ("positive", "negative"))["passed"]
    assert not _label_order(context.teacher, ("good", "bad"))["passed"]


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_answers(context):
    gate = _reloads(context.teacher, context.task.valid["text"][:])
    assert gate["passed"], gate


def test_gains_count_in_the_recall_of_a_class():
    assert not _is_lost(40, 20, 100, 0.1) and _is_lost(40, 0, 100, 0.1)
    assert not _is_lost(1, 0, 1, 0.1) and not _is_lost(0, 0, 0, 0.1)


@pytest.mark.slow
def test_cascades_are_searched_where_the_smallest_student_has_one_layer():
    found, left_out = search_space(StepContext(tiny.task(), tiny.classifier(layers=24)))
    assert "cascade" in found.kinds, left_out


def test_the_large_stage_is_converted_with_the_texts_of_its_task(context, monkeypatch):
    from ecomopt.optimize import recipe
    monkeypatch.setattr(recipe, "convert", lambda model, runtime, precision, task: len(task.train))
    small = _small(context)
    assert recipe._large_stage(small, "onnxruntime") == len(small.task.train) < len(context.task.train)
    assert recipe._large_stage(context, "onnxruntime") == len(context.task.train)


def test_what_can_be_cut_of_other_architectures():
    from ecomopt.optimize.recipe import _sizes
    model = tiny.distilbert()
    assert _sizes(StepContext(tiny.task(), model))["neurons"][1] == model.model.config.hidden_dim
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, intermediate_size=32)
    fake = SimpleNamespace(teacher=SimpleNamespace(model=SimpleNamespace(config=config)))
    assert _sizes(fake)["heads"] == [4, 8], "heads that share a key are cut together"
