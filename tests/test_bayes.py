"""The tuner: nothing twice, nothing lost, the same in threads, processes and on Ray; and better than chance."""
import json

import joblib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from killed import outputs_and_lines
from skopt.benchmarks import branin
from skopt.space import Categorical, Integer, Real

from ecomopt import EcomoptError
from ecomopt.tune.bayes import Tuner, bend, dependence, plot_tuning
from ecomopt.tune.search import Exhausted, RandomSearch, Trial, best, search

SPACE = {"rate": Real(1e-6, 1e-2, "log-uniform"), "layers": Integer(1, 6), "pooling": Categorical(["mean", "first"])}
PLANE = {"x": (-5.0, 10.0), "y": (0.0, 15.0)}


def loss(settings: dict) -> float:
    return abs(np.log10(settings["rate"]) + 4) + settings["layers"] / 10 + (settings["pooling"] == "mean")


def valley(settings: dict) -> float: return branin([settings["x"], settings["y"]])


def run(objective=loss, tuner=None, trials=10, backend="threading", **options) -> list[Trial]:
    with joblib.parallel_config(backend=backend):
        return search(objective, tuner or Tuner(SPACE), trials, progress=False, **options)


def told(trials: list[Trial]) -> list: return [(trial.number, trial.settings, trial.value) for trial in trials]


# ask and tell

@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_points_are_new_plain_and_inside(seed):
    trials = run(tuner=Tuner(SPACE, seed), trials=9)
    assert len({json.dumps(trial.settings) for trial in trials}) == 9
    for trial in trials:
        assert [type(value) for value in trial.settings.values()] == [float, int, str]
        assert all(trial.settings[name] in dimension for name, dimension in SPACE.items())


def test_a_small_space_is_used_up_and_no_more():
    tuner = Tuner({"layers": (1, 3), "pooling": ["mean", "first"]})
    for _ in range(6): tuner.tell(point := tuner.ask(), float(point["layers"]))
    assert len({tuple(trial.settings.values()) for trial in tuner.trials}) == 6
    with pytest.raises(Exhausted): tuner.ask()


@pytest.mark.parametrize("categories", [["sqrt", 0.5], [None, "a", 1e-7], [True, 2], ["a", "b", "c"]])
def test_categories_come_back_as_they_are(categories):
    trials = run(lambda settings: settings["x"] + categories.index(settings["it"]), Tuner({"it": Categorical(categories), "x": (0.0, 1.0)}), trials=12)
    assert {repr(trial.settings["it"]) for trial in trials} == {repr(category) for category in categories} and not any(t.error for t in trials)


def test_without_real_numbers_it_finds_the_best_of_many():
    space = {"a": Integer(0, 19), "b": Integer(0, 9)}
    trials = run(lambda point: (point["a"] - 13)**2 + 3 * (point["b"] - 2)**2, Tuner(space), trials=20)
    assert best(trials).value == 0.0


def test_failures_are_avoided_and_survived():
    def fragile(settings):
        if settings["x"] > 5: raise MemoryError("x is too large")
        return float("nan") if settings["y"] > 12 else valley(settings)
    trials = run(fragile, Tuner(PLANE), trials=16)
    assert len(trials) == 16 and best(trials).value < 10 and any(trial.error for trial in trials)
    def never(settings): raise ValueError("no")
    assert all(trial.value is None for trial in run(never, trials=7))


def test_a_batch_is_spread_out():
    tuner = Tuner(PLANE)
    run(valley, tuner, trials=10)
    points = np.array([list(point.values()) for point in tuner.ask(4)]) / 15
    gaps = np.linalg.norm(points[:, None] - points[None], axis=-1)[np.triu_indices(4, 1)]
    assert gaps.min() > 1e-3 and gaps.max() > 0.1 and len(tuner.asked) == 4


def test_better_than_chance():
    ours = [best(run(valley, Tuner(PLANE, seed), 16)).value for seed in range(5)]
    chance = [best(run(valley, RandomSearch(PLANE, seed), 16)).value for seed in range(5)]
    assert np.median(ours) < np.median(chance)


def test_earlier_trials_come_first():
    earlier = run(trials=12)
    tuner = Tuner(SPACE, seed=1, earlier=earlier)
    ranked = sorted(earlier, key=lambda trial: trial.value)
    assert tuner.ask(2) == [trial.settings for trial in ranked[:2]] and len(tuner.first) == 4
    with pytest.raises(EcomoptError, match="no setting"): Tuner(PLANE, earlier=earlier)


def test_cheap_trials_are_preferred_where_seconds_count():
    def epochs(per_second):
        tuner = Tuner({"rate": Real(1e-4, 1.0, "log-uniform"), "epochs": Integer(1, 100)}, per_second=per_second)
        for _ in range(14):
            point = tuner.ask()
            tuner.tell(point, (np.log10(point["rate"]) + 2)**2, seconds=0.01 * point["epochs"])  # epochs change nothing but the price
        return np.mean([trial.settings["epochs"] for trial in tuner.trials[4:]])
    assert epochs(True) < epochs(False)


@pytest.mark.parametrize("initial", [0, -1, 2.5])
def test_bad_input(initial):
    with pytest.raises(EcomoptError, match="initial"): Tuner(SPACE, initial=initial)


@settings(max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.floats(0.1, 100), st.floats(-10, 10))
def test_bending_keeps_order_and_forgets_the_unit(values, unit, shift):
    values = np.round(values, 3)
    bent = bend(values)
    assert bent.min() == 0 and np.isfinite(bent).all() and (np.diff(bent[np.argsort(values)]) >= 0).all()
    assert np.allclose(bent, bend(unit * values + shift), atol=1e-4)


# resuming

@pytest.mark.parametrize("cut", [0, 40, 300])
def test_goes_on_with_the_same_suggestion(tmp_path, cut):
    whole = told(run())
    run(journal=tmp_path / "journal", trials=8)
    (tmp_path / "journal").write_bytes((tmp_path / "journal").read_bytes()[:-1 - cut])
    assert told(run(journal=tmp_path / "journal")) == whole


def test_an_unfinished_round_is_finished(tmp_path):
    journal = tmp_path / "journal"
    whole = run(journal=journal, jobs=3, trials=9)
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:-2], lines[-1]]))
    assert sorted(told(run(journal=journal, jobs=3, trials=9))) == sorted(told(whole))


PROGRAM = """
import sys, time
from ecomopt.tune.bayes import Tuner
from ecomopt.tune.search import search
if __name__ == "__main__":
    objective = lambda s: time.sleep(0.03) or (s["x"] - 3)**2 + s["y"]
    trials = search(objective, Tuner({"x": (-5.0, 10.0), "y": (0.0, 15.0)}), 9, journal=sys.argv[1], progress=False)
    print([(trial.number, trial.settings) for trial in trials])
"""


def test_killed_for_real(tmp_path):
    killed, whole, _ = outputs_and_lines(PROGRAM, 7, tmp_path)
    assert killed == whole != ""


# in parallel: one test for all backends

@pytest.fixture(scope="module")
def ray():
    """Ray on this machine, for the time of the tests."""
    import ray
    from ray.util.joblib import register_ray
    for left in range(4, -1, -1):  # it gives its own agent 15 seconds to start, too few where all cores are busy (ray-project/ray#65983)
        try: ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        except Exception:
            ray.shutdown()
            if not left: raise
        else: break
    register_ray()
    yield
    ray.shutdown()


@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("backend", ["threading", "loky", "ray"])
def test_parallel_trials(backend, request, tmp_path):
    if backend == "ray": request.getfixturevalue("ray")
    def objective(settings):
        if settings["x"] > 8: raise RuntimeError("out of memory")
        return float((settings["x"] - 3)**2 + settings["y"])
    with joblib.parallel_config(backend=backend):
        trials = search(objective, Tuner(PLANE), trials=10, jobs=2, journal=tmp_path / "journal", progress=False)
    assert [trial.start for trial in trials] == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]
    assert len((tmp_path / "journal").read_text().splitlines()) == 11
    assert told(trials) == told(search(objective, Tuner(PLANE), trials=10, jobs=2, progress=False))


# what it has learned

@pytest.mark.parametrize("per_second", [False, True])
def test_dependence_and_plot(per_second):
    tuner = Tuner(SPACE, per_second=per_second)
    run(tuner=tuner, trials=14)
    values, mean = dependence(tuner, "pooling")
    assert values == ["mean", "first"] and mean[0] > mean[1]
    assert len(dependence(tuner, "rate", n=7)[1]) == 7 and len(plot_tuning(tuner).axes) == 4
    with pytest.raises(EcomoptError, match="Did you mean 'rate'"): dependence(tuner, "rat")
    result = tuner.result()
    assert result.fun == tuner.best.value and len(result.x_iters) == 14


def test_nothing_to_show():
    with pytest.raises(EcomoptError, match="None of 0"): plot_tuning(Tuner(SPACE))
