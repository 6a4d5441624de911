"""Cascades: temperatures, calibration, thresholds, what is deferred, saving, serving, damage, and bad input."""
import asyncio
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from torch.nn import functional as F

from ecomopt import Cascade, EcomoptError, artifact_info, convert, fit_cascade, quantize
from ecomopt.accelerate.cascade import (
    _fewest,
    _is_deferred,
    _threshold,
    calibration_error,
    deferral_table,
    fit_temperature,
)
from ecomopt.compress.distill import keep_layers
from ecomopt.compress.static import static_model
from ecomopt.core.artifact import disk_bytes, file_bytes, load, save
from ecomopt.core.measure import compare, count_parameters
from ecomopt.core.train import fingerprint
from ecomopt.optimize.batching import Batcher, _encode
from ecomopt.optimize.recipe import Recipe

TEXTS = ["the battery is great", "the screen broke", "not a good phone, very slow", "love it", "a", "was it bad"]


def stages():
    """Three classifiers with two tokenizers."""
    teacher = tiny.classifier()
    return unsure(teacher, 0), keep_layers(tiny.classifier(seed=1), 1), teacher


def unsure(teacher, seed: int):
    """A static model whose confidence differs from text to text."""
    static = static_model(teacher, TEXTS, 16, 64)
    torch.nn.init.normal_(static.model.embeddings.weight, generator=torch.Generator().manual_seed(seed))
    return static


@pytest.fixture(scope="module")
def models():
    return stages()


# ---------------------------------------------------------------- calibration

@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(0.2, 8), st.integers(2, 5))
def test_the_temperature_of_drawn_labels_is_found(seed, scale, classes):
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(4000, classes, generator=generator)
    y = torch.multinomial(z.softmax(1), 1, generator=generator).flatten()
    T = fit_temperature(scale * z, y)
    assert abs(T / scale - 1) < 0.15
    assert abs(fit_temperature(3 * scale * z, y) / T - 3) < 1e-2
    nll = [F.cross_entropy(scale * z / t, y) for t in (T, 0.98 * T, 1.02 * T)]
    assert nll[0] <= min(nll[1:])


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 20))
def test_the_calibration_error_is_that_of_the_reliability_curve(seed, bins):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(300, 3, generator=generator).double()
    y = torch.randint(0, 3, (300,), generator=generator)
    c, label = z.softmax(1).max(1)
    accuracy, confidence = calibration_curve(label == y, c, n_bins=bins)
    counts = np.histogram(c, bins=np.linspace(0, 1, bins + 1))[0]
    expected = (np.abs(accuracy - confidence) * counts[counts > 0]).sum() / 300
    assert abs(calibration_error(z, y, bins) - expected) < 1e-9


# ---------------------------------------------------------------- thresholds

@settings(max_examples=50)
@given(st.lists(st.floats(0.5, 1, width=32, exclude_max=True), min_size=2, max_size=40, unique=True), st.data())
def test_a_threshold_defers_as_many_as_asked_for(confidence, data):
    count, confidence = data.draw(st.integers(0, len(confidence) - 1)), np.array(confidence, np.float32)
    found = _threshold(confidence, count)
    for values in (confidence, torch.from_numpy(confidence)): assert _is_deferred(values, found).sum() == count


@pytest.mark.parametrize("low", [np.float32(0.75), np.nextafter(np.float32(0.75), np.float32(1))])
def test_a_threshold_separates_neighbours(low):
    """The middle of two numbers with none between them is rounded to one of them."""
    confidence = np.array([low, np.nextafter(low, np.float32(1))])
    assert _is_deferred(torch.from_numpy(confidence), _threshold(confidence, 1)).tolist() == [True, False]


def test_the_table_begins_with_the_small_model_and_ends_with_the_large_one():
    torch.manual_seed(0)
    small, large = torch.randn(2, 200, 2)
    labels = torch.randint(0, 2, (200,)).numpy()
    table = deferral_table(small, large, labels, 11)
    right = [(z.argmax(1).numpy() == labels).mean() for z in (small, large)]
    assert table.deferred.tolist() == pytest.approx(np.linspace(0, 1, 11))
    assert table.accuracy.iloc[[0, -1]].tolist() == pytest.approx(right)
    assert table["drop"].iloc[-1] == 0 and (table.bound >= table["drop"]).all()
    for _, row in table.iterrows():
        c, first = small.softmax(1).max(1)
        answers = torch.where(c < row.threshold, large.argmax(1), first).numpy()
        assert (answers == labels).mean() == pytest.approx(row.accuracy)


def test_the_fewest_that_keep_a_drop_are_deferred(models):
    task = tiny.task(120)
    cascade = fit_cascade(models[1:], task, max_drop=0.05)
    labels = np.array(task.valid["label"])
    z = [stage.logits(task.valid["text"]) / T for stage, T in zip(models[1:], cascade.temperatures)]
    c, first = z[0].softmax(1).max(1)
    answers = torch.where(c < cascade.thresholds[0], z[1].argmax(1), first).numpy()
    teacher = (z[1].argmax(1).numpy() == labels).mean()
    assert teacher - (answers == labels).mean() <= 0.05 + 1e-9


def reached(cascade: Cascade, texts: list[str]) -> tuple[list[int], torch.Tensor]:
    """How many texts each stage after the first is asked, and the classes they get, by the definition."""
    z = [stage.logits(texts) / T for stage, T in zip(cascade.stages, cascade.temperatures)]
    counts, answers, left = [], z[0].argmax(1), torch.ones(len(texts), dtype=torch.bool)
    for before, after, least in zip(z, z[1:], cascade.thresholds):
        left &= before.softmax(1).max(1).values < least
        answers = torch.where(left, after.argmax(1), answers)
        counts.append(int(left.sum()))
    return counts, answers


def test_three_stages_pass_on_the_fractions_asked_for(models):
    task = tiny.task(200)
    texts = task.valid["text"][:]
    cascade = fit_cascade([unsure(models[2], 0), unsure(models[2], 1), models[2]], task, deferred=[0.5, 0.2])
    counts, answers = reached(cascade, texts)
    assert counts == [round(0.5 * len(texts)), round(0.2 * len(texts))]
    assert torch.equal(cascade.logits(texts).argmax(1), answers)


@pytest.mark.parametrize("most", [0.0, 0.1, 0.3])
def test_three_stages_keep_a_drop(models, most):
    task = tiny.task(200)
    labels, texts = torch.tensor(task.valid["label"][:]), task.valid["text"][:]
    _, answers = reached(fit_cascade(models, task, max_drop=most), texts)
    teacher = (models[-1].logits(texts).argmax(1) == labels).float().mean()
    assert teacher - (answers == labels).float().mean() <= most + 1e-6


# ---------------------------------------------------------------- what it computes

@pytest.mark.parametrize("thresholds", [[0.4, 0.4], [1.0, 1.0], [0.6, 0.55]])
def test_each_text_has_the_logits_of_the_stage_that_answers(models, thresholds):
    temperatures = [2.0, 0.5, 1.0]
    cascade = Cascade(models, thresholds, temperatures)
    for text, found in zip(TEXTS, cascade.logits(TEXTS)):
        for stage, T, least in zip(models, temperatures, [*thresholds, 0]):
            z = stage.logits([text])[0] / T
            if z.softmax(0).max() >= least: break
        torch.testing.assert_close(found, z, rtol=1e-4, atol=1e-4)
    batch = torch.cat([cascade._batch_logits(cascade.encode([text])) for text in TEXTS])
    torch.testing.assert_close(batch, cascade.logits(TEXTS), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        cascade._batch_logits(cascade.encode(TEXTS)), cascade.logits(TEXTS, 2), rtol=1e-4, atol=1e-4)


def test_extreme_thresholds_ask_one_stage_alone(models):
    low, high = (Cascade(models[1:], [t]) for t in (1e-9, 1.0))
    torch.testing.assert_close(low.logits(TEXTS), models[1].logits(TEXTS))
    torch.testing.assert_close(high.logits(TEXTS), models[2].logits(TEXTS))
    assert low.predict([]) == [] and low.labels == models[1].labels


def test_what_was_not_deferred_costs_nothing(models, monkeypatch):
    asked = []
    real = type(models[2]).logits
    def logits(self, texts, batch_size=32):
        asked.append((self is models[2], len(texts), batch_size))
        return real(self, texts, batch_size)
    cascade = fit_cascade(models[1:], tiny.task(80), deferred=0.25)
    monkeypatch.setattr("ecomopt.core.train.Classifier.logits", logits)
    texts = tiny.task(80).valid["text"][:]
    cascade.logits(texts, 7)
    (_, n, _), (is_large, deferred, size) = asked
    assert n == len(texts) and is_large and size == 7  # the deferred ones in batches of their own
    assert abs(deferred / n - 0.25) <= 1 / n + 0.25 * (len(texts) < 8)


def test_many_callers_are_answered_by_the_cascade(models):
    cascade = Cascade(models, [0.6, 0.55])
    async def ask():
        async with Batcher(cascade, max_batch_tokens=64) as batcher:
            ids, truncated = await batcher.encode(TEXTS)
            assert not any(truncated)
            return await batcher.logits(ids)
    torch.testing.assert_close(asyncio.run(ask()), cascade.logits(TEXTS), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_it_is_compared_and_is_a_step_of_recipes():
    task, teacher = tiny.task(60), tiny.classifier()
    steps = [{"keep_layers": {"layers": 1}}, {"cascade": {"runtime": "none", "deferred": 0.5}}]
    cascade = Recipe(steps).run(task, teacher, measure=False).model
    assert isinstance(cascade, Cascade)
    table = compare({"teacher": teacher, "cascade": cascade}, task, memory=False, repeats=1, calls=2).table
    assert table.loc["cascade", "parameters M"] == pytest.approx(
        sum(count_parameters(stage.model) for stage in cascade.stages) / 1e6, abs=0.01)


# ---------------------------------------------------------------- saving

def test_it_is_saved_with_all_stages_and_replaced(models, tmp_path):
    cascade = Cascade(models, [0.6, 0.55], [1.5, 1.0, 2.0])
    path = save(cascade, tmp_path / "cascade", [{"seed": 0}], files={"README.md": "three stages"})
    again = load(path)
    assert (again.thresholds, again.temperatures) == ([0.6, 0.55], [1.5, 1.0, 2.0])
    assert torch.equal(again.logits(TEXTS), cascade.logits(TEXTS)) and fingerprint(again) == fingerprint(cascade)
    assert artifact_info(path)["kind"] == "Cascade"
    assert disk_bytes(path) > sum(file_bytes(stage) for stage in models)
    save(models[1], path)
    assert sorted(one.name for one in path.iterdir() if one.is_dir()) == []
    save(cascade, path)
    assert torch.equal(load(path).logits(TEXTS), cascade.logits(TEXTS))
    assert fingerprint(Cascade(models, [0.7, 0.55])) != fingerprint(Cascade(models, [0.6, 0.55]))


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_answers(models, tmp_path):
    path = save(Cascade(models, [0.6, 0.55]), tmp_path / "cascade")
    code = "import sys, ecomopt; print(ecomopt.load(sys.argv[1]).predict(['the screen broke', 'love it']))"
    found = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert eval(found.stdout) == load(path).predict(["the screen broke", "love it"])


def change_manifest(path, **change):
    file = path / "artifact.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


DAMAGE = {
    "a stage is missing": lambda path: shutil.rmtree(path / "stage1"),
    "a stage was exchanged": lambda path: shutil.copytree(path / "stage0", path / "stage1", dirs_exist_ok=True),
    "weights of a stage": lambda path: (path / "stage0" / "model.safetensors").write_bytes(b"x"),
    "the manifest of a stage": lambda path: change_manifest(path / "stage0", max_length=7),
    "another file": lambda path: (path / "stage1" / "more.json").write_text("{}"),
    "another folder": lambda path: (path / "stage2").mkdir(),
    "names outside": lambda path: change_manifest(path, stages={"../stage0": "0" * 64, "stage1": "0" * 64}),
    "no stages": lambda path: change_manifest(path, stages={}),
    "a threshold": lambda path: change_manifest(path, settings={"thresholds": [7], "temperatures": [1, 1]}),
    "unknown settings": lambda path: change_manifest(path, settings={"code": "print(1)"}),
    "settings are no table": lambda path: change_manifest(path, settings=3),
    "another kind": lambda path: change_manifest(path, kind="Classifier"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cascade_is_refused(models, tmp_path, damage):
    path = save(Cascade(models[1:], [0.6]), tmp_path / "cascade")
    damage(path)
    with pytest.raises(EcomoptError): load(path)


def test_a_cascade_in_a_cascade_is_refused_when_it_is_loaded(models, tmp_path):
    inner = save(Cascade(models[1:], [0.6]), tmp_path / "inner")
    outer = save(Cascade(models[1:], [0.6]), tmp_path / "outer")
    shutil.rmtree(outer / "stage0")
    shutil.copytree(inner, outer / "stage0")
    with pytest.raises(EcomoptError): load(outer)


def test_a_folder_with_something_else_in_a_stage_is_not_replaced(models, tmp_path):
    path = save(Cascade(models[1:], [0.6]), tmp_path / "cascade")
    (path / "stage1" / "mine.txt").write_text("keep me")
    with pytest.raises(EcomoptError): save(models[1], path)
    assert (path / "stage1" / "mine.txt").read_text() == "keep me"


# ---------------------------------------------------------------- bad input

WRONG = {
    "one stage": lambda a, b, task: Cascade([a], []),
    "no classifier": lambda a, b, task: Cascade([a, "minilm"], [0.5]),
    "no threshold": lambda a, b, task: Cascade([a, b], []),
    "a threshold above 1": lambda a, b, task: Cascade([a, b], [1.5]),
    "a threshold of 0": lambda a, b, task: Cascade([a, b], [0.0]),
    "temperatures": lambda a, b, task: Cascade([a, b], [0.5], [1.0]),
    "other labels": lambda a, b, task: Cascade([a, tiny.classifier(labels=("positive", "negative"))], [0.5]),
    "nested": lambda a, b, task: Cascade([a, Cascade([a, b], [0.5])], [0.5]),
    "no target": lambda a, b, task: fit_cascade([a, b], task),
    "two targets": lambda a, b, task: fit_cascade([a, b], task, deferred=0.1, max_drop=0.1),
    "a fraction above 1": lambda a, b, task: fit_cascade([a, b], task, deferred=1.5),
    "a negative drop": lambda a, b, task: fit_cascade([a, b], task, max_drop=-0.1),
    "the wrong order": lambda a, b, task: Cascade([b, a], [0.5]),
    "the wrong order, to be fitted": lambda a, b, task: fit_cascade([b, a], task, deferred=0.1),
    "a threshold that is no number": lambda a, b, task: Cascade([a, b], "0.5"),
    "rising fractions": lambda a, b, task: fit_cascade([a, b, b], task, deferred=[0.1, 0.5]),
    "no validation texts": lambda a, b, task: fit_cascade([a, b], task.sample(valid=0), deferred=0.1),
    "quantize": lambda a, b, task: quantize(Cascade([a, b], [0.5])),
    "convert": lambda a, b, task: convert(Cascade([a, b], [0.5]), "onnxruntime", "float32"),
    "logits without labels": lambda a, b, task: fit_temperature(torch.zeros(3, 2), [0, 1]),
    "no student in a recipe": lambda a, b, task: Recipe(["cascade"]),
    "a step after it": lambda a, b, task: Recipe([{"keep_layers": {"layers": 1}}, "cascade", "quantize"]),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused(models, wrong):
    with pytest.raises(EcomoptError): wrong(models[1], models[2], tiny.task(40))


def test_two_stages_need_one_threshold_and_no_list(models):
    assert Cascade(models[1:], 0.5).thresholds == Cascade(models[1:], [0.5]).thresholds == [0.5]


def test_labels_are_matched_by_name(models):
    _, student, teacher = models
    task = tiny.task(60)
    turned = replace(task, labels=task.labels[::-1], valid=task.valid.map(lambda row: {"label": 1 - row["label"]}))
    first, second = (fit_cascade([student, teacher], one, 0.3) for one in (task, turned))
    assert first.temperatures == second.temperatures and first.thresholds == second.thresholds
    other = replace(task, labels=("bad", "good"))
    with pytest.raises(EcomoptError, match="labels"): fit_cascade([student, teacher], other, 0.3)


def test_a_stage_that_is_always_sure_does_not_defer_everything():
    sure = np.ones(100, np.float32)
    assert _threshold(sure, 10) < 1 and not (sure < _threshold(sure, 10)).any()
    assert _threshold(sure, 100) == 1


def test_what_any_stage_truncates_is_said(models):
    static, student, teacher = models
    short = replace(teacher, max_length=8)
    cascade = Cascade([replace(static, max_length=64), short], [0.9])
    assert _encode(cascade, ["bad", "bad battery " * 10])[1] == [False, True]


def test_cascades_of_other_stages_are_other_models(models):
    _, student, teacher = models
    first, second = (Cascade([student, replace(teacher, max_length=n)], [0.9]) for n in (64, 16))
    assert fingerprint(first) != fingerprint(second)


def test_a_small_model_that_is_always_right_defers_as_many_as_asked_for():
    z = torch.tensor([[4.0 + i / 100, 0.0] for i in range(50)])
    assert fit_temperature(z, [0] * 50) == 1.0
    confidence = z.softmax(1).max(1).values.numpy()
    assert (confidence < _threshold(confidence, 10)).sum() == 10


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(2, 40), st.floats(0, 4))
def test_the_fewest_are_those_of_the_table(seed, n, most):
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(-3, 4, (n, 2), generator=generator).double()  # with equal confidences
    large = torch.randn(n, 2, generator=generator)
    labels = torch.randint(0, 2, (n,), generator=generator).numpy()
    table = deferral_table(small, large, labels, n + 1)
    broken = table.index[table["drop"] * n > most + 1e-9]
    assert _fewest(small, large, labels, most) == (int(broken.max()) + 1 if len(broken) else 0)
