"""The tuner: no point twice, no trial lost, the same in threads, processes and on Ray; better than random search."""
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
from ecomopt.tune.bayes import Tuner, log_warp, partial_dependence, plot_tuning
from ecomopt.tune.gp import log_expected_improvement
from ecomopt.tune.search import Exhausted, RandomSearch, Trial, _best, search

SPACE = {"rate": Real(1e-6, 1e-2, "log-uniform"), "layers": Integer(1, 6), "pooling": Categorical(["mean", "first"])}
PLANE = {"x": (-5.0, 10.0), "y": (0.0, 15.0)}


def loss(params: dict) -> float:
    return abs(np.log10(params["rate"]) + 4) + params["layers"] / 10 + (params["pooling"] == "mean")


def valley(params: dict) -> float: return branin([params["x"], params["y"]])


def run(objective=loss, tuner=None, n_trials=10, backend="threading", **options) -> list[Trial]:
    with joblib.parallel_config(backend=backend):
        return search(objective, tuner or Tuner(SPACE), n_trials, show_progress_bar=False, **options)


def told(trials: list[Trial]) -> list: return [(trial.number, trial.params, trial.value) for trial in trials]


# ask and tell

@pytest.mark.slow
@settings(max_examples=5)
@given(seed=st.integers(0, 2**31 - 1))
def test_points_are_new_plain_and_inside(seed):
    trials = run(tuner=Tuner(SPACE, seed), n_trials=9)
    assert len({json.dumps(trial.params) for trial in trials}) == 9
    for trial in trials:
        assert [type(value) for value in trial.params.values()] == [float, int, str]
        assert all(trial.params[name] in dimension for name, dimension in SPACE.items())


def test_a_small_space_is_used_up_and_no_more():
    tuner = Tuner({"layers": (1, 3), "pooling": ["mean", "first"]})
    for _ in range(6):
        point = tuner.ask()
        tuner.tell(point, float(point["layers"]))
    assert len({tuple(trial.params.values()) for trial in tuner.trials}) == 6
    with pytest.raises(Exhausted): tuner.ask()


@pytest.mark.parametrize("categories", [["sqrt", 0.5], [None, "a", 1e-7], [True, 2], ["a", "b", "c"]])
def test_categories_come_back_as_they_are(categories):
    def objective(params): return params["x"] + categories.index(params["it"])
    trials = run(objective, Tuner({"it": Categorical(categories), "x": (0.0, 1.0)}), n_trials=12)
    assert {repr(trial.params["it"]) for trial in trials} == {repr(category) for category in categories}
    assert not any(trial.error for trial in trials)


def test_without_real_numbers_it_finds_the_best_of_many():
    space = {"a": Integer(0, 19), "b": Integer(0, 9)}
    trials = run(lambda point: (point["a"] - 13)**2 + 3 * (point["b"] - 2)**2, Tuner(space), n_trials=20)
    assert _best(trials).value == 0.0


def test_failures_are_avoided_and_survived():
    def fragile(params):
        if params["x"] > 5: raise MemoryError("x is too large")
        return float("nan") if params["y"] > 12 else valley(params)
    trials = run(fragile, Tuner(PLANE), n_trials=16)
    assert len(trials) == 16 and _best(trials).value < 10 and any(trial.error for trial in trials)
    def never(params): raise ValueError("no")
    assert all(trial.value is None for trial in run(never, n_trials=7))


def test_a_batch_is_spread_out():
    tuner = Tuner(PLANE)
    run(valley, tuner, n_trials=10)
    points = np.array([list(point.values()) for point in tuner.ask(4)]) / 15
    gaps = np.linalg.norm(points[:, None] - points[None], axis=-1)[np.triu_indices(4, 1)]
    assert gaps.min() > 1e-3 and gaps.max() > 0.1 and len(tuner.pending) == 4


@pytest.mark.slow
def test_better_than_random_search():
    ours = [_best(run(valley, Tuner(PLANE, seed), 16)).value for seed in range(5)]
    random = [_best(run(valley, RandomSearch(PLANE, seed), 16)).value for seed in range(5)]
    assert np.median(ours) < np.median(random)


def test_a_warm_start_comes_first():
    earlier = run(n_trials=12)
    tuner = Tuner(SPACE, seed=1, warm_start=earlier)
    ranked = sorted(earlier, key=lambda trial: trial.value)
    assert tuner.ask(2) == [trial.params for trial in ranked[:2]] and len(tuner.initial_points) == 4
    with pytest.raises(EcomoptError, match="no hyperparameter"): Tuner(PLANE, warm_start=earlier)


def test_cheap_trials_are_preferred_if_cost_aware():
    def epochs(cost_aware):
        tuner = Tuner({"rate": Real(1e-4, 1.0, "log-uniform"), "epochs": Integer(1, 100)}, cost_aware=cost_aware)
        for _ in range(14):
            point = tuner.ask()
            value = (np.log10(point["rate"]) + 2)**2  # epochs change nothing but the cost
            tuner.tell(point, value, seconds=0.01 * point["epochs"])
        return np.mean([trial.params["epochs"] for trial in tuner.trials[4:]])
    assert epochs(True) < epochs(False)


@pytest.mark.parametrize("n", [0, -1, 2.5])
def test_bad_input(n):
    with pytest.raises(EcomoptError, match="n_initial_points"): Tuner(SPACE, n_initial_points=n)


@settings(max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.floats(0.1, 100), st.floats(-10, 10))
def test_log_warp_keeps_order_and_does_not_depend_on_the_unit(values, unit, shift):
    values = np.round(values, 3)
    warped = log_warp(values)
    assert warped.min() == 0 and np.isfinite(warped).all() and (np.diff(warped[np.argsort(values)]) >= 0).all()
    assert np.allclose(warped, log_warp(unit * values + shift), atol=1e-4)


def test_log_warp_uses_the_mean_if_the_median_is_the_best():
    assert np.allclose(log_warp([1.0, 1.0, 1.0, 5.0]), [0, 0, 0, np.log(5)])
    assert log_warp([2.0, 2.0]).tolist() == [0, 0]


def test_acquisition_per_second_is_the_mean_over_the_posterior_of_the_time():
    tuner = Tuner({"rate": (0.0, 1.0)}, cost_aware=True)
    for rate in (0.1, 0.4, 0.5, 0.9): tuner.tell({"rate": rate}, (rate - 0.45)**2, seconds=1 + 5 * rate)
    optimizer, points = tuner._optimizer(4), [{"rate": 0.2}, {"rate": 0.7}]
    process, log_time = optimizer.models[-1].estimators_
    X, rng = optimizer.space.transform([[0.2], [0.7]]), np.random.default_rng(0)
    mean, std = log_time.predict(X, return_std=True)
    per_second = np.exp(-rng.normal(mean, std, (200_000, 2))).mean(0)
    expected = log_expected_improvement(*process.predict(X, return_std=True), 0.0) + np.log(per_second)
    assert np.allclose(tuner._log_acquisition(optimizer, points), expected, atol=0.02)


# resuming

@pytest.mark.slow
@pytest.mark.parametrize("cut", [0, 40, 300])
def test_goes_on_with_the_same_suggestion(tmp_path, cut):
    whole = told(run())
    run(journal=tmp_path / "journal", n_trials=8)
    (tmp_path / "journal").write_bytes((tmp_path / "journal").read_bytes()[:-1 - cut])
    assert told(run(journal=tmp_path / "journal")) == whole


def test_an_unfinished_round_is_finished(tmp_path):
    journal = tmp_path / "journal"
    whole = run(journal=journal, n_jobs=3, n_trials=9)
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:-2], lines[-1]]))
    assert sorted(told(run(journal=journal, n_jobs=3, n_trials=9))) == sorted(told(whole))


PROGRAM = """
import sys, time
from ecomopt.tune.bayes import Tuner
from ecomopt.tune.search import search
if __name__ == "__main__":
    def objective(params): return time.sleep(0.1) or (params["x"] - 3)**2 + params["y"]
    tuner = Tuner({"x": (-5.0, 10.0), "y": (0.0, 15.0)})
    trials = search(objective, tuner, 9, journal=sys.argv[1], show_progress_bar=False)
    print([(trial.number, trial.params) for trial in trials])
"""


@pytest.mark.slow
def test_killed_for_real(tmp_path):
    killed, whole, written = outputs_and_lines(PROGRAM, 7, tmp_path)
    assert written < 10
    assert killed == whole != ""


# in parallel: one test for all backends

@pytest.fixture(scope="module")
def ray():
    """Ray on this machine, for the time of the tests."""
    import ray
    from ray.util.joblib import register_ray
    for left in range(4, -1, -1):  # its agent has 15 seconds to start, too few on busy cores (ray-project/ray#65983)
        try: ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        except Exception:
            ray.shutdown()
            if not left: raise
        else: break
    register_ray()
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("backend", ["threading", "loky", "ray"])
def test_parallel_trials(backend, request, tmp_path):
    if backend == "ray": request.getfixturevalue("ray")
    def objective(params):
        if params["x"] > 8: raise RuntimeError("out of memory")
        return float((params["x"] - 3)**2 + params["y"])
    with joblib.parallel_config(backend=backend):
        options = dict(n_trials=10, n_jobs=2, show_progress_bar=False)
        trials = search(objective, Tuner(PLANE), journal=tmp_path / "journal", **options)
    assert [trial.round for trial in trials] == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]
    assert len((tmp_path / "journal").read_text().splitlines()) == 11
    assert told(trials) == told(search(objective, Tuner(PLANE), **options))


# what it has learned

@pytest.mark.slow
@pytest.mark.parametrize("cost_aware", [False, True])
def test_partial_dependence_and_plot(cost_aware):
    tuner = Tuner(SPACE, cost_aware=cost_aware)
    run(tuner=tuner, n_trials=14)
    values, mean = partial_dependence(tuner, "pooling")
    assert values == ["mean", "first"] and mean[0] > mean[1]
    assert len(partial_dependence(tuner, "rate", n=7)[1]) == 7 and len(plot_tuning(tuner).axes) == 4
    with pytest.raises(EcomoptError, match="Did you mean 'rate'"): partial_dependence(tuner, "rat")
    result = tuner.result()
    assert result.fun == tuner.best.value and len(result.x_iters) == 14


def test_nothing_to_show():
    with pytest.raises(EcomoptError, match="None of 0"): plot_tuning(Tuner(SPACE))
