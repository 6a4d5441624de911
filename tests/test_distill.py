"""Distillation: the loss, and a Trainer that computes it whatever the batches are."""
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, Trainer

from ecomopt import EcomoptError
from ecomopt.compress import distill as module
from ecomopt.compress.distill import DistillationTrainer, distill, distillation_loss, keep_layers, teacher_logits
from ecomopt.core.train import fingerprint, tokenized, training_arguments

numbers = st.floats(-50, 50, width=32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path / "cache"))


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=6), st.floats(0.1, 50))
@settings(deadline=None)
def test_kl_is_never_negative_and_zero_for_equal_logits(pairs, temperature):
    teacher, student = torch.tensor(pairs, dtype=torch.float64).T.reshape(2, 1, -1)
    none = torch.tensor([-100])
    assert distillation_loss(student, teacher, none, temperature, 1.0) >= -1e-9
    assert abs(distillation_loss(teacher, teacher, none, temperature, 1.0)) < 1e-9


@given(st.floats(0.5, 20))
@settings(deadline=None)
def test_the_gradient_is_the_one_derived(temperature):
    teacher, student = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    distillation_loss(student, teacher, torch.tensor([-100]), temperature, 1.0).backward()
    expected = temperature * (F.softmax(student / temperature, -1) - F.softmax(teacher / temperature, -1))
    assert torch.allclose(student.grad, expected.detach(), atol=1e-10)


def arguments(batch_size=16, **others):
    return training_arguments(1, 1e-2, batch_size, 0, bf16=False, optim="sgd", train_sampling_strategy="sequential", **others)


def no_dropout(classifier):
    for m in classifier.model.modules():
        if isinstance(m, torch.nn.Dropout): m.p = 0.0
    return classifier


def rows(classifier, unlabelled=True):
    data = tokenized(classifier, tiny.task(48).train)
    return data.map(lambda row, i: {"labels": -100 if unlabelled and i % 3 else row["labels"]}, with_indices=True)


def weights(classifier): return torch.cat([p.detach().flatten() for p in classifier.model.parameters()])


def trained(args, data=None, trainer=DistillationTrainer, **kwargs):
    student = no_dropout(tiny.classifier(seed=1, layers=1))
    data = rows(student) if data is None else data
    trainer(student.model, args, train_dataset=data, data_collator=DataCollatorWithPadding(student.tokenizer), **kwargs).train()
    return weights(student)


def test_alpha_0_is_the_plain_trainer():
    labelled = rows(tiny.classifier(), unlabelled=False)
    plain = trained(arguments(), labelled, Trainer)
    assert torch.allclose(trained(arguments(), labelled, teacher_model=tiny.classifier().model, alpha=0.0), plain, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_one_batch_of_32_is_four_of_8(alpha):
    one = trained(arguments(32), teacher_model=tiny.classifier().model, alpha=alpha)
    four = trained(arguments(8, gradient_accumulation_steps=4), teacher_model=tiny.classifier().model, alpha=alpha)
    assert torch.allclose(one, four, atol=1e-6)


def test_cached_logits_equal_live_ones():
    teacher, student = tiny.classifier(), no_dropout(tiny.classifier(seed=1, layers=1))
    data = rows(student)
    texts = tiny.task(48).train["text"]
    live = trained(arguments(), data, teacher_model=teacher.model)
    kept = trained(arguments(), data.add_column("teacher_logits", teacher_logits(teacher, texts).tolist()))
    assert torch.allclose(live, kept, atol=1e-6)


def test_padding_changes_nothing():
    student, teacher = no_dropout(tiny.classifier(seed=1, layers=1)), tiny.classifier()
    short = student.tokenizer(["good battery"], return_tensors="pt")
    padded = student.tokenizer(["good battery"], return_tensors="pt", padding="max_length", max_length=20)
    trainer = DistillationTrainer(student.model, arguments(), teacher_model=teacher.model)
    losses = [trainer.compute_loss(student.model, {k: v for k, v in batch.items() if k != "token_type_ids"} | {"labels": torch.tensor([1])})
              for batch in (short, padded)]
    assert torch.isclose(*losses, atol=1e-6)


def test_a_student_learns_from_unlabelled_text():
    task, teacher = tiny.task(120), no_dropout(tiny.classifier())
    Trainer(teacher.model, training_arguments(8, 3e-3, 16, 0, bf16=False), train_dataset=tokenized(teacher, task.train),
        data_collator=DataCollatorWithPadding(teacher.tokenizer)).train()
    student = distill(teacher, task, 1, epochs=10, learning_rate=3e-3, alpha=1.0)
    assert student.predict(task.test["text"]) == teacher.predict(task.test["text"])


def test_a_finished_distillation_is_not_repeated(monkeypatch):
    task, teacher = tiny.task(), tiny.classifier()
    first = distill(teacher, task, 2)
    monkeypatch.setattr(module, "DistillationTrainer", None)
    assert fingerprint(distill(teacher, task, 2)) == fingerprint(first)


def test_the_teacher_is_left_alone():
    task, teacher = tiny.task(), tiny.classifier()
    before = fingerprint(teacher)
    distill(teacher, task, teacher, epochs=1)
    assert fingerprint(teacher) == before


@pytest.mark.parametrize("layers, kept", [(1, [0]), (2, [0, 5]), (3, [0, 2, 5]), (6, [0, 1, 2, 3, 4, 5]), ([1, 4], [1, 4])])
def test_which_layers_are_kept(layers, kept):
    teacher = tiny.classifier(layers=6)
    student = keep_layers(teacher, layers)
    assert student.model.config.num_hidden_layers == len(kept)
    for mine, index in zip(student.model.bert.encoder.layer, kept):
        assert torch.equal(mine.output.dense.weight, teacher.model.bert.encoder.layer[index].output.dense.weight)


@pytest.mark.parametrize("wrong", [0, 4, -1, [], [3], [-1]])
def test_impossible_layers(wrong):
    with pytest.raises(EcomoptError): keep_layers(tiny.classifier(layers=3), wrong)


@pytest.mark.parametrize("wrong", [dict(alpha=-0.1), dict(alpha=1.1), dict(alpha=float("nan")), dict(temperature=0), dict(temperature=-1)])
def test_impossible_settings(wrong):
    with pytest.raises(EcomoptError): distill(tiny.classifier(), tiny.task(), 1, **wrong)


def test_other_labels():
    with pytest.raises(EcomoptError, match="labels differ"):
        distill(tiny.classifier(), tiny.task(), tiny.classifier(labels=("no", "yes")))


def test_other_vocabularies():
    student = tiny.classifier()
    student.model.resize_token_embeddings(200)
    with pytest.raises(EcomoptError, match="vocab_size"): DistillationTrainer(student.model, arguments(), teacher_model=tiny.classifier().model)


def test_a_teacher_is_needed():
    student = tiny.classifier()
    with pytest.raises(EcomoptError, match="no teacher"): DistillationTrainer(student.model, arguments(), train_dataset=rows(student))
