"""Language models: writing and judging equal transformers' own, batch or not; artifacts keep them; and bad input."""
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from ecomopt import EcomoptError, LanguageModel, fetch, load, load_language_model, save
from ecomopt.core.generate import _rates, generation_speed, greedy_decoding, losses, paired_perplexity, perplexity
from ecomopt.core.train import fingerprint

TEXTS = ["the battery is very good", "not bad", "a phone a phone works and the screen was awful", "great"]


@pytest.fixture(scope="module")
def lm(): return tiny.language_model()


def reference(lm, ids: list[int], n: int) -> list[int]:
    """What transformers writes."""
    start = torch.tensor([ids])
    out = lm.model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=n, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    return out[0, len(ids):].tolist()


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_is_what_transformers_writes(tied):
    lm = tiny.language_model(tied=tied)
    ids = lm.encode(TEXTS)
    expected = [reference(lm, row, 9) for row in ids]
    assert greedy_decoding(lm.model, ids, 9) == expected == [greedy_decoding(lm.model, [row], 9)[0] for row in ids]


def test_another_architecture():
    """Positions of padded prompts are right also where they are learned."""
    torch.manual_seed(0)
    words = tiny.tokenizer()
    lm = LanguageModel(
        GPT2LMHeadModel(
            GPT2Config(vocab_size=len(words), n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
        ).eval(),
        words,
    )
    ids = lm.encode(TEXTS)
    assert greedy_decoding(lm.model, ids, 6) == [reference(lm, row, 6) for row in ids]


def test_writing_ends_at_a_stop_token(lm):
    ids = lm.encode(TEXTS)
    written = greedy_decoding(lm.model, ids, 12)
    stop = written[0][4]
    assert greedy_decoding(lm.model, ids, 12, {stop}) == [
        row[: row.index(stop)] if stop in row else row for row in written
    ]


@pytest.mark.parametrize("ends, expected", [(5, {3, 5}), ([5, 7], {3, 5, 7}), (None, {3})])
def test_stop_tokens(ends, expected):
    lm = tiny.language_model()
    lm.model.config.eos_token_id, lm.tokenizer.eos_token = ends, "[SEP]"
    assert lm.stop == expected


def test_the_end_of_a_turn_ends_a_text(tmp_path):
    lm = tiny.language_model()
    lm.model.config.eos_token_id = 3
    lm.model.generation_config.eos_token_id = [3, 7]
    lm.model.save_pretrained(tmp_path / "chat")
    lm.tokenizer.save_pretrained(tmp_path / "chat")
    found = load_language_model(tmp_path / "chat")
    assert {3, 7} <= found.stop
    assert load(save(found, tmp_path / "artifact")).stop == found.stop


def test_the_order_of_answers_is_that_of_the_prompts(lm):
    assert lm.generate(TEXTS, 5, batch_size=2) == [lm.generate([text], 5)[0] for text in TEXTS]


def test_chat_template(lm):
    lm = LanguageModel(lm.model, tiny.tokenizer(), max_length=12)
    plain = lm.encode(["good"])
    assert lm.encode(["good"], chat=True) == plain
    lm.tokenizer.chat_template = (
        "{% for m in messages %}very {{ m.content }} {% endfor %}{% if add_generation_prompt %}was{% endif %}"
    )
    assert lm.tokenizer.decode(lm.encode(["good"], chat=True)[0]) == "very good was" and lm.encode(["good"]) == plain
    with pytest.raises(EcomoptError, match="has 14 tokens"): lm.generate(["good " * 12])


def test_no_texts(lm):
    assert lm.encode([]) == [] and lm.generate([]) == []


@given(
    st.lists(st.lists(st.sampled_from(tiny.WORDS), max_size=12).map(" ".join), min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(1, 4),
)
@settings(max_examples=15)
def test_losses_are_the_models_own(texts, window, batch_size):
    """With any window and batch each token but the first is predicted once, by those before it in its window."""
    lm = tiny.language_model()
    expected = np.zeros((len(texts), 2))
    for row, ids in zip(expected, lm.encode(texts)):
        for start in range(0, len(ids) - 1, window):
            piece = torch.tensor([ids[start:start + window + 1]])
            with torch.inference_mode(): nats = lm.model(piece, labels=piece).loss.item()
            row += nats * (piece.shape[1] - 1), piece.shape[1] - 1
    if expected.any(): assert np.allclose(losses(lm, texts, window, batch_size), expected, atol=1e-3)
    else:
        with pytest.raises(EcomoptError, match="nothing to predict"): losses(lm, texts, window, batch_size)


def test_perplexity_weighs_tokens():
    rows = np.array([[2 * math.log(2), 2], [6 * math.log(8), 6]])
    result = perplexity(rows)
    assert math.isclose(result["perplexity"], 2 ** ((2 + 18) / 8)) and result["tokens"] == 8
    low, high = result["perplexity_interval"]
    assert 2 <= low <= result["perplexity"] <= high <= 8.0001


def test_paired_perplexity_is_finer_than_two_intervals():
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 50, 40)
    first = np.column_stack([tokens * generator.uniform(2, 6, 40), tokens])
    second = first + np.column_stack([tokens * math.log(1.03), 0 * tokens])
    result = paired_perplexity(first, second)
    assert math.isclose(result["perplexity_change"], 0.03, rel_tol=1e-9)
    assert np.allclose(result["perplexity_change_interval"], 0.03)


def test_only_the_same_tokens_are_compared():
    with pytest.raises(EcomoptError, match="same tokens"): paired_perplexity(np.array([[1.0, 2]]), np.array([[1.0, 3]]))


def test_generation_speed(lm):
    table = generation_speed({"one": lm, "other": lm}, "the battery", max_new_tokens=3, rounds=2)
    assert list(table.index) == ["one", "other"] and table.loc["one", "× tokens/s"] == 1


def test_the_rates_are_those_of_the_seconds():
    """Ten tokens after a prompt of six: 1 s for the first, 4 s for all; the baseline takes twice as long."""
    seconds = np.array([[1.0, 4.0]] * 3)
    rates = _rates(seconds, 2 * seconds[:, 1], 6, 10)
    assert rates == {"tokens/s": 2.5, "prefill tokens/s": 6.0, "decode tokens/s": 3.0, "× tokens/s": 2.0,
                     "IQR": "2.00 to 2.00", "rounds": 3}


@pytest.mark.slow
def test_a_fresh_process_writes_the_same(lm, tmp_path):
    path = save(lm, tmp_path / "writer")
    code = "import json, sys, ecomopt; print(json.dumps(ecomopt.load(sys.argv[1]).generate(sys.argv[2:], 6)))"
    done = subprocess.run([sys.executable, "-c", code, str(path), *TEXTS], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == lm.generate(TEXTS, 6)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_loaded(tmp_path, tied):
    lm = tiny.language_model(tied=tied)
    path = save(lm, tmp_path / "writer")
    again = load(path)
    assert fingerprint(again) == fingerprint(lm) and again.max_length == lm.max_length
    assert (again.model.lm_head.weight is again.model.get_input_embeddings().weight) == tied
    weights = sum(p.numel() for p in lm.model.parameters())
    assert 4 * weights < (path / "model.safetensors").stat().st_size < 4 * weights + 5000


def test_an_artifact_of_an_unknown_kind(tmp_path):
    path = save(tiny.language_model(), tmp_path / "writer")
    about = json.loads((path / "artifact.json").read_text())
    (path / "artifact.json").write_text(json.dumps(about | {"kind": "Oracle"}))
    with pytest.raises(EcomoptError, match="does not fit together"): load(path)


def test_a_local_directory(tmp_path):
    lm = tiny.language_model()
    tiny.written(lm, tmp_path)
    assert load_language_model(tmp_path).generate(TEXTS, 4) == lm.generate(TEXTS, 4)


@pytest.mark.parametrize("name", ["no-such-model", "missing.gguf"])
def test_a_model_that_is_not_there(name, tmp_path):
    with pytest.raises(EcomoptError, match="cannot be loaded"): load_language_model(tmp_path / name)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda lm: lm.encode("one text"),
        lambda lm: lm.generate(["good"], 0),
        lambda lm: lm.generate(["good"], batch_size=0),
        lambda lm: lm.generate([""]),
        lambda lm: losses(lm, ["good"], window=0),
        lambda lm: losses(lm, []),
        lambda lm: losses(lm, ["good"]),
        lambda lm: generation_speed({"one": lm}, "good", max_new_tokens=1),
    ],
)
def test_bad_input(lm, wrong):
    with pytest.raises(EcomoptError): wrong(lm)


@pytest.mark.slow
def test_a_gguf_file_is_read_once_wherever_it_lies(monkeypatch, tmp_path):
    """What was read is found by the content of the file; another content is read anew."""
    lm = load_language_model("smollm2")
    copied = tmp_path / "copied.gguf"
    shutil.copy(next(fetch("smollm2").glob("*.gguf")), copied)

    def read(file, into): raise OSError("read again")
    monkeypatch.setattr("ecomopt.core.generate._read_gguf", read)
    again, ids = load_language_model(copied), torch.tensor([[1, 20, 300]])
    assert torch.equal(again.model(ids).logits, lm.model(ids).logits)
    assert again.encode(["Hello, 12.50!"], chat=True) == lm.encode(["Hello, 12.50!"], chat=True)
    with copied.open("ab") as file: file.write(b"x")
    with pytest.raises(EcomoptError, match="read again"): load_language_model(copied)


def test_weights_in_safetensors_come_before_gguf(tmp_path):
    folder = tiny.written(tiny.language_model(), tmp_path / "model")
    (folder / "other-Q4.gguf").write_bytes(b"not read")
    assert len(load_language_model(folder).generate(["good"], 3)) == 1
    lonely = tmp_path / "two"
    lonely.mkdir()
    for name in ("a.gguf", "b.gguf"): (lonely / name).write_bytes(b"")
    with pytest.raises(EcomoptError, match=r"several models: a.gguf, b.gguf"): load_language_model(lonely)
