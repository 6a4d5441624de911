"""Pruning: exact sparsity, torch's masks, zeros that survive optimizer steps, saving and loading; and bad input."""
import copy
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune as torch_prune
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
)

from ecomopt import EcomoptError
from ecomopt.compress.distill import distill
from ecomopt.compress.prune import (
    MaskCallback,
    PruneCallback,
    compute_sparsity,
    cubic_sparsity,
    prunable_layers,
    prune,
    pruning_masks,
)
from ecomopt.compress.quantize import quantize
from ecomopt.compress.structured import prune_structured
from ecomopt.core.artifact import load, save
from ecomopt.core.train import Classifier, finetune, fingerprint, tokenized, training_arguments

KINDS = {"bert": tiny.classifier(), "distilbert": tiny.distilbert()}
SCOPES, IMPORTANCES = ("global", "local"), ("magnitude", "random")
SPARSITIES = st.floats(0, 1, exclude_max=True)


def weights(classifier: Classifier) -> dict[str, torch.Tensor]:
    return {name: linear.weight.detach() for name, linear in prunable_layers(classifier.model).items()}


def zeros(classifier: Classifier) -> dict[str, torch.Tensor]:
    return {name: w == 0 for name, w in weights(classifier).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# masks

@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.97])
def test_masks_are_those_of_torch(kind, scope, importance, sparsity):
    method = {"magnitude": torch_prune.L1Unstructured, "random": torch_prune.RandomUnstructured}[importance]
    theirs = prunable_layers(copy.deepcopy(KINDS[kind].model))
    torch.manual_seed(3)
    pairs = [(linear, "weight") for linear in theirs.values()]
    if scope == "global": torch_prune.global_unstructured(pairs, method, amount=sparsity)
    else:
        for linear in theirs.values(): method.apply(linear, "weight", amount=sparsity)
    ours = pruning_masks(prunable_layers(KINDS[kind].model), sparsity, scope, importance, seed=3)
    assert same(ours, {name: linear.weight_mask.bool() for name, linear in theirs.items()})


@pytest.mark.slow
@settings(max_examples=40)
@given(SPARSITIES, st.sampled_from(SCOPES), st.sampled_from(IMPORTANCES), st.sampled_from(list(KINDS)))
def test_sparsity_is_exact_to_one_weight(sparsity, scope, importance, kind):
    """In every matrix, or over all; the weights that are kept do not change."""
    before, after = weights(KINDS[kind]), weights(prune(KINDS[kind], sparsity, scope, importance))
    gone = {name: w == 0 for name, w in after.items()}
    groups = [list(gone)] if scope == "global" else [[name] for name in gone]
    for names in groups:
        total = sum(gone[name].numel() for name in names)
        assert abs(sum(gone[name].sum().item() for name in names) - sparsity * total) < 1
    assert all(torch.equal(after[name][~gone[name]], before[name][~gone[name]]) for name in gone)


@pytest.mark.slow
@settings(max_examples=20)
@given(SPARSITIES, SPARSITIES, st.sampled_from(SCOPES), st.sampled_from(IMPORTANCES))
def test_pruning_twice_is_pruning_once(one, other, scope, importance):
    """Zeros are pruned first, so a second pruning continues the first."""
    low, high = sorted((one, other))
    twice = prune(prune(KINDS["bert"], low, scope, importance), high, scope, importance)
    assert same(zeros(twice), zeros(prune(KINDS["bert"], high, scope, importance)))


@pytest.mark.parametrize("scope", SCOPES)
def test_ties_do_not_change_the_count(scope):
    """A threshold would remove all of them or none."""
    equal = replace(KINDS["bert"], model=copy.deepcopy(KINDS["bert"].model))
    for linear in prunable_layers(equal.model).values(): linear.weight.data = linear.weight.sign() * 0.5
    assert compute_sparsity(prune(equal, 0.25, scope).model) == 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_layers_are_pruned(kind):
    before, after = KINDS[kind].model.state_dict(), prune(KINDS[kind], 0.9).model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in prunable_layers(KINDS[kind].model)}
    assert all(part not in name for name in changed for part in ("embedding", "Norm", "norm", "classifier", "pooler"))
    assert all((after[name] == 0).any() and not (before[name] == 0).any() for name in changed)


def test_language_models_are_pruned_too():
    model = prune(tiny.language_model(num_hidden_layers=2, tied=False), 0.5).model
    assert len(prunable_layers(model)) == 2 * 7 and compute_sparsity(model) == 0.5 and (model.lm_head.weight != 0).all()


def test_random_choices_have_a_seed():
    def chosen(seed): return zeros(prune(KINDS["bert"], 0.5, importance="random", seed=seed))
    assert same(chosen(1), chosen(1)) and not same(chosen(1), chosen(2))


def test_zeros_are_positive():
    """-0.0 equals 0, but its bytes do not: files would compress worse."""
    pruned = weights(prune(KINDS["bert"], 0.9))
    assert not any((w.signbit() & (w == 0)).any() for w in pruned.values())


# training

class Record(TrainerCallback):
    """The sparsity after each step."""
    def __init__(self): self.sparsity = []

    def on_step_end(self, args, state, control, model=None, **kwargs): self.sparsity.append(compute_sparsity(model))


def train(classifier: Classifier, *callbacks: TrainerCallback, resume: str | None = None, **others) -> list[float]:
    """Train in place for 16 steps: the sparsity after each."""
    args = training_arguments(
        **{"epochs": 4, "learning_rate": 1e-2, "batch_size": 12, "seed": 0, "bf16": False, **others}
    )
    record = Record()
    Trainer(
        classifier.model,
        args,
        train_dataset=tokenized(classifier, tiny.task(48).train),
        callbacks=[*callbacks, record],
        data_collator=DataCollatorWithPadding(classifier.tokenizer),
    ).train(resume_from_checkpoint=resume)
    return record.sparsity


@pytest.mark.slow
@pytest.mark.parametrize(
    "others",
    [
        {},
        dict(optim="sgd"),
        dict(optim="adamw_torch", weight_decay=0.5),
        dict(batch_size=3, gradient_accumulation_steps=4),
        dict(max_grad_norm=0.0),
    ],
    ids=str,
)
def test_masked_zeros_survive_optimizer_steps(others):
    pruned = prune(tiny.classifier(), 0.8)
    before, values = zeros(pruned), copy.deepcopy(weights(pruned))
    assert len(set(train(pruned, MaskCallback(), **others))) == 1
    assert same(zeros(pruned), before)
    assert not any(torch.equal(w, values[name]) for name, w in weights(pruned).items())  # the others did learn


@pytest.mark.slow
def test_zeros_without_a_mask_are_lost():
    pruned = prune(tiny.classifier(), 0.8)
    assert train(pruned)[-1] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_sparsity_follows_the_schedule(scope, importance):
    model = tiny.classifier()
    history = train(
        model,
        PruneCallback(0.9, initial_sparsity=0.3, begin=0.25, end=0.75, frequency=3, scope=scope, importance=importance),
    )
    total = sum(w.numel() for w in weights(model).values())
    last = 0.0  # pruning is at steps 6 and 9, whole multiples of 3, and at the end of the schedule, 12
    for t, sparsity in enumerate(history, 1):
        if t in (6, 9, 12): last = cubic_sparsity(t, 0.3, 0.9, 4, 12)
        assert abs(sparsity - last) * total < (1 if scope == "global" else len(weights(model)))
    if scope == "local": assert all(abs((w == 0).sum().item() - 0.9 * w.numel()) < 1 for w in weights(model).values())


@settings(max_examples=100)
@given(SPARSITIES, SPARSITIES, st.floats(0, 0.9), st.floats(0.01, 1), st.floats(-1, 3), st.floats(0, 3))
def test_the_schedule_rises_from_first_to_last(one, other, begin, length, t, later):
    first, last = sorted((one, other))
    early, late = (cubic_sparsity(step, first, last, begin, begin + length) for step in (t, t + later))
    assert first - 1e-12 <= early <= late + 1e-12 <= last + 2e-12
    assert cubic_sparsity(begin, first, last, begin, begin + length) == pytest.approx(first)
    end = begin + length
    assert cubic_sparsity(end, first, last, begin, end) == last or end - begin != length


@pytest.mark.slow
def test_gradual_pruning_continues_from_zeros():
    pruned = prune(tiny.classifier(), 0.5)
    before = zeros(pruned)
    history = train(pruned, PruneCallback(0.9, frequency=1))
    assert min(history) >= 0.5 and history == sorted(history) and abs(history[-1] - 0.9) < 1e-4
    assert all((zeros(pruned)[name] | ~gone).all() for name, gone in before.items())


@pytest.mark.slow
def test_a_killed_training_resumes_from_its_checkpoint(tmp_path):
    def callback(): return PruneCallback(0.9, frequency=2)
    whole, resumed = tiny.classifier(), tiny.classifier()
    options = dict(output_dir=str(tmp_path), save_strategy="steps", save_steps=8)
    history = train(whole, callback(), **options)
    assert train(resumed, callback(), resume=str(tmp_path / "checkpoint-8"), **options) == history[8:]
    assert same(zeros(whole), zeros(resumed))


@pytest.fixture
def cache(tmp_path, monkeypatch): monkeypatch.setenv("ECOMOPT_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_prunes_while_distilling(cache, alpha):
    teacher = tiny.classifier()

    def student(sparsity):
        return distill(teacher, tiny.task(), teacher, alpha=alpha, callbacks=[PruneCallback(sparsity, frequency=2)])

    for sparsity in (0.5, 0.9):
        # the key of the cache has the callback's arguments
        assert abs(compute_sparsity(student(sparsity).model) - sparsity) < 1e-4
    assert same(zeros(student(0.9)), zeros(student(0.9))) and compute_sparsity(teacher.model) == 0
    further = distill(teacher, tiny.task(), student(0.9), alpha=alpha, seed=1, callbacks=[MaskCallback()])
    assert same(zeros(further), zeros(student(0.9))) and fingerprint(further) != fingerprint(student(0.9))


@pytest.mark.slow
def test_prunes_while_fine_tuning(cache, tmp_path):
    original = tiny.classifier()
    for part in (original.model, original.tokenizer): part.save_pretrained(tmp_path / "model")
    learned = finetune(tmp_path / "model", tiny.task(), epochs=2, callbacks=[PruneCallback(0.8, scope="local")])
    assert all(abs((w == 0).sum().item() - 0.8 * w.numel()) < 1 for w in weights(learned).values())


# saving, and other steps

@pytest.mark.slow
def test_loads_in_a_fresh_process(tmp_path):
    pruned = prune(KINDS["bert"], 0.9)
    save(pruned, tmp_path / "pruned")
    save(KINDS["bert"], tmp_path / "dense")
    code = (
        "import json, sys, ecomopt; from ecomopt.compress.prune import prunable_layers; c = ecomopt.load(sys.argv[1]);"
        "zeros = {name: (m.weight == 0).tolist() for name, m in prunable_layers(c.model).items()};"
        "print(json.dumps([c.logits(['good battery']).tolist(), zeros]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "pruned")], capture_output=True, text=True, check=True
    )
    logits, there = json.loads(answer.stdout)
    assert torch.allclose(torch.tensor(logits), pruned.logits(["good battery"]), atol=1e-6)
    assert same({name: torch.tensor(gone) for name, gone in there.items()}, zeros(pruned))
    size, dense = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("pruned", "dense"))
    assert size == dense  # zeros in a dense file save nothing


@pytest.mark.slow
def test_a_loaded_model_is_trained_with_its_zeros(tmp_path):
    pruned = prune(tiny.classifier(), 0.9)
    again = load(save(pruned, tmp_path / "pruned"))
    train(again, MaskCallback())
    assert same(zeros(again), zeros(pruned))


def test_after_structured_pruning_a_model_can_be_pruned_and_then_quantized():
    small = prune(prune_structured(tiny.classifier(), layers=2, heads=[4, 2], neurons=[50, 7], first_token=True), 0.6)
    assert abs(compute_sparsity(small.model) - 0.6) < 1e-4
    gone = [w == 0 for w in weights(small).values()]
    integers = quantize(small).model.state_dict()
    assert sum((t == 0).sum().item() for t in integers.values() if t.dtype == torch.int8) >= sum(
        z.sum().item() for z in gone
    )


# bad input

@pytest.mark.parametrize("wrong, what", [
    *[(dict(sparsity=s), f"sparsity is {s!r}") for s in (1, 1.0, 1.5, -0.1, float("nan"), "0.5", None, True)],
    (dict(sparsity=0.5, scope="layer"), "scope 'layer'"), (dict(sparsity=0.5, importance="l2"), "importance 'l2'")])
def test_bad_input_is_refused_before_anything_is_copied(monkeypatch, wrong, what):
    original = tiny.classifier()
    monkeypatch.setattr(copy, "deepcopy", lambda model: pytest.fail("work was begun"))
    with pytest.raises(EcomoptError, match=what): prune(original, **wrong)
    with pytest.raises(EcomoptError, match=what): PruneCallback(**wrong)
    with pytest.raises(EcomoptError, match=what): pruning_masks(prunable_layers(original.model), **wrong)


@pytest.mark.slow
@pytest.mark.parametrize("scope, where", [("global", "the layers"), ("local", "attention.self.query")])
def test_zeros_are_not_brought_back(scope, where):
    pruned = prune(tiny.classifier(), 0.8, scope)
    with pytest.raises(EcomoptError, match="zero already") as caught: prune(pruned, 0.5, scope)
    assert where in caught.value.where
    with pytest.raises(EcomoptError, match="zero already"): train(pruned, PruneCallback(0.5, scope=scope))


@pytest.mark.parametrize(
    "wrong, what",
    [
        (dict(begin=0.5, end=0.4), "begins at 0.5 and ends at 0.4"),
        (dict(begin=0.5, end=0.5), "ends at 0.5"),
        (dict(begin=-0.1), "begins at -0.1"),
        (dict(end=1.1), "ends at 1.1"),
        (dict(end="late"), "'late'"),
        (dict(begin=float("nan")), "nan"),
        (dict(initial_sparsity=0.9), "falls, from 0.9"),
        (dict(initial_sparsity=1.0), "initial_sparsity is 1.0"),
        (dict(frequency=0), "every 0"),
        (dict(frequency=2.5), "every 2.5"),
    ],
)
def test_bad_schedules_are_refused(wrong, what):
    with pytest.raises(EcomoptError, match=what): PruneCallback(0.8, **wrong)


@pytest.mark.slow
def test_the_best_model_may_not_be_the_pruned_one(tmp_path):
    with pytest.raises(EcomoptError, match="not be pruned yet"):
        train(
            tiny.classifier(),
            PruneCallback(0.8),
            output_dir=str(tmp_path),
            load_best_model_at_end=True,
            eval_strategy="no",
            save_strategy="no",
        )


def test_the_best_epoch_may_not_be_the_pruned_one(tmp_path):
    path = tiny.written(tiny.classifier(), tmp_path / "model")
    options = dict(epochs=1, select_best=True, callbacks=[PruneCallback(0.8)], cache=False)
    with pytest.raises(EcomoptError, match="select_best"): finetune(path, tiny.task(), **options)


@pytest.mark.parametrize("refuse", [lambda c: prune(c, 0.5), lambda c: compute_sparsity(c.model)])
def test_unsupported_models_are_refused(refuse):
    words = tiny.tokenizer()
    gpt2 = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, vocab_size=len(words), pad_token_id=0)
    )
    for model in (quantize(tiny.classifier()), Classifier(gpt2, words)):  # GPT-2's maps are convolutions
        with pytest.raises(EcomoptError, match="nothing to prune"): refuse(model)
    albert = AutoConfig.for_model(
        "albert",
        vocab_size=len(words),
        embedding_size=8,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=1,
        intermediate_size=8,
    )
    with pytest.raises(EcomoptError, match="no list of 3 layers"):
        refuse(Classifier(AutoModelForSequenceClassification.from_config(albert), words))


def test_the_spec_is_plain_data():
    callback = PruneCallback(np.float32(0.5), end=np.float64(0.5), frequency=np.int64(3), seed=np.int32(1))
    assert (
        json.loads(json.dumps(callback.spec())) == callback.spec()
        and PruneCallback(**callback.spec()).spec() == callback.spec()
    )
