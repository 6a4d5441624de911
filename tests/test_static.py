"""Static students: what they compute, that padding and order behave, that they are distilled, quantized and saved."""
import subprocess
import sys

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch.nn import functional as F

from ecomopt import EcomoptError, convert, prune, prune_structured, quantize, share_weights, static_student
from ecomopt.compress.distill import distill
from ecomopt.compress.static import StaticModel, _principal, hash_ngrams, static_model
from ecomopt.core.artifact import file_bytes, load, save
from ecomopt.core.measure import compare, count_parameters
from ecomopt.core.train import Classifier, fingerprint
from ecomopt.optimize.recipe import Recipe

TEXTS = ["the battery is great", "the screen broke", "not a good phone, very slow", "love it"]


@pytest.fixture(scope="module")
def teacher():
    return tiny.classifier()


def random_student(teacher, ngrams=2, width=16, buckets=64) -> Classifier:
    """A static student with random rows, so that every token and n-gram counts."""
    student = static_model(teacher, TEXTS, width, buckets, ngrams)
    torch.manual_seed(0)
    torch.nn.init.normal_(student.model.embeddings.weight)
    return student


@settings(max_examples=60)
@given(st.data())
def test_ngrams_are_numbered_by_their_tokens_alone(data):
    n, buckets = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 5000))
    rows = data.draw(st.lists(st.lists(st.integers(0, 40_000), min_size=6, max_size=6), min_size=1, max_size=4))
    ids = torch.tensor(rows)
    found = hash_ngrams(ids, n, buckets)
    assert found.shape == (len(rows), 7 - n) and found.min() >= 0 and found.max() < buckets
    for i in range(7 - n):  # the same wherever the n-gram stands, and in whatever batch
        assert torch.equal(hash_ngrams(ids[:, i:i + n], n, buckets)[:, 0], found[:, i])


@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_text_shorter_than_an_ngram_has_none(length):
    assert hash_ngrams(torch.zeros(2, length, dtype=torch.long), 3, 7).shape == (2, 0)


@pytest.mark.parametrize("ngrams", [1, 2, 3])
def test_logits_are_those_of_the_equations(teacher, ngrams):
    student = random_student(teacher, ngrams)
    model, V = student.model, len(student.tokenizer)
    for text in [*TEXTS, ""]:
        (ids,) = student.encode([text])
        rows = [model.embeddings.weight[i] for i in ids]
        for n in range(2, ngrams + 1):
            for start in range(len(ids) - n + 1):
                code = 0
                for token in ids[start:start + n]: code = code * 1_000_003 + token
                rows.append(model.embeddings.weight[V + code % 64])
        h = torch.stack(rows).sum(0) / len(ids) * 4
        expected = model.classifier(F.relu(model.hidden(h)))
        torch.testing.assert_close(student.logits([text])[0], expected.detach(), rtol=1e-4, atol=1e-4)


@settings(max_examples=25)
@given(st.lists(st.text(alphabet="abc é!", max_size=60), min_size=1, max_size=6))
def test_a_text_has_the_same_logits_alone_and_in_a_batch(texts):
    student = random_student(tiny.classifier(), 3)
    alone = torch.cat([student.logits([text]) for text in texts])
    torch.testing.assert_close(student.logits(texts), alone, rtol=1e-4, atol=1e-4)


def test_pairs_know_the_order_and_tokens_alone_do_not(teacher):
    one, other = "good not bad", "bad not good"
    tokens, pairs = random_student(teacher, 1), random_student(teacher, 2)
    torch.testing.assert_close(*(tokens.logits([text]) for text in (one, other)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*(pairs.logits([text]) for text in (one, other)), atol=1e-3)


def test_components_are_those_of_scikit_learn():
    torch.manual_seed(0)
    X = torch.randn(50, 12) * torch.arange(1, 13)
    expected = torch.tensor(PCA(5, svd_solver="full").fit_transform(X.numpy()))
    torch.testing.assert_close(_principal(X, 5).abs(), expected.abs(), rtol=1e-3, atol=1e-3)
    assert _principal(X, 20)[:, 12:].abs().max() == 0  # no more components than there are


def test_the_start_is_the_teachers_and_the_same_every_time(teacher):
    one, two = (static_model(teacher, TEXTS, 16) for _ in range(2))
    other = static_model(tiny.classifier(seed=1), TEXTS, 16)
    assert fingerprint(one) == fingerprint(two) != fingerprint(other)
    assert one.labels == teacher.labels and one.max_length == teacher.max_length
    assert len(one.tokenizer) < len(teacher.tokenizer)
    assert [len(row) for row in one.encode(TEXTS)] == [len(row) for row in teacher.encode(TEXTS)]
    assert static_model(teacher, TEXTS, 16, max_length=300).max_length == 300


def test_words_that_are_left_out_leave_the_frequencies_of_the_others(teacher):
    texts = ["the"] * 99 + ["battery", "the screen"]
    assert fingerprint(static_model(teacher, texts, 16)) == fingerprint(static_model(teacher, texts, 16, words=texts))
    def frequent_to_rare(texts):
        model = static_model(teacher, texts, 16, words=["the", "battery"])
        assert "screen" not in model.tokenizer.get_vocab()
        rows = model.model.embeddings.weight[model.tokenizer.convert_tokens_to_ids(["the", "battery"])]
        return rows[0].norm() / rows[1].norm()
    assert frequent_to_rare(texts) < 0.5 * frequent_to_rare(["the battery"])


@pytest.mark.slow
def test_it_learns_what_its_teacher_answers(teacher, tmp_path, monkeypatch):
    task = tiny.task(200)
    student = static_student(teacher, task, width=16, buckets=128, epochs=30, learning_rate=1e-2)
    texts = task.train["text"][:]
    wanted = teacher.logits(texts)
    before = F.mse_loss(static_model(teacher, texts, 16, 128).logits(texts), wanted)
    assert F.mse_loss(student.logits(texts), wanted) < 0.5 * before
    assert isinstance(student.model, StaticModel)
    weight = student.model.embeddings.weight
    assert weight[len(student.tokenizer):].abs().max() > 0  # the pairs have learned, too
    monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path))  # trained again
    again = static_student(teacher, task, width=16, buckets=128, epochs=30, learning_rate=1e-2)
    assert fingerprint(again) == fingerprint(student)


@pytest.mark.parametrize("bits", [8, 4])
def test_its_table_is_quantized_and_saved(teacher, tmp_path, bits):
    student = random_student(teacher, width=32, buckets=2048)
    small = quantize(student, bits)
    path = save(small, tmp_path / "small")
    assert torch.equal(load(path).logits(TEXTS), small.logits(TEXTS))
    assert file_bytes(student) - file_bytes(small) > 0.8 * (1 - (bits + 0.5) / 32) * 2048 * 32 * 4
    assert count_parameters(small.model) >= 2048 * 32
    error = (small.logits(TEXTS) - student.logits(TEXTS)).abs().max() / student.logits(TEXTS).abs().max()
    assert error < (0.1 if bits == 8 else 0.5)


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_answers(teacher, tmp_path):
    student = random_student(teacher, 3)
    path = save(student, tmp_path / "static")
    code = "import sys, ecomopt; print(ecomopt.load(sys.argv[1]).logits(['the screen broke'])[0].tolist())"
    found = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    torch.testing.assert_close(torch.tensor(eval(found.stdout)), student.logits(["the screen broke"])[0])


@pytest.mark.slow
def test_it_is_compared_and_is_a_step_of_recipes(teacher):
    task = tiny.task(40)
    steps = [{"static": {"width": 16, "buckets": 64}}, {"distill": {"epochs": 1.0}}, "quantize"]
    result = Recipe(steps).run(task, teacher, measure=False)
    table = compare({"teacher": teacher, "static": result.model}, task, memory=False, repeats=1, calls=2).table
    assert table.loc["static", "MACs M/token"] < table.loc["teacher", "MACs M/token"]


WRONG = {
    "no texts": lambda teacher: static_model(teacher, []),
    "no width": lambda teacher: static_model(teacher, TEXTS, width=0),
    "no buckets": lambda teacher: static_model(teacher, TEXTS, buckets=0),
    "no n-grams": lambda teacher: static_model(teacher, TEXTS, ngrams=0),
    "no teacher": lambda teacher: static_model("minilm", TEXTS),
    "a static teacher": lambda teacher: static_model(random_student(teacher), TEXTS),
    "convert": lambda teacher: convert(random_student(teacher), "onnxruntime", "float32"),
    "prune": lambda teacher: prune(random_student(teacher), 0.5),
    "prune_structured": lambda teacher: prune_structured(random_student(teacher), layers=1),
    "share_weights after quantize": lambda teacher: share_weights(quantize(random_student(teacher))),
    "order": lambda teacher: Recipe([{"keep_layers": {"layers": 1}}, "static"]),
    "convert in a recipe": lambda teacher: Recipe(["static", "convert"]),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused(teacher, wrong):
    with pytest.raises(EcomoptError): wrong(teacher)


def test_a_student_with_int8_words_is_no_student_to_train(teacher):
    with pytest.raises(EcomoptError): distill(teacher, tiny.task(20), quantize(random_student(teacher)))


def test_a_maximum_length_of_0_is_refused(teacher):
    with pytest.raises(EcomoptError, match="max_length"): static_model(teacher, TEXTS, 16, 64, max_length=0)
