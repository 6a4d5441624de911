"""Measurement: intervals, paired tests, interleaved timing, counts, and input that cannot be measured."""
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from ecomopt import EcomoptError
from ecomopt.compress.quantize import activation_levels, quantize
from ecomopt.core.artifact import save
from ecomopt.core.data import Task
from ecomopt.core.measure import (
    Measurement,
    _peak_memory,
    compare,
    count_macs,
    count_parameters,
    interleave,
    measure,
    paired_quality,
    quality,
)
from ecomopt.core.train import Classifier

LABELS = ("negative", "positive")
QUICK = dict(repeats=1, calls=2, threads=1, memory=False)


def classifier(labels: tuple[str, ...] = LABELS) -> Classifier:
    """A small random classifier."""
    return tiny.classifier(layers=1, hidden=16, labels=labels)


@pytest.fixture
def task() -> Task:
    return tiny.task()  # 20 test sentences, every second one positive


def recording(name: str, log: list) -> Classifier:
    """Logs its name and the number of sentences of each call."""
    made = classifier()
    ask = made.logits
    def logits(texts, batch_size=32):
        log.append((name, len(texts)))
        return ask(texts, batch_size)
    made.logits = logits
    return made


def fixed(answer: tuple = (0.0, 1.0), labels: tuple[str, ...] = LABELS) -> Classifier:
    """Returns the same logits for every sentence."""
    made = classifier(labels=labels)
    made.logits = lambda texts, batch_size=32: torch.tensor(answer).repeat(len(texts), 1)
    return made


# ---------------------------------------------------------------- quality

classes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


@given(classes)
def test_quality_is_that_of_scipy_and_scikit_learn(rows):
    predicted, actual = np.array(rows).T
    result, right = quality(predicted, actual, "abcd"), int((predicted == actual).sum())
    low, high = result["accuracy_interval"]
    assert (low, high) == pytest.approx(binomtest(right, len(rows)).proportion_ci(method="wilson"))
    assert -1e-12 <= low <= result["accuracy"] + 1e-12 and result["accuracy"] - 1e-12 <= high <= 1 + 1e-12
    assert result["macro_f1"] == pytest.approx(f1_score(actual, predicted, average="macro"))
    assert set(result["recall"]) == {"abcd"[i] for i in actual}


def test_wilson_by_hand():
    """18 of 20, z = 1.96: centre (0.9 + 0.09604) / 1.19208, half 1.96 √(0.0045 + 0.002401) / 1.19208."""
    low, high = quality(np.array([0] * 18 + [1] * 2), np.zeros(20, int), "ab")["accuracy_interval"]
    assert (low, high) == pytest.approx((0.6990, 0.9721), abs=2e-4)


def test_mcnemar_by_hand():
    """One lost and five gained: 2 (1 + 6) / 2⁶."""
    actual = np.zeros(10, int)
    first, second = np.array([0] + [1] * 5 + [0] * 4), np.array([1] + [0] * 5 + [0] * 4)
    result = paired_quality(first, second, actual)
    assert (result["lost"], result["gained"], result["flips"]) == (1, 5, 6)
    assert result["mcnemar_p"] == pytest.approx(14 / 64)
    assert result["accuracy_change"] == pytest.approx(0.4)


def test_flips_count_changes_from_wrong_to_wrong():
    result = paired_quality(np.array([1, 1]), np.array([2, 1]), np.array([0, 0]))
    assert (result["flips"], result["lost"], result["gained"], result["mcnemar_p"]) == (1, 0, 0, 1.0)


@given(classes, st.integers(0, 5))
def test_a_pair_is_symmetric(rows, seed):
    first, second = np.array(rows).T
    actual = np.zeros(len(rows), int)
    one, other = paired_quality(first, second, actual, seed), paired_quality(second, first, actual, seed)
    low, high = one["accuracy_change_interval"]
    assert one["mcnemar_p"] == other["mcnemar_p"] <= 1 and one["flips"] == other["flips"]
    assert one["accuracy_change"] == -other["accuracy_change"] and -1 <= low <= high <= 1


# ---------------------------------------------------------------- interleaved timing

def test_interleave_warms_up_and_alternates():
    log = []
    seconds = interleave({name: lambda x, name=name: log.append(name + x) for name in "AB"}, [["1", "2"], ["3", "4"]])
    assert log == ["A1", "B1", "A1", "A2", "B1", "B2", "A3", "A4", "B3", "B4"]
    assert {name: s.shape for name, s in seconds.items()} == {"A": (2, 2), "B": (2, 2)}


def test_compare_times_interleaved(task):
    log = []
    compare({name: recording(name, log) for name in "ABC"}, task, **QUICK | dict(repeats=2))
    everything = [(name, 20) for name in "ABC"]
    one_by_one = [(name, 1) for name in "ABC" for _ in range(2)]
    warm_up = [(name, 1) for name in "ABC"]
    # quality, warm-up and two rounds in batches; then warm-up and two rounds one by one
    assert log == everything + everything + everything * 2 + warm_up + one_by_one * 2


def test_threads_are_restored(task):
    before = torch.get_num_threads()
    measure(classifier(), task, **QUICK | dict(threads=before + 1))
    assert torch.get_num_threads() == before
    broken = fixed(answer=(float("nan"), 0.0))
    with pytest.raises(EcomoptError): measure(broken, task, **QUICK | dict(threads=before + 1))
    assert torch.get_num_threads() == before


# ---------------------------------------------------------------- counts

def formula(d: int, f: int, layers: int, classes: int, tokens: int) -> int:
    return layers * (tokens * (4 * d * d + 2 * d * f) + 2 * tokens**2 * d) + d * d + d * classes


@pytest.mark.parametrize("hidden, layers, classes", [(16, 1, 2), (32, 3, 5)])
@pytest.mark.parametrize("tokens", [1, 7, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_macs_are_those_of_the_formula(hidden, layers, classes, tokens, dtype):
    model = tiny.classifier(layers=layers, hidden=hidden, labels=tuple("abcde"[:classes])).model.to(dtype)
    assert count_macs(model, tokens) == formula(hidden, 2 * hidden, layers, classes, tokens)


def dynamic(classifier: Classifier) -> torch.nn.Module:
    """The model with torch's own int8 layers."""
    return torch.ao.quantization.quantize_dynamic(classifier.model, {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("int8", [dynamic, lambda c: quantize(c).model, lambda c: quantize(c, embedding_bits=4).model],
                         ids=["torch", "int8", "int4 embeddings"])
def test_quantized_layers_are_counted(int8):
    activation_levels()  # multiplies once a process, to find out what the CPU can do: no part of the model
    base = tiny.classifier()
    biases = sum(layer.bias.numel() for layer in base.model.modules() if isinstance(layer, torch.nn.Linear))
    assert count_macs(int8(base)) == count_macs(base.model) > 0
    assert count_parameters(int8(base)) == count_parameters(base.model) - biases


def test_shared_weights_are_counted_once():
    layers = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    layers[1].weight = layers[0].weight
    assert count_parameters(layers) == 9 + 3 + 3


def test_disk_bytes_are_those_of_the_files(task, tmp_path):
    measured = classifier()
    disk_bytes = measure(measured, task, **QUICK).disk_bytes
    assert disk_bytes == sum(file.stat().st_size for file in save(measured, tmp_path / "saved").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_is_that_of_a_fresh_process(task):
    ballast = np.ones(50_000_000)  # 400 MB here must not be counted there
    measured = measure(classifier(), task, **QUICK | dict(memory=True)).memory_bytes
    assert 0 < measured < ballast.nbytes


def test_an_artifact_that_does_not_run_is_reported(monkeypatch):
    monkeypatch.setattr("ecomopt.core.measure._PROBE", "raise RuntimeError('no such layer')")
    with pytest.raises(EcomoptError, match="did not run in a fresh process(?s:.*)no such layer"):
        _peak_memory("small", ["good"], 1, 1)


# ---------------------------------------------------------------- measurements

def test_a_measurement_survives_json(task):
    measurement = measure(classifier(), task, **QUICK)
    assert Measurement.from_dict(json.loads(json.dumps(measurement.to_dict()))) == measurement
    assert measurement.conditions["threads"] == 1 and measurement.conditions["device"] == "cpu"
    assert {"ecomopt", "torch", "transformers"} <= measurement.conditions["versions"].keys()
    assert 0 < measurement.latency_ms["p50"] <= measurement.latency_ms["p95"] <= measurement.latency_ms["p99"]


@pytest.mark.parametrize("change", [lambda data: data.pop("accuracy"), lambda data: data.update(speed=1)])
def test_other_data_is_no_measurement(task, change):
    data = measure(classifier(), task, **QUICK).to_dict()
    change(data)
    with pytest.raises(EcomoptError, match="Wrong fields"): Measurement.from_dict(data)


def test_a_comparison_has_a_table_and_a_figure(task):
    comparison = compare({"yes": fixed(), "no": fixed(answer=(1.0, 0.0))}, task, **QUICK)
    table = comparison.table
    assert list(table.index) == ["yes", "no"]
    assert list(table["flips"]) == [0, 20] and list(table["accuracy %"]) == [50.0, 50.0]
    pair = comparison.pairs["no"]
    assert pair.accuracy_change == 0 and (pair.lost, pair.gained) == (10, 10)
    assert comparison.pairs["yes"].speedup == 1 and "memory MB" not in table
    assert comparison.recall.loc["positive"].to_dict() == {"yes": 1.0, "no": 0.0}
    assert len(comparison.rounds) == 1 and set(comparison.rounds.columns.get_level_values(1)) == {"yes", "no"}
    axis = comparison.plot().axes[0]
    assert "sentences" in axis.get_xlabel() and "accuracy" in axis.get_ylabel()
    assert {"yes", "no"} == {text.get_text().split("\n")[0] for text in axis.texts}


def test_labels_are_matched_by_name(task):
    said = measure(fixed(labels=LABELS[::-1]), task, **QUICK)
    assert said.recall == {"negative": 1.0, "positive": 0.0}


# ---------------------------------------------------------------- several test sets

def test_each_test_set_and_all_pooled(task):
    """Always "positive": right for the positive rows of each set."""
    rows = [{"text": f"web {i}", "label": int(i < 9)} for i in range(12)]
    more = task.with_tests(web=Dataset.from_list(rows), outlet=Dataset.from_list([{"text": "outlet", "label": 0}]))
    comparison = compare({"yes": fixed(), "no": fixed(answer=(1.0, 0.0), labels=LABELS)}, more, **QUICK)
    yes, pair = comparison.measurements["yes"], comparison.pairs["no"]
    assert {name: (t["sentences"], t["accuracy"]) for name, t in yes.tests.items()} == {
        "test": (20, 0.5), "web": (12, 0.75), "outlet": (1, 0.0), "pooled": (33, 19 / 33)}
    assert (yes.sentences, yes.accuracy) == (20, 0.5) and yes.tests["web"]["recall"] == {"negative": 0, "positive": 1}
    assert {name: (t["lost"], t["gained"]) for name, t in pair.tests.items()} == {
        "test": (10, 10), "web": (9, 3), "outlet": (0, 1), "pooled": (19, 14)}
    assert pair.accuracy_change == 0 and pair.tests["pooled"]["accuracy_change"] == -5 / 33
    table = comparison.tests
    assert list(table.loc["no"].index) == ["test", "web", "outlet", "pooled"] and table["flips"]["no", "web"] == 12
    assert list(comparison.answers.index.unique()) == ["test", "web", "outlet"]
    assert comparison.actual.tolist()[20:] == [1] * 9 + [0] * 4 and comparison.metric == "accuracy"
    assert Measurement.from_dict(json.loads(json.dumps(yes.to_dict()))) == yes


def test_the_score_of_each_test_set_is_by_the_task_s_metric(task):
    more = replace(task, metric="balanced_accuracy", tests={"web": task.valid.select([0, 1, 3])})
    tests = measure(fixed(), more, **QUICK).tests
    assert tests["web"]["score"] == 0.5 != tests["web"]["accuracy"]


def test_only_the_test_split_has_more_sets_and_only_it_is_timed(task):
    log, more = [], replace(task, tests={"web": task.valid})
    measured = measure(recording("A", log), more, **QUICK)
    assert [n for _, n in log] == [40, 20, 20, 1, 1, 1]  # quality of both; then warm-ups and rounds
    assert list(measured.tests) == ["test", "web", "pooled"] and measured.sentences == 20
    comparison = compare({"A": classifier()}, more, split="valid", **QUICK)
    assert comparison.measurements["A"].tests == {} == comparison.pairs["A"].tests and comparison.tests.empty
    assert set(comparison.answers.index) == {"valid"}


def test_a_measurement_of_version_0_2_is_read(task):
    measured = measure(classifier(), task, **QUICK)
    data = measured.to_dict()
    assert data.pop("tests") == {} and Measurement.from_dict(data) == measured


# ---------------------------------------------------------------- what cannot be measured

@pytest.mark.parametrize("change, message", [
    (dict(answer=(float("nan"), 0.0)), "not finite numbers"),
    (dict(answer=(float("inf"), 0.0)), "not finite numbers"),
    (dict(answer=(0.0, 1.0, 2.0)), "not finite numbers"),
    (dict(labels=("bad", "good")), "Its labels are"),
    (dict(labels=("negative", "neutral", "positive")), "Its labels are"),
])
def test_a_classifier_that_cannot_be_measured(task, change, message):
    with pytest.raises(EcomoptError, match=message) as caught: compare({"broken": fixed(**change)}, task, **QUICK)
    assert "broken" in caught.value.where


@pytest.mark.parametrize("options, message", [
    (dict(split="transfer"), "Split 'transfer' has no labelled rows"),
    (dict(split="holdout"), "Split 'holdout' has no labelled rows"),
    *[({name: 0}, name) for name in ("repeats", "threads", "calls", "batch_size")],
])
def test_options_that_measure_nothing(task, options, message):
    with pytest.raises(EcomoptError, match=message): measure(classifier(), task, **QUICK | options)


def test_an_empty_split_and_no_classifier(task):
    empty = replace(task, test=task.test.select([]))
    with pytest.raises(EcomoptError, match="no labelled rows"): measure(classifier(), empty, **QUICK)
    with pytest.raises(EcomoptError, match="nothing to measure"): compare({}, task, **QUICK)
    with pytest.raises(EcomoptError, match="cannot be scored"): quality(np.array([], int), np.array([], int), LABELS)
