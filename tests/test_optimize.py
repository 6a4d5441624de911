"""One call: a winner always, gates, limits, unbalanced classes, interruption, bad input, the command line."""
import contextlib
import copy
import html
import inspect
import json
import random
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from datasets import Dataset
from joblib.externals.loky.process_executor import TerminatedWorkerError
from typer.testing import CliRunner

from ecomopt import (
    Classifier,
    EcomoptError,
    Goal,
    Recipe,
    Task,
    finetune,
    html_report,
    load,
    load_model,
    optimize,
    save,
)
from ecomopt.compress.distill import keep_layers
from ecomopt.core import train
from ecomopt.core.artifact import disk_bytes, file_bytes
from ecomopt.core.steps import _KINDS, step_kinds
from ecomopt.core.train import fingerprint
from ecomopt.optimize import cli, recipe
from ecomopt.optimize import optimize as module
from ecomopt.optimize.candidates import _gate, search_space
from ecomopt.optimize.cli import app
from ecomopt.optimize.recipe import StepContext
from tools import architectures

BINARY = Path(sys.executable).with_name("ecomopt")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("optimize")]


@pytest.fixture(scope="module")
def task(): return tiny.task(300)


@pytest.fixture(scope="module")
def teacher(task, tmp_path_factory):
    folder = tiny.written(tiny.classifier(), tmp_path_factory.mktemp("model") / "bert")
    return finetune(folder, task, epochs=30, learning_rate=1e-3)


@pytest.fixture(scope="module", autouse=True)
def no_conversion():
    """Without the runtimes, whose conversions take seconds, a search of tiny models is quick; one test has them."""
    with pytest.MonkeyPatch.context() as patch:
        step_kinds()
        for kind in ("convert", "cascade"): patch.delitem(_KINDS, kind)
        yield


@pytest.fixture
def no_fresh_process(monkeypatch):
    """Without the gate that loads the winner in a fresh process, whose imports take seconds; `result` has it."""
    monkeypatch.setattr(module, "_reloads", lambda model, texts: _gate("skipped", True, ""))


@contextlib.contextmanager
def searched(asks: int):
    """Searches that ask so many times what to try, in place of seconds: how fast the machine is decides nothing."""
    class Counted(module.ConstrainedSearch):
        n_asked = 0
        def ask(self, *seconds_left):
            self.n_asked += 1
            return super().ask(*seconds_left)

    def left(search): return 80.0 if search.search.n_asked < asks else 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ConstrainedSearch", Counted)
        patch.setattr(module._Search, "left", left)
        patch.setattr(module._Search, "expected", lambda self, *part: self.n_texts(*part) / 100)
        patch.setattr(module, "_PRIORS", json.loads(json.dumps(module._PRIORS).replace("20000", "200")))
        yield


@pytest.fixture(scope="module")
def result(task, teacher):
    with searched(20): return optimize(task, teacher, Goal(max_drop=0.2))


@pytest.fixture
def few_trials():
    with searched(5): yield


def test_there_is_one_winner_and_it_keeps_the_goal(result, task, teacher):
    trials = result.data["trials"]
    won = [trial for trial in trials if trial["winner"]]
    assert len(won) == 1 and result.feasible and won[0]["drop"] <= 0.2
    assert len(trials) > 2 and any(trial["fraction"] == 1 for trial in trials[1:])
    assert all(gate["passed"] for gate in result.data["gates"]) and len(result.data["gates"]) == 4
    assert result.verdict.sentences == len(task.test)
    assert trials[0]["steps"] == [], "the teacher is the first trial"


def test_what_is_saved_is_what_was_found(result, task, tmp_path):
    path = result.save(tmp_path / "small")
    assert load(path).predict(task.test["text"][:]) == result.model.predict(task.test["text"][:])
    manifest = json.loads((path / "artifact.json").read_text())
    assert manifest["measurements"] == [result.data] and Recipe.from_list(manifest["recipe"]) == result.recipe
    assert "## " in (path / "README.md").read_text("utf8")
    report = module_report(path)
    assert str(len(result.data["trials"])) in report and result.verdict.outcome.split(" with")[0] in report


def module_report(path: Path) -> str:
    """The text of the HTML report."""
    from ecomopt import report
    return report(path).read_text("utf8")


def test_the_recipe_makes_the_same_model_again(result, task, teacher):
    again = result.recipe.run(task, teacher, measure=False)
    first, second = (model.model.state_dict() for model in (result.model, again.model))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert again.model.predict(task.test["text"][:]) == result.model.predict(task.test["text"][:])
    assert result.data["reproducible"] == module._SAME, "no runtime whose files differ"


def test_the_front_is_a_front_and_tables_are_whole(result):
    known = [t for t in result.data["trials"] if t["is_complete"] and t["status"] == "trained"]
    assert not any(t["pareto"] for t in result.data["trials"] if t not in known), "costs and drop of one model"
    def costs(t): return (t["drop"], t["latency_ms"], t["disk_bytes"])
    def is_dominated(b):
        return any(all(x <= y for x, y in zip(costs(a), costs(b))) and costs(a) != costs(b) for a in known)
    for trial in known: assert trial["pareto"] != is_dominated(trial), trial["number"]
    assert len(result.table) == len(result.data["trials"])
    assert result.data["baselines"][0]["name"].startswith("TF-IDF")
    assert json.loads(json.dumps(result.data)) == result.data


def test_what_breaks_a_limit_is_never_trained(task, teacher, no_fresh_process):
    most = 0.9 * disk_bytes_of(teacher)
    with searched(12): found = optimize(task, teacher, Goal(max_drop=0.2, max_bytes=int(most), minimize="bytes"))
    over = [t for t in found.data["trials"] if t["disk_bytes"] and t["disk_bytes"] > most]
    assert over and all(t["status"] == "cost" and t["drop"] is None for t in over)
    assert found.feasible and found.data["winner"]["disk_bytes"] <= most


def disk_bytes_of(model) -> int:
    """What saving it takes."""
    import tempfile
    with tempfile.TemporaryDirectory() as folder: return disk_bytes(save(model, Path(folder) / "m"))


def test_an_impossible_goal_gives_the_closest(task, teacher, tmp_path, no_fresh_process, few_trials):
    with pytest.warns(UserWarning, match="cannot be kept"):
        found = optimize(task, teacher, Goal(max_bytes=10))
    assert not found.feasible and "times the disk_bytes of the limit" in found.data["reason"]
    assert any("cannot be kept" in note for note in found.data["notes"])
    assert load(found.save(tmp_path / "closest")).labels == task.labels


def test_what_models_cost_is_said_before_the_first_trial(task, teacher, capsys, no_fresh_process, few_trials):
    said = []
    found = optimize(task, teacher, Goal(max_drop=0.2), on_trial=lambda trial: said.append(capsys.readouterr().err))
    assert "students cost, before conversion: smallest" in said[0] and "students cost" not in "".join(said[1:])
    costs = found.data["costs"]
    assert [*costs] == ["smallest", "typical", "largest"]
    assert costs["smallest"]["disk_bytes"] < file_bytes(teacher) <= costs["largest"]["disk_bytes"]


def test_a_limit_that_only_one_kind_of_student_keeps_is_possible(task, teacher):
    search = module._Search(StepContext(task, teacher), Goal(), 10.0, 1, 1, None)
    search.prepare()
    recipes = [steps for steps in (module._sized(steps, search.space) for steps in module._SMALLEST) if steps]
    assert {next(iter(steps[0])) for steps in recipes} == {"static", "prune_structured", "keep_layers"}
    sizes = [search.costs(module.build_untrained(steps, search.context), 1, 10)["disk_bytes"] for steps in recipes]
    search.goal = Goal(max_bytes=int(min(sizes)))
    assert search.is_possible() and not search.impossible
    search.goal = Goal(max_bytes=int(min(sizes)) - 1)
    with pytest.warns(UserWarning, match="typically"): assert not search.is_possible()


def test_a_fault_of_another_library_is_a_trial_that_failed(
    task, teacher, monkeypatch, no_fresh_process, few_trials
):
    def broken(*arguments): raise RuntimeError("it fell over\nand more")
    for name in ("build_untrained", "_trained"): monkeypatch.setattr(module, name, broken)
    found = optimize(task, teacher, Goal(max_drop=0.2, max_bytes=10**9))
    assert found.model is teacher and found.feasible
    assert any(t["why"] == "RuntimeError: it fell over" for t in found.data["trials"])


def test_a_student_that_cannot_answer_is_a_trial_that_failed(
    task, teacher, monkeypatch, no_fresh_process, few_trials
):
    predict = module._predict
    def broken(name, model, *others):
        if "distill" in name: raise RuntimeError("no answer")
        return predict(name, model, *others)
    monkeypatch.setattr(module, "_predict", broken)
    found = optimize(task, teacher, Goal(max_drop=0.2))
    failed = [t for t in found.data["trials"] if t["status"] == "failed"]
    assert failed and {t["why"] for t in failed} == {"RuntimeError: no answer"} and found.feasible


def test_interruption_at_the_end_leaves_the_best_so_far(
    task, teacher, monkeypatch, no_fresh_process, few_trials
):
    tested, calls = tiny.interrupted_once(module._tested)
    monkeypatch.setattr(module, "_tested", tested)
    found = optimize(task, teacher, Goal(max_drop=0.2))
    assert found.feasible and len(calls) == 2 and any("interrupted" in note for note in found.data["notes"])


def test_texts_without_words_have_a_baseline():
    rows = [{"text": "👍👎"[i % 2] * (1 + i % 3), "label": i % 2, "group": str(i)} for i in range(40)]
    texts = Dataset.from_list(rows)
    signs = Task("signs", ("good", "bad"), texts, texts, texts, texts.select([]))
    found = module._tfidf(signs, texts["text"][:], np.array(texts["label"]))
    assert found["accuracy"] == 1.0 and found["disk_bytes"] > 0


@pytest.mark.parametrize("texts, expected", [
    (["这个手机真好用", "屏幕坏了 ok"], True), (["แบตเตอรี่ดีมาก"], True), (["👍 👎"], True),
    (["a good phone, 很好"], False), (["très bon", "хорошо"], False),
])
def test_scripts_without_spaces_are_counted_by_characters(texts, expected):
    assert module._has_no_spaces(texts) == expected


def test_students_learn_from_the_mean_of_several_teachers(task, teacher, no_fresh_process, few_trials):
    other = tiny.classifier(seed=5)
    found = optimize(task, [teacher, other], Goal(max_drop=0.3), "5s")
    assert any("mean of 2 teachers" in note for note in found.data["notes"])
    context = StepContext(task, teacher, more_teachers=(other,))
    texts = task.valid["text"][:8]
    mean = torch.stack([teacher.logits(texts), other.logits(texts)]).mean(0)
    torch.testing.assert_close(context.mean_teacher.logits(texts), mean)
    steps = Recipe([{"distill": {"layers": 1}}])
    alone, both = (steps.run(task, model, measure=False).model for model in (teacher, [teacher, other]))
    assert fingerprint(alone) != fingerprint(both)
    for wrong in ([], [teacher, "minilm"], [teacher, tiny.classifier(labels=("a", "b"))]):
        with pytest.raises(EcomoptError): optimize(task, wrong, Goal(), "5s")


def test_a_large_test_split_is_timed_in_fewer_rounds(task):
    many = SimpleNamespace(test=range(20_000))
    assert [module._rounds(many, rate) for rate in (150.0, 1000.0, 1e6)] == [1, 3, 5]


def test_a_winner_keeps_the_goal_by_its_own_estimate(task, teacher, monkeypatch, no_fresh_process, few_trials):
    real = module._Search.judge
    def judge(self, candidate, trial, fraction, model):
        real(self, candidate, trial, fraction, model)
        if trial.steps: trial.estimate = 0.5  # the process of the search does not hear of it
    monkeypatch.setattr(module._Search, "judge", judge)
    found = optimize(task, teacher, Goal(max_drop=0.3), "5s")
    assert found.feasible and found.recipe.steps == [], found.data["reason"]


def test_without_a_model_the_default_teacher_is_fine_tuned(
    task, teacher, monkeypatch, no_fresh_process, few_trials
):
    asked = []
    def tuned(*arguments, **options):
        asked.append((*arguments, options))
        return teacher
    monkeypatch.setattr(recipe, "finetune", tuned)
    found = optimize(task, goal=Goal(max_drop=0.2), seed=3)
    assert asked == [("minilm", task, {"seed": 3})] and found.feasible


def test_trials_run_in_parallel(task, teacher, no_fresh_process, few_trials):
    found = optimize(task, teacher, Goal(max_drop=0.2), n_jobs=2)
    assert found.feasible and any(t["fraction"] for t in found.data["trials"])


def test_no_round_trains_a_candidate_twice(task, teacher, monkeypatch, no_fresh_process, few_trials):
    rounds, train = [], module._Search.train
    def noted(self, batch, complete=False):
        rounds.append([id(candidate) for candidate, _ in batch])
        return train(self, batch, complete)
    monkeypatch.setattr(module._Search, "train", noted)
    monkeypatch.setattr(module, "Parallel", lambda n_jobs: lambda jobs: [f(*args) for f, args, _ in jobs])
    optimize(task, teacher, Goal(max_drop=0.2), n_jobs=3)
    assert max(map(len, rounds)) > 1 and all(len(set(one)) == len(one) for one in rounds)


def test_good_recipes_stay_the_same_in_the_space(task, teacher):
    space, _ = search_space(StepContext(task, teacher))
    sized = [module._sized(steps, space) for steps in module._PRIORS]
    assert any(sized)
    for steps in filter(None, sized): assert [*map(list, space.steps(space.point(steps)))] == [*map(list, steps)]


def test_a_search_runs_in_one_process(task, teacher, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EcomoptError, match="one process"): optimize(task, teacher)


@pytest.mark.parametrize(("against", "said"), [("met", "No transformer is needed"), ("not resolvable", "too small"),
                                               ("not met", "")])
def test_the_notes_say_what_the_baseline_means(task, teacher, against, said):
    search = SimpleNamespace(task=task, texts=[""] * 100, goal=Goal(), impossible=None, is_interrupted=False,
                             context=SimpleNamespace(more_teachers=()))
    trial, baseline = SimpleNamespace(drop_std=0.032), SimpleNamespace(outcome=against)
    notes = module._notes(search, trial, baseline)
    assert any(said in note for note in notes if "standard error" not in note) == bool(said)
    assert "standard error of 3.2 points" in notes[0], "the valid split of 100 texts cannot tell"


def test_unbalanced_classes_are_said_before_work(task, teacher, monkeypatch):
    rows = Dataset.from_list([r for i, r in enumerate(task.train) if r["label"] == 1 or i % 12 == 0])
    def stop(*arguments): raise InterruptedError
    monkeypatch.setattr(module, "_Search", stop)
    with pytest.warns(UserWarning, match="macro_f1"), pytest.raises(InterruptedError):
        optimize(replace(task, train=rows), teacher)


def test_interruption_finishes_with_the_best_so_far(task, teacher, no_fresh_process):
    def interrupt(trial): raise KeyboardInterrupt
    found = optimize(task, teacher, Goal(max_drop=0.2), "10min", on_trial=interrupt)
    assert found.feasible and len(found.data["trials"]) == 1
    assert any("interrupted" in note for note in found.data["notes"])


def test_interruption_before_the_first_trial_leaves_the_teacher(task, teacher, monkeypatch, no_fresh_process):
    def interrupt(context): raise KeyboardInterrupt
    monkeypatch.setattr(module, "search_space", interrupt)
    found = optimize(task, teacher, Goal(max_drop=0.2), "10min")
    assert found.model is teacher and found.feasible


def test_a_step_that_fails_is_a_trial_that_failed(
    task, teacher, monkeypatch, no_fresh_process, few_trials
):
    def broken(*arguments): raise EcomoptError("It is broken.", "here", "Mend it.")
    monkeypatch.setattr(module, "build_untrained", broken)
    found = optimize(task, teacher, Goal(max_drop=0.2))
    assert all(t["status"] in ("failed", "trained") for t in found.data["trials"]) and found.model is teacher
    assert any(t["why"] == "It is broken." for t in found.data["trials"])


def test_the_closest_model_is_one_that_answers(task, teacher, few_trials):
    search = module._Search(StepContext(task, teacher), Goal(), 10.0, 1, 1, None)
    search.run()
    for trial in search.trials.values():
        if trial.steps: trial.status, trial.model, trial.is_complete = "failed", None, True
    assert search.closest().model is teacher


def test_a_killed_worker_is_a_trial_that_failed(task, teacher, monkeypatch, no_fresh_process, few_trials):
    def killed(*arguments, **options): raise TerminatedWorkerError("a worker was killed")
    monkeypatch.setattr(module, "Parallel", lambda n_jobs: killed)
    found = optimize(task, teacher, Goal(max_drop=0.2))
    assert any("killed" in (t["why"] or "") for t in found.data["trials"])


def test_the_error_of_a_drop_of_macro_f1_is_that_of_the_metric(task, teacher):
    search = module._Search(StepContext(replace(task, metric="macro_f1"), teacher), Goal(), 10.0, 1, 1, None)
    search.actual = np.array([0] * 95 + [1] * 5)
    search.answers = search.actual.copy()
    found = search.answers.copy()
    found[-1] = 0
    accuracy = np.sqrt((found != search.answers).mean() / len(found))
    assert search.drop_std(found, 0.01) > 3 * accuracy, "one of five texts of a class"


def test_unbalanced_classes_are_noted_and_one_class_never_wins(task):
    rows = Dataset.from_list([r for i, r in enumerate(task.train) if r["label"] == 1 or i % 12 == 0])
    unbalanced = replace(task, train=rows)
    constant = tiny.classifier()
    constant.model.classifier.weight.data.zero_()
    constant.model.classifier.bias.data = torch.tensor([0.0, 1.0])
    context = StepContext(unbalanced, constant)
    search = module._Search(context, Goal(), 10.0, 1, 1, None)
    gate = module._no_lost_class(search.answers, search.actual, search.actual, task.labels, 0.1)
    assert not gate["passed"] and "negative" in gate["detail"]


def loaded(name: str, folder: Path) -> Classifier:
    """A random model of an architecture as a teacher; skips those that are refused: the table of the site says why."""
    try: return load_model(architectures.checkpoint(name, folder), architectures.LABELS, max_length=64)
    except EcomoptError as error: pytest.skip(error.what)


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_what_an_architecture_does_not_support_is_left_out_and_said(name, tmp_path):
    context = StepContext(tiny.task(120), loaded(name, tmp_path))
    _, left_out = search_space(context)
    outcomes = json.loads(architectures.TABLE.read_text("utf8"))[name]
    tried = {step for step, kind in step_kinds().items() if kind.ranges(context) and not kind.trains}
    refused = {step for step, outcome in outcomes.items() if outcome.startswith("refused")} & tried
    assert refused <= {one["what"].split()[0] for one in left_out} and all(one["why"] for one in left_out)


@pytest.mark.parametrize("name", ["DistilBERT", "XLM-R", "ALBERT", "DeBERTa-v3", "ModernBERT", "LLaMA", "T5"])
def test_any_architecture_is_optimized_and_comes_back(name, tmp_path, no_fresh_process, few_trials):
    found = optimize(tiny.task(120), loaded(name, tmp_path / "model"), Goal(max_drop=0.5), threads=1)
    assert found.feasible
    again = load(found.save(tmp_path / "small"))
    assert again.predict(["good", "bad battery"]) == found.model.predict(["good", "bad battery"])


def test_fifty_classes_of_any_script_with_entities_and_emoji(tmp_path, no_fresh_process):
    said = ("très bon", "很好，真的", "отлично", "&quot;good&quot; &amp; cheap", "👍🏽", "<b>schlecht</b><br/>",
            "جيد جدا")
    table = pd.DataFrame({"text": [f"{said[i % 7]} {i} " * (1 + i % 40) for i in range(400)],
                          "label": [f"Größe {i % 50}" for i in range(400)]})
    table.to_json(tmp_path / "texts.jsonl", orient="records", lines=True, force_ascii=False)
    task = Task.from_csv(tmp_path / "texts.jsonl", "text", "label")
    teacher = keep_layers(load_model("minilm", task.labels, max_length=64), 1)
    with searched(2): found = optimize(task, teacher, Goal(max_drop=0.5), threads=1)
    assert len(found.model.labels) == 50 and found.data["task"]["truncated"]["train"] > 0
    assert "Größe 7" in html_report(found.data)


@pytest.mark.parametrize("change, match", [
    (dict(budget=0), "budget"), (dict(budget="soon"), "budget"), (dict(goal=0.01), "goal"),
    (dict(n_jobs=0), "n_jobs"), (dict(goal=Goal(max_perplexity=0.02)), "perplexity"),
    (dict(threads=0), "threads"), (dict(seed=-1), "seed"),
])
def test_wrong_arguments_are_refused_before_work(task, teacher, change, match, monkeypatch):
    monkeypatch.setattr(module, "_Search", None)
    with pytest.raises(EcomoptError, match=match): optimize(task, teacher, **change)


def test_a_task_without_a_split_or_of_other_labels_is_refused(task, teacher):
    for split in ("valid", "test"):
        empty = replace(task, **{split: getattr(task, split).select([])})
        with pytest.raises(EcomoptError, match=split): optimize(empty, teacher)
    with pytest.raises(EcomoptError, match="labels"): optimize(task, tiny.classifier(labels=("a", "b")))
    with pytest.raises(EcomoptError, match="task"): optimize("reviews", teacher)


# ---------------------------------------------------------------- the command line

@pytest.fixture(scope="module")
def shop(task, teacher, tmp_path_factory):
    """A shop's folder: a file of reviews and a teacher."""
    folder = tmp_path_factory.mktemp("shop")
    draw = random.Random(0)
    words = [" ".join(draw.choices(tiny.WORDS[:8], k=5)) for _ in range(300)]
    rows = [f"{text} {('bad', 'good')[i % 2]} {i},{('negative', 'positive')[i % 2]}" for i, text in enumerate(words)]
    (folder / "reviews.csv").write_text("\n".join(["review,stars", *rows]) + "\n")
    save(teacher, folder / "teacher")
    return folder


def run(shop: Path, *words: str, **options) -> subprocess.CompletedProcess:
    """A command as a user runs it."""
    return subprocess.run([BINARY, *words], cwd=shop, capture_output=True, text=True, timeout=300, **options)


def invoke(shop: Path, *words: str):
    """A command in this process: the imports of a fresh one take seconds."""
    with contextlib.chdir(shop): return CliRunner().invoke(app, words)


COLUMNS = ("reviews.csv", "--text", "review", "--label", "stars")


def test_the_main_job_in_one_line(shop):
    words = ("--model", "teacher", "--max-drop", "0.3", "--budget", "5s", "--out", "small", "--json")
    ran = run(shop, "optimize", *COLUMNS, *words)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["feasible"] and Path(shop / "small" / "artifact.json").exists()
    assert Path(found["report"]).read_text("utf8").startswith("<!doctype html>")
    measured = json.loads(run(shop, "measure", "small", *COLUMNS, "--json").stdout)
    assert measured["sentences"] == 60
    labelled = run(shop, "predict", "small", "reviews.csv", "--text", "review").stdout.splitlines()
    assert labelled[0] == "review,stars,label,score" and len(labelled) == 301


def test_the_command_of_the_report_makes_the_model_again(shop, result, monkeypatch):
    quick = partial(recipe.compare, repeats=1, calls=2, memory=False)  # without fresh processes
    monkeypatch.setattr(recipe, "compare", quick)
    result.save(shop / "found")
    (shop / "recipe.yaml").write_text(result.data["recipe"])
    page = html.unescape(module_report(shop / "found"))
    words = shlex.split(re.search("ecomopt (recipe run .*)", page)[1].split("<")[0])
    words = [{"DATA": "reviews.csv", "TEACHER": "teacher"}.get(word, word) for word in words]
    ran = invoke(shop, *words, *COLUMNS[1:], "--json")
    assert ran.exit_code == 0, ran.output
    assert load(shop / "again").labels == result.model.labels


def test_a_directory_without_a_head_for_these_labels_is_fine_tuned(task, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "finetune", lambda *given, **options: given)
    def taught(name, model, **config):
        for key, value in config.items(): setattr(model.config, key, value)
        model.save_pretrained(tmp_path / name)
        teacher.tokenizer.save_pretrained(tmp_path / name)
        return cli._teachers(str(tmp_path / name), task, 0, 128)[0]
    model = copy.deepcopy(teacher.model)
    assert taught("classifier", model).predict(["good"]) == teacher.predict(["good"])
    assert taught("encoder", model.base_model) == (str(tmp_path / "encoder"), task)
    assert taught("other", model, id2label={0: "spam", 1: "ham"}) == (str(tmp_path / "other"), task)
    save(teacher, tmp_path / "artifact")
    assert cli._teachers(str(tmp_path / "artifact"), task, 0, 128)[0].labels == task.labels
    with pytest.raises(EcomoptError, match="--teachers"): cli._teachers(str(tmp_path / "artifact"), task, 0, 128, 3)


def test_exit_code_1_where_the_test_split_refutes_the_goal(shop, monkeypatch, tmp_path):
    class Found:
        feasible, verdict, data = True, SimpleNamespace(outcome="not met"), {}
        def save(self, out): pass
    monkeypatch.setattr(cli, "_searched", lambda *given: Found())
    monkeypatch.setattr(cli, "_summary", lambda *given: ({}, True, ""))
    words = ("optimize", *COLUMNS, "--model", "teacher", "--out", str(tmp_path / "refuted"), "--json")
    assert invoke(shop, *words).exit_code == 1
    Found.verdict = SimpleNamespace(outcome="not resolvable with n = 60")
    assert invoke(shop, *words).exit_code == 0


def test_a_result_that_cannot_be_saved_is_kept_elsewhere(shop, result, monkeypatch, tmp_path):
    monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path))
    class Found:
        def save(self, out):
            if Path(out).name == "full": raise EcomoptError("No space is left.", str(out), "Make room.")
            return result.save(out)
    monkeypatch.setattr(cli, "_searched", lambda *given: Found())
    ran = invoke(shop, "optimize", *COLUMNS, "--model", "teacher", "--out", "full")
    assert ran.exit_code == 2 and "No space is left." in ran.stderr
    kept, = (tmp_path / "unsaved").iterdir()
    assert str(kept) in ran.stderr.replace("\n", "") and load(kept).labels == result.model.labels


@pytest.mark.parametrize("words", [
    ("optimize", *COLUMNS, "--threads", "0", "--out", "never"), ("optimize", *COLUMNS, "--jobs", "0", "--out", "never"),
    ("optimize", *COLUMNS, "--seed", "5000000000", "--out", "never"), ("quantize", "teacher", "--bits=9", "--out=x"),
    ("distill", "teacher", *COLUMNS, "--layers", "0", "--out", "never"), ("measure", "minilm", *COLUMNS),
    ("distill", "teacher", *COLUMNS, "--epochs", "-1", "--out", "never"), ("predict", "teacher", "-", "--text", "a"),
])
def test_numbers_and_models_are_checked_before_any_work(shop, monkeypatch, words):
    monkeypatch.setattr(cli, "_teachers", None)
    monkeypatch.setattr(train, "load_model", None)
    ran = invoke(shop, *words)
    assert ran.exit_code == 2 and "Traceback" not in ran.stderr and not (shop / "never").exists(), ran.stderr


def test_texts_are_as_long_as_the_command_says(task, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "finetune", lambda *given, **options: seen.append(options))
    cli._teachers("minilm", task, 5, 64, 3)
    assert [(one["seed"], one["max_length"]) for one in seen] == [(5, 64), (6, 64), (7, 64)]


def test_an_unforeseen_fault_is_exit_code_3(shop, monkeypatch):
    def broken(*arguments, **options): raise ZeroDivisionError("it fell over")
    monkeypatch.setattr(module, "optimize", broken)
    ran = invoke(shop, "optimize", *COLUMNS, "--model", "teacher", "--budget", "2s", "--out", "never")
    assert ran.exit_code == 3 and "ZeroDivisionError: it fell over" in ran.stderr and not (shop / "never").exists()


def test_a_file_in_the_place_of_the_report_is_refused_before_work(shop, monkeypatch):
    monkeypatch.setattr(module, "optimize", None)
    (shop / "mine-report.html").write_text("mine")
    ran = invoke(shop, "optimize", *COLUMNS, "--model", "teacher", "--budget", "2s", "--out", "mine")
    assert ran.exit_code == 2 and "another file" in ran.stderr and (shop / "mine-report.html").read_text() == "mine"


def test_every_command_prints_json(shop):
    def printed(*words): return json.loads(invoke(shop, *words, "--json").stdout)
    assert {"name", "MB"} <= printed("assets")[0].keys()
    found = printed("quantize", "teacher", "--out", "eight")
    assert found["artifact"] == "eight" and found["disk_bytes"] < found["from_disk_bytes"]
    found = printed("distill", "teacher", *COLUMNS, "--layers", "1", "--out", "short")
    assert found["disk_bytes"] == disk_bytes(shop / "short")


def test_students_learn_from_a_file_without_labels(shop):
    words = "distill", "teacher", *COLUMNS, "--layers", "1", "--out", "taught"
    (shop / "more.jsonl").write_text('{"review": "good battery"}\n{"review": "bad screen, really"}\n')
    alone, taught = (invoke(shop, *words, *more) for more in ((), ("--unlabelled", "more.jsonl")))
    assert alone.exit_code == taught.exit_code == 0, taught.output
    (shop / "copies.csv").write_text((shop / "reviews.csv").read_text())
    with pytest.warns(UserWarning, match="90 of 300 texts are copies"):
        assert invoke(shop, *words, "--unlabelled", "copies.csv").exit_code == 0


def test_a_goal_that_is_not_met_is_exit_code_1(shop, no_fresh_process, few_trials):
    words = ("--model", "teacher", "--max-bytes", "9", "--out", "closest")
    ran = invoke(shop, "optimize", *COLUMNS, *words)
    assert ran.exit_code == 1 and (shop / "closest" / "artifact.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("optimize", *COLUMNS, "--budget", "0"),
        ("optimize", *COLUMNS, "--max-drop", "7"),
        ("optimize", "nothing.csv"),
        ("optimize", "reviews.csv", "--text", "reveiw"),
        ("optimize", *COLUMNS, "--minimize", "x"),
        ("optimize", *COLUMNS, "--metric", "acuracy"),
        ("recipe", "run", "none.yaml", *COLUMNS),
        ("optimize", *COLUMNS, "--model", "."),
        ("optimize", *COLUMNS, "--model", "reviews.csv"),
    ],
)
def test_bad_input_is_exit_code_2_and_nothing_is_left(shop, words):
    ran = invoke(shop, *words, "--out", "never")
    assert ran.exit_code == 2 and "Traceback" not in ran.stderr and "do:" in ran.stderr, ran.stderr
    assert not (shop / "never").exists() and not list(shop.glob(".never*"))


def test_an_output_that_holds_something_else_is_refused(shop):
    (shop / "mine").mkdir(exist_ok=True)
    (shop / "mine" / "photo").write_text("x")
    ran = run(shop, "quantize", "teacher", "--out", "mine")
    assert ran.returncode == 2 and (shop / "mine" / "photo").read_text() == "x"


def test_two_runs_on_one_output(shop):
    words = [BINARY, "optimize", *COLUMNS, "--model", "teacher", "--budget", "10min", "--out", "both"]
    def heeds_interrupts(): signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts with & does not

    with subprocess.Popen(words, cwd=shop, stderr=subprocess.PIPE, text=True, preexec_fn=heeds_interrupts) as first:
        try:
            assert any("searching" in line for line in first.stderr)
            second = run(shop, *words[1:])
            assert any("teacher" in line for line in first.stderr)
            first.send_signal(signal.SIGINT)
            first.stderr.read()
        except BaseException:
            first.kill()
            raise
    assert second.returncode == 2 and "Another run" in second.stderr
    assert first.returncode in (0, 1) and (shop / "both" / "artifact.json").exists(), "Ctrl-C saves the best so far"


def test_predict_needs_little_memory_for_many_lines(shop):
    code = ("import resource, subprocess, sys; out = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, "
            "stdout=subprocess.DEVNULL); [out.stdin.write(b'the battery broke\\n' * 1000) for _ in range({n})]; "
            "out.stdin.close(); out.wait(); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    def peak(n):
        words = [sys.executable, "-c", code.format(n=n), BINARY, "predict", "teacher"]
        return int(subprocess.run(words, cwd=shop, capture_output=True, text=True, check=True).stdout)
    assert peak(40) < peak(4) + 60_000  # kilobytes


def test_predict_keeps_all_columns(shop):
    (shop / "scored.csv").write_text("text,score,label,predicted_label\ngood,5,a,b\n")
    row = json.loads(invoke(shop, "predict", "teacher", "scored.csv", "--json").stdout)
    assert (row["score"], row["label"], row["predicted_label"]) == ("5", "a", "b")
    assert row["predicted_predicted_label"] in ("negative", "positive") and 0.5 <= row["predicted_score"] <= 1


def test_predict_reads_long_texts_and_names_another_encoding(shop):
    (shop / "long.csv").write_text(f"text\n{'good ' * 40_000}\n")
    assert invoke(shop, "predict", "teacher", "long.csv").exit_code == 0
    (shop / "windows.csv").write_bytes("text\ntrès bon\n".encode("cp1252"))
    ran = invoke(shop, "predict", "teacher", "windows.csv")
    assert ran.exit_code == 2 and "UTF-8" in ran.stderr and "Traceback" not in ran.stderr


def test_the_home_directory_that_a_shell_leaves_is_found(shop, monkeypatch):
    monkeypatch.setenv("HOME", str(shop))
    ran = invoke(shop, "quantize", "~/teacher", "--out=~/at_home")
    assert ran.exit_code == 0, ran.output
    assert (shop / "at_home" / "artifact.json").exists() and not (shop / "~").exists()


def labelled(shop: Path, file: str) -> list[dict]:
    """What `ecomopt predict` prints for a file of JSON lines."""
    return [json.loads(line) for line in invoke(shop, "predict", "teacher", file).stdout.splitlines()]


def test_predict_names_the_line_at_fault(shop):
    (shop / "rows.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    ran = run(shop, "predict", "teacher", "rows.jsonl")
    assert ran.returncode == 2 and "line 2" in ran.stderr
    (shop / "rows.jsonl").write_text('{"text": "good"}\n\n{"text": 5}\n')
    assert [row["text"] for row in labelled(shop, "rows.jsonl")] == ["good", 5], "empty lines, and a number as a text"
    (shop / "rows.xml").write_text("<a/>")
    assert invoke(shop, "predict", "teacher", "rows.xml").exit_code == 2
    assert invoke(shop, "predict", "teacher", "none.csv").exit_code == 2


@pytest.mark.parametrize("write, name", [
    (lambda table, path: table.to_csv(path, index=False), "a.csv"),
    (lambda table, path: table.to_csv(path, index=False, sep=";", encoding="utf-8-sig"), "semicolons.csv"),
    (lambda table, path: table.to_csv(path, index=False, sep="\t"), "a.tsv"),
    (lambda table, path: table.to_parquet(path), "a.parquet"),
    (lambda table, path: table.to_json(path, orient="records", lines=True), "a.jsonl"),
])
def test_predict_reads_what_optimize_reads_and_keeps_a_label_that_is_there(shop, write, name):
    table = pd.DataFrame({"review": ["good, really", 'a "bad" one\nwith two lines', ""], "label": ["a", "b", "c"]})
    write(table, shop / name)
    ran = invoke(shop, "predict", "teacher", name, "--text", "review", "--json")
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [(row["review"], row["label"]) for row in rows] == list(table.itertuples(index=False, name=None)), ran.stderr
    assert {row["predicted_label"] for row in rows} <= {"negative", "positive"}


@pytest.mark.parametrize("content, words", [
    ("text,n\nbought 3, works 3,1\n", "line 2"), ("text,n\ngood\n", "line 2"), ("texts,n\ngood,1\n", "texts"),
])
def test_predict_refuses_columns_that_shift(shop, content, words):
    (shop / "shifted.csv").write_text(content)
    ran = invoke(shop, "predict", "teacher", "shifted.csv")
    assert ran.exit_code == 2 and words in ran.stderr and "Traceback" not in ran.stderr


def test_predict_reads_a_table_that_is_piped_in(shop):
    words = "predict", "teacher", "-", "--text", "review", "--json"
    table = 'n,review\r\n1,"good,\r\nreally"\r\n'.encode("utf-8-sig")
    ran = subprocess.run([BINARY, *words, "--format", "csv"], cwd=shop, input=table, capture_output=True, timeout=300)
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [(row["n"], row["review"]) for row in rows] == [("1", "good,\r\nreally")]
    ran = run(shop, *words, "--format", "jsonl", input='{"review": null}\n')
    assert json.loads(ran.stdout)["label"] in ("negative", "positive"), ran.stderr


def test_predict_loses_no_column_and_no_disk_is_full_in_silence(shop, tmp_path):
    (shop / "twice.csv").write_text("text,note,note\ngood,1,2\n")
    ran = invoke(shop, "predict", "teacher", "twice.csv")
    assert ran.exit_code == 2 and "note" in ran.stderr
    save(tiny.language_model(), shop / "writer")
    for words in (("predict", "writer", "twice.csv"), ("quantize", "writer", "--out", "never")):
        ran = invoke(shop, *words)
        assert ran.exit_code == 2 and "language model" in ran.stderr and "Traceback" not in ran.stderr
    with open("/dev/full", "w") as full:
        ran = subprocess.run([BINARY, "predict", "teacher"], cwd=shop, input="good\n" * 9, text=True, stdout=full,
                             stderr=subprocess.PIPE, timeout=300)
    assert ran.returncode == 2 and "cannot be written" in ran.stderr and "Traceback" not in ran.stderr, ran.stderr


def test_lines_of_text_come_back_in_order(shop):
    ran = run(shop, "predict", "teacher", "--json", input="good\r\nbad, really\n")
    assert [json.loads(line)["text"] for line in ran.stdout.splitlines()] == ["good", "bad, really"]


def test_help_teaches_by_example():
    for name in ("measure", "distill", "quantize", "optimize", "predict", "report", "serve"):
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "120"})
        assert shown.exit_code == 0 and "Example: " in shown.stdout and "ecomopt" in shown.stdout


def test_limits_of_the_command_are_those_of_the_server():
    from ecomopt.optimize.cli import _serve
    from ecomopt.optimize.serve import Limits
    defaults = {name: p.default for name, p in inspect.signature(_serve).parameters.items()}
    assert {name: defaults[name] for name in vars(Limits())} == vars(Limits())
