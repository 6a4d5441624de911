"""Recipes: checked before any work, run step by step, found again after a kill, tried again after an error."""
import functools
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ecomopt import EcomoptError, Recipe, load
from ecomopt.compress.distill import keep_layers
from ecomopt.core.steps import _KINDS, StepKind, register_step, step_kind, step_kinds
from ecomopt.core.train import fingerprint
from ecomopt.optimize import recipe as recipe_module
from ecomopt.optimize.recipe import StepContext

STEPS = [{"prune_structured": {"layers": 2}}, {"distill": {"epochs": 1}}, "quantize"]
QUICK = dict(repeats=1, calls=2, threads=1, memory=False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def counted(monkeypatch):
    """How often each kind of step was applied."""
    counts = {}
    for name, kind in step_kinds().items():
        def apply(model, context, name=name, kind=kind, **options):
            counts[name] = counts.get(name, 0) + 1
            return kind.apply(model, context, **options)
        apply.__signature__ = inspect.signature(kind.apply)
        apply.__annotations__, apply.__module__ = kind.apply.__annotations__, kind.apply.__module__
        monkeypatch.setitem(_KINDS, name, StepKind(name, apply, kind.space, kind.cannot_follow, kind.must_follow))
    return counts


# plain data

WAYS = [
    ["quantize"],
    [{"quantize": None}],
    [("quantize", {"embedding_bits": 4})],
    [{"prune_structured": {"layers": 2, "vocabulary": True}}, {"distill": {"epochs": 0.5}}, "quantize", "calibrate"],
    [{"share_weights": {"embedding_bits": None, "group": None}}, "distill", "codebooks_to_int8"],
    [],
]


@pytest.mark.parametrize("steps", WAYS)
def test_yaml_and_python_are_the_same(steps, tmp_path):
    recipe = Recipe(steps, seed=3)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == Recipe.from_yaml(str(tmp_path / "recipe.yaml")) == recipe
    assert Recipe.from_yaml(yaml.safe_dump(recipe.steps) + "\n").steps == recipe.steps


@pytest.mark.parametrize("steps, message", [
    (["distil"], "Did you mean 'distill'"),
    ([{"distill": {"epoch": 2}}], "Did you mean 'epochs'"),
    ([{"distill": {"epochs": "two"}}], "Give a number"),
    ([{"distill": {"epochs": True}}], "Give a number"),
    ([{"distill": {"augment": 0.5}}], "Give a whole number"),
    ([{"prune_structured": {"layers": "3"}}], "whole number or null"),
    ([{"prune_structured": {"vocabulary": 1}}], "true or false"),
    ([{"distill": {"epochs": float("nan")}}], "Give a number"),
    ([{"distill": {"epochs": 10**400}}], "Give a number"),
    ([{"quantize": {"bits": 9}}], "2 or 3"),
    ([{"prune_structured": {"importance": "taylr"}}], "'taylor'"),
    ([{"quantize": False}], "no step"), ([{"quantize": 0}], "no step"), ([{"quantize": ""}], "no step"),
    ([[[], None]], "no step"), ([{"quantize", "distill"}], "no step"),
    (["prepare_qat", "share_weights"], "cannot follow prepare_qat"),
    (["share_weights", "share_weights"], "cannot follow share_weights"),
    (["prepare_qat", "prepare_qat"], "cannot follow prepare_qat"),
    (["quantize", "distill"], "distill cannot follow quantize"),
    (["prune", "distill"], "distill cannot follow prune"),
    (["share_weights", "prune_structured"], "cannot follow share_weights"),
    ([{"convert": {}}, "quantize"], "cannot follow convert"),
    ([{"convert": {"runtime": "onnxruntime", "precision": "int8_weight_only"}}], "onnxruntime has no int8_weight_only"),
    (["calibrate"], "must follow quantize"),
    (["codebooks_to_int8"], "must follow share_weights"),
    ("quantize", "no list of steps"),
    ({"quantize": {}}, "no list of steps"),
    ([5], "no step"), ([{"quantize": 5}], "no step"), ([{"quantize": {}, "distill": {}}], "no step"),
    ([[]], "no step"),
    ([None], "no step"), ([("quantize", {}, 1)], "no step"), ([{1: {}}], "no step"),
])
def test_what_is_refused_before_any_work(steps, message):
    with pytest.raises(EcomoptError, match=message): Recipe(steps)


@pytest.mark.parametrize("text, message", [
    ("steps: [quantize]\nsed: 1\n", "Did you mean 'seed'"),
    ("steps: [quantize\n", "cannot be read"),
    ("!!python/object/apply:os.system ['true']\n", "cannot be read"),
    ("seed: 1\n  steps: x\n", "cannot be read"),
    ("steps: quantize\nseed: 1\n", "no list"),
    ("5\n", "no list"),
    ("missing.yaml", "cannot be read"),
    ("seed: 1\nseed: 2\nsteps: []\n", "given twice"),
    ("- distill: {epochs: 1, epochs: 2}\n", "given twice"),
    ("- 2024-13-45\n", "cannot be read"),
    ("- !!bool x\n", "cannot be read"),
    pytest.param("[" * 3000 + "\n", "cannot be read", id="deep"),
    ("steps: []\nseed: -1\n", "seed"),
])
def test_yaml_that_is_refused(text, message):
    with pytest.raises(EcomoptError, match=message): Recipe.from_yaml(text)


words = st.text(max_size=9) | st.sampled_from(["quantize", "distill", "epochs", "prune"])
def test_numbers_as_people_write_them():
    read = Recipe.from_yaml("- distill: {learning_rate: 1e-4, epochs: 2}\n")
    assert read == Recipe([{"distill": {"learning_rate": 1e-4, "epochs": 2.0}}])
    assert type(read.steps[0]["distill"]["epochs"]) is float


def test_numbers_of_numpy():
    recipe = Recipe([{"prune_structured": {"layers": np.int64(2), "vocabulary": np.bool_(True)}},
                     {"distill": {"epochs": np.float64(0.5)}}], seed=np.int64(1))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert [type(v) for v in recipe.steps[0]["prune_structured"].values()] == [int, bool] and type(recipe.seed) is int


def test_a_list_of_a_recipe_can_be_changed_without_changing_the_recipe():
    recipe = Recipe(STEPS)
    recipe.to_list()[2]["distill"]["epochs"] = "x"
    assert recipe == Recipe(STEPS)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
)


@given(plain)
def test_any_plain_data_is_a_recipe_or_an_error(data):
    try: recipe = Recipe(data)
    except EcomoptError: return
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@given(st.text(max_size=60))
def test_any_text_is_a_recipe_or_an_error(text):
    try: Recipe.from_yaml(text + "\n")
    except EcomoptError: pass


# kinds

def test_every_kind_has_a_space_of_its_options():
    context = StepContext(tiny.task(), tiny.classifier())
    for name, kind in step_kinds().items():
        space = kind.ranges(context)
        assert name == kind.name and space.keys() <= kind.defaults.keys()
        assert kind.cannot_follow <= step_kinds().keys() and kind.must_follow <= step_kinds().keys()
        for option, values in space.items():
            for value in values if isinstance(values, list) else values[:2]: kind.check({option: value})
        kind.check(kind.defaults)


def test_the_classes_of_a_teacher_are_put_in_the_order_of_the_task():
    task, teacher = tiny.task(), tiny.classifier(labels=("positive", "negative"))
    before, given = fingerprint(teacher), ["good battery", "bad", "a slow screen"]
    turned = StepContext(task, teacher).teacher
    assert turned.labels == tuple(task.labels) and turned.predict(given) == teacher.predict(given)
    torch.testing.assert_close(turned.logits(given), teacher.logits(given).flip(1))
    assert fingerprint(teacher) == before, "the caller's model stays as it is"
    same = tiny.classifier()
    assert StepContext(task, same).teacher is same
    others = tiny.classifier(labels=("a", "b"))
    assert StepContext(task, others).teacher is others


def test_a_kind_of_a_user_joins(monkeypatch):
    monkeypatch.setattr("ecomopt.core.steps._KINDS", dict(_KINDS))
    @register_step("keep", space={"times": (1, 3)}, cannot_follow=["keep"])
    def keep(model, context, *, times: int = 1): return model
    task, teacher = tiny.task(), tiny.classifier(layers=1)
    result = Recipe([{"keep": {"times": 2}}]).run(task, teacher, **QUICK)
    assert fingerprint(result.model) == fingerprint(teacher)
    with pytest.raises(EcomoptError, match="keep cannot follow keep"): Recipe(["keep", "keep"])
    with pytest.raises(EcomoptError, match="no option"):
        register_step("other", space={"time": (1, 3)})(keep)
    with pytest.raises(EcomoptError, match="another step"): register_step("quantize")(keep)
    def untyped(model, context, *, times=1): return model
    def without(model, context, *, times: int): return model
    def odd(model, context, *, times: list = ()): return model
    for function in (untyped, without, odd):
        with pytest.raises(EcomoptError, match="no type or no default"): register_step("odd")(function)


def test_the_code_of_a_users_step_counts(monkeypatch):
    monkeypatch.setattr("ecomopt.core.steps._KINDS", dict(_KINDS))
    task, teacher = tiny.task(), tiny.classifier(layers=2)
    def keep(model, context): return model
    register_step("mine")(keep)
    assert fingerprint(Recipe(["mine"]).run(task, teacher, measure=False).model) == fingerprint(teacher)
    def keep(model, context): return keep_layers(model, 1)
    register_step("mine")(keep)
    assert fingerprint(Recipe(["mine"]).run(task, teacher, measure=False).model) != fingerprint(teacher)


def test_a_step_that_changes_its_input_is_refused(monkeypatch):
    monkeypatch.setattr("ecomopt.core.steps._KINDS", dict(_KINDS))
    @register_step("spoil")
    def spoil(model, context):
        model.model.classifier.bias.data += 1
        return model
    with pytest.raises(EcomoptError, match="changed the model"):
        Recipe(["spoil"]).run(tiny.task(), tiny.classifier(), measure=False)


def test_an_unknown_kind_is_named():
    with pytest.raises(EcomoptError, match="Did you mean 'quantize'"): step_kind("quantise")


# runs

@pytest.mark.slow
def test_a_second_run_computes_nothing_and_gives_the_same(counted):
    task, teacher = tiny.task(), tiny.classifier()
    first = Recipe(STEPS).run(task, teacher, **QUICK)
    assert counted == {"prune_structured": 1, "distill": 1, "quantize": 1}
    again = Recipe(STEPS).run(task, teacher, measure=False)
    assert counted == {"prune_structured": 1, "distill": 1, "quantize": 1}
    assert [fingerprint(s.model) for s in again.steps] == [fingerprint(s.model) for s in first.steps]
    assert list(first.table.index) == ["prune_structured", "distill", "quantize"] and "MB" in first.table
    assert list(again.table) == ["options", "s"]


@pytest.mark.slow
@pytest.mark.parametrize("changed, computed", [
    (dict(steps=[*STEPS[:2], {"quantize": {"embedding_bits": 4}}]), {"quantize"}),
    (dict(steps=[STEPS[0], {"distill": {"epochs": 2}}, "quantize"]), {"distill", "quantize"}),
    (dict(seed=1), {"prune_structured", "distill", "quantize"}),
    (dict(task=tiny.task(seed=1)), {"prune_structured", "distill", "quantize"}),
    (dict(teacher=tiny.classifier(seed=1)), {"prune_structured", "distill", "quantize"}),
])
def test_what_a_result_depends_on(counted, changed, computed):
    def run(steps=STEPS, seed=0, task=tiny.task(), teacher=tiny.classifier()):
        Recipe(steps, seed).run(task, teacher, measure=False)
    run()
    counted.clear()
    run(**changed)
    assert counted.keys() == computed


@pytest.mark.slow
def test_options_as_they_are_applied_are_the_key(counted):
    task, teacher = tiny.task(), tiny.classifier()
    for step in ("quantize", {"quantize": {"embedding_bits": 8}}): Recipe([step]).run(task, teacher, measure=False)
    for epochs in (1, 1.0): Recipe([{"distill": {"epochs": epochs}}]).run(task, teacher, measure=False)
    assert counted == {"quantize": 1, "distill": 1}


def test_measurements_are_found_again(counted, monkeypatch):
    task, teacher = tiny.task(), tiny.classifier()
    first = Recipe(STEPS[:1]).run(task, teacher, **QUICK)
    @functools.wraps(recipe_module.compare)
    def compare(*args, **options): raise AssertionError("measured again")

    monkeypatch.setattr(recipe_module, "compare", compare)
    assert Recipe(STEPS[:1]).run(task, teacher, **QUICK).steps[0].measurements == first.steps[0].measurements


@pytest.mark.parametrize("wrong, message", [
    (dict(repeat=1), "Did you mean 'repeats'"), (dict(split="test"), "no option"), (dict(repeats=0), "repeats"),
    (dict(measure=False, repeats=1), "no option"), (dict(task="reviews"), "task"),
])
def test_arguments_are_checked_before_the_first_step(counted, wrong, message):
    with pytest.raises(EcomoptError, match=message):
        Recipe(STEPS).run(**dict(task=tiny.task(), model=tiny.classifier()) | wrong)
    assert not counted


def test_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EcomoptError, match="one process"): Recipe([]).run(tiny.task(), tiny.classifier())


def test_the_seed_is_that_of_random_importance():
    task, teacher = tiny.task(), tiny.classifier()
    steps = [{"prune_structured": {"neurons": 8, "importance": "random"}}]
    marks = {fingerprint(Recipe(steps, seed).run(task, teacher, measure=False).model) for seed in range(3)}
    assert len(marks) == 3


@pytest.mark.slow
def test_a_failed_step_is_tried_again(counted, monkeypatch):
    task, teacher = tiny.task(), tiny.classifier()
    right = _KINDS["quantize"]
    def fail(model, context, *, embedding_bits: int = 8, bits: int = 8):
        raise EcomoptError("No luck.", "quantize", "Wait.")

    monkeypatch.setitem(_KINDS, "quantize", StepKind("quantize", fail))
    with pytest.raises(EcomoptError, match="No luck"): Recipe(STEPS).run(task, teacher, measure=False)
    monkeypatch.setitem(_KINDS, "quantize", right)
    Recipe(STEPS).run(task, teacher, measure=False)
    assert counted == {"prune_structured": 1, "distill": 1, "quantize": 1}


@pytest.mark.slow
def test_the_artifact_says_how_it_was_made(tmp_path):
    task, teacher = tiny.task(), tiny.classifier()
    result = Recipe(STEPS, seed=2).run(task, teacher, **QUICK)
    path = result.save(tmp_path / "small")
    manifest = json.loads((path / "artifact.json").read_text())
    assert Recipe.from_list(manifest["recipe"]) == Recipe(STEPS, seed=2)
    assert [m["step"] for m in manifest["measurements"]] == ["prune_structured", "distill", "quantize"]
    assert manifest["measurements"][0]["before"]["accuracy"] <= 1
    assert fingerprint(load(path)) == fingerprint(result.model)


def test_steps_are_reported_as_they_finish():
    seen = []
    Recipe(STEPS[:1]).run(tiny.task(), tiny.classifier(), on_step=lambda step: seen.append(step.name), **QUICK)
    assert seen == ["prune_structured"]


RUN = """
import sys, time
sys.path.insert(0, "tests")
import tiny
from ecomopt import Recipe
from ecomopt.core.steps import register_step
@register_step("wait")
def wait(model, context):
    print("waiting", flush=True)
    time.sleep(float(sys.argv[1]))
    return model
Recipe([{"prune_structured": {"layers": 2}}, {"distill": {"epochs": 1}}, "wait", "quantize"]).run(
    tiny.task(), tiny.classifier(), measure=False, on_step=lambda step: print(step.name, flush=True))
"""


@pytest.mark.slow
def test_after_a_kill_only_the_step_under_way_is_repeated(cache):
    root = Path(__file__).parents[1]
    def start(seconds): return subprocess.Popen([sys.executable, "-c", RUN, str(seconds)], cwd=root, text=True,
                                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    killed = start(1000)
    lines = [killed.stdout.readline().strip() for _ in range(3)]
    killed.kill()
    killed.communicate()
    assert lines == ["prune_structured", "distill", "waiting"]
    before = {path: path.stat().st_mtime_ns for path in (cache / "step").glob("*/key.json")}
    assert len(before) == 2
    again = start(0)
    assert again.communicate(timeout=300)[0].split() == ["prune_structured", "distill", "waiting", "wait", "quantize"]
    after = {path: path.stat().st_mtime_ns for path in (cache / "step").glob("*/key.json")}
    assert len(after) == 4 and before.items() <= after.items()


def test_frequent_words_stay_in_every_form_and_inside_a_text():
    texts = ["The Battery broke", "the battery", "a phone"]
    assert recipe_module._frequent_words(texts, 1) == texts
    kept = recipe_module._frequent_words(texts, 2)
    assert sorted(kept) == sorted([*(words := ["The", "the", "Battery", "battery"]), *(f" {w}" for w in words)])
