"""Fine-tuning: the cache, the seeds, the class around a model."""
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from tokenizers import normalizers, processors
from transformers import TrainerCallback, TrainingArguments

from ecomopt import EcomoptError
from ecomopt.compress.qat import prepare_qat
from ecomopt.compress.structured import prune_structured
from ecomopt.core import train
from ecomopt.core.artifact import load, save
from ecomopt.core.pretrained import _padded, _permute_classes
from ecomopt.core.train import finetune, fingerprint, load_model, training_arguments


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A local Hugging Face directory, and an empty cache."""
    monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path / "cache"))
    return tiny.written(tiny.classifier(), tmp_path / "model")


@given(st.lists(st.lists(st.integers(0, 9), max_size=9), min_size=1, max_size=6), st.sampled_from(["right", "left"]))
def test_batches_are_padded_as_the_tokenizer_does(ids, side):
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = side
    ours, theirs = _padded(tokenizer, ids), tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    assert {"input_ids", "attention_mask"} == set(ours)
    assert all(torch.equal(ours[name], theirs[name].long()) for name in ours)


@pytest.mark.slow
def test_learns_the_task(checkpoint):
    task = tiny.task()
    learned = finetune(checkpoint, task, epochs=15, learning_rate=3e-3, batch_size=8)
    assert learned.predict(task.test["text"]) == [task.labels[i] for i in task.test["label"]]


def test_a_finished_training_is_not_repeated(checkpoint, monkeypatch):
    task = tiny.task()
    first = finetune(checkpoint, task, epochs=1)
    monkeypatch.setattr(train, "Trainer", None)  # a second training would fail
    assert fingerprint(finetune(checkpoint, task, epochs=1)) == fingerprint(first)


@pytest.mark.slow
def test_a_training_need_not_be_cached(checkpoint, tmp_path):
    kept = fingerprint(finetune(checkpoint, tiny.task(), epochs=1))
    before = sorted(tmp_path.rglob("*"))
    for seed in (0, 1):
        alone = finetune(checkpoint, tiny.task(), epochs=1, seed=seed, cache=False, save_strategy="epoch")
        assert (fingerprint(alone) == kept) == (seed == 0) and len(alone.predict(["good"])) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("change", [dict(seed=1), dict(learning_rate=1e-4), dict(epochs=2), dict(weight_decay=0.5)])
def test_every_argument_makes_another_training(checkpoint, change):
    task = tiny.task()
    changed = finetune(checkpoint, task, **{"epochs": 1, **change})
    assert fingerprint(changed) != fingerprint(finetune(checkpoint, task, epochs=1))


class Louder(TrainerCallback):
    """Raises all weights after training."""
    def __init__(self, factor): self.factor = factor

    def spec(self): return {"factor": self.factor}

    def on_train_end(self, args, state, control, model=None, **kwargs):
        for weight in model.parameters(): weight.data *= self.factor


@pytest.mark.slow
def test_every_callback_makes_another_training(checkpoint):
    def learned(*callbacks): return fingerprint(finetune(checkpoint, tiny.task(), epochs=1, callbacks=callbacks))
    assert len({learned(), learned(Louder(2.0)), learned(Louder(3.0))}) == 3
    assert learned(Louder(2.0)) == learned(Louder(2.0))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model(checkpoint, monkeypatch, tmp_path):
    task = tiny.task()
    first = fingerprint(finetune(checkpoint, task, epochs=1, seed=3))
    monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path / "another"))
    assert fingerprint(finetune(checkpoint, task, epochs=1, seed=3)) == first


def test_a_killed_training_leaves_nothing(checkpoint, monkeypatch, tmp_path):
    def killed(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(train.Trainer, "train", killed)
    with pytest.raises(KeyboardInterrupt): finetune(checkpoint, tiny.task(), epochs=1)
    assert not list((tmp_path / "cache" / "finetune").glob("[!.]*"))


def test_logits_do_not_depend_on_the_rest_of_the_batch():
    model = tiny.classifier()
    texts = ["good", "the battery is awful and very very slow", "", "x" * 1000, "not bad"]
    alone = torch.cat([model.logits([text]) for text in texts])
    assert torch.allclose(model.logits(texts), alone, atol=1e-5)
    assert torch.allclose(model.logits(texts[::-1]), alone.flip(0), atol=1e-5)


@pytest.mark.slow
def test_a_million_characters_are_cut():
    model = tiny.classifier()
    assert len(model.encode(["very bad " * 120_000])[0]) == model.max_length


def test_no_texts_no_answers():
    assert tiny.classifier().predict([]) == []


def test_a_string_is_not_a_list():
    with pytest.raises(EcomoptError, match="single string"): tiny.classifier().predict("good")


@pytest.mark.parametrize(
    "wrong", [dict(epochs=0), dict(learning_rate=0), dict(learning_rate=float("nan")), dict(batch_size=-1)]
)
def test_impossible_arguments(wrong):
    with pytest.raises(EcomoptError, match="Give a"):
        training_arguments(**{"epochs": 1, "learning_rate": 1e-3, "batch_size": 8, "seed": 0, **wrong})


def test_an_unknown_model_names_the_known_ones():
    with pytest.raises(EcomoptError, match="minilm"): load_model("no/such-model", ["a", "b"])


def test_a_pickled_checkpoint_is_refused(checkpoint):
    weights = load_model(checkpoint, ("negative", "positive")).model.state_dict()
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    with pytest.raises(EcomoptError, match="safetensors"): load_model(checkpoint, ("negative", "positive"))


@pytest.mark.slow
def test_a_training_that_diverges_says_so_each_time(checkpoint, tmp_path):
    for epochs, words in ((3, "diverged"), (3, "diverged"), (1, "not finite")):  # with one epoch, in the last update
        with pytest.raises(EcomoptError, match=words):
            finetune(checkpoint, tiny.task(), epochs=epochs, learning_rate=1e30)
    assert not list((tmp_path / "cache").glob("finetune/*/*.safetensors"))


@pytest.mark.parametrize("damage", [lambda file: file.write_text("version https://git-lfs.github.com/spec/v1"),
                                    lambda file: file.write_bytes(file.read_bytes()[:1000])])
def test_a_damaged_checkpoint_is_named(checkpoint, damage):
    damage(checkpoint / "model.safetensors")
    with pytest.raises(EcomoptError, match="cannot be loaded"): load_model(checkpoint, ["negative", "positive"])


def test_an_evaluation_while_training_is_refused():
    with pytest.raises(EcomoptError, match="select_best"): training_arguments(1, 1e-4, 8, 0, eval_strategy="epoch")


def test_classes_that_differ_only_in_case_stay_apart(tmp_path):
    model = tiny.classifier(labels=("A", "B", "a"))
    path = tiny.written(model, tmp_path / "model")
    assert torch.equal(load_model(path, ["A", "B", "a"]).logits(["good"]), model.logits(["good"]))
    with pytest.warns(UserWarning, match="new head"): load_model(path, ["B", "A", "a"])


def test_only_plain_heads_are_put_in_order():
    turned = tiny.classifier()
    before = turned.logits(["good"])
    _permute_classes(turned.model, [1, 0])
    torch.testing.assert_close(turned.logits(["good"]), before.flip(1))
    with pytest.raises(EcomoptError, match="rows"): _permute_classes(prepare_qat(turned).model, [1, 0])


def test_three_classes(checkpoint):
    assert load_model(checkpoint, ("a", "b", "c")).logits(["good"]).shape == (1, 3)


def test_a_pruned_model_saved_without_its_shapes_is_refused(tmp_path):
    small = prune_structured(tiny.classifier(), heads=2)
    tiny.written(small, tmp_path)
    with pytest.raises(EcomoptError, match="another shape"): load_model(tmp_path, small.labels)


def test_a_head_of_other_classes_is_made_anew(checkpoint):
    assert load_model(checkpoint, ("a", "b", "c")).logits(["good"]).shape == (1, 3)


def test_the_fingerprint_knows_how_texts_are_split_and_cut():
    def changed(change) -> str:
        model = tiny.classifier()
        change(model.tokenizer)
        return fingerprint(model)
    def lower(tokenizer): tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    def left(tokenizer): tokenizer.truncation_side = "left"
    def called(tokenizer): tokenizer(["good", "good good"], truncation=True, padding=True, max_length=4)
    plain = changed(lambda tokenizer: None)
    assert len({plain, changed(lower), changed(left)}) == 3 and changed(called) == plain


def test_a_model_is_the_same_after_it_was_saved(tmp_path):
    model = tiny.classifier()
    assert fingerprint(load(save(model, tmp_path / "model"))) == fingerprint(model)


def test_an_empty_text_has_a_token_whatever_the_tokenizer(checkpoint):
    model = tiny.classifier()
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert model.encode(["", "good"])[0] == [model.tokenizer.pad_token_id]
    assert model.logits(["", "good"]).isfinite().all() and len(model.predict([""])) == 1


def test_class_weights_of_scikit_learn(checkpoint):
    task = tiny.task()
    weights = compute_class_weight("balanced", classes=np.array([0, 1]), y=np.array(task.train["label"]))
    assert train._class_weights(list(task.train["label"]), 2, weights) == pytest.approx([1, 1], abs=0.2)
    with pytest.raises(EcomoptError, match="number 2 has no text"):
        train._class_weights([0, 1, 1], 3, "balanced")


def test_the_best_epoch_needs_texts_to_choose_by(checkpoint):
    task = tiny.task()
    with pytest.raises(EcomoptError, match="valid split is empty"):
        finetune(checkpoint, replace(task, valid=task.valid.select([])), epochs=1, select_best=True)


def test_several_gpus_do_not_make_a_batch_larger(monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: self.__dict__.get("_n_gpu") or 4))
    args = training_arguments(1, 1e-3, 32, 0)
    assert args._n_gpu == 1 and args.train_batch_size == 32
