"""Quantized language models: the same function up to rounding, for any shape; saved and loaded; and bad input."""
import copy
import json
import subprocess
import sys

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from ecomopt import EcomoptError, LanguageModel, load, quantize_language_model, save
from ecomopt.compress.quantize_llm import (
    WeightOnlyLayer,
    WeightOnlyLinear,
    quantize_per_group_asymmetric,
    weight_only_linear,
)
from ecomopt.compress.structured import prune_structured
from ecomopt.core.train import fingerprint

TEXTS = ["the battery is very good", "not bad", "a phone a phone works and the screen was awful", "great"]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 0.01) -> bool:
    return ((a - b).norm() < tolerance * b.norm()).item()


def as_good_as_bfloat16(small: LanguageModel, lm: LanguageModel) -> bool:
    """Is the rounded model no further from the float one with the same weights than this in bfloat16 is?"""
    half = LanguageModel(copy.deepcopy(lm.model).bfloat16(), lm.tokenizer)
    off = [[(logits(model, text) - logits(lm, text)).norm() for text in TEXTS] for model in (small, half)]
    return (sum(off[0]) < 1.5 * sum(off[1])).item()


def rounded(linear: nn.Linear | nn.Embedding, bits: int) -> torch.Tensor:
    """The weights that come back, in float64."""
    W = linear.weight.detach().double()
    if bits == 8:
        s = W.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        return torch.round(W / s) * s
    low, high = W.unflatten(1, (-1, 32)).aminmax(dim=-1, keepdim=True)
    s = (high - low) / 15
    return (torch.round((W.unflatten(1, (-1, 32)) - low) / s) * s + low).flatten(1)


def with_rounded_weights(lm: LanguageModel, bits: int) -> LanguageModel:
    """The float model whose weights are those that come back."""
    model = copy.deepcopy(lm.model).requires_grad_(False)
    for name, module in model.named_modules():
        table = isinstance(module, nn.Embedding) or name == "lm_head"
        if table or isinstance(module, nn.Linear): module.weight.copy_(rounded(module, 8 if table else bits))
    return LanguageModel(model, lm.tokenizer)


@torch.inference_mode()
def logits(lm: LanguageModel, text: str) -> torch.Tensor:
    return lm.model(torch.tensor(lm.encode([text]))).logits


@given(
    rows=st.integers(1, 6), groups=st.integers(1, 4), bits=st.integers(2, 8),
    scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_the_error_of_a_group_is_half_a_scale_at_most(rows, groups, bits, scale, seed):
    W = torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(seed)) * scale
    integers, step, low = quantize_per_group_asymmetric(W, 32, bits)
    back = integers.unflatten(1, (-1, 32)) * step[..., None] + low[..., None]
    assert int(integers.max()) < 2**bits and ((back - W.unflatten(1, (-1, 32))).abs() <= step[..., None] * 0.501).all()
    again = quantize_per_group_asymmetric(back.flatten(1), 32, bits)
    assert torch.equal(again[0], integers)  # quantizing twice changes nothing


def test_a_constant_group():
    integers, step, low = quantize_per_group_asymmetric(torch.full((1, 32), 0.3))
    assert not integers.any() and torch.allclose(low, torch.tensor(0.3))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("count", [1, 17, 129])
def test_a_product(bits, count):
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48), torch.randn(2, count, 64)
    y = x @ rounded(linear, bits).float().T + linear.bias.detach()
    assert close(weight_only_linear(linear, bits=bits)(x), y, 0.01)


def test_what_does_not_fit_four_bits_gets_eight():
    assert [weight_only_linear(nn.Linear(*shape), bits=4).bits for shape in ((64, 32), (48, 32), (64, 30))] == [4, 8, 8]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_is_the_one_with_rounded_weights(bits, tied):
    lm = tiny.language_model(tied=tied)
    small, float_ = quantize_language_model(lm, bits), with_rounded_weights(lm, bits)
    assert all(isinstance(layer, WeightOnlyLayer) for layer in small.model.model.layers)
    assert not any(isinstance(m, nn.Linear) for m in small.model.modules())
    assert as_good_as_bfloat16(small, float_)


def test_padding_and_cache_change_nothing():
    small = quantize_language_model(tiny.language_model(), 4)
    assert small.generate(TEXTS, 8) == [small.generate([text], 8)[0] for text in TEXTS]
    ids = torch.tensor(small.encode(TEXTS[:1]))
    with torch.inference_mode():
        first = small.model(ids[:, :-2], use_cache=True)
        then = small.model(ids[:, -2:], past_key_values=first.past_key_values).logits[:, -1]
    assert close(then, logits(small, TEXTS[0])[:, -1], 0.02)


def test_transformers_generates_with_it():
    small = quantize_language_model(tiny.language_model(), 8)
    ids = torch.tensor(small.encode(TEXTS[:1]))
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    out = small.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert small.tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True) == small.generate(TEXTS[:1], 5)[0]


def test_layers_of_another_kind_are_quantized_one_linear_layer_at_a_time():
    words = tiny.language_model().tokenizer
    config = Qwen2Config(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96,
    )
    lm = LanguageModel(Qwen2ForCausalLM(config).eval(), words)
    for layer in lm.model.model.layers: nn.init.normal_(layer.self_attn.q_proj.bias)
    small = quantize_language_model(lm, 4)
    assert sum(isinstance(m, WeightOnlyLinear) for m in small.model.modules()) == 15
    assert as_good_as_bfloat16(small, with_rounded_weights(lm, 4))


def test_a_pruned_llama():
    lm = tiny.language_model(num_hidden_layers=2)
    pruned = LanguageModel(prune_structured(lm, heads=2, importance="magnitude").model, lm.tokenizer)
    small = quantize_language_model(pruned, 8)
    assert small.model.model.layers[0].heads == 2
    assert as_good_as_bfloat16(small, with_rounded_weights(pruned, 8))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_loaded(tmp_path, bits, tied):
    small = quantize_language_model(tiny.language_model(tied=tied), bits)
    again = load(save(small, tmp_path / "small"))
    assert fingerprint(again) == fingerprint(small) and torch.equal(logits(again, TEXTS[0]), logits(small, TEXTS[0]))
    assert (again.model.lm_head.weight is again.model.model.embed_tokens.weight) == tied


@pytest.mark.slow
def test_a_fresh_process_writes_the_same(tmp_path):
    small = quantize_language_model(tiny.language_model(), 4)
    path = save(small, tmp_path / "small")
    code = "import json, sys, ecomopt; print(json.dumps(ecomopt.load(sys.argv[1]).generate(sys.argv[2:], 6)))"
    done = subprocess.run([sys.executable, "-c", code, str(path), *TEXTS], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == small.generate(TEXTS, 6)


def test_bytes_on_disk(tmp_path):
    lm = tiny.language_model(num_hidden_layers=6, hidden_size=128, intermediate_size=256)
    tables = 128 * lm.model.config.vocab_size
    layers = sum(m.weight.numel() for m in lm.model.model.layers.modules() if isinstance(m, nn.Linear))
    for bits, each in ((8, 8), (4, 5)):
        size = (save(quantize_language_model(lm, bits), tmp_path / str(bits)) / "model.safetensors").stat().st_size
        assert tables + layers * each / 8 < size < (tables + layers * each / 8) * 1.03 + 20_000


def test_the_float_model_is_left_as_it_is():
    lm = tiny.language_model()
    before = fingerprint(lm)
    quantize_language_model(lm, 4)
    assert fingerprint(lm) == before


@pytest.mark.parametrize("options", [dict(bits=3), dict(bits="4"), dict(group=20), dict(group=0)])
def test_bad_arguments(options):
    with pytest.raises(EcomoptError): quantize_language_model(tiny.language_model(), **options)


def test_what_cannot_be_quantized():
    lm = tiny.language_model()
    with pytest.raises(EcomoptError, match="no language model"): quantize_language_model(tiny.classifier())
    with pytest.raises(EcomoptError, match="already"): quantize_language_model(quantize_language_model(lm))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(lm.tokenizer), n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(EcomoptError, match="unsupported architecture GPT2LMHeadModel"):
        quantize_language_model(LanguageModel(gpt2, lm.tokenizer))
