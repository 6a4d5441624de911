"""Files, labels and arguments that used to be read wrongly: now they are read exactly, or refused with the place."""
import csv
import io
import json
import math
import os
import sys
import unicodedata
from collections import Counter
from dataclasses import replace
from functools import partial
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    fbeta_score,
    hamming_loss,
    make_scorer,
    matthews_corrcoef,
)

from ecomopt import EcomoptError
from ecomopt.core.data import Task, _transfer, connected_components, load_task, normalize, stratified_group_split

ROWS = [(f"{word} number {i}", label) for i in range(6) for word, label in (("good", "pos"), ("bad", "neg"))]
LINES = "".join(f"{text},{label}\n" for text, label in ROWS)


def task_of(tmp_path, content, name="mine.csv", **arguments):
    """The task of a file with this content."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return Task.from_csv(tmp_path / name, **{"text": "text", "label": "label"} | arguments)


def rows_of(task):
    """All rows of a task: text and the name of the label, sorted."""
    splits = (task.train, task.valid, task.test)
    return sorted((row["text"], task.labels[row["label"]]) for split in splits for row in split)


def refused(action, *words):
    """The error of an action; each word must be in it."""
    with pytest.raises(EcomoptError) as error: action()
    for word in words: assert word in str(error.value), str(error.value)
    return error.value


# records with more or fewer fields than the header

@pytest.mark.parametrize("content, place", [
    ("text,label\n" + LINES + "bought 3, works 3,pos\n", "line 14 has 3"),
    ("text,label\nbought 3, works 3,pos\n" + LINES, "line 2 has 3"),
    ("text,label\n" + LINES.replace("good", "well, good"), "line 2 has 3"),  # all texts of one class
    ("text,label\n" + LINES.replace(",", ", not,"), "line 2 has 3"),  # every line
    ("text,label\n" + LINES.replace("\n", ",\n"), "line 2 has 3"),  # a comma at the end of every line
    ("text,label\n" + LINES + "no label\n", "line 14 has 1"),
    ('text,label\n"two\nlines",pos\n' + LINES + "a,b,pos\n", "line 16 has 3"),
    ('text,label\n' + LINES + '"two\nlines",pos,more\n' + LINES, "line 14 has 3"),
    ('text,label\r\n\r\n' + LINES + 'a,b,pos\r\n', "line 15 has 3"),
    ('"te\nxt",label\n' + LINES + 'a,b,pos\n', "line 15 has 3"),
])
def test_a_record_with_other_fields_than_the_header_is_named_by_its_first_line(tmp_path, content, place):
    text = "te\nxt" if "te\nxt" in content else "text"
    refused(lambda: task_of(tmp_path, content, text=text), "2 fields of the header", place, "mine.csv")


def test_trailing_commas_do_not_move_the_columns(tmp_path):
    lines = "".join(f"{text},{label},{i % 5},\n" for i, (text, label) in enumerate(ROWS))
    refused(lambda: task_of(tmp_path, "text,label,stars\n" + lines), "12 of 12 records", "line 2 has 4")
    task = task_of(tmp_path, "text,label,stars,\n" + lines)  # the header has the comma too
    assert rows_of(task) == sorted(ROWS)


def test_a_tsv_is_checked_too(tmp_path):
    content = "text\tlabel\n" + LINES.replace(",", "\t")
    assert rows_of(task_of(tmp_path, content, "mine.tsv")) == sorted(ROWS)
    refused(lambda: task_of(tmp_path, content + "a\tb\tpos\n", "mine.tsv"), "line 14 has 3", "mine.tsv")


def test_many_bad_lines_are_counted(tmp_path):
    bad = "a,b,pos\n" * 20
    refused(lambda: task_of(tmp_path, "text,label\n" + LINES + bad), "20 of 32 records", "line 18 has 3 and 15 more")


@pytest.mark.parametrize("bad", ['"never closed,pos\n', '"big" sale,pos\n', '"a \\"b\\" c",pos\n'])
def test_wrong_quotes_are_named_by_their_line(tmp_path, bad):
    refused(lambda: task_of(tmp_path, "text,label\n" + LINES + bad + LINES), "line 14", "mine.csv")


def test_blank_lines_quotes_and_line_ends_change_no_row(tmp_path):
    content = 'text,label\r\n\r\n"a ""good"", one",pos\r\n   \r\n"two\r\nlines\u2028",neg\r\n' + LINES
    expected = [('a "good", one', "pos"), ("two\r\nlines\u2028", "neg"), *ROWS]
    assert rows_of(task_of(tmp_path, content)) == sorted(expected)


def test_many_rows(tmp_path):
    lines = "".join(f'"item {i}, fine",{"pos" if i % 3 else "neg"}\n' for i in range(20_000))
    task = task_of(tmp_path, "text,label\n" + lines)
    assert len(task.train) + len(task.valid) + len(task.test) == 20_000


# copies

TEXT = "Très bon café, 100 % cotton & soft; we'd buy 2 again"
COPIES = {
    "NFD": unicodedata.normalize("NFD", TEXT),
    "zero-width space": TEXT.replace("bon", "bo\u200bn"),
    "byte order mark": "\ufeff" + TEXT,
    "soft hyphen": TEXT.replace("cotton", "cot\u00adton"),
    "word joiner and directions": "\u202a" + TEXT.replace(" ", " \u2060") + "\u202c",
    "no-break space": TEXT.replace(" ", "\u00a0"),
    "ideographic space": TEXT.replace(" ", "\u3000"),
    "entities": TEXT.replace("&", "&amp;").replace("è", "&egrave;").replace("'", "&#39;"),
    "hexadecimal entities": TEXT.replace("&", "&#x26;").replace(" ", "&nbsp;"),
    "full-width letters": TEXT.replace("100", "１００").replace("soft", "ｓｏｆｔ"),
    "capitals": TEXT.upper(),
    "variation selector": TEXT.replace("&", "&\ufe0f"),
    "zero-width in an NFD accent": unicodedata.normalize("NFD", TEXT).replace("\u0301", "\u200b\u0301"),
    "several": unicodedata.normalize("NFD", TEXT.upper()).replace("&", "&AMP;").replace(" ", " \u200b\u00a0"),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_changed_copy_is_a_copy(kind):
    assert COPIES[kind] != TEXT and normalize(COPIES[kind]) == normalize(TEXT)
    assert connected_components([TEXT, COPIES[kind], "other"], ["a", "b", "c"]).tolist() == [0, 0, 1]


@pytest.mark.parametrize("change", [
    lambda text: unicodedata.normalize("NFD", text),
    lambda text: "\u200b".join(text),
    lambda text: text.replace("&", "&amp;").replace("é", "&eacute;"),
    lambda text: text.replace(" ", "\u00a0"),
])
def test_copies_stay_in_one_split_and_texts_stay_as_they_are(tmp_path, change):
    rows = [(f"café & co number {i}", ("pos", "neg")[i % 2]) for i in range(100)]
    rows += [(change(text), label) for text, label in rows]
    table = pd.DataFrame(rows, columns=["text", "label"])
    table.to_csv(tmp_path / "mine.csv", index=False)
    task = Task.from_csv(tmp_path / "mine.csv", text="text", label="label")
    assert rows_of(task) == sorted(rows)
    train, valid, test = ({normalize(text) for text in part["text"]} for part in (task.train, task.valid, task.test))
    assert not train & test and not train & valid and not valid & test and len(train | valid | test) == 100


def test_the_transfer_split_has_no_changed_copies():
    known = pd.Series([TEXT, "plain"])
    tables = {"shop": pd.DataFrame({"text": [*COPIES.values(), "PLAIN\u200b", "new", "n\u00adew"]})}
    assert list(_transfer(tables, known)["text"]) == ["new"]


@pytest.mark.parametrize("a, b", [("resume", "résumé"), ("5 < 6", "5 > 6"), ("ab", "a b"), ("&", "and"), ("o", "ö")])
def test_other_texts_are_no_copies(a, b):
    assert normalize(a) != normalize(b)


# labels

@pytest.mark.parametrize("a, b", [
    ("Positive", "positive"), (" positive", "positive"), ("positive\u00a0", "positive"), ("POSITIVE", "Positive"),
    ("caf\u00e9", "cafe\u0301"), ("pos\u200bitive", "positive"), ("very  good", "very good"), ("ｇｏｏｄ", "good"),
    ("1", "1.0"), ("1", "01"), ("1.0", "1.00"), ("1", "+1"), ("1000", "1e3"), ("True", "TRUE"), ("R&amp;D", "R&D"),
    ("9007199254740993", "9007199254740993.0"), ("Straße", "STRASSE"),
])
def test_one_class_in_two_spellings_is_refused(tmp_path, a, b):
    lines = "".join(f"text {i},{(a, b, 'other')[i % 3]}\n" for i in range(30))
    refused(lambda: task_of(tmp_path, "text,label\n" + lines), repr(a), repr(b), "column 'label'")


@pytest.mark.parametrize("a, b, names", [
    ("1e30", "2.0", ("1e30", "2")),
    ("9007199254740993", "9007199254740992", ("9007199254740992", "9007199254740993")),
    ("9007199254740993.0", "9007199254740992.0", ("9007199254740992", "9007199254740993")),
    ("18446744073709551617", "1.0", ("1", "18446744073709551617")),
    ("-1", "1.0", ("-1", "1")),
    ("1e999999999", "2", ("1e999999999", "2")),
    ("9" * 5000, "2", ("2", "9" * 5000)),
    ("True", "1", ("1", "True")),
    ("None", "null", ("None", "null")),
    ("good", "not good", ("good", "not good")),
])
def test_labels_keep_their_value(tmp_path, a, b, names):
    lines = "".join(f"text {i},{(a, b)[i % 2]}\n" for i in range(30))
    task = task_of(tmp_path, "text,label\n" + lines)
    assert task.labels == names
    by_name = dict(zip((a, b), names if names[0] in (a, a.removesuffix(".0")) else names[::-1]))
    assert rows_of(task) == sorted((f"text {i}", by_name[(a, b)[i % 2]]) for i in range(30))


@pytest.mark.parametrize("a, b", [("inf", "1"), ("-Infinity", "2.0"), ("1e-3", "2"), ("9007199254740992.5", "1")])
def test_numbers_that_are_no_classes(tmp_path, a, b):
    lines = "".join(f"text {i},{(a, b)[i % 2]}\n" for i in range(30))
    refused(lambda: task_of(tmp_path, "text,label\n" + lines), "numbers with fractions", a)


def test_whole_numbers_of_a_file_stay_exact(tmp_path):
    rows = [{"text": 2**53 + i, "label": 2**60 + i % 2} for i in range(20)]
    expected = sorted((str(row["text"]), str(row["label"])) for row in rows)
    pd.DataFrame(rows).to_parquet(tmp_path / "mine.parquet")
    lines = "\n".join(map(json.dumps, rows))
    assert rows_of(task_of(tmp_path, lines, "mine.jsonl")) == expected
    assert rows_of(Task.from_csv(tmp_path / "mine.parquet", text="text", label="label")) == expected


def test_one_number_written_as_two_types(tmp_path):
    lines = "\n".join(json.dumps({"text": f"text {i}", "label": (1, 1.0, 2)[i % 3]}) for i in range(30))
    refused(lambda: task_of(tmp_path, lines, "mine.jsonl"), "'1'", "'1.0'")


# columns and cells

@pytest.mark.parametrize("header, line", [
    ("text,label,label", "a,pos,neg"), ("label,text,label", "pos,a,neg"), ("text,label,text", "a,pos,b"),
    ('text,"label",label', "a,pos,neg"),
])
def test_a_column_that_is_there_twice(tmp_path, header, line):
    refused(lambda: task_of(tmp_path, header + "\n" + f"{line}\n" * 9), "2 columns are called", "mine.csv")


def test_a_column_that_is_there_twice_and_not_asked_for(tmp_path):
    content = "text,label,note,note\n" + LINES.replace("\n", ",x,y\n")
    assert rows_of(task_of(tmp_path, content)) == sorted(ROWS)


def test_a_key_that_is_there_twice(tmp_path):
    line = '{"text": "a", "label": "pos", "label": "neg"}\n'
    refused(lambda: task_of(tmp_path, '{"text": "a", "label": "b"}\n' + line, "mine.jsonl"), "twice", "line 2")


@pytest.mark.parametrize("line, number", [("[1, 2]", 3), ("5", 3), ('{"text": ', 3), ('"text"', 3), ("{}{}", 3)])
def test_a_line_that_is_no_json_object(tmp_path, line, number):
    good = '{"text": "a", "label": "b"}\n\n'
    refused(lambda: task_of(tmp_path, good + line + "\n" + good, "mine.jsonl"), f"line {number}", "one object a line")


@pytest.mark.parametrize("text", ["NA", "N/A", "null", "None", "NULL", "n/a", "#N/A", "<NA>", "0", "-"])
def test_words_for_missing_values_stay_texts(tmp_path, text):
    assert (text, "pos") in rows_of(task_of(tmp_path, "text,label\n" + LINES + f"{text},pos\n"))


@pytest.mark.parametrize("text", ["", " ", "\u200b", "&nbsp;", "\u00a0\u2007", "\ufeff\u00ad", "nan", "NaN"])
def test_texts_that_show_nothing_are_empty(tmp_path, text):
    content = "text,label\n" + LINES + f'"{text}",pos\n'
    refused(lambda: task_of(tmp_path, content), "1 of 13 rows have an empty text: rows 13", "column 'text'")


@pytest.mark.parametrize("text", [True, ["a"], {"a": 1}, math.inf, -math.inf])
def test_cells_that_are_no_texts(tmp_path, text):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
    rows[4]["text"] = text
    lines = "\n".join(map(json.dumps, rows))
    refused(lambda: task_of(tmp_path, lines, "mine.jsonl"), "1 of 20 rows", type(text).__name__, "rows 5")


@pytest.mark.parametrize("column", ["text", "label", "shop"])
@pytest.mark.parametrize("value", [["a"], {"a": 1}, "\ud800"])
def test_cells_that_are_no_names(tmp_path, column, value):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2], "shop": f"s{i}"} for i in range(20)]
    rows[4][column] = rows[7][column] = value
    lines = "\n".join(map(json.dumps, rows))
    error = refused(lambda: task_of(tmp_path, lines, "mine.jsonl", group="shop"), "2 of 20 rows", "rows 5, 8")
    assert repr(column) in error.where


def test_bytes_are_no_texts(tmp_path):
    pd.DataFrame({"text": [b"a", b"b"] * 9, "label": ["a", "b"] * 9}).to_parquet(tmp_path / "mine.parquet")
    refused(lambda: Task.from_csv(tmp_path / "mine.parquet", text="text", label="label"), "18 of 18", "bytes")


# encodings and delimiters

ACCENTS = "text,label\n" + LINES + "très bon,pos\n很好,pos\n"


@pytest.mark.parametrize("content, advice", [
    (ACCENTS.encode("utf-16"), "-f UTF-16 "),
    (b"\xfe\xff" + ACCENTS.encode("utf-16-be"), "-f UTF-16 "),
    (ACCENTS.encode("utf-32"), "-f UTF-32 "),
    (b"\0\0\xfe\xff" + ACCENTS.encode("utf-32-be"), "-f UTF-32 "),
    (ACCENTS.encode("utf-16-le"), "-f UTF-16LE "),
    (ACCENTS.encode("utf-16-be"), "-f UTF-16BE "),
    (ACCENTS.encode("utf-32-le"), "-f UTF-32LE "),
    (ACCENTS.encode("utf-32-be"), "-f UTF-32BE "),
    (("text,label\n" + LINES).encode("utf-16-le"), "-f UTF-16LE "),  # plain ASCII: its bytes are UTF-8 too
    (("text,label\n" + LINES).encode("utf-16-be"), "-f UTF-16BE "),
    (("text,label\n" + "一二三,好\n一一,坏\n" * 9).encode("utf-16-le"), "-f UTF-16LE "),
    (ACCENTS.replace("很好", "ça").encode("cp1252"), "WINDOWS-1252"),
    (ACCENTS.replace("è", "e").encode("gb18030"), "GB18030"),
    (ACCENTS.replace("très", "a\0b").encode(), "tr -d '\\000'"),
    (b"PK\x03\x04\x14\0\x06\0" + bytes(range(200, 250)), "zip archive or an Excel workbook"),
    (b"\x1f\x8b\x08\0" + bytes(range(200, 250)), "gzip"),
    (b"PAR1" + bytes(50), "Parquet"),
])
@pytest.mark.parametrize("name", ["mine.csv", "mine.tsv", "mine.jsonl"])
def test_the_advice_names_the_encoding(tmp_path, content, advice, name):
    error = refused(lambda: task_of(tmp_path, content, name), "not UTF-8", advice)
    assert ("WINDOWS-1252" in error.do) == (advice in ("WINDOWS-1252", "GB18030"))


def test_the_line_of_the_first_wrong_byte(tmp_path):
    content = ("text,label\n" + LINES + "très bon,pos\n").encode("latin-1")
    refused(lambda: task_of(tmp_path, content), "line 14 has the byte 0xe8")


def test_utf8_with_a_mark_is_read(tmp_path):
    assert ("很好", "pos") in rows_of(task_of(tmp_path, ACCENTS.encode("utf-8-sig")))
    lines = "\n".join(json.dumps({"text": text, "label": label}) for text, label in ROWS)
    assert rows_of(task_of(tmp_path, lines.encode("utf-8-sig"), "mine.jsonl")) == sorted(ROWS)


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
@pytest.mark.parametrize("name", ["mine.csv", "mine.tsv"])
def test_other_delimiters_are_read(tmp_path, delimiter, name):
    rows = [*ROWS, ("a; b, c | d\te", "pos")]
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([("text", "label"), *rows])
    assert rows_of(task_of(tmp_path, file.getvalue(), name)) == sorted(rows)
    refused(
        lambda: task_of(tmp_path, file.getvalue(), name, label="lable"), "no column 'lable'", "text, label", "'label'?"
    )


def test_a_delimiter_in_the_texts_is_none(tmp_path):
    rows = [(f"{text}; works; 3|4", label) for text, label in ROWS]
    content = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)
    assert rows_of(task_of(tmp_path, content)) == sorted(rows)


# arguments

@pytest.mark.parametrize("arguments, name", [
    (dict(label=["a", "b"]), "label"), (dict(label=None), "label"), (dict(label=1), "label"),
    (dict(text=3), "text"), (dict(text=("text",)), "text"), (dict(text=b"text"), "text"),
    (dict(group=["text"]), "group"), (dict(group=0), "group"), (dict(text="label"), "text"),
    (dict(seed="0"), "seed"), (dict(seed=1.5), "seed"), (dict(seed=None), "seed"), (dict(seed=True), "seed"),
    (dict(valid="0.1"), "valid"), (dict(valid=None), "valid"), (dict(test=[0.2]), "test"),
    (dict(group=""), "column ''"),
])
def test_arguments_of_wrong_types(tmp_path, arguments, name):
    refused(lambda: task_of(tmp_path, "text,label\n" + LINES, **arguments), name)


def test_numpy_numbers_are_numbers(tmp_path):
    content = "text,label\n" + LINES
    task = task_of(tmp_path, content, seed=3, valid=0.25, test=0.25)
    same = task_of(tmp_path, content, seed=np.int64(3), valid=np.float32(0.25), test=np.float64(0.25))
    assert same.fingerprint == task.fingerprint
    small = task.sample(train=np.int64(4), test=np.int32(2), seed=np.int64(1))
    assert small.fingerprint == task.sample(train=4, test=2, seed=1).fingerprint


@pytest.mark.parametrize(
    "path", [None, 5, b"mine.csv", ["mine.csv"], "a\0.csv", "x" * 5000, "x" * 5000 + ".csv", "", "."]
)
def test_paths_that_are_none(path):
    refused(lambda: Task.from_csv(path, text="text", label="label"), "where:")


def test_a_path_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.csv").write_text("text,label\n" + LINES)
    assert rows_of(Task.from_csv("~/mine.csv", text="text", label="label")) == sorted(ROWS)


@pytest.mark.parametrize("name", ["folder", "folder.csv", "folder.jsonl"])
def test_a_folder_is_no_file(tmp_path, name):
    (tmp_path / name).mkdir()
    refused(lambda: Task.from_csv(tmp_path / name, text="text", label="label"), "cannot be read", name)


@pytest.mark.parametrize("sizes", [dict(train="9"), dict(valid=-1), dict(test=2.5), dict(transfer=True), dict(seed="1"),
                                   dict(train=4, seed=-1), dict(train=4, seed=2**40), dict(train=-3)])
def test_samples_of_wrong_sizes(sizes):
    if list(sizes) == ["seed"]: sizes = sizes | {"valid": 3}
    refused(lambda: tiny.task().sample(**sizes), next(reversed([k for k in sizes if k != "valid" or len(sizes) == 1])))


@pytest.mark.parametrize("split, column", [("train", "text"), ("train", "label"), ("valid", "label"), ("test", "text"),
                                           ("transfer", "text")])
def test_a_split_lacks_a_column(split, column):
    task = tiny.task()
    part = getattr(task, split).remove_columns(column)
    refused(lambda: replace(task, **{split: part}), f"no column {column!r}", f"split {split}")


@pytest.mark.parametrize("part", [None, pd.DataFrame({"text": ["a"], "label": [0]}), [{"text": "a", "label": 0}]])
def test_a_split_is_a_data_set(part):
    refused(lambda: replace(tiny.task(), train=part), "train", type(part).__name__, "Dataset")


def test_a_task_without_transfer_text():
    task = replace(tiny.task(), transfer=None)
    assert len(task.transfer) == 0 and task.transfer.column_names == ["text", "domain"]
    assert (
        task.fingerprint == replace(task, transfer=task.transfer).fingerprint and task.summary().rows["transfer"] == 0
    )


@pytest.mark.parametrize("rows, words", [
    (pd.DataFrame({"text": [], "label": [], "group": []}), "no rows"),
    (pd.DataFrame({"text": ["a"], "label": ["b"]}), "no column 'group'"),
    (pd.DataFrame({"text": ["a", 5], "label": ["b", "b"], "group": ["1", "2"]}), "Row 1"),
])
def test_rows_that_cannot_be_split(rows, words):
    refused(lambda: stratified_group_split(rows, {"train": 0.5, "test": 0.5}), words)


@pytest.mark.parametrize("fraction", [0, -0.1, "0.5", None, math.nan])
def test_fractions_that_are_none(fraction):
    rows = pd.DataFrame({"text": ["a", "b"], "label": ["c", "c"], "group": ["1", "2"]})
    refused(lambda: stratified_group_split(rows, {"train": 0.5, "test": fraction}), "test")


@pytest.mark.parametrize("name", [None, ["reviews"], 3])
def test_a_task_whose_name_is_no_string(name):
    refused(lambda: load_task(name), "no task", "reviews_zh")


# the metric

METRICS = {"accuracy": accuracy_score, "macro_f1": partial(f1_score, average="macro")}


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_metrics_are_those_of_scikit_learn(pairs):
    labels, predictions = map(list, zip(*pairs))
    task = replace(tiny.task(rows=2), labels=("a", "b", "c", "d"))
    for name, reference in METRICS.items():
        assert replace(task, metric=name).score(labels, predictions) == pytest.approx(reference(labels, predictions))
    recalls = [np.mean([p == c for y, p in pairs if y == c]) for c in set(labels)]
    assert replace(task, metric="balanced_accuracy").score(labels, predictions) == pytest.approx(np.mean(recalls))


def test_balanced_accuracy_is_that_of_scikit_learn():
    labels, predictions = [0, 0, 0, 1, 1, 2], [0, 1, 0, 1, 2, 2]
    task = replace(tiny.task(), labels=("a", "b", "c"), metric="balanced_accuracy")
    assert task.score(labels, predictions) == pytest.approx(balanced_accuracy_score(labels, predictions))


def test_the_metric_is_set_when_a_file_is_read(tmp_path):
    assert task_of(tmp_path, "text,label\n" + LINES).metric == "accuracy"
    task = task_of(tmp_path, "text,label\n" + LINES, metric="macro_f1")
    assert task.metric == "macro_f1" == task.sample(train=4).metric
    assert task.score([0, 1, 1], [0, 1, 0]) == pytest.approx(2 / 3)
    own = task_of(tmp_path, "text,label\n" + LINES, metric=lambda labels, predictions: (labels - predictions).mean())
    assert own.score([1, 1], [0, 1]) == 0.5


@pytest.mark.parametrize("scorer, reference", [
    ("f1_weighted", partial(f1_score, average="weighted")), ("matthews_corrcoef", matthews_corrcoef),
    ("f1_macro", partial(f1_score, average="macro")),
    (make_scorer(fbeta_score, beta=2, average="macro"), partial(fbeta_score, beta=2, average="macro")),
    (make_scorer(hamming_loss, greater_is_better=False), lambda labels, said: -hamming_loss(labels, said)),
], ids=["f1_weighted", "matthews", "f1_macro", "fbeta", "hamming loss"])
def test_a_scorer_of_scikit_learn_is_a_metric(scorer, reference):
    labels, predictions = [0, 0, 0, 1, 1, 2], [0, 1, 0, 1, 2, 2]
    task = replace(tiny.task(), labels=("a", "b", "c"), metric=scorer)
    assert task.score(labels, predictions) == pytest.approx(reference(labels, predictions))
    assert task.score(labels, labels) > task.score(labels, predictions)
    assert task.fingerprint == replace(task, metric=scorer).fingerprint != tiny.task().fingerprint


@pytest.mark.parametrize("metric", ["roc_auc", "neg_log_loss", "average_precision", "top_k_accuracy",
                                    make_scorer(brier_score_loss, response_method="predict_proba")], ids=str)
def test_a_scorer_of_probabilities_is_refused(metric):
    refused(lambda: replace(tiny.task(), metric=metric), "predict_proba", "f1_weighted")


def test_a_scorer_of_two_classes_is_refused_for_three():
    assert replace(tiny.task(), metric="f1").score([0, 1, 1], [0, 1, 0]) == pytest.approx(2 / 3)
    refused(lambda: replace(tiny.task(), labels=("a", "b", "c"), metric="f1"), "multiclass", "f1_weighted")


def first_metric(labels, predictions): return 1.0


def second_metric(labels, predictions): return 2.0


def test_the_fingerprint_knows_the_metric():
    task = tiny.task()
    metrics = ["accuracy", "macro_f1", "balanced_accuracy", first_metric, second_metric, accuracy_score]
    prints = [replace(task, metric=metric).fingerprint for metric in metrics]
    assert len(set(prints)) == len(metrics)
    assert prints == [replace(task, metric=metric).fingerprint for metric in metrics]


@pytest.mark.parametrize("metric, nearest", [("macrof1", "macro_f1"), ("acuracy", "accuracy"), ("f1_makro", "f1_macro"),
                                             ("balanced", "balanced_accuracy"), ("", ""), (None, ""), (3, "")])
def test_a_metric_that_is_none(metric, nearest):
    refused(lambda: replace(tiny.task(), metric=metric), repr(metric), "accuracy, balanced_accuracy, macro_f1", nearest)


@pytest.mark.parametrize(
    "values",
    [
        [0, 1, 1],
        (0, 1, 1),
        np.array([0, 1, 1]),
        np.array([0, 1, 1], dtype=np.uint8),
        pd.Series([0, 1, 1], index=[5, 6, 7]),
        torch.tensor([0, 1, 1]),
        Dataset.from_dict({"label": [0, 1, 1]})["label"],
    ],
    ids=lambda values: type(values).__name__,
)
def test_scores_of_any_kind_of_numbers(values):
    score = tiny.task().score(values, values)
    assert score == 1 and type(score) is float


@pytest.mark.parametrize("predictions", [
    [0, 1], [], [[0, 1], [1, 0], [0, 1]], [0.2, 0.8, 0.1], ["0", "1", "1"], [0, 1, 2], [0, -1, 1], None, 1, {0: 1},
    [[0], [1, 2], [1]], [True, False, True],
], ids=str)
def test_predictions_that_are_none(predictions):
    refused(lambda: tiny.task().score([0, 1, 1], predictions), "predictions", "Task.score")


@pytest.mark.parametrize("metric, words", [
    (lambda labels, predictions: math.nan, "nan"), (lambda labels, predictions: "good", "ValueError"),
    (lambda labels, predictions: None, "TypeError"), (lambda labels: 1.0, "TypeError"),
    (lambda labels, predictions: 1 / 0, "ZeroDivisionError"), (lambda labels, predictions: math.inf, "inf"),
])
def test_functions_that_are_no_metrics(metric, words):
    refused(lambda: replace(tiny.task(), metric=metric).score([0, 1], [0, 1]), words, "f(labels, predictions)")


# generated files

CASES = int(os.environ.get("ECOMOPT_CASES", 300))
cells = st.one_of(
    st.text(alphabet='ab ,;|"\t\n\r\'é好\u200b\u2028&', max_size=8),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
    st.sampled_from(["NA", "nan", "null", "", "1e30", '"', '""', "a,b", "&nbsp;", "\ufeff", "=1+1"]),
)
texts = st.one_of(cells.map("said {}".format), cells.map("{} it".format), cells)
labels = st.sampled_from(["pos", "neg"] * 4 + [" pos", "NA", "Neg", "1"])
faults = st.sampled_from([None] * 8 + ["surplus", "short", "trailing delimiter", "stray quote", "NUL", "open quote"])
encodings = st.sampled_from(["utf-8", "utf-8-sig"] * 6 + ["utf-16", "utf-16-le", "utf-32-be", "latin-1", "gb18030"])


def quoted(cell, delimiter, always):
    """A cell as it stands in a file."""
    needed = always or any(c in cell for c in (delimiter, '"', "\n", "\r"))
    return '"' + cell.replace('"', '""') + '"' if needed else cell


def faulty(fault, header, delimiter):
    """A line that is no record of this header."""
    cells = ["broken"] * len(header)
    if fault == "surplus": cells.append("more")
    if fault == "short": cells.pop()
    if fault == "trailing delimiter": cells.append("")
    cells[0] += {"stray quote": '", he said', "NUL": "\0"}.get(fault, "")
    return ('"' if fault in ("stray quote", "open quote") else "") + delimiter.join(cells)


def encoded(text, encoding):
    """The bytes of a text, in UTF-8 where they would be UTF-8 by chance; and whether they are UTF-8."""
    try: content = text.encode(encoding)
    except UnicodeEncodeError: return text.encode(), True
    try: is_utf8 = "\0" in text or "\0" not in content.decode()
    except UnicodeDecodeError: return content, False
    return (content if encoding == "utf-8-sig" or not is_utf8 else text.encode()), is_utf8


@st.composite
def files(draw):
    """The bytes of a CSV file, its rows, and whether they can be read."""
    names = draw(st.lists(cells.filter(lambda name: name not in ("text", "label")), max_size=3, unique=True))
    header = draw(st.permutations(["text", "label", *names]))
    delimiter, always = draw(st.sampled_from(",,;\t|")), draw(st.booleans())
    drawn = draw(st.lists(st.tuples(texts, labels), max_size=6))
    rows = [*ROWS, *drawn] if draw(st.booleans()) else [*drawn, *ROWS]
    records = [[{"text": text, "label": label}.get(name) for name in header] for text, label in rows]
    records = [[draw(cells) if cell is None else cell for cell in record] for record in records]
    lines = [delimiter.join(quoted(cell, delimiter, always) for cell in record) for record in (header, *records)]
    fault, at = draw(faults), draw(st.integers(1, len(lines)))
    if fault: lines.insert(len(lines) if fault == "open quote" else at, faulty(fault, header, delimiter))
    for i in draw(st.lists(st.integers(0, len(lines)), max_size=2)): lines.insert(i, draw(st.sampled_from(["", "  "])))
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    content, is_utf8 = encoded(end.join(lines) + end * draw(st.integers(0, 1)), draw(encodings))
    return content, rows, is_utf8 and not fault


def acceptable(rows):
    """Can these rows be a task: no empty texts, no class in two spellings, three texts of each class?"""
    counts = Counter(label for _, label in {(normalize(text), label) for text, label in rows})
    is_empty = any(normalize(text) in ("", "nan") for text, _ in rows)
    return not is_empty and len(set(map(normalize, counts))) == len(counts) and min(counts.values()) >= 3


@pytest.mark.slow
@settings(max_examples=CASES, suppress_health_check=list(HealthCheck))
@given(files())
def test_a_generated_file_gives_its_rows_or_an_error(tmp_path_factory, file):
    content, rows, is_sound = file
    path = tmp_path_factory.getbasetemp() / "generated.csv"
    path.write_bytes(content)
    try: task = Task.from_csv(path, text="text", label="label")
    except EcomoptError as error:
        assert not (is_sound and acceptable(rows)), str(error)
        return
    assert is_sound and acceptable(rows) and rows_of(task) == sorted((text, label.strip()) for text, label in rows)


def test_the_fingerprint_knows_what_a_function_of_a_module_does(monkeypatch):
    def made(points: float) -> str:
        module = ModuleType("shop_metric")
        monkeypatch.setitem(sys.modules, "shop_metric", module)
        exec(f"def cost(labels, predictions): return {points}", module.__dict__)  # noqa: S102
        return replace(tiny.task(), metric=module.cost).fingerprint
    assert made(1.0) == made(1.0) != made(0.5)
