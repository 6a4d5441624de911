"""Grid, random search and successive halving: no trial is lost, no point is asked twice; and bad input."""
import json
import time
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from killed import outputs_and_lines
from skopt.space import Categorical, Integer, Real

from ecomopt import EcomoptError
from ecomopt.tune.search import (
    Exhausted,
    GridSearch,
    Journal,
    ListSearch,
    RandomSearch,
    Trial,
    _best,
    _check_space,
    _number,
    _values_of,
    search,
    successive_halving,
)

SPACE = {"rate": Real(1e-6, 1e-2, "log-uniform"), "layers": Integer(1, 6), "pooling": Categorical(["mean", "first"])}


def loss(params: dict) -> float:
    return abs(np.log10(params["rate"]) + 4) + params["layers"] / 10 + (params["pooling"] == "mean")


def run(objective=loss, searcher=None, n_trials=8, backend="threading", **options) -> list[Trial]:
    with joblib.parallel_config(backend=backend):
        return search(objective, searcher or RandomSearch(SPACE), n_trials, show_progress_bar=False, **options)


def told(trials: list[Trial]) -> list: return [(trial.number, trial.params, trial.value) for trial in trials]


# the space

@pytest.mark.parametrize("space, what", [
    ({}, "not a search space"),
    ([("rate", (0.1, 1.0))], "not a search space"),
    ({3: (0.1, 1.0)}, "not a search space"),
    ({"rate": (1.0, 0.1)}, "less than"),
    ({"rate": (0.1, 0.1)}, "is invalid"),
    ({"rate": (0.0, 1.0, "log-uniform")}, "log-uniform"),
    ({"rate": (-1.0, 1.0, "log-uniform")}, "log-uniform"),
    ({"layers": (0, 3, "log-uniform")}, "log-uniform"),
    ({"rate": (0.0, float("inf"))}, "do not fit"),
    ({"pooling": []}, "is invalid"),
    ({"pooling": Categorical([("a",), ("b",)])}, "not plain"),
    ({"pooling": ["mean", "mean"]}, "not all different"),
    ({"pooling": Categorical([float("nan"), 1.0])}, "not all different"),
    ({"pooling": ["1", 1]}, "not all different"),
    ({"rate": (1e-6, 1e-2, "log")}, "no prior 'log'"),
    ({"rate": "0.1"}, "is invalid"),
])
def test_bad_spaces(space, what):
    with pytest.raises(EcomoptError, match=what): RandomSearch(space)


@pytest.mark.parametrize("categories", [[None, "a", 1], ["a", 0.5], [True, False], [0.1, 3, True]])
def test_categories_come_back_as_they_are(categories):
    points = RandomSearch({"it": Categorical(categories)}).ask(len(categories))
    assert {repr(point["it"]) for point in points} == {repr(category) for category in categories}


@pytest.mark.parametrize("seed", [None, -1, 1.5, "a", 2**32])
def test_bad_seeds(seed):
    with pytest.raises(EcomoptError, match="seed"): RandomSearch(SPACE, seed)


@pytest.mark.parametrize("params, what", [
    ({"rate": 1e-3, "layers": 3, "poling": "mean"}, "Did you mean 'pooling'"),
    ({"rate": 1e-3, "layers": 3}, "missing"),
    ({"rate": 1.0, "layers": 3, "pooling": "mean"}, "outside"),
    ({"rate": 1e-3, "layers": 7, "pooling": "mean"}, "outside"),
    ({"rate": 1e-3, "layers": 3, "pooling": "last"}, "outside"),
])
def test_bad_params(params, what):
    with pytest.raises(EcomoptError, match=what): RandomSearch(SPACE).tell(params, 1.0)


def test_values_are_even_on_their_scale():
    assert np.allclose(_values_of(Real(1e-4, 1e-2, "log-uniform"), 3), [1e-4, 1e-3, 1e-2])
    assert _values_of(Integer(1, 100, "log-uniform"), 3) == [1, 10, 100] and _values_of(Integer(1, 3), 9) == [1, 2, 3]
    assert _values_of(Real(2.0, 4.0), 1) == [3.0] and _values_of(Categorical(["a", "b"]), 1) == ["a", "b"]


# ask and tell

@pytest.mark.slow
@settings(max_examples=20)
@given(seed=st.integers(0, 2**31 - 1), n=st.integers(1, 40))
def test_points_are_new_plain_and_inside(seed, n):
    searcher = RandomSearch(SPACE, seed)
    points = searcher.ask(n)
    assert len({json.dumps(point) for point in points}) == n
    assert all([type(value) for value in point.values()] == [float, int, str] for point in points)
    assert all(point[name] in dimension for point in points for name, dimension in _check_space(SPACE).items())
    assert points == RandomSearch(SPACE, seed).ask(n)


def test_a_small_space_is_used_up_and_no_more():
    searcher = RandomSearch({"layers": (1, 3), "pooling": ["mean", "first"]})
    assert len({tuple(point.values()) for point in searcher.ask(99)}) == 6
    with pytest.raises(Exhausted): searcher.ask()
    assert len(run(lambda params: params["layers"], GridSearch({"layers": (1, 3)}, 2), n_trials=99)) == 2


def test_draws_follow_the_prior():
    rates = np.log10([point["rate"] for point in RandomSearch(SPACE).ask(400)])
    assert np.allclose(np.quantile(rates, [0.25, 0.5, 0.75]), [-5, -4, -3], atol=0.35)


def test_grid_has_every_combination():
    grid = GridSearch(SPACE, {"rate": 3, "layers": 2, "pooling": 1})
    assert len(grid.points) == 12 and {point["layers"] for point in grid.points} == {1, 6}
    for levels in (0, {"rate": 3}, 2.5):
        with pytest.raises(EcomoptError, match="levels"): GridSearch(SPACE, levels)


@pytest.mark.parametrize("n", [0, -1, 1.5])
def test_ask_for_a_whole_number(n):
    with pytest.raises(EcomoptError, match="n is"): RandomSearch(SPACE).ask(n)


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.int64(1), np.array(1.0), torch.tensor(1.0), True])
def test_numbers_of_all_kinds(value):
    assert _number(value) == 1.0 and type(_number(value)) is float


@pytest.mark.parametrize("value", ["1.0", None, 1j, [1.0], np.array([1.0, 2.0]), {}])
def test_not_a_number(value):
    with pytest.raises(EcomoptError, match="not a number"): _number(value)


def test_failures_are_trials():
    def fragile(params):
        if params["layers"] > 3: raise RuntimeError("out of memory")
        return float("nan") if params["pooling"] == "mean" else 1.0
    trials = run(fragile, n_trials=20)
    errors = {trial.error for trial in trials}
    assert len(trials) == 20 and errors == {None, "RuntimeError: out of memory", "The value is nan."}
    assert all((trial.value is None) == (trial.error is not None) for trial in trials) and _best(trials).value == 1.0
    trials = run(lambda params: 1 / 0, n_trials=3)
    with pytest.raises(EcomoptError, match="None of 3 trials.*ZeroDivisionError"): _best(trials)


def test_budgets():
    begun = time.monotonic()
    trials = run(lambda params: time.sleep(0.02) or 1.0, n_trials=None, timeout=0.2)
    assert 1 <= len(trials) < 1 + (time.monotonic() - begun) / 0.02
    assert run(n_trials=None, timeout=0.0) == []
    with pytest.raises(EcomoptError, match="budget"): run(n_trials=None)


def test_the_bar_counts_and_tells_the_best(tmp_path, capsys):
    journal = tmp_path / "journal"
    run(journal=journal, n_trials=3)
    assert "trials" not in capsys.readouterr().err
    trials = search(loss, RandomSearch(SPACE), 8, journal=journal)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "8/8" in last and f"best {_best(trials).value:.4g}" in last


# the journal

def test_one_line_a_trial(tmp_path):
    trials = run(journal=tmp_path / "deep" / "journal.jsonl")
    lines = (tmp_path / "deep" / "journal.jsonl").read_text().splitlines()
    assert [Trial(**json.loads(line)) for line in lines[1:]] == trials


@pytest.mark.parametrize("n_jobs", [1, 3])
@pytest.mark.parametrize("cut", range(0, 200, 23))
def test_goes_on_after_a_kill_in_mid_write(tmp_path, cut, n_jobs):
    journal = tmp_path / "journal.jsonl"
    whole = told(run(n_jobs=1))
    run(journal=journal)
    journal.write_bytes(journal.read_bytes()[:-1 - cut])
    assert told(run(journal=journal, n_jobs=n_jobs)) == whole
    assert len(journal.read_text().splitlines()) == 9


@pytest.mark.parametrize("n_jobs", [2, 4])
def test_an_unfinished_round_is_finished(tmp_path, n_jobs):
    journal = tmp_path / "journal.jsonl"
    whole = run(journal=journal, n_jobs=n_jobs, n_trials=8)
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:-2], lines[-1]]))  # the last but one was lost
    again = run(journal=journal, n_jobs=n_jobs, n_trials=8)
    assert [(t.number, t.params, t.round) for t in again] == [(t.number, t.params, t.round) for t in whole]


def test_another_search_may_go_on(tmp_path):
    run(journal=tmp_path / "journal", n_trials=5)
    trials = run(searcher=RandomSearch(SPACE, seed=7), journal=tmp_path / "journal", n_trials=9)
    assert len({tuple(trial.params.values()) for trial in trials}) == 9
    assert [trial.number for trial in trials] == list(range(9))


def test_journals_of_version_0_1_0_go_on(tmp_path):
    journal = tmp_path / "journal"
    trials = run(journal=journal, n_trials=5)
    journal.write_text(journal.read_text().replace('"params": ', '"settings": ').replace('"round": ', '"start": '))
    assert '"settings"' in journal.read_text() and run(journal=journal, n_trials=5) == trials
    assert told(run(journal=journal)) == told(run())


def test_journals_that_do_not_fit(tmp_path):
    journal = tmp_path / "journal.jsonl"
    run(journal=journal, n_trials=3)
    other = RandomSearch({**SPACE, "layers": Integer(1, 7)})
    with pytest.raises(EcomoptError, match="another space"): run(journal=journal, searcher=other)
    lines = journal.read_text().splitlines()
    for broken in ("{broken", "[1, 2]", '{"number": 0}'):
        journal.write_text("\n".join([lines[0], broken, *lines[2:]]) + "\n")
        with pytest.raises(EcomoptError, match="Line 2"): run(journal=journal)
        assert len(journal.read_text().splitlines()) == 4  # nothing was thrown away


def test_a_last_line_that_lacks_only_its_end_is_a_trial(tmp_path):
    journal = tmp_path / "journal"
    trials = run(journal=journal, n_trials=3)
    journal.write_bytes(journal.read_bytes()[:-1])
    def never(params): raise AssertionError("all of it is in the journal")
    assert run(never, journal=journal, n_trials=3) == trials
    assert len(run(journal=journal, n_trials=4)) == 4 == len(journal.read_text().splitlines()) - 1


@pytest.mark.parametrize("cut", [0, 1, 30, 60])
def test_a_killed_first_line_is_written_again(tmp_path, cut):
    journal = tmp_path / "journal"
    with Journal(journal, SPACE): first = journal.read_bytes()
    journal.write_bytes(first[:cut])
    run(journal=journal, n_trials=2)
    assert journal.read_bytes().startswith(first) and len(journal.read_text().splitlines()) == 3


@pytest.mark.parametrize("content", [b"what I know", b"text,stars\ngood,5\nbad", bytes(range(256)), b"[1, 2]", b"\n"])
def test_other_files_are_left_alone(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(EcomoptError, match="no journal"): run(journal=tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content


def test_journals_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "journal", "/proc/journal"):
        with pytest.raises(EcomoptError, match="cannot be written"): run(journal=path)


def test_no_second_process(tmp_path):
    with Journal(tmp_path / "journal", SPACE), pytest.raises(EcomoptError, match="Another process"):
        run(journal=tmp_path / "journal")
    assert len(run(journal=tmp_path / "journal")) == 8


@pytest.mark.parametrize("answer", ["good", None, [0.5]])
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_not_a_number_stops_and_loses_nothing(tmp_path, answer, n_jobs):
    journal, calls = tmp_path / "journal", tmp_path / "calls"
    calls.mkdir()
    def late(params):
        (calls / f"{params['rate']}").touch()
        return answer if len(list(calls.iterdir())) > 5 else loss(params)
    with pytest.raises(EcomoptError, match="not a number"): run(late, journal=journal, n_jobs=n_jobs)
    assert len(journal.read_text().splitlines()) - 1 in (4, 5)
    assert [t.params for t in run(journal=journal, n_jobs=n_jobs)] == [t.params for t in run()]


PROGRAM = """
import sys, time
from ecomopt.tune.search import RandomSearch, search
if __name__ == "__main__":
    def objective(params): return time.sleep(0.1) or params["x"]
    trials = search(objective, RandomSearch({"x": (0.0, 1.0)}), 12, journal=sys.argv[1], show_progress_bar=False)
    print([(trial.number, trial.params) for trial in trials])
"""


@pytest.mark.slow
def test_killed_for_real(tmp_path):
    killed, whole, written = outputs_and_lines(PROGRAM, 4, tmp_path)
    assert written < 13
    assert killed == whole != ""


# in parallel, and stopping early

@pytest.mark.slow
@pytest.mark.parametrize("n_jobs, backend", [(2, "loky"), (-1, "threading")])
def test_parallel_trials_are_the_same_trials(n_jobs, backend):
    assert told(run(n_jobs=n_jobs, backend=backend)) == told(run())


def budgeted(params: dict, budget: float) -> float: return loss(params) + 1 / budget


def test_successive_halving_keeps_the_best(tmp_path):
    def halved(objective):
        return successive_halving(
            objective, RandomSearch(SPACE), 27, (1, 3, 9), journal=tmp_path / "half.jsonl", show_progress_bar=False
        )
    rungs = halved(budgeted)
    assert {budget: len(trials) for budget, trials in rungs.items()} == {1: 27, 3: 9, 9: 3}
    assert _best(rungs[9]).params == _best(rungs[1]).params
    assert {path.name for path in Path(tmp_path).glob("*.jsonl")} == {f"half.{b}.jsonl" for b in (1, 3, 9)}
    def never(params, budget): raise AssertionError("all of it is in the journals")
    assert halved(never) == rungs


def test_successive_halving_drops_failures():
    def fragile(params, budget): return loss(params) if params["layers"] > 3 else float("nan")
    rungs = successive_halving(fragile, RandomSearch(SPACE), 9, (1, 9), show_progress_bar=False)
    assert all(trial.value is not None for trial in rungs[9])


@pytest.mark.parametrize("n, budgets, left", [(9, (0.1, 3 * 0.1), [9, 3]), (3, (0.7, 2.1), [3, 1])])
def test_computed_budgets_may_be_off_by_rounding(n, budgets, left):
    rungs = successive_halving(budgeted, RandomSearch(SPACE), n, budgets, show_progress_bar=False)
    assert [len(trials) for trials in rungs.values()] == left


@pytest.mark.parametrize("budgets", [(1,), (3, 1), (0, 1), (1, 99)])
def test_bad_budgets(budgets):
    with pytest.raises(EcomoptError, match="budgets"): successive_halving(budgeted, RandomSearch(SPACE), 9, budgets)


def test_points_of_a_list():
    points = [{"rate": 1e-3, "layers": n, "pooling": "mean"} for n in (3, 1, 2)]
    assert [trial.params["layers"] for trial in run(searcher=ListSearch(SPACE, points))] == [3, 1, 2]
    with pytest.raises(EcomoptError, match="missing"): ListSearch(SPACE, [{"rate": 1e-3}])
