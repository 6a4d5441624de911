"""Searching at its limits: large grids, long searches, wrong arguments, full disks, odd labels."""
import errno
import itertools
import json
import math
import multiprocessing
import os
import resource
import sys
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from skopt.space import Categorical, Integer, Real

from ecomopt import EcomoptError
from ecomopt.tune import search as module
from ecomopt.tune.bayes import Tuner, _informative, log_warp, partial_dependence
from ecomopt.tune.estimator import TransformerClassifier
from ecomopt.tune.gp import GaussianProcess
from ecomopt.tune.search import (
    Exhausted,
    GridSearch,
    Journal,
    ListSearch,
    RandomSearch,
    Trial,
    search,
    successive_halving,
)

SPACE = {"rate": Real(1e-6, 1e-2, "log-uniform"), "layers": Integer(1, 6), "pooling": Categorical(["mean", "first"])}
POINT = {"rate": 1e-3, "layers": 3, "pooling": "mean"}
CASES = int(os.environ.get("ECOMOPT_CASES", "200"))


def loss(params: dict) -> float:
    return abs(np.log10(params["rate"]) + 4) + params["layers"] / 10 + (params["pooling"] == "mean")


def run(objective=loss, searcher=None, n_trials=6, **options) -> list[Trial]:
    with joblib.parallel_config(backend="threading"):
        return search(objective, searcher or RandomSearch(SPACE), n_trials, show_progress_bar=False, **options)


def calls(work) -> int:
    """How many Python functions and generators are entered."""
    count = 0
    def note(frame, event, argument):
        nonlocal count
        count += event == "call"
    sys.setprofile(note)
    try: work()
    finally: sys.setprofile(None)
    return count


def peak(work) -> int:
    """The highest number of bytes in use at once."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()


# grids of any size

@pytest.mark.parametrize("n, levels", [(12, 10), (30, 10), (3, 100_000), (64, 2)])
def test_a_grid_costs_nothing_until_it_is_asked(n, levels):
    space = {f"x{i}": (0.0, 1.0) for i in range(n)}
    def work():
        grid = GridSearch(space, levels)
        points = grid.ask(3)
        assert grid.points.size == levels**n
        assert [list(point.values())[-1] for point in points] == np.linspace(0, 1, levels)[:3].tolist() or levels == 2
        assert grid.points[-1] == dict.fromkeys(space, 1.0) and grid.points[0] == dict.fromkeys(space, 0.0)
    assert peak(work) < 50e6


@pytest.mark.parametrize(
    "levels", [1, 2, {"rate": 3, "layers": 2, "pooling": 1}, {"rate": 1, "layers": 9, "pooling": 5}]
)
def test_the_order_is_that_of_nested_loops(levels):
    grid = GridSearch(SPACE, levels)
    values = [grid.points.values[name] for name in SPACE]
    expected = [dict(zip(SPACE, point)) for point in itertools.product(*values)]
    assert list(grid.points) == expected == grid.points[:] and grid.points[::-2] == expected[::-2]
    assert grid.ask(10**6) == expected
    with pytest.raises(IndexError): grid.points[len(expected)]
    with pytest.raises(Exhausted): grid.ask()


def test_each_point_of_a_grid_is_made_once(monkeypatch):
    made, make = [], module._Grid.__getitem__
    def counted(self, number):
        made.append(number)
        return make(self, number)
    monkeypatch.setattr(module._Grid, "__getitem__", counted)
    grid = GridSearch({f"x{i}": (0.0, 1.0) for i in range(6)}, 4)
    for _ in range(300): grid.tell(grid.ask(), 1.0)
    grid.ask(1700)
    assert len(made) <= 2 * 2000 and len(grid.trials) == 300 and len(grid.pending) == 1700


def test_points_told_by_hand_are_left_out_and_dropped_ones_come_again():
    grid = GridSearch({"a": (1, 3), "b": ["x", "y"]})
    grid.tell({"a": 1, "b": "y"}, 0.5)
    assert grid.ask(2) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]
    grid.pending.clear()
    assert grid.ask(9)[0] == {"a": 1, "b": "x"} and len(grid.pending) == 5
    grid.pending = []
    grid.trials = []
    assert len(grid.ask(9)) == 6


# long searches: the work for a trial does not grow with the trials before it

def grid_of(n): return GridSearch({"x": (0, n - 1), "y": (0.0, 1.0)}, {"x": n, "y": 1})
def random_of(n): return RandomSearch({"x": (0.0, 1.0)})
def list_of(n): return ListSearch({"x": (0, n)}, [{"x": i} for i in range(n)])


@pytest.mark.parametrize("make", [grid_of, random_of, list_of])
@pytest.mark.parametrize("order", ["one by one", "all at once", "backwards"])
def test_work_grows_in_proportion(make, order):
    def work(n):
        searcher = make(n)
        def ask_and_tell():
            for _ in range(1 if order != "one by one" else n):
                points = searcher.ask(n if order != "one by one" else 1)
                for point in points[::-1] if order == "backwards" else points: searcher.tell(point, 1.0)
        count = calls(ask_and_tell)
        assert [trial.number for trial in searcher.trials] == list(range(n)) and not searcher.pending
        return count
    assert work(400) < 2.5 * work(200)


def test_a_journal_of_thousands_of_trials(tmp_path):
    journal, n = tmp_path / "journal", 2000
    def constant(params): return 1.0
    def work(n):
        path = tmp_path / f"journal {n}"
        return [calls(lambda: run(constant, grid_of(500), trials, journal=path)) for trials in (n, n + 1)]
    small, large = work(150), work(300)
    assert large[0] < 2.5 * small[0] and large[1] < 2.5 * small[1]
    with Journal(journal, {"x": (0.0, 1.0)}) as opened: pass
    lines = [json.dumps({"number": i, "params": {"x": i / n}, "round": i, "value": 1.0}) for i in range(n)]
    journal.write_text(journal.read_text() + "\n".join(lines) + "\n")
    trials = run(constant, RandomSearch({"x": (0.0, 1.0)}), n + 3, journal=journal)
    assert [trial.number for trial in trials] == list(range(n + 3)) and not opened.trials
    assert len({trial.params["x"] for trial in trials}) == n + 3


@pytest.fixture
def fitted(monkeypatch) -> list[int]:
    """The numbers of points that Gaussian processes are fitted to."""
    sizes, fit = [], GaussianProcess.fit
    def noted(self, X, y):
        sizes.append(len(X))
        return fit(self, X, y)
    monkeypatch.setattr(GaussianProcess, "fit", noted)
    return sizes


def told(n: int, **options) -> Tuner:
    tuner = Tuner(SPACE, **options)
    state = np.random.default_rng(0)
    for _ in range(n):
        point = {"rate": 10**state.uniform(-6, -2), "layers": int(state.integers(1, 7))}
        point["pooling"] = ["mean", "first"][state.integers(2)]
        tuner.tell(point, loss(point), seconds=state.random())
    return tuner


@pytest.mark.parametrize("options, most", [({}, 200), ({"cost_aware": True}, 200), ({"max_points": 60}, 60)])
def test_a_long_search_is_fitted_to_some_points(fitted, options, most):
    tuner = told(1000, **options)
    assert peak(lambda: tuner.ask(1)) < 300e6
    assert fitted and max(fitted) == most
    assert not any(trial.params == tuner.pending[0].params for trial in tuner.trials)
    assert loss(tuner.pending[0].params) < np.median([trial.value for trial in tuner.trials])


def test_all_points_of_a_short_search_count(fitted):
    tuner = told(30)
    tuner.ask(2)
    assert fitted == [30, 31]
    assert len(tuner.result().x_iters) == len(tuner.result().func_vals) == 32
    long = told(120, max_points=50)
    assert len(long.result().x_iters) == len(long.result().func_vals) == 120
    assert len(partial_dependence(long, "rate", 5, 20)[1]) == 5


@pytest.mark.parametrize("n", [10, 50, 100])
def test_the_points_of_the_fit_are_the_best_and_spread_out(n):
    rng = np.random.default_rng(n)
    X = np.concatenate([0.01 * rng.random((480, 3)), rng.random((20, 3))])  # most of them in one corner
    values = rng.random(500)
    kept = _informative(X, values, n)
    best = np.argsort(values)[:n // 2]
    assert len(set(kept.tolist())) == n and set(best.tolist()) <= set(kept.tolist())
    spread, drawn = X[kept[n // 2:]], X[rng.permutation(500)[:n - n // 2]]
    assert spread.std(0).min() > drawn.std(0).max()
    same = _informative(np.zeros((30, 2)), np.zeros(30), 20)
    assert len(set(same.tolist())) == 20


def test_pending_points_of_a_long_search_are_in_the_fit(fitted):
    tuner = told(300, max_points=40)
    points = tuner.ask(5)
    assert len({tuple(point.values()) for point in points}) == 5
    rates = np.log10([point["rate"] for point in points])
    assert np.unique(rates.round(3)).size > 1 or len({point["layers"] for point in points}) > 1


# finite spaces end, whatever their size

FINITE = [
    {"a": (1, 40, "log-uniform")},
    {"a": (1, 12, "log-uniform"), "b": [True, False]},
    {"a": ["only"], "b": [3]},
    {"a": Categorical(["x", "y", "z"], prior=[0.98, 0.01, 0.01]), "b": (0, 4)},
    {"a": [0.5, "half", None]},
]


@pytest.mark.slow
@pytest.mark.parametrize("space", FINITE)
@pytest.mark.parametrize("make", [RandomSearch, Tuner, lambda space: GridSearch(space, 99)])
def test_more_trials_than_points(space, make):
    searcher = make(space)
    points = searcher.points if isinstance(searcher, GridSearch) else module._all_points(searcher.space)
    size = len(points)
    trials = run(lambda params: float(len(str(params))), searcher, n_trials=10**6)
    assert len({tuple(trial.params.items()) for trial in trials}) == len(trials) == size


@pytest.mark.parametrize("make", [RandomSearch, Tuner])
def test_the_last_points_of_a_large_finite_space_are_found(make):
    searcher = make({"a": (0, 149), "b": (0, 149)})
    for i in range(22_497): searcher.tell({"a": i // 150, "b": i % 150}, None)
    assert {point["b"] for point in searcher.ask(9)} == {147, 148, 149}


def test_random_points_are_never_the_same():
    points = RandomSearch({"a": (0, 9), "b": ["x", "y"], "c": (0.0, 1e-322)}).ask(300)
    assert len({tuple(point.values()) for point in points}) == 300
    assert 1 <= len(RandomSearch({"x": (1.0, math.nextafter(1.0, 2.0))}).ask(5)) <= 2


# one space, many searches

def test_searches_share_no_dimensions():
    space = {"x": Real(0.0, 1.0), "n": Integer(1, 9)}
    alone = RandomSearch({"x": Real(0.0, 1.0), "n": Integer(1, 9)}).ask(20)
    first = RandomSearch(space)
    Tuner(space).ask()
    space["n"].set_transformer("normalize")
    assert first.ask(20) == alone == RandomSearch(space).ask(20)


def test_a_point_that_is_changed_afterwards_changes_no_trial():
    searcher = RandomSearch(SPACE)
    points = searcher.ask(2)
    asked = dict(points[0])
    points[0]["layers"] = 99
    assert searcher.pending[0].params == asked and searcher.tell(asked, 1.0).number == 0


# spaces

@pytest.mark.parametrize("given", [
    (1, 2, "uniform", 10), (0.1, 1.0, "lognormal"), (1, 2, "log"), (1e-3, 1.0, "log-uniform", "x"),  # priors
    (1.0, 0.5), (3, 3), (math.nan, 1.0), (0.0, math.nan), (-math.inf, 0.0), (-1.7e308, 1.7e308), (0, 10**400),  # bounds
    (0.0, 1.0, "log-uniform"), (0, 5, "log-uniform"), (1e-320, 1.0, "log-uniform"), (-(2**60), 2**60), Integer(1.5, 4),
    [], (), None, 3, "mean", b"mean", {1, 2}, {"a": 1}, range(3), np.array(3), iter([1, 2]), object(),  # no list
    [["a"], ["b"]], [{"a": 1}], [np.zeros(2), np.ones(2)], np.zeros((2, 2)), [object(), 1], [1j, 2],  # no values
    ["a", "a"], [1, 1.0], [True, 1], ["1", 1], [0.1, 0.1], [math.nan], [math.inf, 1], ["a\0", "b"], [10**30, 1],
])
def test_spaces_that_are_none(given):
    with pytest.raises(EcomoptError) as caught: RandomSearch({"it": given})
    assert "'it'" in caught.value.where and caught.value.do


@pytest.mark.parametrize(
    "given, values",
    [
        ([3], {3}),
        (["mean"], {"mean"}),
        ([16, 32], {16, 32}),
        ([0.1, 0.2], {0.1, 0.2}),
        (np.array([1, 2]), {1, 2}),
        (np.array([True, False]), {True, False}),
        ([None], {None}),
        (("a", "b"), {"a", "b"}),
        ((np.int64(1), np.int64(2)), {1, 2}),
    ],
)
def test_a_list_is_categories_and_a_tuple_a_range(given, values):
    for make in (RandomSearch, Tuner, GridSearch):
        points = make({"it": given}).ask(9)
        assert {point["it"] for point in points} == values
        assert all(type(point["it"]) in (int, float, bool, str, type(None)) for point in points)


@pytest.mark.parametrize("space", [None, [], "rate", {"": 1}, {1: (0, 1)}, {None: [1]}, {("a",): [1]}, RandomSearch])
def test_no_dictionary_of_dimensions(space):
    for make in (RandomSearch, Tuner, GridSearch, lambda space: Journal("journal", space)):
        with pytest.raises(EcomoptError): make(space)


@pytest.mark.parametrize("name, value", [
    ("rate", "0.001"), ("rate", None), ("rate", [1e-3]), ("rate", np.array([1e-3])), ("rate", math.nan), ("rate", True),
    ("layers", 2.5), ("layers", "3"), ("layers", True), ("layers", 1e300), ("pooling", ["mean"]), ("pooling", {}),
    ("pooling", np.array(["mean", "first"])), ("pooling", 1),
])
def test_values_outside(name, value):
    for use in (lambda p: RandomSearch(SPACE).tell(p, 1.0), RandomSearch(SPACE).seen, lambda p: ListSearch(SPACE, [p])):
        with pytest.raises(EcomoptError, match=f"{name} = .* is outside"): use({**POINT, name: value})


@pytest.mark.parametrize("params", [None, [], "rate", 3, [("rate", 1e-3)], {}, {1: 2}, {"rate": 1e-3}])
def test_no_points(params):
    with pytest.raises(EcomoptError): RandomSearch(SPACE).tell(params, 1.0)
    with pytest.raises(EcomoptError): ListSearch(SPACE, [params])
    with pytest.raises(EcomoptError): ListSearch(SPACE, params if params and not isinstance(params, list) else None)


def test_points_become_plain_python():
    searcher = RandomSearch(SPACE)
    odd = {"pooling": np.str_("mean"), "layers": np.float64(3.0), "rate": np.float32(1e-3)}
    trial = searcher.tell(odd, 1.0)
    assert [type(value) for value in trial.params.values()] == [float, int, str] and list(trial.params) == list(SPACE)
    assert searcher.seen(odd) and json.dumps(trial.params)


# arguments of searches

WHOLE = ["2", 2.0, 2.5, True, np.True_, -1, [2], math.nan, math.inf, object(), np.array([2]), torch.tensor(2.5)]


@pytest.mark.parametrize("bad", WHOLE)
@pytest.mark.parametrize("use", [
    lambda n: RandomSearch(SPACE, seed=n),
    lambda n: RandomSearch(SPACE).ask(n),
    lambda n: GridSearch(SPACE, n),
    lambda n: GridSearch(SPACE, {"rate": 2, "layers": n, "pooling": 1}),
    lambda n: Tuner(SPACE, n_initial_points=n),
    lambda n: Tuner(SPACE, max_points=n),
    lambda n: run(n_trials=n),
    lambda n: successive_halving(loss, RandomSearch(SPACE), n),
])
def test_what_is_counted_is_a_whole_number(use, bad):
    with pytest.raises(EcomoptError): use(bad)


@pytest.mark.parametrize("number", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_of_all_types(number):
    assert RandomSearch(SPACE, number).ask(number) == RandomSearch(SPACE, 3).ask(3)
    assert len(GridSearch(SPACE, number).points) == 3 * 3 * 2
    assert len(run(n_trials=number)) == 3 and len(Tuner(SPACE, n_initial_points=number).initial_points) == 3


@pytest.mark.parametrize("n_jobs", [0, True, False, 1.0, "2", [1], math.nan, np.float64(2)])
def test_bad_numbers_of_jobs(n_jobs):
    with pytest.raises(EcomoptError, match="n_jobs"): run(n_jobs=n_jobs)
    with pytest.raises(EcomoptError, match="n_jobs"):
        successive_halving(lambda params, budget: 1.0, RandomSearch(SPACE), 9, n_jobs=n_jobs, show_progress_bar=False)


@pytest.mark.parametrize("n_jobs", [1, 2, np.int64(2), -1, -2, None, 1000])
def test_good_numbers_of_jobs(n_jobs):
    assert [trial.params for trial in run(n_jobs=n_jobs, n_trials=3)] == [trial.params for trial in run(n_trials=3)]


@pytest.mark.parametrize("options", [
    {"objective": None}, {"objective": "loss"}, {"objective": 1.0},
    {"searcher": RandomSearch}, {"searcher": SPACE}, {"searcher": "random"}, {"searcher": 3},
    {"timeout": "1"}, {"timeout": -1.0}, {"timeout": math.nan}, {"timeout": True}, {"timeout": [1]},
    {"journal": 3}, {"journal": True}, {"journal": b"journal"}, {"journal": ""}, {"journal": "a\0b"},
    {"journal": "~nobody-of-this-name/journal"}, {"journal": Path("/")}, {"n_trials": None},
])
def test_bad_arguments_of_search(options):
    with pytest.raises(EcomoptError): run(**options)


@pytest.mark.parametrize(
    "budgets", [None, 3, "13", ("a", "b"), (1, "3"), (1, None), (math.nan, 3), (1, math.nan), {1: 2}, ()]
)
def test_bad_budgets(budgets):
    with pytest.raises(EcomoptError, match="budgets"): successive_halving(loss, RandomSearch(SPACE), 9, budgets)


@pytest.mark.parametrize(
    "answer", [np.float32(1), torch.tensor(1.0), torch.tensor(1.0, requires_grad=True), np.array(1), True]
)
def test_answers_that_are_numbers(answer):
    assert {trial.value for trial in run(lambda params: answer)} == {1.0}


@pytest.mark.parametrize("answer", [math.nan, -math.inf, np.float32("nan"), torch.tensor(math.inf)])
def test_answers_that_are_failures(answer):
    assert all(trial.value is None and trial.error for trial in run(lambda params: answer))


@pytest.mark.parametrize("answer", [
    None, (1.0, 2.0), [1.0], {}, "1.0", 1j, torch.ones(1), torch.empty(()).to("meta"), np.array("a"), 10**400, object(),
])
def test_answers_that_are_none(answer):
    with pytest.raises(EcomoptError, match="not a number"): run(lambda params: answer)


@pytest.mark.parametrize("seconds", [None, "1", math.nan, math.inf, -1.0, [1.0]])
def test_bad_durations(seconds):
    with pytest.raises(EcomoptError): RandomSearch(SPACE).tell(POINT, 1.0, seconds)


@pytest.mark.parametrize("earlier", [[{"params": POINT}], POINT, 3, "trials", [None], Trial(0, POINT, 0, 1.0)])
def test_bad_warm_starts(earlier):
    with pytest.raises(EcomoptError, match="warm_start"): Tuner(SPACE, warm_start=earlier)


def test_a_warm_start_may_have_failures_of_any_kind():
    values = [None, math.nan, math.inf, 0.5]
    tuner = Tuner(SPACE, warm_start=(Trial(i, {**POINT, "layers": i + 1}, i, v) for i, v in enumerate(values)))
    assert tuner.ask() == {**POINT, "layers": 4}


def test_many_initial_points_are_spread_and_asked_once():
    tuner = Tuner(SPACE, n_initial_points=500)
    count = calls(lambda: tuner.ask(100)), calls(lambda: tuner.ask(100))
    assert count[1] < 1.5 * count[0] and len({tuple(point.values()) for point in tuner.initial_points}) == 500


@pytest.mark.parametrize(
    "categories", [["sqrt", 2**60 + 1], [2**60, 2**60 + 1, 0.5], ["é", "e\u0301", ""], [0, 0.5, "0.25"]]
)
def test_categories_survive_the_tuner(categories):
    trials = run(lambda params: params["x"], Tuner({"it": categories, "x": (0.0, 1.0)}, n_initial_points=8), n_trials=9)
    assert {repr(trial.params["it"]) for trial in trials} == set(map(repr, categories))


@pytest.mark.parametrize("values", [[1.7e308, -1.7e308, 0.0], [0.0, 1e-300, 1e-300, 1e300], [5e-324, 0.0], [1e308] * 3])
def test_values_of_any_size(values):
    warped = log_warp(values)
    assert np.isfinite(warped).all() and (np.diff(warped[np.argsort(values)]) >= 0).all()
    tuner = Tuner(SPACE, n_initial_points=1)
    for i, value in enumerate(values): tuner.tell({**POINT, "layers": i + 1}, value, seconds=10.0**(100 * i))
    assert tuner.ask() and not tuner.seen({**POINT, "layers": 6})


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_nothing_to_warp(values):
    with pytest.raises(EcomoptError, match="finite"): log_warp(values)


@pytest.mark.parametrize(
    "X, y, options",
    [
        (["a", "b"], [1.0, 2.0], {}),
        ([[1.0], [None]], [1.0, 2.0], {}),
        ([[1.0], [2.0, 3.0]], [1.0, 2.0], {}),
        ([[1.0], [2.0]], ["a", "b"], {}),
        (np.empty((2, 0)), [1.0, 2.0], {}),
        ([[1.0], [2.0]], [1.0, 2.0], {"kernel": ["rbf"]}),
        ([[1.0], [2.0]], [1.0, 2.0], {"n_starts": 0}),
        ([[1.0], [2.0]], [1.0, 2.0], {"n_starts": "2"}),
    ],
)
def test_processes_that_cannot_be_fitted(X, y, options):
    with pytest.raises(EcomoptError): GaussianProcess(**options).fit(X, y)


@pytest.mark.parametrize("X", [[0.5], [[0.5, 0.5]], [["a"]], [[math.nan]]])
def test_points_that_cannot_be_predicted(X):
    process = GaussianProcess().fit([[0.1], [0.9]], [1.0, 2.0])
    with pytest.raises(EcomoptError): process.predict(X)
    with pytest.raises(ValueError, match="not fitted"): GaussianProcess().predict([[0.5]])


# the journal

def never(params): raise AssertionError("all of it is in the journal")


def test_home_links_and_relative_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    trials = run(journal="~/journal")
    assert run(never, journal=tmp_path / "journal") == trials and not Path("~").exists()
    (tmp_path / "link").symlink_to(tmp_path / "journal")
    monkeypatch.chdir(tmp_path)
    for same in ("link", "journal", "./journal", Path("~/link")):
        assert run(never, journal=same) == trials
        with Journal("journal", SPACE), pytest.raises(EcomoptError, match="Another process"): run(journal=same)


def test_an_objective_may_change_the_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").mkdir()
    def moving(params):
        os.chdir(tmp_path / "below")
        return loss(params)
    run(moving, journal="journal")
    assert len((tmp_path / "journal").read_text().splitlines()) == 7 and not list((tmp_path / "below").iterdir())


def test_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "loop", tmp_path / ("x" * 300), "/proc/journal"):
        with pytest.raises(EcomoptError): run(journal=path)
    for path in (tmp_path / "pipe" / "journal", "/proc/journal", ""):
        with pytest.raises(EcomoptError): successive_halving(loss, RandomSearch(SPACE), 9, journal=path)


def denied(*arguments, **options): raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("what", ["mkdir", "open", "read_bytes"])
def test_folders_and_files_of_others(tmp_path, monkeypatch, what):
    monkeypatch.setattr(Path, what, denied)
    with pytest.raises(EcomoptError, match="Permission denied"): run(journal=tmp_path / "below" / "journal")


class FullDisk:
    """The disk has room for so many lines."""

    def __init__(self, monkeypatch, lines: int):
        self.lines, self.sync = lines, os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, file):
        self.lines -= 1
        if self.lines < 0: raise OSError(errno.ENOSPC, "No space left on device")
        self.sync(file)


@pytest.mark.parametrize("n_jobs, room", [(1, 1), (1, 4), (3, 1), (3, 3), (3, 5)])
def test_a_full_disk_loses_no_trial(tmp_path, monkeypatch, n_jobs, room):
    journal, calls_made = tmp_path / "journal", []
    def counted(params):
        calls_made.append(params)
        return loss(params)
    whole = [trial.params for trial in run(n_trials=9)]
    disk, searcher = FullDisk(monkeypatch, room), RandomSearch(SPACE)
    with pytest.raises(EcomoptError, match="No space left") as caught:
        run(counted, searcher, 9, journal=journal, n_jobs=n_jobs)
    assert "same searcher and journal" in caught.value.do
    assert len(searcher.trials) == len(calls_made) and all(map(json.loads, journal.read_text().splitlines()))
    disk.lines = 99
    trials = run(counted, searcher, 9, journal=journal, n_jobs=n_jobs)
    assert [trial.params for trial in trials] == whole
    assert len(calls_made) == 9
    assert run(never, journal=journal, n_trials=9) == trials


def test_another_search_goes_on_from_what_was_written_before_the_disk_was_full(tmp_path, monkeypatch):
    disk = FullDisk(monkeypatch, 4)
    with pytest.raises(EcomoptError, match="No space left"): run(journal=tmp_path / "journal")
    disk.lines = 99
    assert [trial.params for trial in run(journal=tmp_path / "journal")] == [trial.params for trial in run()]


def write_until_full(path: Path) -> None:
    """In a process that may write files of so many bytes: half of a line fits."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(EcomoptError, match="cannot be written"): run(journal=path, n_trials=30)


def test_half_a_line_is_taken_back(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=write_until_full, args=(tmp_path / "journal",))
    process.start()
    process.join(60)
    content = (tmp_path / "journal").read_bytes()
    assert process.exitcode == 0 and 400 < len(content) <= 700 and content.endswith(b"}\n")
    assert len(run(journal=tmp_path / "journal", n_trials=9)) == 9


def test_a_journal_that_vanishes(tmp_path):
    journal = tmp_path / "journal"
    def deleting(params):
        journal.unlink(missing_ok=True)
        return loss(params)
    with pytest.raises(EcomoptError, match="No such file"): run(deleting, journal=journal)


def line(**changes) -> str:
    return json.dumps({"number": 3, "params": POINT, "round": 3, "value": 0.5, "seconds": 1.0, "error": None} | changes)


@pytest.mark.parametrize("broken", [
    line(value=math.nan), line(value=math.inf), line(seconds=-math.inf), line().replace("0.5", "1e999"),  # numbers
    line(value="0.5"), line(value=[1]), line(seconds=None), line(number="3"), line(number=-1), line(number=2.5),
    line(number=True), line(round=4), line(round=None), line(number=10**9), line(error=5),
    line(params={}), line(params=None), line(params={"x": 0.5}), line(params={**POINT, "layers": 9}),  # another search
    line(params={**POINT, "rate": math.nan}), line(params={**POINT, "extra": 1}), line(loss=1.0),
    json.dumps({"space": {"x": ["Real", 0.0, 1.0, "uniform"]}}), "3", "null", "[]", "{", "\x00", '"' + "x" * 99,
    "[" * 100_000,
])
def test_lines_that_are_no_trials_of_this_search(tmp_path, broken):
    journal = tmp_path / "journal"
    run(journal=journal, n_trials=3)
    before = journal.read_text()
    journal.write_text(before + broken + "\n")
    with pytest.raises(EcomoptError, match="Line 5 is damaged") as caught: run(journal=journal)
    assert "Remove the line" in caught.value.do and journal.read_text() == before + broken + "\n"
    journal.write_text(before)
    assert len(run(journal=journal)) == 6


def test_a_trial_twice(tmp_path):
    journal = tmp_path / "journal"
    run(journal=journal, n_trials=3)
    journal.write_text(journal.read_text() + journal.read_text().splitlines()[2] + "\n")
    with pytest.raises(EcomoptError, match="Trial 1 is in the journal twice"): run(journal=journal)


@pytest.mark.parametrize("change", [
    lambda text: text.replace(b"\n", b"\r\n"),
    lambda text: text.replace(b"\n", b"\n\n") + b"\n \n",
    lambda text: text + b"\x00" * 50,
    lambda text: text + b'{"number": 3, "par',
    lambda text: text + b'{"number": 3, "params": "\xff\xfe',
    lambda text: text + b"[" * 100_000,
])
def test_journals_that_are_read_all_the_same(tmp_path, change):
    journal = tmp_path / "journal"
    trials = run(journal=journal, n_trials=3)
    journal.write_bytes(change(journal.read_bytes()))
    assert run(journal=journal)[:3] == trials
    assert run(never, journal=journal) == run(never, journal=journal)


def second_process(path: Path) -> None:
    with pytest.raises(EcomoptError, match="Another process"): run(never, journal=path)


def test_a_second_process_waits_for_no_lock_and_breaks_nothing(tmp_path):
    journal = tmp_path / "journal"
    def objective(params):
        process = multiprocessing.get_context("fork").Process(target=second_process, args=(journal,))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        return loss(params)
    trials = run(objective, journal=journal, n_trials=2)
    assert not any(trial.error for trial in trials) and run(never, journal=journal, n_trials=2) == trials


def test_points_asked_by_hand_do_not_exceed_the_budget():
    searcher = RandomSearch(SPACE)
    searcher.ask(20)
    assert len(run(searcher=searcher, n_trials=4)) == 4 and len(searcher.pending) == 16


def test_a_result_does_not_change_with_the_next_search():
    searcher = RandomSearch(SPACE)
    first = run(searcher=searcher, n_trials=3)
    run(searcher=searcher, n_trials=6)
    assert len(first) == 3


# the estimator

TEXTS = tiny.task(40).train["text"][:]
LABELS = np.array(["bad", "good"])[tiny.task(40).train["label"][:]]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A tiny model in a directory."""
    return str(tiny.written(tiny.classifier(layers=1, hidden=32), tmp_path_factory.mktemp("tiny")))


def make(model: str = "none", **others) -> TransformerClassifier:
    return TransformerClassifier(model, **{"epochs": 1, "learning_rate": 5e-3, "batch_size": 8} | others)


@pytest.mark.parametrize("X", [
    None, 3, b"bytes", "text", {"a": 1, "b": 2}, {"a", "b"}, pd.DataFrame({"a": ["x"], "b": ["y"]}), np.array("a"),
    np.array([["a"], ["b"]]), [["a"], ["b"]], ["a", None], ["a", math.nan], ["a", b"b"], pd.Series(["a", None]),
    np.array(["a", None]), ["a", "\ud800"], (x for x in ["a", 2]), iter([]), ["a", pd.NA],
])
def test_no_texts(X):
    with pytest.raises(ValueError) as caught: make().fit(X, ["good", "bad"])
    assert isinstance(caught.value, EcomoptError) and caught.value.where == "X"


@pytest.mark.parametrize(
    "y",
    [
        None,
        "ab",
        3,
        {"a": 1, "b": 2},
        {"a", "b"},
        ["a", None],
        ["a", math.nan],
        ["a", pd.NA],
        [1, math.nan],
        [1.0, math.inf],
        pd.Series(["a", None]),
        pd.Series([1, None]),
        np.array([1.0, math.nan]),
        np.array(["a", None], object),
        ["a", 1],
        [1, "a"],
        [True, "True"],
        [True, 2],
        [b"a", b"b"],
        [{}, {}],
        [["a", "b"], ["b", "a"]],
        ["a", "a"],
        [0, 0],
        np.array([1, 1]),
        pd.Series(["a", "a"]),
        [0.5, 0.7],
        ["a"],
        ["a", "b", "c"],
        [],
        np.eye(2),
        pd.DataFrame({"y": ["a", "b"], "z": ["a", "b"]}),
        [1j, 2j],
    ],
)
def test_no_labels(y):
    with pytest.raises(ValueError) as caught: make().fit(["one", "two"], y)
    assert isinstance(caught.value, EcomoptError) and "y" in caught.value.where


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [tuple, pd.Series, np.array, iter, lambda x: (row for row in x), lambda x: np.array(x, object)]
)
def test_texts_and_labels_of_any_ordered_container(model, kind):
    expected = make(model).fit(TEXTS, LABELS.tolist()).predict_proba(TEXTS)
    classifier = make(model).fit(kind(TEXTS), kind(LABELS.tolist()))
    assert classifier.classes_.tolist() == ["bad", "good"]
    assert np.array_equal(classifier.predict_proba(kind(TEXTS)), expected)
    assert set(classifier.predict(kind(TEXTS))) <= {"bad", "good"}


@pytest.mark.slow
@pytest.mark.parametrize("names", [["z", "a"], [1, 0], [True, False], ["2", "10"]])
def test_names_of_classes_in_any_order(model, names):
    order = np.random.default_rng(0).permutation(40)
    texts, y = [TEXTS[i] for i in order], [names[tiny.task(40).train["label"][i]] for i in order]
    classifier = make(model, epochs=12).fit(texts, y)
    assert classifier.classes_.tolist() == sorted(names) and classifier.score(texts, y) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("scoring", ["f1_macro", "balanced_accuracy", "neg_log_loss", "roc_auc"])
def test_metrics_when_a_class_is_never_predicted(model, scoring):
    rare = np.array(["common"] * 40, object)
    rare[::8] = "rare"
    still = make(model, learning_rate=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, about precision without predictions
        scores = cross_val_score(still, TEXTS, rare, cv=2, scoring=scoring, error_score="raise")
    assert np.isfinite(scores).all()


@pytest.mark.slow
def test_class_weights_help_a_rare_class(model):
    y = np.array(["common"] * 40, object)
    y[::8] = "rare"
    equal = make(model).fit(TEXTS, y).predict_proba(TEXTS)[:, 1].mean()
    for weights in ("balanced", {"rare": 9.0}):
        assert make(model, class_weight=weights).fit(TEXTS, y).predict_proba(TEXTS)[:, 1].mean() > equal


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"class_weight": "even"},
        {"class_weight": {"none": 1.0}},
        {"class_weight": {"good": -1.0}},
        {"class_weight": [1, 2]},
        {"class_weight": 3},
        {"random_state": "a"},
        {"random_state": -1},
        {"random_state": True},
        {"random_state": 2**40},
    ],
)
def test_bad_options_leave_the_estimator_as_it_was(model, options):
    classifier = make(model).fit(TEXTS, LABELS)
    before = classifier.predict_proba(TEXTS[:5])
    with pytest.raises(EcomoptError): classifier.set_params(**options).fit(TEXTS[:8], ["x", "y"] * 4)
    assert classifier.classes_.tolist() == ["bad", "good"]
    assert np.array_equal(classifier.predict_proba(TEXTS[:5]), before)


@pytest.mark.slow
def test_clones_have_the_options_and_not_the_training(model):
    classifier = make(model, class_weight={"good": 2.0}, random_state=np.int64(3)).fit(TEXTS, LABELS)
    other = clone(classifier)
    assert other.get_params() == classifier.get_params() and not hasattr(other, "classes_")
    assert set(other.get_params()) >= {"model", "learning_rate", "class_weight", "random_state"}
    with pytest.raises(ValueError): other.set_params(classweight="balanced")


@pytest.mark.slow
def test_trainings_in_threads_are_those_one_after_the_other(model):
    def fit(seed): return make(model, random_state=seed).fit(TEXTS, LABELS).predict_proba(TEXTS)
    expected = [fit(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool: found = list(pool.map(fit, range(3)))
    assert all(map(np.array_equal, found, expected))
    with joblib.parallel_config(backend="threading"):
        grid = GridSearchCV(make(model), {"learning_rate": [1e-3, 5e-3]}, cv=2, n_jobs=2, error_score="raise")
        assert np.isfinite(grid.fit(TEXTS, LABELS).best_score_)


# anything at all: an error that says what to do, or points inside

junk = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 9), st.floats(), st.text(max_size=3), st.just([]), st.just({}),
    st.sampled_from([np.int64(2), np.float32(0.5), np.array([1]), object(), RandomSearch, "uniform", b"x", 1j]),
)
plain = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(-9, 9), st.text(max_size=3))
numbers = st.one_of(st.integers(-9, 9), st.floats(-9, 9), st.floats(), st.integers())


def mostly(good: st.SearchStrategy, odd: st.SearchStrategy = junk) -> st.SearchStrategy:
    """Now and then something odd."""
    return st.integers(0, 15).flatmap(lambda i: odd if i == 7 else good)


priors = mostly(st.sampled_from([(), ("uniform",), ("log-uniform",)]), st.just(("log",)))
integers = st.builds(lambda a, b, prior: (a, a + b, *prior), st.integers(1, 99), st.integers(1, 99), priors)
reals = st.builds(lambda a, b, prior: (a, a + b, *prior), st.floats(1e-9, 9.0), st.floats(1e-3, 9.0), priors)
choices = st.lists(plain, min_size=1, max_size=4, unique_by=str)
ranges = st.builds(lambda a, b, prior: (a, b, *prior), numbers, numbers, priors)
dimensions = mostly(st.one_of(integers, reals, choices), st.one_of(ranges, junk))
spaces = mostly(st.dictionaries(st.text(max_size=3), dimensions, min_size=1, max_size=4))
whole = mostly(st.integers(1, 6))


def check_inside(space: dict, point: dict) -> None:
    """Independent of the library's own check."""
    assert list(point) == list(space)
    json.dumps(point, allow_nan=False)
    for name, value in point.items():
        dimension = space[name]
        if isinstance(dimension, Categorical):
            assert any(type(value) is type(c) and value == c for c in dimension.categories)
        else:
            assert type(value) is (int if isinstance(dimension, Integer) else float)
            assert dimension.low <= value <= dimension.high


def use(draw, space) -> None:
    """Make a searcher of any kind with any arguments, ask and tell it, and let it search."""
    kind = draw(st.sampled_from(["grid", "random", "tuner", "list"]))
    if kind == "grid": searcher = GridSearch(space, draw(whole))
    elif kind == "random": searcher = RandomSearch(space, draw(whole))
    elif kind == "tuner": searcher = Tuner(space, draw(whole), draw(whole), draw(st.booleans()))
    else: searcher = ListSearch(space, draw(mostly(st.just(RandomSearch(space).ask(9)))))
    answers = draw(st.lists(mostly(numbers), min_size=1, max_size=6))
    for answer in answers[:2]:
        points = searcher.ask(draw(st.one_of(st.none(), whole)))
        for point in points if isinstance(points, list) else [points]:
            check_inside(searcher.space, point)
            searcher.tell(point, answer, draw(mostly(st.floats(0, 9))))
    rest, n_jobs = itertools.cycle(answers), draw(mostly(st.just(1), st.sampled_from([0, True, "2", np.int64(1)])))
    timeout = draw(mostly(st.none(), st.sampled_from([5.0, -1, "x", math.nan])))
    n_trials = draw(mostly(st.integers(1, 12)))
    options = dict(timeout=timeout, n_jobs=n_jobs, show_progress_bar=False)
    trials = search(lambda params: next(rest), draw(mostly(st.just(searcher))), n_trials, **options)
    assert len({tuple(trial.params.values()) for trial in trials}) == len(trials)
    for trial in trials:
        check_inside(searcher.space, trial.params)
        assert trial.value is None or math.isfinite(trial.value)


@pytest.mark.slow
@settings(max_examples=CASES, suppress_health_check=list(HealthCheck), print_blob=True)
@given(data=st.data(), space=spaces)
def test_an_error_that_says_what_to_do_or_points_inside(data, space):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: use(data.draw, space)
        except EcomoptError as error:
            assert error.what and error.where and error.do
            event(f"refused: {error.where.split()[0]}")
        else: event("searched")


def test_a_new_journal_takes_what_the_searcher_has_evaluated(tmp_path):
    searcher = RandomSearch(SPACE)
    first = run(searcher=searcher, n_trials=4)
    trials = run(searcher=searcher, n_trials=6, journal=tmp_path / "journal")
    assert trials[:4] == first and run(never, journal=tmp_path / "journal", n_trials=6) == trials
