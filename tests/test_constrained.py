"""Constrained search: Pareto fronts, the acquisition function, rungs, and bad input."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from ecomopt import EcomoptError
from ecomopt.tune.constrained import ConstrainedSearch, log_constrained_improvement, pareto_front
from ecomopt.tune.gp import expected_improvement

COSTS = st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=30)


@given(COSTS)
def test_the_front_is_what_none_dominates(costs):
    costs = np.array(costs, float)
    def dominates(a, b): return (a <= b).all() and (a < b).any()
    assert pareto_front(costs).tolist() == [not any(dominates(a, b) for a in costs) for b in costs]


@pytest.mark.parametrize("wrong", [[1.0, 2.0], [[np.nan, 1.0]], 3.0])
def test_wrong_costs_are_refused(wrong):
    with pytest.raises(EcomoptError): pareto_front(wrong)


@settings(max_examples=50)
@given(st.floats(-3, 3), st.floats(0.01, 2), st.floats(-3, 3), st.floats(-3, 3), st.floats(0.01, 2), st.floats(-3, 3))
def test_improvement_counts_only_as_far_as_feasible(mean, std, best, g, g_std, limit):
    arrays = [np.array([x]) for x in (mean, std, g, g_std)]
    value = log_constrained_improvement(arrays[0], arrays[1], best, [(arrays[2], arrays[3], limit)])[0]
    expected = expected_improvement(*arrays[:2], best)[0] * norm.cdf((limit - g) / g_std)
    assert np.exp(value) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    alone = log_constrained_improvement(arrays[0], arrays[1], None, [(arrays[2], arrays[3], limit)])[0]
    assert alone == pytest.approx(norm.logcdf((limit - g) / g_std))


def seconds(what, before, after): return 5 + 100 * (after - before)
def propose(rng, good): return [(x, tuple(x)) for x in rng.random((50, 2))]
def drop(x, fraction): return 0.1 * (1 - x[0]) ** 2 + 0.01 * np.log10(1 / fraction)


def run(budget: float, limits: dict, first=(), seed: int = 0) -> tuple[ConstrainedSearch, list]:
    """A search on a made-up problem, and all that was asked for."""
    search, spent, asked = ConstrainedSearch("ms", limits, 0.02, propose, seconds, first=first, seed=seed), 0.0, []
    while pair := search.ask(budget - spent):
        candidate, fraction = pair
        asked.append((candidate.what, candidate.fraction, fraction))
        if candidate.costs is None and not search.tell_costs(candidate, {"ms": 1 + 4 * candidate.what[0]}): continue
        spent += seconds(candidate.what, candidate.fraction, fraction)
        search.tell_drop(candidate, fraction, drop(candidate.what, fraction))
    return search, asked


def test_search_keeps_budget_and_limits_and_finds_a_good_candidate():
    search, asked = run(800, {"ms": 4.5})
    best = search.best()
    assert best.costs["ms"] <= 4.5 and drop(best.what, best.fraction) <= 0.03
    assert all(c.out for c in search.candidates if c.costs["ms"] > 4.5)
    assert not any(c.drops for c in search.candidates if c.out)
    spent = sum(seconds(what, before, after) for what, before, after in asked if 1 + 4 * what[0] <= 4.5)
    assert spent <= 800


def test_a_candidate_goes_up_rung_by_rung_and_few_reach_the_last():
    _, asked = run(1000, {})
    by_candidate = {}
    for what, before, after in asked: by_candidate.setdefault(what, []).append((before, after))
    for steps in by_candidate.values():
        assert [b for _, b in steps][:-1] == [a for a, _ in steps][1:]
        assert steps[0][0] == 0.0
    first, last = (sum(any(b == u for _, b in s) for s in by_candidate.values()) for u in (0.1, 1.0))
    assert 0 < last <= first / 3


def test_what_comes_first_is_asked_first_and_the_same_twice():
    first = propose(np.random.default_rng(9), [])[:3]
    _, asked = run(300, {}, first)
    assert [what for what, *_ in asked[:3]] == [what for _, what in first]
    assert run(300, {}, first)[1] == asked != run(300, {}, first, seed=1)[1]


def test_nothing_to_ask_is_none():
    search = ConstrainedSearch("ms", {}, 0.02, lambda rng, good: [], seconds)
    assert search.ask() is None and search.best() is None
    assert ConstrainedSearch("ms", {}, 0.02, propose, seconds).ask(1.0) is None


def test_candidates_without_rungs_take_no_place_of_those_to_be_promoted():
    points = [(x, tuple(x)) for x in np.random.default_rng(0).random((6, 2))]
    search = ConstrainedSearch("ms", {}, 0.02, propose, seconds, first=points)
    for i in range(6):
        candidate, _ = search.ask()
        search.tell_costs(candidate, {"ms": 9.0 - i})
        search.tell_drop(candidate, 1.0 if i < 3 else 0.1, 0.05)
    candidate, fraction = search.ask()
    assert candidate.drops and fraction == pytest.approx(1 / 3)


@pytest.mark.parametrize(("left", "goes_on"), [(0.8, False), (1.0, True), (1.3, True), (1.6, False)])
def test_the_best_candidate_does_not_wait_for_others_when_time_runs_out(left, goes_on):
    search = ConstrainedSearch("ms", {}, 0.02, propose, seconds, first=[(x, tuple(x)) for x in np.eye(2)])
    for ms in (9.0, 8.0):
        candidate, _ = search.ask()
        search.tell_costs(candidate, {"ms": ms})
        search.tell_drop(candidate, 0.1, 0.05)
    asked = search.ask(left * seconds(candidate.what, 0.1, 1.0))
    assert bool(asked and asked[0].drops) == goes_on


@pytest.mark.parametrize(("left", "goes_on"), [(0.9, False), (1.2, True), (100, True)])
def test_the_trusted_candidate_does_not_wait_for_others(left, goes_on):
    first = [(x, tuple(x)) for x in np.eye(3)[:, :2]]
    search = ConstrainedSearch("ms", {}, 0.02, propose, seconds, first=first, trusted=True)
    for ms, fraction in ((9.0, 1.0), (8.0, 0.1)):
        candidate, _ = search.ask()
        search.tell_costs(candidate, {"ms": ms})
        search.tell_drop(candidate, fraction, 0.05)
    asked, fraction = search.ask(left * seconds(candidate.what, 0.1, 1.0))
    assert (asked is candidate) == goes_on and fraction == pytest.approx(1 / 3 if goes_on else 0.1)


def test_a_trusted_candidate_that_is_out_or_too_slow_is_not_trained_on():
    for change in (dict(out="failed"), dict(costs={"ms": 9.0})):
        first = [(x, tuple(x)) for x in np.eye(3)[:, :2]]
        search = ConstrainedSearch("ms", {}, 0.02, propose, seconds, first=first, trusted=True)
        for ms, fraction, loss in ((9.0, 1.0, 0.0), (8.0, 0.1, 0.05)):
            candidate, _ = search.ask()
            search.tell_costs(candidate, {"ms": ms})
            search.tell_drop(candidate, fraction, loss)
        for name, value in change.items(): setattr(candidate, name, value)
        assert search.ask()[0] is search.candidates[2]


def test_a_candidate_whose_training_is_shared_begins_with_all_data():
    def shared(what, before, after): return 5.0 if what[0] else seconds(what, before, after)
    search = ConstrainedSearch("ms", {}, 0.02, propose, shared, first=[(x, tuple(x)) for x in np.eye(2)])
    assert [search.ask()[1] for _ in range(2)] == [1.0, 0.1]


def test_known_costs_are_used_before_a_candidate_is_built():
    def known(what): return {"ms": 1 + 4 * what[0]} if what[0] < 0.5 else {"ms": 9.0}
    search = ConstrainedSearch("ms", {}, 0.05, propose, seconds, known_costs=known)
    for _ in range(6):
        candidate, fraction = search.ask()
        search.tell_costs(candidate, known(candidate.what))
        search.tell_drop(candidate, 1.0, 0.01)
    slow = [c for c in search.candidates[1:] if c.costs["ms"] == 9.0]
    assert not slow, "what is known to be slower than the best is not tried"


def test_what_comes_first_is_left_out_if_there_is_no_time_for_it():
    first = [(np.array([0.5, 0.5]), (0.5, 0.5)), (np.array([0.6, 0.6]), (0.6, 0.6))]
    def slow(what, before, after): return 100.0 if what == (0.5, 0.5) else 1.0
    search = ConstrainedSearch("ms", {}, 0.02, propose, slow, first=first)
    assert search.ask(50.0)[0].what == (0.6, 0.6) and not search.queue


def test_what_is_being_trained_is_not_asked_for_again():
    search, _ = run(300, {})
    waiting = search.ask(1e6)[0]
    other = search.ask(1e6, [waiting])
    assert other[0] is not waiting
