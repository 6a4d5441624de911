"""Models shared by several processes: same outputs, gradients and weights; bytes as predicted; bad input."""
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parameters_to_vector
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ecomopt import EcomoptError
from ecomopt.accelerate.data_parallel import launch
from ecomopt.accelerate.model_parallel import _check_split, allocated_bytes, predict_bytes, shard, tensor_parallel

SIZES = {
    "bert": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96),
    "distilbert": dict(dim=64, n_layers=2, n_heads=4, hidden_dim=96),
    "llama": dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96
    ),
}
IDS = torch.arange(1, 13).reshape(2, 6)
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])


def model(kind, auto=AutoModelForSequenceClassification, **others):
    torch.manual_seed(0)
    return auto.from_config(
        AutoConfig.for_model(kind, vocab_size=50, pad_token_id=0, **{**SIZES[kind], **others})
    ).eval()


def run(rank, original, prepare, *args):
    """Two steps of Adam on a prepared model: outputs, all weights afterwards, the bytes that are held."""
    one = prepare(original, *args)
    optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        logits = one(input_ids=IDS, attention_mask=MASK).logits
        logits.float().square().mean().backward()
        optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in one.parameters()]
    return logits.detach(), parameters_to_vector(whole).detach(), allocated_bytes(one, optimizer)


def same(original): return original


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("parts", [["heads", "neurons"], ["neurons"]])
def test_split_into_heads_and_neurons_it_is_the_same_model(kind, parts):
    original = model(kind)
    (logits, weights, _), = launch(run, 1, original, same)
    for split_logits, split_weights, held in launch(run, 2, original, tensor_parallel, parts):
        assert torch.allclose(split_logits, logits, atol=1e-5) and torch.allclose(split_weights, weights, atol=1e-5)
        assert held == predict_bytes(original, 2, parts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIZES)
def test_sharded_it_is_the_same_model(kind):
    original = model(kind)
    (logits, weights, held), = launch(run, 1, original, same)
    assert held == predict_bytes(original, 1)
    results = launch(run, 2, original, shard)
    for sharded_logits, sharded_weights, _ in results:
        assert torch.allclose(sharded_logits, logits, atol=1e-5) and torch.allclose(sharded_weights, weights, atol=1e-5)
    assert results[0][2] == predict_bytes(original, 2)


@pytest.mark.slow
def test_a_language_model_of_tied_weights():
    original = model("llama", AutoModelForCausalLM, tie_word_embeddings=True)
    (logits, weights, _), = launch(run, 1, original, same)
    for prepare in (shard, tensor_parallel):
        for other_logits, other_weights, held in launch(run, 2, original, prepare):
            assert torch.allclose(other_logits, logits, atol=1e-5) and torch.allclose(other_weights, weights, atol=1e-5)


@settings(max_examples=30)
@given(rows=st.integers(1, 20), columns=st.integers(1, 5), processes=st.integers(1, 8))
def test_the_first_process_holds_its_rows_four_times(rows, columns, processes):
    one = nn.Linear(columns, rows, bias=False)
    share = len(one.weight.chunk(processes)[0]) * columns * 4
    assert predict_bytes(one, processes) == {"weights": share, "gradients": share, "optimizer": 2 * share}


@pytest.mark.slow
def test_frozen_weights_have_neither_gradient_nor_optimizer():
    original = model("bert")
    everything = predict_bytes(original, 2)
    original.get_input_embeddings().requires_grad_(False)
    frozen = predict_bytes(original, 2)
    assert (
        frozen["weights"] == everything["weights"] and everything["gradients"] - frozen["gradients"] == 50 * 64 * 4 / 2
    )
    assert launch(run, 2, original, shard)[0][2] == frozen


@pytest.mark.parametrize(
    "kind, processes, parts, message",
    [
        ("bert", 3, ["heads"], "3 processes cannot share 4 heads"),
        ("bert", 5, ["neurons"], "5 processes cannot share 96 neurons"),
        ("llama", 4, ["heads"], "4 processes cannot share 2 key heads"),
        ("bert", 2, ["layers"], "nothing to split in"),
        ("bert", 2, [], "nothing to split in"),
    ],
)
def test_what_cannot_be_shared_is_said_before_anything_starts(kind, processes, parts, message):
    with pytest.raises(EcomoptError, match=message): _check_split(model(kind), processes, parts)


@pytest.mark.slow
def test_the_way_out_is_named_and_is_one():
    original = model("bert", num_attention_heads=1)
    with pytest.raises(EcomoptError, match=r"or parts=\['neurons'\]"): _check_split(original, 2)
    _check_split(original, 2, ["neurons"])
    with pytest.raises(EcomoptError, match="Process . of 2 failed: EcomoptError: 2 processes cannot share 1 heads"):
        launch(run, 2, original, tensor_parallel)


def test_other_models_are_refused():
    other = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=2, vocab_size=9)
    )
    with pytest.raises(EcomoptError, match="GPT2.* cannot be split"): _check_split(other, 2)


def test_a_classifier_of_the_library_is_split_too():
    original = tiny.classifier().model
    _check_split(original, 4)
    assert predict_bytes(original, 2, ["neurons"])["weights"] < predict_bytes(original, 1)["weights"]
