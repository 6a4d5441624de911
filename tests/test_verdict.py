"""Verdicts on the drop against a teacher: their error rate, their bounds, and what is refused."""
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln, xlogy
from scipy.stats import binomtest, norm

from ecomopt import EcomoptError, noninferiority
from ecomopt.core.measure import compare
from ecomopt.core.verdict import drop_bound, mean_interval, noninferiority_test, verdicts


def answers(lost: int, gained: int, n: int):
    """The teacher's labels, the model's and the true ones, with so many sentences lost and gained."""
    actual = np.arange(n) % 2
    first, second = actual.copy(), actual.copy()
    second[:lost] = 1 - actual[:lost]
    first[lost:lost + gained] = 1 - actual[lost:lost + gained]
    return first, second, actual


def probability(lost, gained, n, p_lost, p_gained):
    both = lost + gained
    log = gammaln(n + 1) - gammaln(lost + 1) - gammaln(gained + 1) - gammaln(n - both + 1)
    return math.exp(log + xlogy(lost, p_lost) + xlogy(gained, p_gained) + xlogy(n - both, 1 - p_lost - p_gained))


def largest_gained(n: int, margin: float) -> list[int]:
    """For each number of lost sentences the fewest gained ones with which the bound is within the margin."""
    fewest, found = 0, []
    for lost in range(n + 1):
        while fewest + lost <= n and drop_bound(lost, fewest, n) > margin: fewest += 1
        if fewest + lost > n: break
        found.append(fewest)
    return found


# the error rate, by adding up the probabilities of all outcomes

@pytest.mark.slow
@pytest.mark.parametrize("n, margin", [(40, 0.05), (60, 0.02), (150, 0.01), (150, 0.1), (589, 0.01), (589, 0.02)])
def test_met_is_said_of_a_drop_at_the_margin_in_5_percent_of_the_tests_at_most(n, margin):
    fewest = largest_gained(n, margin)
    for q in {margin, 1.01 * margin, 1.3 * margin, 2 * margin, 0.1, 0.3} - {0.01 if margin > 0.01 else -1}:
        if q < margin: continue
        p_lost, p_gained = (q + margin) / 2, (q - margin) / 2
        most = int(q * n + 9 * math.sqrt(q * n) + 9)
        rate = sum(probability(lost, gained, n, p_lost, p_gained) for lost, least in enumerate(fewest[:most])
                   for gained in range(least, min(most, n - lost) + 1))
        assert rate <= 0.05, (q, rate)


@pytest.mark.slow
def test_a_harmless_model_is_met_with_enough_sentences():
    rng, met = np.random.default_rng(0), 0
    for _ in range(200):
        lost, gained, _ = rng.multinomial(3000, [0.03, 0.03, 0.94])
        met += noninferiority_test(*answers(lost, gained, 3000), 0.02).outcome == "met"
    assert met > 190


# bounds

counts = st.integers(0, 60)


@given(counts, counts, st.integers(121, 3000))
def test_bounds_are_on_both_sides_of_the_drop_and_monotone(lost, gained, n):
    upper, lower = drop_bound(lost, gained, n), -drop_bound(gained, lost, n)
    assert -1 <= lower < (lost - gained) / n < upper <= 1
    assert drop_bound(lost + 1, gained, n) > upper > drop_bound(lost, gained + 1, n)
    assert drop_bound(lost, gained, n, 0.99) > upper > drop_bound(lost, gained, n, 0.9)


def test_the_bound_solves_the_quadratic_where_nothing_was_gained():
    """Without gained sentences the restricted probability is 0 or more, and the bound nearly Wilson's."""
    for lost, n in [(0, 100), (5, 200), (30, 1570)]:
        z = norm.ppf(0.95)
        wilson = binomtest(lost, n).proportion_ci(0.9, method="wilson").high
        assert abs(drop_bound(lost, 0, n) - wilson) < (0.75 + z**2 / 4) / n


@pytest.mark.filterwarnings("error")
def test_all_lost_and_all_gained():
    assert drop_bound(10, 0, 10) == 1 and -1 < drop_bound(0, 10, 10) < -0.4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(drop_bound(0, n, n) < 0 for n in range(5, 200))
    assert noninferiority_test(*answers(10, 0, 10), 0.4).outcome == "not met"


def test_many_sentences_make_the_bound_wald_s():
    drop, q, n = 0.01, 0.06, 10**6
    wald = drop + norm.ppf(0.95) * math.sqrt((q - drop**2) / n)
    assert abs(drop_bound(0.035 * n, 0.025 * n, n) - wald) < 2e-6


# verdicts

def test_three_outcomes_and_their_sentences():
    met, not_met, open_ = (noninferiority_test(*answers(lost, 5, 600), margin)
                           for lost, margin in ((6, 0.02), (60, 0.02), (14, 0.02)))
    assert (met.outcome, not_met.outcome, open_.outcome) == ("met", "not met", "not resolvable with n = 600")
    assert str(met).startswith("met: accuracy changes by -0.2 points, at worst by -") and "with about" not in str(met)
    assert str(open_).endswith(f"with about {open_.decided_by:,} such sentences it would be met")
    better = noninferiority_test(*answers(5, 6, 600), 0.02)
    assert str(better).startswith("met: accuracy changes by +0.2 points, at worst by -")
    worse = noninferiority_test(*answers(20, 5, 600), 0.02)
    assert str(worse).endswith("such sentences it would be not met")
    assert met.disagreement == 11 / 600


@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([0.005, 0.01, 0.03]))
@settings(max_examples=50)
def test_so_many_sentences_decide_and_one_less_does_not(lost, gained, margin):
    verdict = noninferiority_test(*answers(lost, gained, 500), margin)
    def decides(n):
        a, b = lost * n / 500, gained * n / 500
        return drop_bound(a, b, n) <= margin or -drop_bound(b, a, n) > margin
    if verdict.decided_by is None: assert abs(verdict.drop - margin) < 1e-3
    else: assert decides(verdict.decided_by) and not decides(verdict.decided_by - 1)


def test_a_margin_of_numpy():
    for metric in ("accuracy", "macro_f1"):
        plain, numpy = (noninferiority_test(*answers(9, 5, 300), m, metric) for m in (0.02, np.float64(0.02)))
        assert plain == numpy and type(numpy.margin) is float


def test_a_drop_at_the_margin_is_never_decided():
    verdict = noninferiority_test(*answers(10, 0, 500), 0.02)
    assert verdict.decided_by is None and "no number of sentences" in str(verdict)
    by_f1 = noninferiority_test(*answers(0, 0, 500), 0.02, "macro_f1")
    assert by_f1.drop == 0 and by_f1.decided_by is not None


def fraction_right(labels, predictions): return (labels == predictions).mean()


@pytest.mark.parametrize("metric", ["macro_f1", "balanced_accuracy", fraction_right])
def test_other_metrics_by_bootstrap(metric):
    verdict = noninferiority_test(*answers(20, 14, 589), 0.02, metric)
    assert abs(verdict.drop - 6 / 589) < 1e-3 and verdict.lower < verdict.drop < verdict.upper
    assert 0.02 < verdict.upper < 0.04
    assert verdict == noninferiority_test(*answers(20, 14, 589), 0.02, metric)  # the same seed


@pytest.mark.slow
def test_a_scorer_of_scikit_learn_by_bootstrap():
    verdict = noninferiority_test(*answers(20, 14, 589), 0.02, "f1_macro")
    own = noninferiority_test(*answers(20, 14, 589), 0.02, "macro_f1")
    assert verdict.drop == pytest.approx(own.drop) and abs(verdict.upper - own.upper) < 0.004  # fewer draws
    assert verdict.metric == "f1_macro" and verdict.outcome == own.outcome


def test_same_answers_on_few_sentences_prove_nothing():
    for metric in ("accuracy", "macro_f1"):
        assert "not resolvable" in noninferiority_test(*answers(0, 0, 20), 0.02, metric).outcome
        assert noninferiority_test(*answers(0, 0, 2000), 0.02, metric).outcome == "met"


def test_a_model_that_gives_one_label_is_not_met_by_macro_f1():
    actual = np.arange(1000) < 50
    always = noninferiority_test(actual.astype(int), np.zeros(1000, int), actual.astype(int), 0.02, "macro_f1")
    assert always.outcome == "not met" and always.drop > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("prior, recall, lost", [((0.97, 0.03), (0.99, 0.6), 0.05), ((0.5, 0.5), (0.9, 0.9), 0.04)])
def test_macro_f1_keeps_the_error_rate(prior, recall, lost):
    rng, joint = np.random.default_rng(1), np.zeros((2, 2, 2))  # class, teacher's label, model's
    for i in (0, 1):
        joint[i, i, i], joint[i, i, 1 - i] = (prior[i] * recall[i] * x for x in (1 - lost, lost))
        joint[i, 1 - i, 1 - i] = prior[i] * (1 - recall[i])
    def f1(table): return np.mean([2 * table[i, i] / (table[i].sum() + table[:, i].sum()) for i in (0, 1)])
    margin, met = f1(joint.sum(2)) - f1(joint.sum(1)), 0
    rows = np.array(list(np.ndindex(2, 2, 2))).T
    for _ in range(60):
        actual, first, second = np.repeat(rows, rng.multinomial(400, joint.ravel()), axis=1)
        met += noninferiority_test(first, second, actual, margin, "macro_f1").outcome == "met"
    assert met <= 7  # of 60 at 5 %: more with a probability below 1 %


# classifiers

def test_classifiers_are_compared_by_the_names_of_their_classes():
    task, teacher = tiny.task(), tiny.classifier(layers=1)
    other = tiny.classifier(layers=1, labels=("positive", "negative"))
    rows = list(task.test["text"])
    expected = noninferiority_test(teacher.logits(rows).argmax(1).numpy(), 1 - other.logits(rows).argmax(1).numpy(),
                                   task.test["label"], 0.1)
    assert noninferiority(teacher, other, task, 0.1) == expected
    assert noninferiority(teacher, other, replace(task, metric="macro_f1"), 0.1).metric == "macro_f1"
    assert noninferiority(teacher, other, task, 0.1, split="valid").sentences == len(task.valid)


def test_all_test_sets_are_pooled():
    task, teacher, other = tiny.task(), tiny.classifier(layers=1), tiny.classifier(seed=1, layers=1)
    whole = task.test
    two = replace(task, test=whole.select(range(8)), tests={"web": whole.select(range(8, 20))})
    assert noninferiority(teacher, other, two, 0.1) == noninferiority(teacher, other, task, 0.1)
    assert noninferiority(teacher, other, two, 0.1, split="valid").sentences == len(task.valid)


@pytest.mark.parametrize("metric", ["accuracy", pytest.param("macro_f1", marks=pytest.mark.slow)])
def test_verdicts_of_a_comparison(metric):
    task, teacher, other = tiny.task(), tiny.classifier(layers=1), tiny.classifier(seed=1, layers=1)
    quick = dict(repeats=1, calls=1, threads=1, memory=False)
    with warnings.catch_warnings(action="ignore"):  # a random model may give one label to all
        one = compare({"teacher": teacher, "same": teacher, "other": other}, replace(task, metric=metric), **quick)
        tests = replace(task, metric=metric, tests={"web": task.valid})
        two = compare({"teacher": teacher, "other": other}, tests, **quick)
    expected = noninferiority(teacher, other, replace(task, metric=metric), 0.1)
    assert list(verdicts(one).index) == [("same", "test"), ("other", "test")]
    row = verdicts(one, 0.1).loc["other", "test"]
    assert row.outcome == expected.outcome and row.upper == expected.upper and row.metric == metric
    table = verdicts(two, 0.1).loc["other"]
    assert list(table.index) == ["test", "web", "pooled"] and list(table.sentences) == [20, 20, 40]
    assert table.loc["test"].upper == expected.upper and table.loc["pooled"].upper < expected.upper + 0.1
    pooled = noninferiority_test(two.answers["teacher"], two.answers["other"], two.actual, 0.1, metric)
    assert table.loc["pooled"].upper == pooled.upper == noninferiority(teacher, other, tests, 0.1).upper


def test_verdicts_of_what_is_no_comparison():
    quick = dict(repeats=1, calls=1, threads=1, memory=False)
    with warnings.catch_warnings(action="ignore"):
        alone = compare({"teacher": tiny.classifier(layers=1)}, tiny.task(), **quick)
    assert verdicts(alone).empty
    with pytest.raises(EcomoptError, match="no comparison"): verdicts(alone.table)
    with pytest.raises(EcomoptError, match="margin"):
        verdicts(replace(alone, answers=alone.answers.assign(other=0)), margin=0)


def test_texts_without_labels_bound_the_drop_by_disagreement():
    task, teacher, other = tiny.task(), tiny.classifier(layers=1), tiny.classifier(seed=1, layers=1)
    texts = [" ".join(tiny.WORDS[i // 20**k % 20] for k in range(3)) for i in range(1000)]
    alone, helped = (noninferiority(teacher, teacher, task, unlabelled=more) for more in (None, texts))
    assert alone.upper > 0.1 and helped.outcome == "met"
    assert helped.upper == pytest.approx(1 - 0.025 ** (1 / 1000))  # Clopper and Pearson, nothing seen
    assert "(95 %)" in str(helped), "the union of two bounds of 97.5 %"
    differ = noninferiority(teacher, other, task, unlabelled=texts)
    assert differ.upper >= differ.drop
    flips = int((teacher.logits(texts).argmax(1) != other.logits(texts).argmax(1)).sum())
    exact = binomtest(flips, 1000, alternative="less").proportion_ci(0.975).high
    assert differ.upper == min(exact, noninferiority_test(*(
        model.logits(list(task.test["text"])).argmax(1).numpy() for model in (teacher, other)), task.test["label"],
        confidence=0.975).upper)


@pytest.mark.parametrize("wrong, message", [
    (dict(unlabelled=[]), "no texts"),
    (dict(unlabelled="good"), "single string"),
    (dict(unlabelled=["good", None]), "Row 1"),
    (dict(split="tests"), "no labelled rows"),
    (dict(margin=-0.1), "margin"),
    (dict(model="minilm"), "model"),
])
def test_wrong_arguments(wrong, message):
    right = dict(teacher=tiny.classifier(layers=1), model=tiny.classifier(layers=1), task=tiny.task())
    with pytest.raises(EcomoptError, match=message): noninferiority(**right | wrong)


def test_disagreement_bounds_no_other_metric():
    task, teacher = replace(tiny.task(), metric="macro_f1"), tiny.classifier(layers=1)
    with pytest.raises(EcomoptError, match="macro_f1"): noninferiority(teacher, teacher, task, unlabelled=["good"])


@pytest.mark.parametrize("wrong", [
    dict(margin=0), dict(margin=1), dict(margin="1"), dict(confidence=1.5), dict(confidence=0),
    dict(margin=None), dict(metric="acuracy"), dict(metric=None),
    dict(first=[0, 1]), dict(first=[0.0, 1.0, 1.0]), dict(first=[[0], [1], [1]]), dict(actual=[]),
])
def test_what_is_refused(wrong):
    right = dict(first=[0, 1, 1], second=[0, 1, 0], actual=[0, 1, 1])
    with pytest.raises(EcomoptError): noninferiority_test(**right | wrong)


# seeds

def test_an_interval_of_seeds_and_sentences():
    rng = np.random.default_rng(0)
    outcomes = rng.random((3, 500)) < 0.9
    mean, low, high = mean_interval(outcomes)
    assert low < mean < high and abs(mean - outcomes.mean()) < 1e-12
    assert mean_interval(outcomes, 0.99)[1] < low
    assert mean_interval(np.ones((3, 10))) == (1, 1, 1)
    same = np.repeat(outcomes[:1], 3, axis=0)  # seeds that do not differ add nothing
    narrow = mean_interval(same)
    assert abs((narrow[2] - narrow[1]) / 2 - 1.965 * same[0].std(ddof=1) / math.sqrt(500)) < 1e-3


@pytest.mark.parametrize("wrong", [[0, 1], [[0, 1]], [[0], [1]], [[0, 1], [1, math.nan]], [[]]])
def test_too_few_outcomes(wrong):
    with pytest.raises(EcomoptError): mean_interval(wrong)


def test_the_confidence_is_said():
    answers = np.array([0, 1] * 50)
    assert "(80 %)" in str(noninferiority_test(answers, answers, answers, confidence=0.8))
