"""Distillation: the loss, and a Trainer that computes it whatever the batches are."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, Trainer

from ecomopt import EcomoptError
from ecomopt.compress import distill as module
from ecomopt.compress.augment import Ensemble
from ecomopt.compress.distill import (
    DistillationTrainer,
    attention_loss,
    distill,
    distillation_loss,
    hidden_loss,
    keep_layers,
    ngram_augment,
    teacher_logits,
)
from ecomopt.compress.quantize import quantize
from ecomopt.compress.structured import prune_structured
from ecomopt.core.artifact import load, save
from ecomopt.core.train import Classifier, fingerprint, tokenized, training_arguments

numbers = st.floats(-50, 50, width=32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path / "cache"))


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=6), st.floats(0.1, 50))
def test_kl_is_never_negative_and_zero_for_equal_logits(pairs, temperature):
    teacher, student = torch.tensor(pairs, dtype=torch.float64).T.reshape(2, 1, -1)
    none = torch.tensor([-100])
    assert distillation_loss(student, teacher, none, temperature, 1.0) >= -1e-9
    assert abs(distillation_loss(teacher, teacher, none, temperature, 1.0)) < 1e-9


@given(st.floats(0.5, 20))
def test_the_gradient_is_the_one_derived(temperature):
    teacher, student = (
        torch.randn(1, 4, dtype=torch.float64),
        torch.randn(1, 4, dtype=torch.float64, requires_grad=True),
    )
    distillation_loss(student, teacher, torch.tensor([-100]), temperature, 1.0).backward()
    expected = temperature * (F.softmax(student / temperature, -1) - F.softmax(teacher / temperature, -1))
    assert torch.allclose(student.grad, expected.detach(), atol=1e-10)


def arguments(batch_size=16, **others):
    return training_arguments(
        1, 1e-2, batch_size, 0, bf16=False, optim="sgd", train_sampling_strategy="sequential", **others
    )


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
    trainer(
        student.model, args, train_dataset=data, data_collator=DataCollatorWithPadding(student.tokenizer), **kwargs
    ).train()
    return weights(student)


@pytest.mark.slow
def test_alpha_0_is_the_plain_trainer():
    labelled = rows(tiny.classifier(), unlabelled=False)
    plain = trained(arguments(), labelled, Trainer)
    assert torch.allclose(
        trained(arguments(), labelled, teacher_model=tiny.classifier().model, alpha=0.0), plain, atol=1e-7
    )


@pytest.mark.slow
def test_the_old_name_of_the_tokenizer_is_accepted_with_a_hint():
    student = tiny.classifier(seed=1, layers=1)
    given = dict(train_dataset=rows(student), teacher_model=tiny.classifier().model)
    with pytest.warns(UserWarning, match="processing_class"):
        trainer = DistillationTrainer(student.model, arguments(), tokenizer=student.tokenizer, **given)
    assert trainer.processing_class is student.tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_one_batch_of_32_is_four_of_8(alpha):
    one = trained(arguments(32), teacher_model=tiny.classifier().model, alpha=alpha)
    four = trained(arguments(8, gradient_accumulation_steps=4), teacher_model=tiny.classifier().model, alpha=alpha)
    assert torch.allclose(one, four, atol=1e-6)


def in_processes(n: int, folder: Path, kind: str) -> torch.Tensor:
    """The weights of a student after a training under torchrun."""
    folder.mkdir(exist_ok=True)
    run = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone"]
    script = Path(__file__).with_name("two_processes.py")
    done = subprocess.run([*map(str, [*run, script, folder, kind])], capture_output=True, text=True,
                          env={**os.environ, "TMPDIR": str(folder)})
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(folder / "weights.safetensors")["weights"]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    one = trained(arguments(24), teacher_model=tiny.classifier().model)
    assert torch.allclose(one, in_processes(2, tmp_path, "plain"), atol=1e-6)


def taught(task):
    """A classifier that is trained on the task."""
    teacher = no_dropout(tiny.classifier())
    Trainer(teacher.model, training_arguments(8, 3e-3, 16, 0, bf16=False), train_dataset=tokenized(teacher, task.train),
        data_collator=DataCollatorWithPadding(teacher.tokenizer)).train()
    return teacher


@pytest.mark.slow
def test_a_distilbert_learns_from_a_bert():
    task = tiny.task(120)
    teacher = taught(task)
    student = distill(teacher, task, tiny.distilbert(), epochs=10, learning_rate=3e-3, alpha=1.0)
    assert type(student.model).__name__ == "DistilBertForSequenceClassification"
    assert student.predict(task.test["text"]) == teacher.predict(task.test["text"])


MATCHING = dict(hidden=1.0, cosine=0.5, attention=2.0)


def eager(**sizes):
    model = no_dropout(tiny.classifier(**sizes)).model
    model.set_attn_implementation("eager")
    return model


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [64, 32])
def test_matching_is_the_same_for_one_batch_and_for_four(hidden):
    def weights_after(batch_size, micro_batches):
        student = eager(seed=1, layers=2, hidden=hidden)
        trainer = DistillationTrainer(
            student,
            arguments(batch_size, gradient_accumulation_steps=micro_batches),
            teacher_model=eager(),
            **MATCHING,
            train_dataset=rows(tiny.classifier()),
            data_collator=DataCollatorWithPadding(tiny.tokenizer()),
        )
        torch.manual_seed(0)
        if hidden != 64: torch.nn.init.normal_(trainer.projection.weight)
        trainer.train()
        assert not hasattr(student, "projection")
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    assert torch.allclose(weights_after(32, 1), weights_after(8, 4), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", MATCHING)
def test_matching_reduces_its_loss(name):
    student, teacher, rows_ = eager(seed=1, layers=3), eager(), rows(tiny.classifier())
    trainer = DistillationTrainer(
        student,
        training_arguments(8, 1e-2, 16, 0, bf16=False),
        teacher_model=teacher,
        alpha=1.0,
        train_dataset=rows_,
        data_collator=DataCollatorWithPadding(tiny.tokenizer()),
        **{name: 1.0},
    )
    batch = trainer.data_collator([{k: rows_[i][k] for k in ("input_ids", "labels")} for i in range(8)])
    before = trainer.compute_loss(student, batch).item()
    trainer.train()
    after = trainer.compute_loss(student.eval(), batch).item()
    assert 0 <= after < before


@pytest.mark.parametrize("cosine", [False, True])
def test_equal_states_have_no_loss_and_padding_does_not_count(cosine):
    states, mask = torch.randn(2, 5, 8), torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    other = states.clone()
    other[1, 2:] = 7.0
    assert hidden_loss(states, other, mask, cosine).abs() < 1e-6
    attention = torch.randn(2, 4, 5, 5).softmax(-1)
    assert attention_loss(attention, attention, mask).abs() < 1e-6
    assert attention_loss(attention.flip(-1), attention[:, :2], mask) >= 0


def test_hidden_states_need_a_teacher_model():
    data = rows(tiny.classifier()).add_column("teacher_logits", [[0.0, 0.0]] * 48)
    with pytest.raises(EcomoptError, match="no teacher"):
        DistillationTrainer(tiny.classifier().model, arguments(), train_dataset=data, hidden=1.0)


@pytest.mark.parametrize("weight", ["hidden", "cosine", "attention"])
def test_one_token_alone_cannot_be_matched(weight):
    teacher = tiny.classifier()
    with pytest.raises(EcomoptError, match="one token alone"):
        distill(teacher, tiny.task(8), prune_structured(teacher, first_token=True), **{weight: 1.0})


def test_other_tokens_cannot_be_matched():
    student = tiny.classifier(layers=1)
    student.model.resize_token_embeddings(len(student.tokenizer) + 1)
    student.tokenizer.add_tokens(["battery2"])
    with pytest.raises(EcomoptError, match="different tokens"):
        distill(tiny.classifier(), tiny.task(), student, hidden=1.0)


def test_ngrams_of_nothing_are_refused():
    assert ngram_augment([], 0) == []
    with pytest.raises(EcomoptError, match="no texts"): ngram_augment([], 3)
    task = tiny.task(40)
    nothing = replace(task, train=task.train.select([]))
    with pytest.raises(EcomoptError, match="no texts"): distill(tiny.classifier(), nothing, 1, augment=5)


@given(
    st.lists(st.text("ab ", min_size=1).filter(str.strip), min_size=1, max_size=5),
    st.integers(0, 20),
    st.integers(0, 3),
)
def test_augmented_texts_are_in_the_shop_s_own_words(texts, n, seed):
    augmented = ngram_augment(texts, n, seed)
    assert len(augmented) == n and augmented == ngram_augment(texts, n, seed)
    assert {word for text in augmented for word in text.split()} <= {word for text in texts for word in text.split()}
    assert all(text.strip() for text in augmented)


@pytest.mark.slow
def test_quantized_embeddings_stay_while_the_rest_learns(tmp_path):
    start = quantize(keep_layers(tiny.classifier(), 2), embedding_bits=4, linear=False)
    student = distill(tiny.classifier(), tiny.task(), start, augment=8, learning_rate=1e-2)
    table, before = student.model.get_input_embeddings(), start.model.get_input_embeddings()
    assert torch.equal(table.weight, before.weight) and table.bits == 4
    assert not torch.equal(weights(student), weights(start))
    small = quantize(student)
    assert small.model.get_input_embeddings().bits == 4
    again = load(save(small, tmp_path / "small"))
    assert torch.equal(again.logits(["good battery"]), small.logits(["good battery"]))


@pytest.mark.slow
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
    losses = [
        trainer.compute_loss(
            student.model, {k: v for k, v in batch.items() if k != "token_type_ids"} | {"labels": torch.tensor([1])}
        )
        for batch in (short, padded)
    ]
    assert torch.isclose(*losses, atol=1e-6)


def test_a_teacher_can_still_be_trained_and_copied():
    """The trainer computes without gradients of the teacher, and leaves its parameters as they are."""
    student, teacher = tiny.classifier(seed=1, layers=1), tiny.classifier()
    trainer = DistillationTrainer(student.model, arguments(), teacher_model=teacher.model)
    batch = dict(student.tokenizer(["good battery"], return_tensors="pt"), labels=torch.tensor([1]))
    trainer.compute_loss(student.model, batch).backward()
    assert all(p.requires_grad and p.grad is None for p in teacher.model.parameters())
    assert all(p.requires_grad for p in keep_layers(teacher, 1).model.parameters())


@pytest.mark.slow
def test_a_student_learns_from_unlabelled_text():
    task = tiny.task(120)
    teacher = taught(task)
    student = distill(teacher, task, 1, epochs=10, learning_rate=3e-3, alpha=1.0)
    assert student.predict(task.test["text"]) == teacher.predict(task.test["text"])


@pytest.mark.slow
def test_a_finished_distillation_is_not_repeated(monkeypatch):
    task, teacher = tiny.task(), tiny.classifier()
    first = distill(teacher, task, 2)
    monkeypatch.setattr(module, "DistillationTrainer", None)
    assert fingerprint(distill(teacher, task, 2)) == fingerprint(first)


@pytest.mark.slow
def test_the_teacher_is_not_changed():
    task, teacher = tiny.task(), tiny.classifier()
    before = fingerprint(teacher)
    distill(teacher, task, teacher, epochs=1)
    assert fingerprint(teacher) == before


@pytest.mark.parametrize(
    "layers, kept", [(1, [0]), (2, [0, 5]), (3, [0, 2, 5]), (6, [0, 1, 2, 3, 4, 5]), ([1, 4], [1, 4])]
)
def test_which_layers_are_kept(layers, kept):
    teacher = tiny.classifier(layers=6)
    student = keep_layers(teacher, layers)
    assert student.model.config.num_hidden_layers == len(kept)
    for mine, index in zip(student.model.bert.encoder.layer, kept):
        assert torch.equal(mine.output.dense.weight, teacher.model.bert.encoder.layer[index].output.dense.weight)


@pytest.mark.parametrize("wrong", [0, 4, -1, [], [3], [-1]])
def test_impossible_layers(wrong):
    with pytest.raises(EcomoptError): keep_layers(tiny.classifier(layers=3), wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(alpha=-0.1),
        dict(alpha=1.1),
        dict(alpha=float("nan")),
        dict(hidden=-1),
        dict(attention=float("nan")),
        dict(temperature=0),
        dict(temperature=-1),
        dict(temperature=float("inf")),
        dict(temperature="2"),
        dict(alpha=None),
    ],
)
def test_impossible_arguments(wrong):
    with pytest.raises(EcomoptError): distill(tiny.classifier(), tiny.task(), 1, **wrong)


def test_other_labels():
    with pytest.raises(EcomoptError, match="labels differ"):
        distill(tiny.classifier(), tiny.task(), tiny.classifier(labels=("no", "yes")))
    with pytest.raises(EcomoptError, match="labels differ"):
        distill(tiny.classifier(labels=("no", "yes")), tiny.task(), 1)  # the task has others


def test_other_vocabularies():
    student = tiny.classifier()
    student.model.resize_token_embeddings(200)
    with pytest.raises(EcomoptError, match="vocab_size"):
        DistillationTrainer(student.model, arguments(), teacher_model=tiny.classifier().model)


def test_a_teacher_is_needed():
    student = tiny.classifier()
    with pytest.raises(EcomoptError, match="no teacher"):
        DistillationTrainer(student.model, arguments(), train_dataset=rows(student))


def test_lists_that_share_texts_share_the_teachers_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path))
    texts, asked, logits = [f"text {i}" for i in range(3000)], [], Classifier.logits
    monkeypatch.setattr(Classifier, "logits", lambda self, texts: asked.append(len(texts)) or logits(self, texts))
    teacher = tiny.classifier()
    first = teacher_logits(teacher, texts)
    assert sum(asked) == 3000
    second = teacher_logits(teacher, ["one more", *texts[:2000], "another"])
    assert sum(asked) < 3000 + 2 * 1024 and torch.equal(second[1000:2001], first[999:2000])
    torch.testing.assert_close(second[1:-1], first[:2000])
    assert teacher_logits(teacher, []).shape == (0, 2)


def test_training_does_not_make_quantized_embeddings_larger():
    start = quantize(keep_layers(tiny.classifier(), 2), embedding_bits=4, linear=False)
    kinds = {name: x.dtype for name, x in start.model.named_buffers()}
    assert {name: x.dtype for name, x in module._trainable_copy(start).model.named_buffers()} == kinds
    assert torch.float16 in kinds.values()


def test_padding_on_the_left_changes_nothing():
    labels = torch.tensor([[-100, -100, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    logits = torch.randn(1, 5, 7)
    z, y, real = module._flatten(logits, dict(labels=labels, attention_mask=mask))
    bare, expected, all_real = module._flatten(logits[:, 2:], dict(labels=labels[:, 2:], attention_mask=mask[:, 2:]))
    assert torch.equal(z[real], bare[all_real]) and torch.equal(y[real], expected[all_real])


def test_texts_without_spaces_have_ngrams():
    texts = ["这个手机很好用", "电池 two days 就坏了"]
    made = ngram_augment(texts, 200, 0)
    assert len(set(made)) > 20 and "这个手机" in "".join(made)
    assert all(" " not in text for text in ngram_augment(texts[:1], 50, 0))


def test_what_has_no_layers_and_no_attention_is_refused():
    ensemble = Ensemble([tiny.classifier(), tiny.classifier(seed=1)])
    with pytest.raises(EcomoptError, match="no list of"): distill(ensemble, tiny.task())
    with pytest.raises(EcomoptError, match="Ensemble"): quantize(ensemble)
    with pytest.raises(EcomoptError, match="no hidden states"):
        distill(ensemble, tiny.task(), tiny.classifier(layers=1), hidden=1.0)


def test_labels_are_not_smoothed_in_silence():
    with pytest.raises(EcomoptError, match="smooth"):
        distill(tiny.classifier(), tiny.task(), 1, label_smoothing_factor=0.1)


@pytest.mark.slow
def test_attention_is_matched_without_setting_an_implementation():
    student, teacher = tiny.classifier(seed=1, layers=1), tiny.classifier()
    given = dict(train_dataset=rows(student), data_collator=DataCollatorWithPadding(student.tokenizer))
    DistillationTrainer(student.model, arguments(), teacher_model=teacher.model, attention=1.0, **given).train()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_processes_learn_the_projection_of_a_narrow_student(tmp_path):
    one, two = (in_processes(n, tmp_path / str(n), "narrow") for n in (1, 2))
    assert torch.allclose(one, two, atol=1e-5)
