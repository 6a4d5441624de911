"""Models and trainings that could go wrong without a word: weights, names, tokenizers, texts, options, threads."""
import json
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from transformers import (
    BertConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from ecomopt import DistillationTrainer, EcomoptError, distill, finetune, load_model, measure, quantize, save
from ecomopt.core import train, training
from ecomopt.core.train import fingerprint, main, training_arguments

LABELS = ("negative", "positive")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def checkpoint(tmp_path):
    """A local directory of a BERT and its tokenizer."""
    return tiny.written(tiny.classifier(), tmp_path / "model")


def edit(folder, **changes):
    """Change the configuration."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---------------------------------------------------------------- weights

@pytest.mark.parametrize("missing", ["encoder.layer.1.", "embeddings.word", "LayerNorm.weight", "classifier.bias"])
def test_missing_weights_are_not_drawn(checkpoint, missing):
    tiny.edit_weights(checkpoint, lambda tensors: {k: v for k, v in tensors.items() if missing not in k})
    with pytest.raises(EcomoptError, match="not in the checkpoint"): load_model(checkpoint, LABELS)


@pytest.mark.parametrize("name", ["bert.encoder.layer.0.attention.scale", "bert.encoder.layer.9.output.dense.weight"])
def test_weights_in_excess_are_not_ignored(checkpoint, name):
    tiny.edit_weights(checkpoint, lambda tensors: tensors | {name: torch.ones(3)})
    with pytest.raises(EcomoptError, match="not part of the model"): load_model(checkpoint, LABELS)


def test_a_configuration_of_more_layers_is_refused(checkpoint):
    edit(checkpoint, num_hidden_layers=4)
    with pytest.raises(EcomoptError, match="not in the checkpoint"): finetune(checkpoint, tiny.task())


@pytest.mark.parametrize("change", [lambda model: model, quantize])
def test_an_artifact_is_loaded_by_load(tmp_path, change):
    path = save(change(tiny.classifier()), tmp_path / "small")
    for use in (lambda: load_model(path, LABELS), lambda: finetune(path, tiny.task())):
        with pytest.raises(EcomoptError, match="artifact") as caught: use()
        assert "ecomopt.load" in caught.value.do


def test_an_encoder_without_a_head_gets_one(tmp_path):
    whole = tiny.classifier()
    whole.model.bert.save_pretrained(tmp_path)
    whole.tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, ("a", "b", "c"))
    assert loaded.logits(["good"]).shape == (1, 3)
    assert torch.equal(loaded.model.bert.encoder.layer[0].output.dense.weight,
                       whole.model.bert.encoder.layer[0].output.dense.weight)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(checkpoint, value):
    tiny.edit_weights(checkpoint, lambda tensors: tensors | {"classifier.bias": torch.tensor([0.0, value])})
    with pytest.raises(EcomoptError, match="not finite"): load_model(checkpoint, LABELS)


def test_logits_that_are_not_finite_are_no_answer():
    model = tiny.classifier()
    model.model.classifier.weight.data[0, 0] = math.nan
    for ask in (model.logits, model.predict):
        with pytest.raises(EcomoptError, match="not finite"): ask(["good"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_checkpoints_of_16_bits_are_trained_in_32(checkpoint, dtype):
    tiny.edit_weights(checkpoint, lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})
    edit(checkpoint, dtype=str(dtype).removeprefix("torch."))
    learned = finetune(checkpoint, tiny.task(), epochs=1)
    assert {p.dtype for p in learned.model.parameters()} == {torch.float32}


# ---------------------------------------------------------------- classes

@pytest.mark.parametrize("labels", [("positive", "negative"), ("Positive", "NEGATIVE"), ("negative", "positive")])
def test_classes_are_aligned_by_name(checkpoint, labels):
    texts = tiny.task().test["text"]
    expected = [label.lower() for label in tiny.classifier().predict(texts)]
    assert [label.lower() for label in load_model(checkpoint, labels).predict(texts)] == expected


def test_three_classes_are_permuted(tmp_path):
    model = tiny.classifier(labels=("a", "b", "c"))
    loaded = load_model(tiny.written(model, tmp_path), ("c", "a", "b"))
    assert torch.equal(loaded.model.classifier.weight, model.model.classifier.weight[[2, 0, 1]])
    assert torch.allclose(loaded.logits(["good"]), model.logits(["good"])[:, [2, 0, 1]], atol=1e-6)


@pytest.mark.parametrize("labels", [("good", "bad"), ("negative", "neutral")])
def test_other_classes_get_a_new_head(checkpoint, labels):
    with pytest.warns(UserWarning, match="new head"): loaded = load_model(checkpoint, labels)
    head = tiny.classifier().model.classifier.weight
    assert not torch.allclose(loaded.model.classifier.weight, head) and loaded.labels == labels


def test_classes_without_names_keep_their_order(checkpoint):
    edit(checkpoint, id2label={"0": "LABEL_0", "1": "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_model(checkpoint, LABELS)
    assert torch.equal(loaded.model.classifier.weight, tiny.classifier().model.classifier.weight)
    assert torch.allclose(loaded.logits(["good"]), tiny.classifier().logits(["good"]), atol=1e-6)


@pytest.mark.parametrize("names", [("positive", "negative"), ("bad", "good")])
def test_a_teacher_of_other_classes(tmp_path, names):
    rows = train.tokenized(tiny.classifier(), tiny.task().train)
    args = training_arguments(1, 1e-3, 8, 0)
    teacher = tiny.classifier(labels=names).model
    with pytest.raises(EcomoptError, match="classes of the teacher"):
        DistillationTrainer(tiny.classifier().model, args, train_dataset=rows, teacher_model=teacher)


@pytest.mark.slow
def test_a_class_that_is_never_predicted(checkpoint):
    model = tiny.classifier()
    model.model.classifier.bias.data = torch.tensor([100.0, 0.0])
    with pytest.warns(UserWarning, match="'positive' for none"):
        measure(model, tiny.task(), repeats=1, calls=2, memory=False)
    rare = tiny.task()
    with pytest.warns(UserWarning, match="for none"): finetune(checkpoint, rare, epochs=1, learning_rate=1e-9)


def skewed(rows=120, rare=8):
    """Synthetic texts, few of which are positive; no word tells the classes apart for certain."""
    task = tiny.task(rows)
    keep = [i for i in range(rows) if i % 2 == 0 or i < 2 * rare]
    return replace(task, train=task.train.select(keep))


@pytest.mark.slow
def test_class_weights(checkpoint):
    task = skewed()
    weights = training._class_weights(task.train["label"][:], 2, "balanced")
    assert weights[1] > 5 * weights[0]
    counts = [task.train["label"].count(c) for c in (0, 1)]
    assert np.isclose(np.average(training._class_weights(task.train["label"][:], 2, [1, 9]), weights=counts), 1)
    plain = finetune(checkpoint, task, epochs=1)
    assert fingerprint(finetune(checkpoint, task, epochs=1, class_weights="balanced")) != fingerprint(plain)


@pytest.mark.parametrize("wrong", ["even", [1.0], [1.0, -1.0], [1.0, math.nan], [1.0, 2.0, 3.0]])
def test_wrong_class_weights(checkpoint, wrong):
    with pytest.raises(EcomoptError, match="class_weights"): finetune(checkpoint, tiny.task(), class_weights=wrong)


@pytest.mark.slow
def test_the_best_epoch_is_kept_by_the_metric_of_the_task(checkpoint):
    task, options = tiny.task(), dict(epochs=6, learning_rate=2e-3, batch_size=8)
    def first_class(labels, predicted): return -sum(predicted)  # best when all are of class 0
    chosen = finetune(checkpoint, replace(task, metric=first_class), select_best=True, **options)
    last = finetune(checkpoint, task, **options)
    assert chosen.predict(task.valid["text"]).count("positive") <= last.predict(task.valid["text"]).count("positive")
    assert fingerprint(chosen) != fingerprint(last)


# ---------------------------------------------------------------- tokenizers and positions

@pytest.mark.parametrize("change", ["none", "empty", "larger", "other pad"])
def test_a_tokenizer_that_does_not_fit(checkpoint, change):
    if change == "none":
        for file in checkpoint.glob("*token*"): file.unlink()
    elif change == "larger":
        words = tiny.tokenizer()
        words.add_tokens([f"new{i}" for i in range(5)])
        words.save_pretrained(checkpoint)
    elif change == "empty":
        inner = json.loads((checkpoint / "tokenizer.json").read_text())
        inner["model"]["vocab"] = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
        inner["added_tokens"] = [token for token in inner["added_tokens"] if token["id"] < 5]
        (checkpoint / "tokenizer.json").write_text(json.dumps(inner))
    else: edit(checkpoint, pad_token_id=5)
    with pytest.raises(EcomoptError): finetune(checkpoint, tiny.task(), epochs=1)


def test_a_tokenizer_of_another_language(checkpoint):
    task = tiny.task()
    chinese = task.train.map(lambda row: {"text": "电池很好用手机" + row["text"][:1]})
    with pytest.raises(EcomoptError, match="does not know"): finetune(checkpoint, replace(task, train=chinese))


@pytest.mark.parametrize("length", [0, -1, None, True, 1024, 513, 64.0, "64", 10**12])
def test_lengths_that_cannot_be(checkpoint, length):
    with pytest.raises(EcomoptError, match="max_length"): load_model(checkpoint, LABELS, max_length=length)
    with pytest.raises(EcomoptError, match="max_length"): replace(tiny.classifier(), max_length=length)


def test_lengths_that_can_be(checkpoint):
    for length in (1 + 2, 512, np.int64(64)):
        assert load_model(checkpoint, LABELS, max_length=length).logits(["good " * 900]).shape == (1, 2)


@pytest.mark.parametrize("config, model", [
    (GPT2Config(n_embd=32, n_layer=2, n_head=4, bos_token_id=2, eos_token_id=3), GPT2ForSequenceClassification),
    (LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, bos_token_id=2,
                 eos_token_id=3), LlamaForSequenceClassification),
])
def test_a_model_without_a_padding_token(tmp_path, config, model):
    words = tiny.tokenizer()
    words.pad_token, words.eos_token = None, "[SEP]"
    config.vocab_size = len(words)
    model(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, LABELS)
    texts = ["good", "very bad battery", ""]
    alone = torch.cat([loaded.logits([text]) for text in texts])
    assert torch.allclose(loaded.logits(texts), alone, atol=1e-5)


# ---------------------------------------------------------------- texts

@pytest.mark.parametrize("texts, row", [
    (["good", None], 1), (["good", b"bad"], 1), (["\ud800"], 0), ([("good", "bad")], 0), (["good", 3, "bad"], 1),
    (["good", math.nan], 1), ([["good"]], 0),
])
def test_a_row_that_is_no_text_is_named(texts, row):
    for ask in (tiny.classifier().predict, tiny.classifier().encode):
        with pytest.raises(EcomoptError, match=f"Row {row} "): ask(texts)


@pytest.mark.parametrize("make", [tuple, list, iter, pd.Series, np.array, lambda x: (text for text in x)])
def test_any_ordered_collection_of_texts(make):
    model, texts = tiny.classifier(), ["good", "bad battery"]
    assert torch.equal(model.logits(make(texts)), model.logits(texts))


@pytest.mark.parametrize("texts", ["good", b"good", None, 3, {"good": 1}, {"good", "bad"}])
def test_what_is_no_list(texts):
    with pytest.raises(EcomoptError): tiny.classifier().predict(texts)


# ---------------------------------------------------------------- arguments

@pytest.mark.parametrize("name, value", [
    ("batch_size", 0), ("batch_size", True), ("batch_size", 8.5), ("batch_size", "8"), ("epochs", "abc"),
    ("epochs", None), ("epochs", True), ("learning_rate", -1), ("learning_rate", math.inf), ("seed", -1), ("seed", 0.5),
    ("seed", None),
])
def test_wrong_arguments_are_named(name, value):
    given = dict(epochs=1, learning_rate=1e-3, batch_size=8, seed=0) | {name: value}
    with pytest.raises(EcomoptError, match=name): training_arguments(**given)


def test_numbers_of_numpy():
    args = training_arguments(np.float32(1), np.float64(1e-3), np.int64(8), np.int32(1))
    assert args.per_device_train_batch_size == 8 and type(args.per_device_train_batch_size) is int


def test_an_unknown_argument_suggests_another():
    with pytest.raises(EcomoptError, match="learning_rate|weight_decay"):
        training_arguments(1, 1e-3, 8, 0, weight_decy=0.1)


@pytest.mark.parametrize("name", ["minlm", "minilmm", "Minilm"])
def test_a_misspelt_asset_asks_no_network(name, monkeypatch):
    monkeypatch.setattr(train.pretrained, "_load_pretrained", None)  # asking it would fail
    with pytest.raises(EcomoptError, match="minilm") as caught: load_model(name, LABELS)
    assert "reviews" not in str(caught.value)


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing", 3, None])
def test_a_directory_that_is_not_there(name):
    with pytest.raises(EcomoptError): load_model(name, LABELS)


def test_a_home_directory(checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert load_model("~/model", LABELS).labels == LABELS


@pytest.mark.parametrize("wrong", ["path/to/model", None, 3])
def test_a_path_where_a_model_belongs(wrong):
    for use in (lambda: distill(wrong, tiny.task()), lambda: measure(wrong, tiny.task())):
        with pytest.raises(EcomoptError, match="not a Classifier"): use()
    with pytest.raises(EcomoptError): distill(tiny.classifier(), tiny.task(), student="path/to/model")


def test_no_texts_to_train_on(checkpoint):
    task = tiny.task()
    with pytest.raises(EcomoptError): finetune(checkpoint, replace(task, train=task.train.select([])))


def csv(folder):
    tiny.task().train.select_columns(["text", "label"]).to_csv(folder / "mine.csv")
    return str(folder / "mine.csv")


@pytest.mark.parametrize("option, value", [
    ("--epochs", "abc"), ("--bf16", "maybe"), ("--batch-size", "8.5"), ("--seed", "one"), ("--learning-rate", "nan"),
    ("--epoch", "1"), ("--select-best", "2"),
])
def test_wrong_options_of_the_command_line(checkpoint, tmp_path, option, value):
    with pytest.raises(EcomoptError, match=option):
        main(["finetune", str(checkpoint), csv(tmp_path), "--out", str(tmp_path / "out"), option, value])


@pytest.mark.parametrize("text, value", [("False", False), ("false", False), ("no", False), ("yes", True)])
def test_a_false_option_is_false(text, value):
    options = training._parse_options(["--bf16", text, "--epochs", "2"], training._option_types("finetune"))
    assert options == {"bf16": value, "epochs": 2}


def test_options_of_a_distillation():
    words = ["--student", "[0, 2]", "--hidden", "0.5", "--reverse", "yes", "--augment", "3"]
    options = training._parse_options(words, training._option_types("distill"))
    assert options == {"student": [0, 2], "hidden": 0.5, "reverse": True, "augment": 3}


# ---------------------------------------------------------------- students

@pytest.mark.slow
def test_a_teacher_in_int8_can_teach():
    teacher = quantize(tiny.classifier())
    student = distill(teacher, tiny.task(), tiny.classifier(layers=1), epochs=1)
    assert student.labels == LABELS


@pytest.mark.parametrize("student", [2, quantize])
def test_a_student_in_int8_cannot_be_trained(student):
    teacher = quantize(tiny.classifier())
    given = student if isinstance(student, int) else student(tiny.classifier())
    with pytest.raises(EcomoptError, match="nothing to train"): distill(teacher, tiny.task(), given, epochs=1)


# ---------------------------------------------------------------- threads

@pytest.mark.slow
def test_two_trainings_in_two_threads_are_two_trainings(checkpoint):
    def learned(seed): return fingerprint(finetune(checkpoint, tiny.task(), epochs=2, seed=seed, cache=False))
    one_by_one = [learned(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool: assert list(pool.map(learned, range(3))) == one_by_one


def test_a_tokenizer_in_threads():
    model = tiny.classifier()
    short, texts = replace(model, max_length=4), ["good bad " * n for n in range(1, 40)]
    def ask(i): return (short if i % 2 else model).encode([texts[i % 39]])
    with ThreadPoolExecutor(8) as pool: found = list(pool.map(ask, range(400)))
    assert found == [ask(i) for i in range(400)]




def test_numbered_labels_are_matched_by_name():
    from ecomopt.core.pretrained import _class_order
    names = [f"LABEL_{i}" for i in range(12)]
    config = BertConfig(num_labels=12, architectures=["BertForSequenceClassification"])
    assert _class_order(config, sorted(names)) == [names.index(name) for name in sorted(names)]
    assert _class_order(config, [f"topic {i}" for i in range(12)]) == [*range(12)]
