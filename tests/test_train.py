"""Fine-tuning: the cache, the seeds, the class around a model."""
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

from ecomopt import EcomoptError
from ecomopt.compress.structured import prune_structured
from ecomopt.core import train
from ecomopt.core.pretrained import _padded
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


def test_three_classes(checkpoint):
    assert load_model(checkpoint, ("a", "b", "c")).logits(["good"]).shape == (1, 3)


def test_a_pruned_model_saved_without_its_shapes_is_refused(tmp_path):
    small = prune_structured(tiny.classifier(), heads=2)
    tiny.written(small, tmp_path)
    with pytest.raises(EcomoptError, match="another shape"): load_model(tmp_path, small.labels)


def test_a_head_of_other_classes_is_made_anew(checkpoint):
    assert load_model(checkpoint, ("a", "b", "c")).logits(["good"]).shape == (1, 3)
