"""Reports and model cards: pure functions of plain data, safe with any text, and files that replace nothing else."""
import copy
import json
import re
import stat
from html.parser import HTMLParser

import pytest
import tiny
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomopt import EcomoptError, load, save
from ecomopt.optimize import page as page_module
from ecomopt.optimize.page import Axis, Code, Figure, Table, html_page, interval_panel, markdown_page, pareto_panel
from ecomopt.optimize.report import html_report, model_card, report

EVIL = """<script>alert(1)</script> "><img src=x onerror=alert(1)> & ' | `a` ``` *b* [c](d) $x$ \x00\x1b 😀\n---"""
VOID = {"meta", "br", "img", "link", "input", "hr"}


def model(**others) -> dict:
    """A measurement of a classifier on the test split."""
    return dict(
        task="reviews", split="test", sentences=589, accuracy=0.87, accuracy_interval=[0.84, 0.89], macro_f1=0.86,
        metric="accuracy", score=0.87, recall={"negative": 0.8, "positive": 0.9}, throughput=120.0,
        latency_ms={"p50": 16.0, "p95": 20.0, "p99": 31.0}, throughput_iqr=[118.0, 121.0], memory_bytes=None,
        disk_bytes=90_000_000, parameters=22_000_000, macs=1_300_000_000, conditions={},
    ) | others


def trial(number: int, **others) -> dict:
    """A trial that was trained."""
    return dict(
        number=number, name=f"recipe {number}", options={"layers": 3, "sparsity": 0.51234567}, steps=["distill"],
        status="trained", why=None, fraction=1.0, drop=0.004, drop_std=0.002, quality=0.86, latency_ms=2.0,
        throughput=900.0, disk_bytes=9_000_000, seconds=60.0, pareto=False, winner=False,
    ) | others


def verdict(**others) -> dict:
    """A verdict that 589 sentences cannot give."""
    return dict(
        outcome="not resolvable with n = 589", text="…", metric="accuracy", sentences=589, margin=0.01, drop=0.005,
        lower=-0.009, upper=0.019, disagreement=0.05, decided_by=4770,
    ) | others


UNTRAINED = dict(drop=None, drop_std=None, quality=None, fraction=None, throughput=None)
TRIALS = [
    trial(1, winner=True, pareto=True, steps=[{"distill": {"epochs": 4}}, "quantize"], drop=0.005, latency_ms=1.3),
    trial(2, drop=-0.003, pareto=True),
    trial(3, drop=0.4, drop_std=None),
    trial(4, status="cost", why="slower than 5 ms", **UNTRAINED),
    trial(5, status="failed", why="out of memory", **UNTRAINED | dict(latency_ms=None, disk_bytes=None, seconds=None)),
    trial(6, status="gate", why="says one class for all"),
]


@pytest.fixture
def data() -> dict:
    """What `optimize` stores for a classifier."""
    small = model(accuracy=0.865, latency_ms={"p50": 1.3, "p95": 2.0, "p99": 2.5}, throughput=1500.0,
                  disk_bytes=5_800_000)
    return copy.deepcopy(dict(
        kind="classifier", feasible=True, reason="It is the fastest.", notes=["A note."], verdict=verdict(),
        goal=dict(max_drop=0.01, max_latency_ms=5.0, max_bytes=10_000_000, minimize="latency", max_class_drop=0.05,
                  max_perplexity=None),
        task=dict(name="reviews", labels=["negative", "positive"], metric="accuracy", fingerprint="abc123",
                  sizes=dict(train=2000, valid=589, test=589, transfer=None), truncated={"train": 7},
                  classes={"negative": 900, "positive": 1100}),
        teacher=model(), winner=small,
        pair=dict(flips=31, lost=17, gained=14, mcnemar_p=0.7, accuracy_change=-0.005, speedup=12.5,
                  accuracy_change_interval=[-0.02, 0.01], speedup_iqr=[12.0, 13.0], latency_speedup=12.3,
                  latency_speedup_iqr=[12.0, 12.6]),
        baselines=[dict(name="TF-IDF + logistic regression", accuracy=0.79, accuracy_interval=[0.75, 0.82], score=0.79,
                        throughput=20_000.0, disk_bytes=400_000)],
        recall={"negative": dict(teacher=0.8, winner=0.72, n=268), "positive": dict(teacher=0.9, winner=0.9, n=321)},
        flips=[dict(text="Not bad.", label="positive", teacher="positive", winner="negative")],
        batches=[dict(batch_size=1, teacher_ms=16.0, winner_ms=1.3, teacher_p95_ms=20.0, winner_p95_ms=2.0,
                      teacher_p99_ms=31.0, winner_p99_ms=2.5), dict(batch_size=32, teacher_ms=8.4, winner_ms=0.7)],
        trials=TRIALS,
        costs={"smallest": dict(latency_ms=0.6, disk_bytes=2_000_000),
               "largest": dict(latency_ms=16.0, disk_bytes=90_000_000)},
        left_out=[dict(what="OpenVINO", why="not installed")],
        steps=[dict(name="teacher", options={}, score=0.87, latency_ms=16.0, throughput=120.0, disk_bytes=90_000_000),
               dict(name="quantize", options={"bits": 8}, score=0.865, latency_ms=4.0, throughput=480.0,
                    disk_bytes=30_000_000)],
        gates=[dict(name="alone and in a batch", passed=True, detail="equal")],
        recipe="seed: 0\nsteps:\n- quantize\n", reproducible="It gives the same bytes.", versions={"torch": "2.9"},
        cpu="a CPU", threads=2, seed=0, date="2026-11-28T15:32:24+00:00", seconds=1130.0, budget_s=1200.0,
    ))


@pytest.fixture
def language(data) -> dict:
    """What `optimize` stores for a language model."""
    def text_model(perplexity, rate, size):
        return dict(perplexity=perplexity, perplexity_interval=[perplexity - 1, perplexity + 1], tokens_per_s=rate,
                    latency_ms={"p50": 900.0 / rate, "p95": 1.0}, disk_bytes=size, repetition=0.1, faithfulness=0.9)
    trials = [trial(n, name=f"int{n}", latency_ms=100.0 / n, winner=n == 4, pareto=True, tokens_per_s=10.0 * n)
              for n in (4, 8)]
    for one in trials:
        for key in ("drop", "drop_std", "quality", "throughput"): del one[key]
        one["perplexity_change"] = 0.01
    step = dict(name="quantize_llm", options={"bits": 4}, score=20.2, latency_ms=40.0, tokens_per_s=30.0,
                throughput=None, disk_bytes=100_000_000)
    return data | dict(
        kind="language model", verdict=None, pair=None, recall={}, flips=[], batches=[], baselines=[], trials=trials,
        task=dict(name="descriptions", prompts=20, texts=200), teacher=text_model(20.0, 15.0, 270_000_000),
        winner=text_model(20.2, 30.0, 100_000_000), steps=[step], goal=data["goal"] | dict(max_perplexity=0.02,
        max_drop=None, max_class_drop=None), samples=[dict(prompt="A mug", teacher="is blue", winner="is red")],
    )


class Parser(HTMLParser):
    """Tags, attributes and text of a page; an element that is closed in the wrong place is an error."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID: self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data): self.text.append(data)


def parsed(page: str) -> Parser:
    parser = Parser()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def text_of(page: str) -> str: return " ".join(" ".join(parsed(page).text).split())


def replaced(value: object, text: str) -> object:
    """The data with a text in place of each string that the library does not choose."""
    if isinstance(value, dict):
        fixed = ("outcome", "status", "kind", "minimize", "metric", "split")
        return {key: part if key in fixed else replaced(part, text) for key, part in value.items()}
    if isinstance(value, list): return [replaced(part, text) for part in value]
    return text if isinstance(value, str) else value


# ---------------------------------------------------------------- the page

def test_a_page_is_complete_and_well_formed(data):
    page = html_report(data)
    parser = parsed(page)
    assert page.startswith("<!doctype html>\n<!-- ecomopt report -->\n")
    assert [parser.tags.count(tag) for tag in ("html", "title", "h1", "main", "header")] == [1, 1 + 12, 1, 1, 1]
    ids = [value for key, value in parser.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    links = [value for key, value in parser.attributes if key == "href"]
    assert links and {link.removeprefix("#") for link in links} <= set(ids)
    assert all(part in text_of(page) for part in (
        "Verdict", "4,770", "recipe 3", "slower than 5 ms", "out of memory", "says one class for all",
        "OpenVINO", "not installed", "TF-IDF", "Not bad.", "p99", "batch size", "a CPU", "2026-11-28 15:32", "torch",
        "abc123", "the same bytes", "alone and in a batch", "A note.", "It is the fastest.", "ecomopt serve small",
        "ecomopt recipe run recipe.yaml DATA", "16 ms / 20 ms / 31 ms", "8.4 ms", "load('small')", "truncated",
        "macro-F1", "Steps of the winner",
    ))


def test_several_test_sets_have_a_table(data):
    assert "test set" not in text_of(html_report(data))
    for who, fractions in (("teacher", (0.9, 0.8)), ("winner", (0.875, 0.81))):
        data[who]["tests"] = {name: {"accuracy": a} for name, a in zip(("amazon", "pooled"), fractions)}
    page = text_of(html_report(data))
    assert "Accuracy by test set" in page and "amazon" in page and "87.5" in page


def test_a_page_needs_no_network(data, language):
    """No address but those within the page, no script, and a policy that forbids both."""
    for page in (html_report(data), html_report(language)):
        parser = parsed(page)
        assert not {"script", "link", "iframe", "img", "object", "base", "form"} & set(parser.tags)
        addresses = [value for key, value in parser.attributes if key in ("src", "href", "xlink:href", "action")]
        assert all(address.startswith("#") for address in addresses)
        assert not re.search(r"url\(|@import|https?:|//", page)
        assert not [key for key, _ in parser.attributes if key.startswith("on")]
        assert any(key == "content" and "default-src 'none'" in value for key, value in parser.attributes)


def test_tables_and_figures_are_accessible(data):
    page = html_report(data)
    parser = parsed(page)
    folded, tables = parser.tags.count("details"), parser.tags.count("table")
    assert folded == 2 and parser.tags.count("caption") == tables - folded
    assert page.count('scope="col"') and page.count('scope="row"')
    assert page.count('class="mark') == page.count('role="img" aria-label="recipe') + 12 == 12  # 5 trials, the teacher
    assert all(name in page for name in ('aria-label="1: recipe 1: −0.5 points', 'aria-label="teacher: 0.0 points'))
    assert page.count("<svg") == 3 == len(re.findall(r"<svg [^>]*aria-label=", page))


def test_the_answer_is_words_and_a_sign_beside_the_colour(data):
    data["goal"]["max_class_drop"] = None
    cases = [
        (dict(), "unsure", "?", "too small to confirm it"),
        (dict(verdict=verdict(outcome="met", upper=0.008)), "good", "✓", "Goal met"),
        (dict(verdict=verdict(outcome="not met", lower=0.012)), "bad", "✕", "not on the test split"),
        (dict(feasible=False), "bad", "✕", "this is the closest model"),
        (dict(verdict=None), "good", "✓", "Goal met"),
        (dict(verdict=verdict(drop=0.013)), "unsure", "?", "its estimate is worse"),
        (dict(goal=data["goal"] | dict(max_latency_ms=1.2)), "unsure", "?", "a limit does not hold"),
        (dict(goal=data["goal"] | dict(max_class_drop=0.05)), "unsure", "?", "a limit does not hold"),
    ]
    for change, kind, sign, words in cases:
        page = html_report(data | change)
        assert f'class="status {kind}"' in page and f">{sign}</span>" in page and words in page
    assert "No model met the goal" in html_report(data | dict(feasible=False))


def test_a_verdict_is_told_in_numbers(data):
    page = text_of(html_report(data))
    assert "accuracy falls by 0.5 points" in page and "at most 1.9" in page and "About 4,770 would." in page
    rises = verdict(outcome="met", drop=-0.02, lower=-0.03, upper=-0.001)
    assert "accuracy rises by 2.0 points" in text_of(html_report(data | dict(verdict=rises)))
    undecided = data | dict(verdict=verdict(decided_by=None, metric="macro_f1"))
    assert "no number of them would" in text_of(html_report(undecided))
    assert "macro-F1 falls" in text_of(html_report(undecided))


def test_limits_of_the_goal_are_compared(data):
    page = text_of(html_report(data))
    assert "drop in the recall of any class at most 5.0% 8.0% ✕ does not hold" in page
    assert "latency of one text, p50 at most 5 ms 1.3 ms ✓ holds" in page
    assert "files on disk at most 10 MB 5.8 MB ✓ holds" in page
    free = data["goal"] | dict.fromkeys(["max_drop", "max_latency_ms", "max_bytes", "max_class_drop"])
    assert "within these limits" not in html_report(data | dict(goal=free))


def test_what_a_real_run_leaves_open(data):
    """A class without test sentences, a split whose texts were not counted, options by step."""
    data["recall"]["neutral"] = dict(teacher=None, winner=None, n=0)
    data["trials"][0]["options"] = {"distill": {"epochs": 4, "alpha": 0.123456}, "quantize": {}}
    page = text_of(html_report(data))
    assert "distill (epochs 4, alpha 0.1235)" in page and "quantize (" not in page
    assert "train 2,000 7" in page and "valid 589 –" in page and "neutral" not in page


def test_a_language_model_has_its_own_sections(language):
    page = text_of(html_report(language))
    assert all(part in page for part in (
        "perplexity", "tokens per second", "repetition", "faithfulness", "A mug", "change of perplexity, %",
        "increase of perplexity at most 2.0% 1.0% ✓ holds", "model.generate(", "prompts", "int4",
    ))
    assert "accuracy" not in page and "Recall" not in page and "n = " not in page
    assert yaml.safe_load(model_card(language).split("---\n")[1])["pipeline_tag"] == "text-generation"


def test_sections_without_data_are_left_out(data):
    empty = dict(notes=[], verdict=None, pair=None, baselines=[], recall={}, flips=[], batches=[], trials=[], costs={},
                 left_out=[], steps=[], gates=[], recipe="", reproducible="", versions={}, budget_s=None, cpu=None)
    page = html_report(data | empty)
    parsed(page)
    titles = re.findall(r"<h2[^>]*>([^<]+)", page)
    assert titles == ["Verdict", "Quality", "Speed", "Size", "Use it", "Data", "Conditions"]
    assert "recipe run" not in page and "None" not in page


def test_a_report_changes_nothing_and_says_the_same_twice(data):
    before = json.dumps(data)
    assert html_report(data) == html_report(data) == html_report(json.loads(before))
    assert model_card(data) == model_card(json.loads(before))
    assert json.dumps(data) == before


# ---------------------------------------------------------------- texts of strangers

def test_no_text_becomes_markup(data, language):
    for good in (data, language):
        evil = replaced(good, EVIL) | {"kind": good["kind"]}
        evil["recall"] = {EVIL: value for value in good["recall"].values()}
        evil["task"] = evil["task"] | {"classes": {EVIL: 3}}
        page, harmless = html_report(evil, EVIL), html_report(good)
        assert set(parsed(page).tags) == set(parsed(harmless).tags)
        assert not [key for key, _ in parsed(page).attributes if key.startswith("on")]
        assert "\x00" not in page and "\x1b" not in page and "alert(1)" in page
        card = model_card(evil, EVIL)
        body = card.split("\n---\n", 1)[1]
        assert "<script" not in re.sub(r"```+\w+\n.*?\n```+\n", "", body, flags=re.S)
        assert ModelCard(card).data.library_name == "ecomopt"


@settings(max_examples=50)
@given(st.text(max_size=40) | st.from_regex(r"[`|*<>&\\\n-]{1,9}"))
def test_any_text_stays_in_its_cell(text):
    blocks = [text, [text], Table(text, ["a", "b"], [[text, text]]), Code(text, "yaml")]
    page = html_page(text, text, {"A title": blocks})
    parser = parsed(page)
    assert parser.tags.count("td") == 1 and parser.tags.count("code") == 1 and parser.tags.count("li") == 1
    table = markdown_page({"T": [Table("c", ["a", "b"], [[text, text]])]})
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 3 and all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3 for row in rows)


def test_code_in_markdown_cannot_be_left(data):
    card = model_card(data | {"recipe": "a\n```\n# out\n````\nb"})
    assert "`````yaml\na\n```\n# out\n````\nb\n`````" in card


def test_lone_surrogates_and_long_texts(data):
    data["flips"] = [dict(text="\ud800" + "long " * 1_000_000, label="a", teacher="a", winner="b")] * 1000
    page = html_report(data)
    page.encode()
    assert len(page) < 300_000 and "200 of 1,000" in page and "…" in page


# ---------------------------------------------------------------- numbers and figures

def test_numbers_stand_at_the_right_and_texts_do_not():
    table = Table("c", ["a", "n", "t", "ms"], [["x", "1,520", "5 stars, but it broke in a week", "1.3 ms"],
                                               ["y", "–", "2 much", "−0.4 points"]])
    assert page_module._is_numeric(table) == [False, True, False, True]
    assert not Table("empty", ["a"], [])


@pytest.mark.parametrize("losses", [[0.0], [0.0, 40.0], [-3.0, -2.0], [0.4] * 30, [None], [100.0, -100.0, 0.001]])
@pytest.mark.parametrize("margin", [None, 0.0, 1.0, 50.0])
def test_marks_lie_in_the_drawing(losses, margin):
    models = [dict(mark="untrained" if loss is None else "other", name="a", about="b", loss=loss, ms=10.0 ** (i % 5))
              for i, loss in enumerate(losses)]
    svg = pareto_panel(models, Axis("ms", "ms", limit=3.0), Axis("loss", "points", limit=margin, sign=-1))
    parsed(svg)
    for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', svg):
        assert page_module._LEFT < float(x) < page_module._RIGHT
        assert page_module._TOP < float(y) < page_module._BOTTOM
    assert svg.count("<g ") == len(losses)


def test_better_is_higher_and_faster_is_left():
    models = [dict(mark="other", name=str(n), about="", loss=loss, ms=ms) for n, (loss, ms) in
              enumerate([(0.0, 1.0), (1.0, 10.0), (10.0, 100.0)])]
    svg = pareto_panel(models, Axis("ms", "ms"), Axis("loss", "points"))
    places = [tuple(map(float, place)) for place in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert places == sorted(places) and [y for _, y in places] == sorted(y for _, y in places)


@pytest.mark.parametrize("numbers", [(0.5, -0.9, 1.9, 1.0), (0.0, 0.0, 0.0, 1.0), (-3.0, -4.0, -2.0, 0.5),
                                     (40.0, 30.0, 50.0, 1.0)])
def test_an_interval_is_drawn_for_any_drop(numbers):
    svg = interval_panel(*numbers)
    parsed(svg)
    assert all(-1 <= float(x) <= 481 for x in re.findall(r'\bc?x="([\d.-]+)"', svg))


# ---------------------------------------------------------------- the model card

def test_a_card_is_read_by_hugging_face(data):
    card = ModelCard(model_card(data, "small"))
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"accuracy": 0.865, "f1": 0.86}
    assert card.data.model_name == "small" and card.data.pipeline_tag == "text-classification"
    assert "quantize" in card.data.tags and "language" not in card.data.to_dict()
    assert "## Verdict" in card.text and "<svg" not in card.text and "| accuracy |" in card.text


# ---------------------------------------------------------------- bad data

@pytest.mark.parametrize("path", [
    "goal", "trials", "date", "verdict.upper", "goal.max_bytes", "trials.pareto", "steps.score", "winner.disk_bytes",
])
def test_a_missing_key_is_named(data, path):
    part, _, key = path.partition(".")
    if not key: del data[part]
    elif isinstance(data[part], list): del data[part][0][key]
    else: del data[part][key]
    for write in (html_report, model_card):
        with pytest.raises(EcomoptError, match=re.escape(path)) as caught: write(data)
        assert caught.value.do


@pytest.mark.parametrize("wrong", [
    dict(teacher=None), dict(trials=[3]), dict(seconds="long"), dict(recall={"a": 1}), dict(costs={"a": None}),
    dict(task=[]), dict(notes=3), dict(verdict="met"), dict(flips={"text": "a"}), dict(trials=3),
])
def test_data_that_do_not_fit_are_an_error(data, wrong):
    with pytest.raises(EcomoptError, match="data of a report"): html_report(data | wrong)


@pytest.mark.parametrize("wrong", [None, [], "report", 3])
def test_something_else_than_data(wrong):
    with pytest.raises(EcomoptError, match="no dictionary"): html_report(wrong)


# ---------------------------------------------------------------- files

@pytest.fixture
def artifact(data, tmp_path):
    return save(tiny.classifier(layers=1), tmp_path / "it's small", measurements=[data])


def test_a_report_lies_beside_its_artifact(artifact, data):
    written = report(artifact)
    assert written == artifact.parent / "it's small-report.html"
    assert written.read_text("utf8") == html_report(data, "it's small")
    assert """ecomopt serve &#x27;it&#x27;&quot;&#x27;&quot;&#x27;s small&#x27;""" in written.read_text("utf8")
    load(artifact)  # which is as it was
    assert sorted(path.name for path in artifact.parent.iterdir()) == ["it's small", "it's small-report.html"]
    assert stat.S_IMODE(written.stat().st_mode) & 0o044


def test_an_earlier_report_is_replaced_and_nothing_else(artifact):
    target = artifact.parent / "new" / "r.html"
    assert report(artifact, target) == target == report(str(artifact), str(target))
    for name, content in (("mine.html", b"<!doctype html>mine"), ("empty", b""), ("photo", bytes(range(256)))):
        foreign = artifact.parent / name
        foreign.write_bytes(content)
        with pytest.raises(EcomoptError, match="another file"): report(artifact, foreign)
        assert foreign.read_bytes() == content


def test_places_that_cannot_hold_a_report(artifact, tmp_path):
    with pytest.raises(EcomoptError, match="regular file"): report(artifact, tmp_path)
    with pytest.raises(EcomoptError, match="regular file"): report(artifact, "/dev/null")
    with pytest.raises(EcomoptError, match="own files"): report(artifact, artifact / "report.html")
    with pytest.raises(EcomoptError, match="cannot be written"): report(artifact, "/proc/none/r.html")
    with pytest.raises(EcomoptError, match="cannot be written"): report(artifact, tmp_path / ("n" * 300))
    with pytest.raises(EcomoptError, match="not a path"): report(artifact, 3)
    load(artifact)


def test_a_failure_leaves_the_earlier_report(artifact, monkeypatch):
    written = report(artifact)
    before = written.read_bytes()
    def full(*_): raise OSError(28, "No space left on device", str(written))
    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(EcomoptError, match="full"): report(artifact)
    assert written.read_bytes() == before
    assert not list(artifact.parent.glob("*.part")) and not list(artifact.parent.glob(".*"))


def test_an_artifact_that_optimize_did_not_make(tmp_path):
    for number, measurements in enumerate((None, [{"accuracy": 0.9}], [{}, {}])):
        path = save(tiny.classifier(layers=1), tmp_path / str(number), measurements=measurements)
        with pytest.raises(EcomoptError, match="not made by optimize"): report(path)
    with pytest.raises(EcomoptError, match="not an artifact"): report(tmp_path)
    with pytest.raises(EcomoptError, match="not an artifact"): report(tmp_path / "none")
    assert not list(tmp_path.glob("*.html"))


def test_a_report_of_an_artifact_by_way_of_a_link(artifact, data):
    link = artifact.parent / "live"
    link.symlink_to(artifact)
    assert report(link).name == "live-report.html"


def test_figures_are_left_out_of_markdown():
    assert markdown_page({"A": ["b", Figure(["<svg></svg>"], "c")]}) == "## A\n\nb\n"
