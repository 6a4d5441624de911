"""One call for a language model: the rules for its answers, the choice, and what comes back."""
import copy
import functools
import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecomopt import EcomoptError, LanguageResult, load, optimize
from ecomopt.core.artifact import _manifest
from ecomopt.core.generate import losses, perplexity
from ecomopt.optimize import language
from ecomopt.optimize.candidates import Goal
from ecomopt.optimize.language import (
    LanguageTrial,
    _answer_gates,
    _facts,
    _gate,
    _ranked,
    _reloads,
    apply_language_steps,
    faithfulness,
    optimize_language_model,
    repetition,
)
from ecomopt.optimize.report import html_report, model_card

pytestmark = pytest.mark.xdist_group("optimize_language")  # its fixtures are costly

PROMPTS = ["the battery is great", "bad phone works very good not bad not bad not"]
LOOP = "Title: Trailhead " * 20
GOOD = "Trailhead is a steel bottle of 750 ml. It keeps drinks cold for 24 hours."
REQUEST = "Describe the bottle Trailhead by Nordkap. It holds 750 ml and keeps drinks cold for 24 hours."


@pytest.fixture(scope="module")
def lm(): return tiny.language_model()


@pytest.fixture(scope="module")
def result(lm):
    seen = []
    goal = Goal(max_perplexity=0.5, minimize="bytes")
    found = optimize_language_model(PROMPTS, lm, goal, max_new_tokens=12, threads=1, on_trial=seen.append)
    return found, seen


# ---------------------------------------------------------------- rules for answers

@given(st.lists(st.text(alphabet="ab c好1.", max_size=40), max_size=4), st.integers(1, 5))
def test_repetition_is_a_fraction_that_copies_do_not_change(answers, n):
    value = repetition(answers, n)
    assert 0 <= value < 1 and value == pytest.approx(repetition(answers * 3, n))


def test_a_loop_is_repetition_and_a_good_text_is_none():
    assert repetition([GOOD]) == 0 and repetition([LOOP]) > 0.9
    assert repetition(["one two three"]) == repetition([]) == repetition([""]) == 0
    assert repetition(["好" * 20]) > 0.9 and repetition(["これは良い電池です"]) == 0


@pytest.mark.parametrize("prompt, facts", [
    (REQUEST, {"trailhead", "nordkap", "750", "24"}),
    ("Product: Trailhead, 1.5 liters. Price: 1,299 EUR", {"trailhead", "1.5", "1,299", "eur"}),
    ("iPhone case. USB cable!\nWhat is it? Write a text.", {"iphone", "usb"}),
    ("Name: Éclair Größe 42", {"éclair", "größe", "42"}),
    ("24oz mug", {"24"}), ("describe a mug", set()), ("", set()), ("...", set()), ("I am", set()),
])
def test_facts_are_numbers_and_names(prompt, facts): assert _facts(prompt) == facts


def test_faithfulness_counts_whole_words():
    assert faithfulness([REQUEST], [GOOD]) == 0.75 and faithfulness([REQUEST], [LOOP]) == 0.25
    assert faithfulness(["Model 24"], ["since 2024"]) == 0 and faithfulness(["a mug of 24 oz"], ["24oz"]) == 1
    assert faithfulness(["a mug"], [GOOD]) is None
    with pytest.raises(EcomoptError, match="1 prompts and 2 answers"): faithfulness(["a"], ["b", "c"])


@pytest.mark.parametrize("answer, failed", [
    (GOOD, set()), (LOOP, {"repetition", "loops", "faithfulness"}), ("It is a nice thing.", {"faithfulness"}),
    ("Trailhead Nordkap 750 24 " * 9, {"repetition", "loops"}), (" ", {"no empty answers", "faithfulness"}),
])
def test_gates_stop_loops_lost_facts_and_silence(answer, failed):
    gates = _answer_gates([REQUEST] * 3, [answer] * 3, [GOOD] * 3)
    assert {gate["name"] for gate in gates if not gate["passed"]} == failed


def test_loops_in_more_than_one_of_ten_answers_fail_though_the_average_is_low():
    """One is chance: of 24 answers of SmolLM2, 2 loop in float32 and in bfloat16, 3 in 8 and in 4 bits."""
    loop = "BODY: 750 ml, 24-hour bottle, 750 ml, 24-hour bottle, 750 ml, 24-"
    def failed(answers, original):
        prompts = ["a mug"] * len(answers)
        return {gate["name"] for gate in _answer_gates(prompts, answers, original) if not gate["passed"]}
    assert failed([loop] + [GOOD] * 7, [GOOD] * 8) == set()
    assert failed([loop] * 2 + [GOOD] * 11, [GOOD] * 13) == {"loops"}
    assert failed([loop] * 2 + [GOOD] * 18, [GOOD] * 20) == set()
    assert failed([loop] * 3 + [GOOD] * 21, [GOOD] * 24) == {"loops"}
    assert failed([loop] * 2 + [GOOD] * 11, [GOOD] * 12 + [loop]) == set()


def test_gates_are_relative_to_the_original():
    assert all(gate["passed"] for gate in _answer_gates([REQUEST], [LOOP], [LOOP]))
    assert all(gate["passed"] for gate in _answer_gates(["a mug"], ["a good one"], [GOOD]))


# ---------------------------------------------------------------- the choice

def trial(number, change=0.0, latency=100.0, size=100.0, passed=True, status="trained") -> LanguageTrial:
    return LanguageTrial(
        number, [], status, quality={"perplexity_change": change},
        costs=dict(latency_ms=latency, tokens_per_s=1.0, disk_bytes=size), gates=[_gate("repetition", passed, "")],
    )


TRIALS = [trial(0), trial(1, 0.01, 50, 60), trial(2, 0.02, 80, 20), trial(3, 0.03, 5, 5), trial(4, 0, 1, 1, False),
          LanguageTrial(5, [], "failed")]


@pytest.mark.parametrize("goal, first", [
    (Goal(), 1), (Goal(minimize="bytes"), 2), (Goal(max_latency_ms=60), 1), (Goal(max_bytes=30), 2),
    (Goal(max_latency_ms=40), 1), (Goal(max_bytes=10), 3),
    (Goal(max_bytes=0.5), 3),
])
def test_the_first_is_the_cheapest_feasible_or_the_closest(goal, first):
    goal = replace(goal, max_perplexity=0.02)
    assert _ranked(TRIALS, goal)[0].number == first
    assert {t.number for t in _ranked(TRIALS, goal)} == {0, 1, 2, 3, 4}


# ---------------------------------------------------------------- the whole

@pytest.mark.slow
def test_all_candidates_are_tried_and_one_wins(result, lm):
    found, seen = result
    data, table = found.data, found.table
    assert [t.number for t in seen] == list(range(len(table))) and len(table) == (10 if find_spec("llama_cpp") else 8)
    assert found.feasible and table["winner"].sum() == 1 and all(gate["passed"] for gate in data["gates"])
    row = table[table["winner"]].iloc[0]
    fair = table[(table["status"] == "trained") & (table["perplexity_change"] <= 0.5)]
    assert row["disk_bytes"] == fair["disk_bytes"].min() < table["disk_bytes"][0]
    assert str(found) == data["reason"] and json.loads(json.dumps(data)) == data
    again = perplexity(losses(found.model, PROMPTS))["perplexity"]
    assert data["winner"]["perplexity"] == pytest.approx(again)
    assert data["winner"]["perplexity"] / data["teacher"]["perplexity"] - 1 == pytest.approx(row["perplexity_change"])
    assert data["steps"][-1]["disk_bytes"] == row["disk_bytes"] and len(data["steps"]) == len(found.recipe) + 1


@pytest.mark.slow
def test_decoding_is_tried_on_the_fastest_in_torch_and_changes_no_token(result):
    last = result[0].data["trials"][-1]
    assert "prompt_lookup_decoding" in last["steps"][-1] and last["status"] != "failed"
    before = next(t for t in result[0].data["trials"] if t["steps"] == last["steps"][:-1])
    same = "perplexity", "repetition", "faithfulness", "disk_bytes"
    assert [last[name] for name in same] == [before[name] for name in same]
    gates = {gate["name"]: gate["passed"] for gate in result[1][-1].gates}
    assert gates["same tokens as greedy decoding"]


@pytest.mark.slow
def test_optimize_takes_prompts_and_a_language_model(lm):
    found = optimize(PROMPTS[:2], lm, Goal(max_perplexity=0.5), 1)
    assert isinstance(found, LanguageResult) and found.data["trials"][0]["steps"] == []
    with pytest.raises(EcomoptError, match="no language model"): optimize(PROMPTS[:2], tiny.classifier())


@pytest.mark.slow
def test_the_winner_is_saved_with_all_that_was_measured(result, tmp_path):
    path = result[0].save(tmp_path / "small")
    manifest = _manifest(path)
    assert manifest["recipe"] == result[0].recipe and manifest["measurements"] == [result[0].data]
    assert load(path).generate(PROMPTS, 12) == result[0].generate(PROMPTS, 12)
    assert "text-generation" in (path / "README.md").read_text("utf8")
    with pytest.raises(EcomoptError): result[0].generate("one text")


@pytest.mark.slow
def test_the_data_make_a_report(result):
    page = html_report(result[0].data)
    assert "ecomopt serve" not in page  # it serves classifiers
    assert "perplexity" in page and result[0].data["trials"][1]["name"] in page
    assert "text-generation" in model_card(result[0].data)


@pytest.mark.slow
def test_the_recipe_makes_the_same_model_again(result, lm):
    again = apply_language_steps(lm, result[0].recipe)
    assert again.generate(PROMPTS, 12) == result[0].generate(PROMPTS, 12)


def looping(lm, tokens=(5, 6)):
    """A model with the same perplexity that generates two tokens in turn: wrong as soon as it uses its KV cache."""
    broken = replace(lm, model=copy.deepcopy(lm.model))
    forward = broken.model.forward

    @functools.wraps(forward)
    def wrong(*args, **kwargs):
        out = forward(*args, **kwargs)
        if kwargs.get("use_cache"):
            last = int(kwargs["input_ids"][0, -1])
            out.logits[:] = torch.nn.functional.one_hot(torch.tensor(tokens[last == tokens[0]]), out.logits.shape[-1])
        return out
    broken.model.forward = wrong
    return broken


@pytest.fixture
def only(monkeypatch):
    """Let the search have one candidate besides the original, made by a function, and no process for the last gate."""
    def candidate(make):
        monkeypatch.setitem(language._STEPS, "cast", lambda lm, precision="bfloat16": make(lm))
        monkeypatch.setattr(language, "_CANDIDATES", [[{"cast": {}}]])
        monkeypatch.setattr(language, "_reloads", lambda *args: _gate("reloads", True, ""))
        monkeypatch.setattr(language._Search, "speed", lambda search, lm, steps: dict(
            latency_ms=10.0 if any("cast" in step for step in steps) else 100.0, tokens_per_s=1.0))
    return candidate


@pytest.mark.slow
def test_a_fast_model_that_repeats_itself_never_wins(lm, only):
    only(looping)
    found = optimize_language_model(PROMPTS, lm, threads=1, max_new_tokens=40)
    row = found.table.iloc[1]
    assert row["perplexity_change"] == 0 and row["latency_ms"] < 50  # by perplexity it would win
    assert row["repetition"] > 0.8 and row["status"] == "gate" and "repetition" in row["why"]
    assert "cast" not in str(found.recipe) and found.feasible and not row["winner"] and not row["pareto"]
    impossible = optimize_language_model(PROMPTS, lm, Goal(max_bytes=1), threads=1, max_new_tokens=40)
    assert not impossible.feasible and not impossible.table["winner"][1]  # not even as the closest


@pytest.mark.slow
def test_what_cannot_be_made_is_left_out(lm, only):
    def make(lm): raise RuntimeError("no such kernel\nmore")
    only(make)
    found = optimize_language_model(PROMPTS, lm, threads=1, max_new_tokens=4)
    assert found.data["left_out"] == [{"what": "cast", "why": "RuntimeError: no such kernel"}]
    assert found.table["status"].tolist()[:2] == ["trained", "failed"] and found.feasible
    assert html_report(found.data)


@pytest.mark.slow
def test_an_interrupt_finishes_with_the_best_so_far(lm, only):
    def make(lm): raise KeyboardInterrupt
    only(make)
    found = optimize_language_model(PROMPTS, lm, threads=1, max_new_tokens=4)
    assert len(found.table) == 1 and found.recipe == [] and any("interrupted" in n for n in found.data["notes"])


@pytest.mark.slow
def test_a_short_budget_leaves_the_original(lm, only):
    only(looping)
    found = optimize_language_model(PROMPTS, lm, budget=1e-3, threads=1, max_new_tokens=4)
    assert found.recipe == [] and found.feasible and len(found.table) == 1
    assert sum("budget ended" in note for note in found.data["notes"]) == 2 and "No other" in str(found)
    assert found.data["winner"] == found.data["teacher"]


@pytest.mark.slow
def test_a_goal_out_of_reach_gives_the_closest(lm, only):
    only(lambda lm: replace(lm))
    found = optimize_language_model(PROMPTS, lm, Goal(max_latency_ms=1), threads=1, max_new_tokens=4)
    assert not found.feasible and "cast" in found.recipe[0] and "None of" in str(found)
    assert "latency_ms is 10, the limit 1" in found.table["why"][1] and found.table["status"][1] == "cost"
    assert html_report(found.data)


@pytest.mark.slow
def test_a_model_that_does_not_reload_gives_way_to_the_next(lm, only, monkeypatch):
    only(lambda lm: replace(lm))
    monkeypatch.setattr(language, "_reloads", lambda new, *args: _gate("reloads", new is lm, "differs"))
    found = optimize_language_model(PROMPTS, lm, threads=1, max_new_tokens=4)
    assert found.recipe in ([], [{"prompt_lookup_decoding": {"num_draft_tokens": 8}}]) and found.feasible
    assert found.table["why"][1] == "reloads: differs"


@pytest.mark.slow
def test_draft_tokens_that_change_the_text_are_out(lm, only, monkeypatch):
    only(lambda lm: replace(lm))
    monkeypatch.setattr(language, "prompt_lookup_decoding", lambda *args, **kwargs: ([5] * 4, 1))
    found = optimize_language_model(PROMPTS, lm, threads=1, max_new_tokens=4)
    last = found.data["trials"][-1]
    assert last["status"] == "gate" and not last["winner"]


@pytest.mark.slow
def test_the_fresh_process_gives_the_same_answers(lm):
    answers = lm.generate(PROMPTS, 6, batch_size=1)
    assert _reloads(lm, PROMPTS, answers, 6, 1)["passed"]
    other = _reloads(lm, PROMPTS, [answers[0], "other"], 6, 1)
    assert not other["passed"] and other["detail"] == "1 of 2 answers"


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("change, what", [
    (dict(prompts=[]), "no prompts"), (dict(prompts="one"), "single string"), (dict(prompts=["a", " "]), "Row 1"),
    (dict(prompts=[1]), "not a string"), (dict(texts=[]), "no texts"), (dict(texts=["a"]), "nothing to predict"),
    (dict(language_model=tiny.classifier()), "Classifier is no language model"),
    (dict(language_model="no-such-model"), "cannot be loaded"), (dict(goal=0.02), "no goal"),
    (dict(goal=Goal(max_drop=0.05)), "does not have"), (dict(goal=Goal(max_class_drop=0.2)), "does not have"),
    (dict(budget=0), "budget"), (dict(budget="soon"), "budget"), (dict(seed=-1), "seed"), (dict(threads=0), "threads"),
    (dict(max_new_tokens=0), "max_new_tokens"), (dict(max_new_tokens=10**6), "positions"),
])
@pytest.mark.slow
def test_bad_input_is_refused_before_any_work(lm, change, what):
    given = dict(prompts=PROMPTS, language_model=lm) | change
    with pytest.raises(EcomoptError, match=what): optimize_language_model(**given)


@pytest.mark.slow
def test_unknown_steps_and_options_are_refused(lm):
    for steps, near in (([{"quantise_language_model": {}}], "quantize_language_model"),
                        ([{"quantize_language_model": {"bit": 4}}], "bits")):
        with pytest.raises(EcomoptError, match=near): apply_language_steps(lm, steps)
    with pytest.raises(EcomoptError, match="float16"): apply_language_steps(lm, [{"cast": {"precision": "float16"}}])


def test_a_winner_that_cannot_be_made_again_leaves_the_next(lm, monkeypatch):
    made, apply = [], language.apply_language_steps
    def once(model, steps):
        if steps and steps in made: raise RuntimeError("no memory")
        made.append(steps)
        return apply(model, steps)
    monkeypatch.setattr(language, "apply_language_steps", once)
    found = optimize(PROMPTS, lm, Goal(max_perplexity=0.5, minimize="bytes"), threads=1)
    assert found.recipe == [] and any("no memory" in str(why) for why in found.table["why"])


def test_interruption_at_the_end_leaves_the_best_so_far(lm, monkeypatch):
    finished, calls = tiny.interrupted_once(language._finished)
    monkeypatch.setattr(language, "_finished", finished)
    found = optimize(PROMPTS, lm, Goal(max_perplexity=0.5), "1s", threads=1)
    assert len(calls) == 2 and any("interrupted" in note for note in found.data["notes"])


def test_language_models_are_tried_one_at_a_time(lm):
    with pytest.raises(EcomoptError, match="n_jobs"): optimize(PROMPTS, lm, n_jobs=2)
