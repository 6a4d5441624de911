"""A GGUF file holds the model; in llama.cpp, where it is installed, it writes the same text."""
import errno
from importlib.util import find_spec

import numpy as np
import pytest
import tiny
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ecomopt import EcomoptError, load, save
from ecomopt.accelerate import llama_cpp as module
from ecomopt.accelerate.llama_cpp import best_language_runtime, write_gguf
from ecomopt.accelerate.runtime_llm import convert_language_model
from ecomopt.compress.quantize_llm import quantize_language_model
from ecomopt.core.generate import greedy_decoding, losses

TEXTS = ["the battery is great", "bad phone works very good not bad not bad not", "good"]


@pytest.fixture(scope="module")
def lm(): return tiny.language_model(head_dim=16)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_the_file_as_the_same_model(tied, tmp_path):
    model = tiny.language_model(tied=tied, head_dim=16).model
    write_gguf(model, tmp_path / "model.gguf", 32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    ids = torch.randint(4, 20, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(): assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-4)


@pytest.mark.parametrize("bits, tolerance", [(32, 0), (8, 0.005), (4, 0.05)])
def test_bits_are_those_of_the_layers_and_embeddings_keep_eight(lm, bits, tolerance, tmp_path):
    write_gguf(lm.model, tmp_path / "model.gguf", bits)
    tensors = {t.name: t for t in GGUFReader(tmp_path / "model.gguf").tensors}
    found = dequantize(tensors["blk.1.ffn_up.weight"].data, tensors["blk.1.ffn_up.weight"].tensor_type)
    wanted = lm.model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max() * 2
    assert tensors["blk.1.ffn_up.weight"].tensor_type.name == {32: "F32", 8: "Q8_0", 4: "Q4_1"}[bits]
    assert tensors["token_embd.weight"].tensor_type.name == {32: "F32", 8: "Q8_0", 4: "Q8_0"}[bits]
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize("changed, words", [
    ({"attention_bias": True}, "biases"), ({"mlp_bias": True}, "biases"), ({"hidden_act": "gelu"}, "gelu"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "scaled"),
])
def test_what_the_file_cannot_say_is_refused(changed, words, tmp_path):
    config = LlamaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
                         intermediate_size=96, **changed)
    with pytest.raises(EcomoptError, match=words): write_gguf(LlamaForCausalLM(config), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_other_bits_are_refused(lm, tmp_path):
    with pytest.raises(EcomoptError, match="3 bits"): write_gguf(lm.model, tmp_path / "model.gguf", 3)
    assert not list(tmp_path.iterdir())


def test_a_runtime_that_is_not_there_is_said(lm, monkeypatch):
    with pytest.raises(EcomoptError, match="llama.cpp"): convert_language_model(lm, 8, runtime="lama.cpp")
    if find_spec("llama_cpp") is None:
        with pytest.raises(EcomoptError, match="llamacpp"): convert_language_model(lm, 8, runtime="llama.cpp")


@pytest.mark.slow
def test_the_choice_is_the_fastest_within_the_limit_and_says_what_is_missing(lm):
    choice = best_language_runtime(lm, TEXTS[0], TEXTS, 0.02, ("openvino", "llama.cpp"), (8,), 4, 1)
    within = choice.table[choice.table["perplexity change"] <= 0.02]
    assert choice.name == within["× tokens/s"].astype(float).idxmax()
    assert choice.table["note"]["PyTorch"] == "" and list(choice.table.index)[0] == "PyTorch"
    missing = choice.table[choice.table["× tokens/s"].isna()]
    assert all(missing["note"]) and len(choice.table) == 3


# ---------------------------------------------------------------- where llama-cpp-python is installed

@pytest.fixture(scope="module")
def converted(lm):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra that is built from source")
    return {bits: convert_language_model(lm, bits, runtime="llama.cpp") for bits in (32, 8, 4)}


def test_the_same_tokens_alone_in_batches_and_after_loading(lm, converted, tmp_path):
    ids = lm.encode(TEXTS)
    wanted = greedy_decoding(lm.model, ids, 12)
    again = load(save(converted[32], tmp_path / "model"))
    for one in (converted[32], again):
        assert greedy_decoding(one.model, ids, 12) == wanted
        assert [greedy_decoding(one.model, [row], 12)[0] for row in ids] == wanted
    assert np.allclose(losses(converted[32], TEXTS), losses(lm, TEXTS), rtol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_give_the_logits_of_the_same_bits_in_pytorch(lm, converted, bits):
    ids = torch.tensor(lm.encode(TEXTS[1:2]))
    with torch.inference_mode():
        wanted, logits = quantize_language_model(lm, bits).model(ids).logits, converted[bits].model(ids).logits
    assert (logits - wanted).norm() < 0.1 * wanted.norm()  # llama.cpp rounds the inputs of products, too


def test_a_cache_that_is_full_moves_into_a_larger_one(lm, converted):
    ids = torch.randint(4, 60, (2, 700), generator=torch.Generator().manual_seed(0))
    past, parts = None, []
    with torch.inference_mode():
        wanted = lm.model(ids).logits
        for part in ids.split([5, 1, 194, 40, 290, 170], 1):
            out = converted[32].model(part, past_key_values=past)
            past, parts = out.past_key_values, [*parts, out.logits]
    assert past.cache.capacity > 700 and (torch.cat(parts, 1) - wanted).norm() < 0.005 * wanted.norm()


def test_two_texts_at_a_time_and_a_text_that_went_on(lm, converted):
    first, second = (torch.tensor([row]) for row in lm.encode(TEXTS[:2]))
    with torch.inference_mode():
        a, b = converted[32].model(first), converted[32].model(second)
        again = converted[32].model(second)
    assert torch.equal(b.logits, again.logits)
    converted[32].model(first[:, :1], past_key_values=a.past_key_values)
    with pytest.raises(EcomoptError, match="forgotten"): converted[32].model(first, past_key_values=a.past_key_values)


def test_a_file_that_is_none_is_refused(converted, monkeypatch):
    broken = converted[8].model
    monkeypatch.setattr(type(broken), "files", lambda self: {"gguf": np.zeros(64, np.uint8)})
    with pytest.raises(EcomoptError, match="does not read"): broken.create_session()


def test_a_file_of_another_vocabulary_is_refused(converted, monkeypatch):
    lying = converted[8].model
    monkeypatch.setattr(lying.config, "vocab_size", 2**20)
    with pytest.raises(EcomoptError, match="tokens"): lying.create_session()


def test_a_full_disk_leaves_the_file_that_was_there(lm, tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"before")
    def full(*arguments): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(module, "_write_all", full)
    with pytest.raises(EcomoptError, match="space"): write_gguf(lm.model, file)
    assert file.read_bytes() == b"before" and list(tmp_path.iterdir()) == [file]
