"""A language model in another runtime: the same text, also after save and load; draft tokens change nothing."""
import time

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

from ecomopt import EcomoptError
from ecomopt.accelerate import runtime_llm
from ecomopt.accelerate.runtime_llm import (
    LANGUAGE_RUNTIMES,
    convert_language_model,
    prompt_lookup,
    prompt_lookup_decoding,
)
from ecomopt.compress.quantize_llm import quantize_language_model
from ecomopt.core.artifact import load, save
from ecomopt.core.generate import greedy_decoding, losses
from ecomopt.core.measure import count_parameters

pytestmark = pytest.mark.xdist_group("runtime_llm")  # its fixtures are costly

TEXTS = ["the battery is great", "bad phone works very good not bad not bad not"]


@pytest.fixture(scope="module")
def lm(): return tiny.language_model()


@pytest.fixture(scope="module")
def converted(lm): return {bits: convert_language_model(lm, bits) for bits in (32, 8, 4)}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 8))
def test_a_draft_is_what_followed_the_last_token(tokens, n, k):
    draft, text = prompt_lookup(tokens, n, k), " ".join(map(str, tokens))
    assert len(draft) <= k and (not draft or " ".join(map(str, [tokens[-1], *draft])) in text)
    assert bool(draft) == (tokens[-1] in tokens[:-1])


@pytest.mark.parametrize("k", [0, 1, 3, 8])
@pytest.mark.parametrize("text", TEXTS)
def test_draft_tokens_change_nothing(lm, text, k):
    ids = lm.encode([text])[0]
    whole = greedy_decoding(lm.model, [ids], 40)[0]
    generated, calls = prompt_lookup_decoding(lm.model, ids, 40, num_draft_tokens=k)
    assert generated == whole and calls <= 40 and (k or calls == 40)
    stop = {whole[12]}
    stopped, _ = prompt_lookup_decoding(lm.model, ids, 40, stop, num_draft_tokens=k)
    assert stopped == greedy_decoding(lm.model, [ids], 40, stop)[0]


@pytest.mark.slow
def test_generated_texts_are_the_same(lm, converted):
    ids = lm.encode(TEXTS)
    assert greedy_decoding(converted[32].model, ids, 12) == greedy_decoding(lm.model, ids, 12)
    assert abs(losses(converted[32], TEXTS) - losses(lm, TEXTS)).max() < 1e-2
    assert count_parameters(converted[4].model) == count_parameters(lm.model)


@pytest.mark.slow
@pytest.mark.parametrize("bits, tolerance", [(8, 0.1), (4, 0.1)])
def test_few_bits_are_those_of_torch(lm, converted, bits, tolerance):
    ids = torch.tensor(lm.encode(TEXTS[:1]))
    with torch.inference_mode():
        wanted = quantize_language_model(lm, bits).model(ids).logits
        logits = converted[bits].model(ids).logits
    assert (logits - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 4])
def test_save_and_load(lm, converted, bits, tmp_path):
    again, ids = load(save(converted[bits], tmp_path / "model")), lm.encode(TEXTS)
    assert greedy_decoding(again.model, ids, 8) == greedy_decoding(converted[bits].model, ids, 8)
    assert again.generate(TEXTS, 4) == converted[bits].generate(TEXTS, 4)


@pytest.mark.slow
def test_one_text_at_a_time(lm, converted):
    ids = torch.tensor(lm.encode(TEXTS[:1]))
    first = converted[32].model(ids)
    second = converted[32].model(ids[:, :1], past_key_values=first.past_key_values)
    assert second.past_key_values.length == ids.shape[1] + 1
    for old in (first.past_key_values,):
        with pytest.raises(EcomoptError, match="forgotten"): converted[32].model(ids, past_key_values=old)


@pytest.fixture(scope="module", params=LANGUAGE_RUNTIMES)
def exact(request, lm):
    """The model in float32 in each runtime."""
    if request.param == "llama.cpp": pytest.importorskip("llama_cpp", reason="llama-cpp-python is built from source")
    return convert_language_model(lm, 32, runtime=request.param)


@pytest.mark.parametrize("k", [0, 3, 8])
def test_drafts_change_nothing_in_a_converted_model(lm, exact, k):
    for row in lm.encode([*TEXTS, "good"]):
        tokens, calls = prompt_lookup_decoding(exact.model, row, 30, num_draft_tokens=k)
        assert tokens == greedy_decoding(lm.model, [row], 30)[0] and (calls == 30 if k == 0 else calls <= 30)


def test_a_batch_goes_on_where_it_was_cropped(lm, converted):
    ids = torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7]])
    more = torch.tensor([[4, 9], [8, 4]])
    with torch.inference_mode():
        out = converted[32].model(ids)
        out.past_key_values.crop(-1)
        found = converted[32].model(more, past_key_values=out.past_key_values).logits
        wanted = lm.model(torch.cat([ids[:, :3], more], 1)).logits[:, 3:]
    assert torch.allclose(found, wanted, atol=1e-4)


def test_bad_input(lm, converted, monkeypatch):
    for wrong in (lm.model, quantize_language_model(lm, 8), converted[32]):
        with pytest.raises(EcomoptError): convert_language_model(wrong)
    with pytest.raises(EcomoptError): convert_language_model(lm, bits=3)
    monkeypatch.setattr(runtime_llm, "_make", lambda *arguments: time.sleep(30))
    with pytest.raises(EcomoptError, match="longer than 0.2 s"): convert_language_model(lm, 32, timeout=0.2)


def test_a_cache_with_a_window_is_not_cut(monkeypatch):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = MistralConfig(vocab_size=12, num_key_value_heads=2, sliding_window=4, pad_token_id=0, **sizes)
    model = MistralForCausalLM(config).eval()
    ids = [1, 2, 3, 1, 2, 3, 1, 2]
    found, _ = prompt_lookup_decoding(model, ids, 12)
    assert found == greedy_decoding(model, [ids], 12)[0]
