"""Recipes: checked before any work, run step by step, found again after a kill, tried again after an error."""
import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ecomopt import EcomoptError, Recipe, load
from ecomopt.core.steps import _KINDS, StepKind, register_step, step_kind, step_kinds
from ecomopt.core.train import fingerprint

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
        apply.__annotations__ = kind.apply.__annotations__
        monkeypatch.setitem(_KINDS, name, StepKind(name, apply, kind.space, kind.cannot_follow, kind.must_follow))
    return counts


# plain data

WAYS = [
    ["quantize"],
    [{"quantize": None}],
    [("quantize", {"embedding_bits": 4})],
    [{"prune_structured": {"layers": 2, "vocabulary": True}}, {"distill": {"epochs": 0.5}}, "quantize", "calibrate"],
    [{"share_weights": {"bits": None, "group": None}}, "distill", "codebooks_to_int8"],
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
    ([{"prune_structured": {"layers": "3"}}], "whole number or nothing"),
    ([{"prune_structured": {"vocabulary": 1}}], "true or false"),
    (["quantize", "distill"], "distill cannot follow quantize"),
    (["prune", "distill"], "distill cannot follow prune"),
    (["share_weights", "prune_structured"], "cannot follow share_weights"),
    ([{"convert": {}}, "quantize"], "cannot follow convert"),
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
])
def test_yaml_that_is_refused(text, message):
    with pytest.raises(EcomoptError, match=message): Recipe.from_yaml(text)


words = st.text(max_size=9) | st.sampled_from(["quantize", "distill", "epochs", "prune"])
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
    for name, kind in step_kinds().items():
        assert name == kind.name and kind.space.keys() <= kind.defaults.keys()
        assert kind.cannot_follow <= step_kinds().keys() and kind.must_follow <= step_kinds().keys()
        for option, values in kind.space.items():
            for value in values: kind.check({option: value})
        kind.check(kind.defaults)


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


def test_an_unknown_kind_is_named():
    with pytest.raises(EcomoptError, match="Did you mean 'quantize'"): step_kind("quantise")


# runs

STEPS = [{"prune_structured": {"layers": 2}}, {"distill": {"epochs": 1}}, "quantize"]


def test_a_second_run_computes_nothing_and_gives_the_same(counted):
    task, teacher = tiny.task(), tiny.classifier()
    first = Recipe(STEPS).run(task, teacher, **QUICK)
    assert counted == {"prune_structured": 1, "distill": 1, "quantize": 1}
    again = Recipe(STEPS).run(task, teacher, measure=False)
    assert counted == {"prune_structured": 1, "distill": 1, "quantize": 1}
    assert [fingerprint(s.model) for s in again.steps] == [fingerprint(s.model) for s in first.steps]
    assert list(first.table.index) == ["prune_structured", "distill", "quantize"] and "MB" in first.table
    assert list(again.table) == ["options", "s"]


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
    assert [killed.stdout.readline().strip() for _ in range(3)] == ["prune_structured", "distill", "waiting"]
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    before = {path: path.stat().st_mtime_ns for path in (cache / "step").glob("*/key.json")}
    assert len(before) == 2
    again = start(0)
    assert again.communicate(timeout=300)[0].split() == ["prune_structured", "distill", "waiting", "wait", "quantize"]
    after = {path: path.stat().st_mtime_ns for path in (cache / "step").glob("*/key.json")}
    assert len(after) == 4 and before.items() <= after.items()
