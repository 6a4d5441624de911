"""Data: splits that do not leak, tasks from any file, and a clear error for each kind of bad input."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomopt import EcomoptError
from ecomopt.core.data import Task, connected_components, load_task, normalize, stratified_group_split

FRACTIONS = {"train": 0.7, "valid": 0.1, "test": 0.2}


@pytest.fixture(scope="module")
def reviews():
    return load_task("reviews")


@pytest.fixture(scope="module")
def reviews_zh():
    return load_task("reviews_zh")


def rows_of(n, classes=2):
    return pd.DataFrame({"text": [f"text {i}" for i in range(n)], "label": [f"class {i % classes}" for i in range(n)]})


def task_of(table, tmp_path, name="mine.csv", **arguments):
    table.to_csv(tmp_path / name, index=False)
    return Task.from_csv(tmp_path / name, **{"text": "text", "label": "label"} | arguments)


def parts(task):
    return {"train": task.train, "valid": task.valid, "test": task.test}


def crossings(task):
    """What is in more than one split."""
    train, valid, test = (
        {("group", group) for group in part["group"]} | {("text", normalize(text)) for text in part["text"]}
        for part in parts(task).values()
    )
    return train & valid | train & test | valid & test


# splits

some_texts = [f" Text  {i}" for i in range(30)] + [f"text {i}" for i in range(30)]
some_row = st.tuples(st.sampled_from(some_texts), st.sampled_from("abc"), st.integers(0, 40).map(str))
some_rows = st.lists(some_row, min_size=9, max_size=80)


@settings(max_examples=200)
@given(some_rows, st.integers(0, 3))
def test_no_group_and_no_copy_crosses(rows, seed):
    table = pd.DataFrame(rows, columns=["text", "label", "group"])
    try: table["split"] = stratified_group_split(table, FRACTIONS, seed)
    except EcomoptError as error:
        assert error.what.startswith("No split ")
        return
    table["text"] = table.text.map(normalize)
    for column in ("text", "group"): assert (table.groupby(column).split.nunique() == 1).all()
    assert (table.groupby("label").split.nunique() == 3).all()
    assert stratified_group_split(table, FRACTIONS, seed) == list(table.split)  # deterministic


@given(st.lists(st.integers(3, 60), min_size=2, max_size=5), st.integers(0, 9))
def test_independent_rows_are_stratified_exactly(sizes, seed):
    labels = [f"class {c}" for c, size in enumerate(sizes) for _ in range(size)]
    table = pd.DataFrame({"text": map(str, range(len(labels))), "label": labels, "group": map(str, range(len(labels)))})
    table["split"] = stratified_group_split(table, FRACTIONS, seed)
    counts = table.groupby(["label", "split"]).size().unstack()
    for c, size in enumerate(sizes):
        expected = {"valid": max(1, round(0.1 * size)), "test": max(1, round(0.2 * size))}
        assert dict(counts.loc[f"class {c}", ["valid", "test"]]) == expected


@pytest.mark.parametrize("sizes", [(3, 3, 3), (5, 4, 1), (4, 4, 2), (4, 3, 3)])
def test_a_class_of_as_many_components_as_splits_is_in_each(sizes):
    groups = [f"group {i}" for i, size in enumerate(sizes) for _ in range(size)]
    table = rows_of(len(groups) + 20).assign(group=groups + [str(i) for i in range(20)])
    table["label"] = ["a"] * len(groups) + ["b"] * 20
    table["split"] = stratified_group_split(table, FRACTIONS)
    assert (table.groupby("label").split.nunique() == 3).all() and (table.groupby("group").split.nunique() == 1).all()


def test_a_class_of_fewer_components_than_splits_has_no_split():
    table = rows_of(30).assign(group=["x"] * 5 + ["y"] * 5 + [str(i) for i in range(20)], label=["a"] * 10 + ["b"] * 20)
    refused(
        lambda: stratified_group_split(table, FRACTIONS), "No split is possible for the class a: rows tied together"
    )


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=25))
def test_components_are_those_of_the_definition(rows):
    naive = list(range(len(rows)))
    for i, a in enumerate(rows):
        for j, b in enumerate(rows[:i]):
            if a[0] == b[0] or a[1] == b[1]: naive = [naive[j] if c == naive[i] else c for c in naive]
    found = connected_components([f"t{t}" for t, _ in rows], [f"g{g}" for _, g in rows])
    assert np.array_equal(found[:, None] == found, np.asarray(naive)[:, None] == np.asarray(naive))


def test_a_text_and_a_group_of_one_name_are_two_things():
    assert connected_components(["a", "b"], ["b", "c"]).tolist() == [0, 1]


@pytest.mark.parametrize("groups", [["x", None, None], ["x", float("nan"), "y"], ["x", "y"]])
def test_a_row_without_a_group_is_refused(groups):
    with pytest.raises(EcomoptError, match="3 texts"): connected_components(["a", "b", "c"], groups)


@pytest.mark.parametrize("column", ["label", "group"])
def test_rows_with_missing_values_are_not_split(column):
    rows = pd.DataFrame({"text": list("abcdef"), "label": list("xyxyxy"), "group": list("abcdef")})
    rows.loc[3, column] = None
    with pytest.raises(EcomoptError, match="missing"): stratified_group_split(rows, {"train": 0.5, "test": 0.5})


def test_a_column_is_no_test_set():
    for name in ("text", "label"):
        with pytest.raises(EcomoptError, match="no test sets"): tiny.task().with_tests(**{name: "more.csv"})


def test_groups_keep_the_balance():
    random = np.random.default_rng(0)
    group = random.integers(0, 200, 3000)
    table = pd.DataFrame(
        {
            "text": map(str, range(3000)),
            "group": group.astype(str),
            "label": np.where(random.random(3000) < 0.2, "rare", "common"),
        }
    )
    table["split"] = stratified_group_split(table, FRACTIONS)
    fractions = table.groupby("split").label.value_counts(normalize=True).unstack()
    assert (fractions.rare - 0.2).abs().max() < 0.03
    assert (table.split.value_counts(normalize=True) - pd.Series(FRACTIONS)).abs().max() < 0.01


# the tasks of the book

def test_reviews(reviews):
    assert reviews.labels == ("negative", "positive") and crossings(reviews) == set()
    summary = reviews.summary()
    assert summary.rows[:3].sum() == 1725 + 1218
    assert (summary.positive[:3] - 1725 / 2943).abs().max() < 0.02
    assert (summary.rows[:3] / 2943 - [0.7, 0.1, 0.2]).abs().max() < 0.01
    assert set(reviews.transfer["domain"]) == {"reviews", "movies", "tweets", "editorials"}


def test_transfer_text_repeats_nothing(reviews):
    texts = [normalize(text) for text in reviews.transfer["text"]]
    assert len(texts) == len(set(texts)) > 18_000
    assert not set(texts) & {normalize(text) for part in parts(reviews).values() for text in part["text"]}


@pytest.mark.slow
def test_reviews_zh(reviews_zh):
    assert reviews_zh.labels == ("negative", "positive") and crossings(reviews_zh) == set()
    assert sum(map(len, parts(reviews_zh).values())) == 17_405 - 47  # distinct texts, without those of both labels
    assert len(reviews_zh.transfer) == 0 and (reviews_zh.summary().positive[:3] - 0.48).abs().max() < 0.01


def test_the_seed_decides(reviews):
    again, other = load_task("reviews"), load_task("reviews", seed=1)
    assert again.fingerprint == reviews.fingerprint != other.fingerprint and crossings(other) == set()


def test_the_fingerprint_is_of_the_content(reviews):
    assert replace(reviews, name="other").fingerprint == reviews.fingerprint
    changes = [
        {"labels": ("a", "b")},
        {"metric": "macro_f1"},
        {"train": reviews.train.select(range(9))},
        {"transfer": reviews.transfer.select([])},
    ]
    assert len({replace(reviews, **change).fingerprint for change in changes} | {reviews.fingerprint}) == 5


def test_an_unknown_task():
    with pytest.raises(EcomoptError, match="no task 'revews'") as error: load_task("revews")
    assert "reviews" in error.value.do + error.value.where


# samples

def test_a_sample_keeps_the_balance(reviews):
    small = reviews.sample(train=200, valid=20, test=50, transfer=100)
    assert list(small.summary().rows) == [200, 20, 50, 100]
    assert (small.summary().positive[:3] - reviews.summary().positive[:3]).abs().max() <= 0.03
    assert set(small.train["text"]) <= set(reviews.train["text"]) and crossings(small) == set()
    assert small.fingerprint == reviews.sample(train=200, valid=20, test=50, transfer=100).fingerprint
    assert small.fingerprint != reviews.sample(train=200, valid=20, test=50, transfer=100, seed=1).fingerprint


def test_a_sample_loses_no_class(tmp_path):
    table = rows_of(1000).assign(label=["rare"] * 4 + ["common"] * 996)
    task = task_of(table, tmp_path).sample(train=10)
    assert set(task.train["label"]) == {0, 1} and len(task.train) == 10


def test_a_sample_of_more_than_all_is_all(reviews):
    assert (
        reviews.sample(train=10**6, transfer=10**6).fingerprint == reviews.fingerprint == reviews.sample().fingerprint
    )
    assert len(reviews.sample(transfer=0).transfer) == 0


def test_a_sample_with_fewer_rows_than_classes(reviews):
    with pytest.raises(EcomoptError, match="Fewer rows than classes"): reviews.sample(train=1)


# more test sets

def shop(**parts):
    """A task of two labelled texts in each split."""
    labelled = {split: Dataset.from_dict({"text": [f"{split} good", f"{split} bad"], "label": [1, 0]})
                for split in ("train", "valid", "test")}
    return Task("shop", ("bad", "good"), **labelled | {"transfer": Dataset.from_dict({"text": ["loose"]})} | parts)


def rows_with(texts, labels): return Dataset.from_dict({"text": texts, "label": labels})


def test_without_more_test_sets_the_fingerprint_is_that_of_version_0_2():
    assert shop().fingerprint == shop(tests={}).fingerprint == "1b51e25bf89da537"
    outlet = rows_with(["outlet"], [1])
    prints = [shop(tests={"a": outlet}), shop(tests={"b": outlet}), shop(tests={"a": rows_with(["outlet"], [0])})]
    assert len({task.fingerprint for task in prints} | {shop().fingerprint}) == 4


@pytest.mark.parametrize("suffix, write", [
    (".csv", lambda table, path: table.to_csv(path, index=False)),
    (".jsonl", lambda table, path: table.to_json(path, lines=True, orient="records")),
])
def test_test_sets_of_files_and_of_data_sets(tmp_path, suffix, write):
    path = tmp_path / f"outlet{suffix}"
    write(pd.DataFrame({"review": ["late", "fast", "late"], "stars": ["bad", "good", "bad"], "more": 1}), path)
    task = shop().with_tests(text="review", label="stars", outlet=path, web=rows_with(["ok"], [1]))
    assert list(task.tests) == ["outlet", "web"] and list(task.tests["outlet"]["label"]) == [0, 1, 0]
    assert task.tests["outlet"]["text"][:] == ["late", "fast", "late"]  # repeated within a test set: kept
    summary = task.summary()
    assert dict(summary.rows) == dict(train=2, valid=2, test=2, transfer=1, outlet=3, web=1)
    assert summary.good["outlet"] == pytest.approx(1 / 3, abs=1e-3) and summary.good["web"] == 1
    more = task.with_tests(web=rows_with(["never", "ok"], [0, 1]))  # in the place of the earlier one
    assert list(more.tests) == ["outlet", "web"] and len(more.tests["web"]) == 2 and len(task.tests["web"]) == 1
    assert replace(task, name="other").fingerprint == task.fingerprint != more.fingerprint


def test_texts_that_a_task_has_already_are_left_out_of_a_test_set():
    copies = ["TRAIN  good", "valid bad", "test good", "Loose", "new"]
    with pytest.warns(UserWarning, match="4 of 5 texts of the test set 'web' are copies"):
        task = shop().with_tests(web=rows_with(copies, [1, 0, 1, 1, 0]))
    assert task.tests["web"][:] == {"text": ["new"], "label": [0]}
    with pytest.warns(UserWarning, match="1 of 2 texts"):  # a sentence is counted once in all of them together
        both = shop().with_tests(a=rows_with(["x"], [0]), b=rows_with(["X", "y"], [0, 1]))
    assert both.tests["b"]["text"][:] == ["y"]
    refused(lambda: shop().with_tests(web=rows_with(copies[:4], [1, 0, 1, 1])), "4 of 4 texts", "web", "no training")


def test_a_sample_of_the_test_sets():
    task = shop().with_tests(web=rows_with([f"web {i}" for i in range(40)], [i % 2 for i in range(40)]))
    few = task.sample(test=2)
    assert len(few.tests["web"]) == 2 == len(set(few.tests["web"]["label"])) and len(task.tests["web"]) == 40
    assert task.sample(train=2).tests["web"] is task.tests["web"] and task.sample(test=0).tests == {}
    assert task.sample().fingerprint == task.fingerprint


def test_test_sets_that_are_none(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nnew,ugly\nnewer,good\n")
    refused(lambda: shop().with_tests(a=tmp_path / "a.csv"), "no class ugly", "a.csv", "bad, good")
    refused(lambda: shop().with_tests(a=tmp_path / "a.csv", label="stars"), "no column 'stars'", "a.csv")
    refused(lambda: shop().with_tests(a=tmp_path / "b.csv"), "cannot be read", "b.csv")
    refused(lambda: shop().with_tests(a=rows_with(["new"], [2])), "a is from 2 to 2; the classes are 0 to 1")
    refused(lambda: shop().with_tests(a=rows_with(["new"], ["good"])), "not whole numbers")
    refused(lambda: shop().with_tests(a=Dataset.from_dict({"text": ["new"]})), "no column 'label'", "a")
    refused(lambda: shop().with_tests(a=pd.DataFrame({"text": ["new"], "label": [0]})), "DataFrame", do="Dataset")
    refused(lambda: shop().with_tests(test=rows_with(["new"], [0])), "cannot have the name 'test'")
    refused(lambda: shop().with_tests(pooled=rows_with(["new"], [0])), "cannot have the name 'pooled'")
    refused(lambda: shop(tests={"a": rows_with([], [])}), "0 rows")
    refused(lambda: shop(tests={1: rows_with(["new"], [0])}), "name 1")
    refused(lambda: shop(tests=[rows_with(["new"], [0])]), "type list", "argument tests")


# labels that are no classes

@pytest.mark.parametrize("labels", [
    ['["a", "b"]', '["b"]', "[]"], ["['a']", "['b', 'a']"], ["[1, 2]", "[3]"], ["['a' 'b']", "['c']"],
    ["a|b", "a|c", "b|c", "a", "b", "c"], ["late; broken", "broken", "late", "broken; late; dirty"],
    ["price, size", "size, price", "size"], ["0,1,1", "1,0,0", "0,0,1"],
    ["Action|Comedy", "Comedy", "Drama", "Comedy|Drama", "Action|Drama|War", "Action"],
])
def test_multi_label_columns_are_recognised(tmp_path, labels):
    table = rows_of(10 * len(labels)).assign(label=labels * 10)
    refused(lambda: task_of(table, tmp_path), "(multi-label)", "column 'label'", "of each label")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_cells_with_lists_of_labels(tmp_path, suffix):
    table, path = pd.DataFrame({"text": ["a", "b"], "label": [["x", "y"], ["x"]]}), tmp_path / f"mine{suffix}"
    if suffix == ".jsonl": table.to_json(path, lines=True, orient="records")
    else: table.to_parquet(path)
    refused(lambda: Task.from_csv(path, text="text", label="label"), "2 of 2 rows have several labels (multi-label)",
            "column 'label'", "of each label")


@pytest.mark.parametrize("labels", [
    ["Food, Drinks", "Toys", "Books; Music"], ["Food", "Drinks", "Food, Drinks"],  # one fixed class
    ["Clothing, Men", "Clothing, Women", "Shoes, Men", "Shoes, Women"],            # a grid
    ["Home", "Home | Kitchen", "Home | Kitchen | Knives", "Garden", "Garden | Tools"],  # a hierarchy
    ["Clothing, other", "Food, other", "other"], ["good", "[bad]", "[a, b"], [";)", ":|", ":;"],
    ["1,0", "1,5", "2,0", "2,5"], ["a|", "b|", "c"], ["yes, but slow", "slow, but yes"],
])
def test_labels_with_separators_are_classes(tmp_path, labels):
    table = rows_of(10 * len(labels)).assign(label=labels * 10)
    assert len(task_of(table, tmp_path).labels) == len(labels)


@pytest.mark.parametrize("labels", [range(60), range(-30, 30), range(0, 6000, 100)])
def test_numbers_to_estimate_are_recognised(tmp_path, labels):
    table = rows_of(600).assign(label=[*labels] * 10)
    refused(lambda: task_of(table, tmp_path), "60 different numbers", "column 'label'", "ranges")
    named = table.assign(label=[f"class {label}" for label in table.label])
    assert len(task_of(named, tmp_path).labels) == 60


@pytest.mark.parametrize("classes, rows", [(50, 500), (10, 30), (2, 6), (11, 60)])
def test_few_numbers_are_classes(tmp_path, classes, rows):
    table = rows_of(rows).assign(label=[i % classes for i in range(rows)])
    assert len(task_of(table, tmp_path).labels) == classes


def test_numbers_that_seldom_recur_are_none():
    from ecomopt.core.data import _check_classes_alone
    refused(lambda: _check_classes_alone(pd.Series([str(i % 30) for i in range(100)]), "mine.csv"), "regression")


# files

@pytest.mark.parametrize("suffix, write", [
    (".csv", lambda table, path: table.to_csv(path, index=False)),
    (".CSV", lambda table, path: table.to_csv(path, index=False, encoding="utf-8-sig")),
    (".tsv", lambda table, path: table.to_csv(path, index=False, sep="\t")),
    (".parquet", lambda table, path: table.to_parquet(path)),
    (".jsonl", lambda table, path: table.to_json(path, lines=True, orient="records", force_ascii=False)),
])
def test_every_kind_of_file_gives_the_same_task(tmp_path, suffix, write):
    table = rows_of(40, 4).assign(shop=[f"s{i // 2}" for i in range(40)])
    table.loc[0, "text"] = 'très "bon", 很好\nsecond line\t😀'
    table.loc[1, "text"] = "NA"
    write(table, tmp_path / f"mine{suffix}")
    task = Task.from_csv(tmp_path / f"mine{suffix}", text="text", label="label", group="shop")
    assert task.name == "mine" and task.labels == tuple(f"class {i}" for i in range(4)) and crossings(task) == set()
    assert {text for part in parts(task).values() for text in part["text"]} == set(table.text)
    assert set(task.train.column_names) == {"text", "label", "group"} and set(task.transfer.column_names) == {
        "text",
        "domain",
    }
    for part in parts(task).values():  # the label stays with its text
        for row in part: assert task.labels[row["label"]] == table.set_index("text").label[row["text"]]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
@pytest.mark.parametrize("labels, names", [
    ([1, 5, 10], ("1", "5", "10")), ([1.0, 5.0, 10.0], ("1", "5", "10")), ([True, False], ("False", "True")),
    (["é", "NA", " b "], ("NA", "b", "é")), (["1.5", "other"], ("1.5", "other")), (["007", "08"], ("007", "08")),
])
def test_labels_become_names(tmp_path, suffix, labels, names):
    table = rows_of(30).assign(label=labels * (30 // len(labels)))
    path = tmp_path / f"mine{suffix}"
    {".csv": lambda: table.to_csv(path, index=False), ".parquet": lambda: table.to_parquet(path),
     ".jsonl": lambda: table.to_json(path, lines=True, orient="records")}[suffix]()
    assert Task.from_csv(path, text="text", label="label").labels == names


def test_many_classes(tmp_path):
    task = task_of(rows_of(1500, 150), tmp_path)
    assert len(task.labels) == 150 and all(len(set(part["label"])) == 150 for part in parts(task).values())


def test_ten_rows(tmp_path):
    assert list(task_of(rows_of(10), tmp_path).summary().rows[:3]) == [6, 2, 2]


def test_a_split_may_be_left_out(tmp_path):
    task = task_of(rows_of(10), tmp_path, valid=0, test=0.5)
    assert (len(task.train), len(task.valid), len(task.test)) == (6, 0, 4)
    assert task.valid.column_names == task.train.column_names and task.summary().rows["valid"] == 0


def test_a_text_of_a_million_characters(tmp_path):
    table = rows_of(30)
    table.loc[3, "text"] = "wörd " * 200_000
    task = task_of(table, tmp_path)
    assert max(len(text) for part in parts(task).values() for text in part["text"]) == 1_000_000


# bad input

def refused(action, what, where="", do=""):
    with pytest.raises(EcomoptError) as error: action()
    assert what in error.value.what and where in error.value.where and do in error.value.do, str(error.value)


def test_a_wrong_column(tmp_path):
    refused(
        lambda: task_of(rows_of(10), tmp_path, text="txt"),
        "no column 'txt'",
        "mine.csv (columns: text, label)",
        "Did you mean 'text'?",
    )
    refused(
        lambda: task_of(rows_of(10), tmp_path, group="customer"),
        "no column 'customer'",
        "mine.csv",
        "Choose one of text, label",
    )


def test_an_unknown_file_type_and_a_missing_file(tmp_path):
    (tmp_path / "mine.xlsx").write_text("")
    refused(
        lambda: Task.from_csv(tmp_path / "mine.xlsx", text="a", label="b"),
        "'.xlsx' is not known",
        "mine.xlsx",
        ".csv, .tsv, .parquet, .jsonl",
    )
    refused(lambda: Task.from_csv(tmp_path / "none.csv", text="a", label="b"), "cannot be read", "none.csv")
    (tmp_path / "folder.csv").mkdir()
    refused(lambda: Task.from_csv(tmp_path / "folder.csv", text="a", label="b"), "cannot be read", "folder.csv")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_file_that_is_not_utf8(tmp_path, suffix):
    line = '{"text": "für", "label": "a"}\n' if suffix == ".jsonl" else "text,label\nfür,a\n"
    (tmp_path / f"old{suffix}").write_bytes(line.encode("latin-1") * 20)
    refused(
        lambda: Task.from_csv(tmp_path / f"old{suffix}", text="text", label="label"),
        "not UTF-8",
        f"old{suffix}",
        "iconv",
    )


@pytest.mark.parametrize(
    "suffix, content",
    [
        (".csv", b""),
        (".csv", b'text,label\na,b\na,b,c,d\n'),
        (".jsonl", b'{"text": '),
        (".jsonl", b"[1, 2]\n3"),
        (".jsonl", b""),
        (".parquet", b"PAR1 no"),
        (".csv", b'text,label\n"open'),
    ],
)
def test_a_file_that_is_not_what_it_says(tmp_path, suffix, content):
    (tmp_path / f"bad{suffix}").write_bytes(content)
    with pytest.raises(EcomoptError) as error: Task.from_csv(tmp_path / f"bad{suffix}", text="text", label="label")
    assert f"bad{suffix}" in error.value.where


@pytest.mark.parametrize("column", ["text", "label", "shop"])
@pytest.mark.parametrize("empty", [None, float("nan"), "", "  ", "NaN"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_empty_cells_are_named_by_row(tmp_path, column, empty, suffix):
    table = rows_of(20).assign(shop="s").astype(object)
    table.loc[[2, 7], column] = empty
    path = tmp_path / f"mine{suffix}"
    {".csv": lambda: table.to_csv(path, index=False), ".parquet": lambda: table.to_parquet(path),
     ".jsonl": lambda: table.to_json(path, lines=True, orient="records")}[suffix]()
    role = {"shop": "group"}.get(column, column)
    refused(
        lambda: Task.from_csv(path, text="text", label="label", group="shop"),
        f"2 of 20 rows have an empty {role}: rows 3, 8.",
        f"column {column!r}",
    )


def test_many_empty_texts_are_counted(tmp_path):
    refused(
        lambda: task_of(rows_of(20).assign(text=""), tmp_path),
        "20 of 20 rows have an empty text: rows 1, 2, 3, 4, 5 and 15 more.",
    )


@pytest.mark.parametrize("ratings", [[1.0, 3.7], [0.5, 2], ["3.25", "4.0"], ["inf", "1.0"]])
def test_ratings_are_not_classes(tmp_path, ratings):
    refused(
        lambda: task_of(rows_of(20).assign(label=ratings * 10), tmp_path),
        "numbers with fractions",
        "column 'label'",
        "round",
    )


def test_a_single_class_or_no_rows(tmp_path):
    refused(lambda: task_of(rows_of(10, 1), tmp_path), "two classes or more; here are 1: class 0", "mine.csv")
    refused(lambda: task_of(rows_of(0), tmp_path), "here are 0", "mine.csv")


def test_a_class_with_one_row(tmp_path):
    refused(
        lambda: task_of(rows_of(20).assign(label=["a"] * 19 + ["b"]), tmp_path),
        "for the class b: fewer than 3 rows",
        "mine.csv",
        "add rows",
    )


def test_one_group_for_all(tmp_path):
    refused(
        lambda: task_of(rows_of(20).assign(shop="s"), tmp_path, group="shop"),
        "tied together by groups and copies (up to 20 of all 20)",
        "mine.csv",
    )


@pytest.mark.parametrize(
    "fractions", [{"valid": 0.5, "test": 0.5}, {"valid": -0.1}, {"test": 20}, {"test": float("nan")}]
)
def test_fractions_that_leave_nothing(tmp_path, fractions):
    refused(lambda: task_of(rows_of(20), tmp_path, **fractions), "no rows to train on", "test=")
