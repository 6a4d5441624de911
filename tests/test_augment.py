"""Text for the teacher to answer: replaced words, several teachers, and what is refused."""
import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecomopt import EcomoptError, distill
from ecomopt.compress.augment import (
    Ensemble,
    _sampled,
    generate_augment,
    mask_augment,
    masked_language_model,
    without_near_copies,
)
from ecomopt.core.train import fingerprint

TEXTS = tiny.task(60).train["text"][:]


def with_mask():
    """The tokenizer of the tests, with a token for masked words."""
    words = tiny.tokenizer()
    words.add_special_tokens({"mask_token": "[MASK]"})
    return words


@pytest.fixture(scope="module")
def masked(): return masked_language_model(TEXTS, with_mask(), width=32, layers=1, epochs=2)


def test_the_mean_of_logits_and_a_teacher_like_any_other():
    members = [tiny.classifier(seed) for seed in range(3)]
    mean = Ensemble(members)
    expected = sum(one.logits(TEXTS[:5]) for one in members) / 3
    assert torch.allclose(mean.logits(TEXTS[:5]), expected, atol=1e-6)
    assert mean.labels == members[0].labels and mean.predict(TEXTS[:5])
    student = distill(mean, tiny.task(16), members[0], epochs=1, batch_size=8, bf16=False)
    assert student.labels == mean.labels


def test_an_ensemble_of_one_is_that_one():
    one = tiny.classifier()
    assert torch.equal(Ensemble([one]).logits(TEXTS[:5]), one.logits(TEXTS[:5]))


def test_wrong_members_are_refused():
    with pytest.raises(EcomoptError, match="0 members"): Ensemble([])
    with pytest.raises(EcomoptError, match="labels"): Ensemble([tiny.classifier(), tiny.classifier(labels=("a", "b"))])
    with pytest.raises(EcomoptError): Ensemble(["minilm"])


def test_replaced_tokens_are_words_and_the_rest_stays(masked):
    words = with_mask()
    same = mask_augment(TEXTS, 20, masked, words, p=0.0)
    assert set(same) <= {words.decode(words(text)["input_ids"], skip_special_tokens=True) for text in TEXTS}
    other = mask_augment(TEXTS, 20, masked, words, p=0.5)
    assert len(other) == 20 and other != same and other == mask_augment(TEXTS, 20, masked, words, p=0.5)
    assert other != mask_augment(TEXTS, 20, masked, words, p=0.5, seed=1)
    before, after = (sum(len(text.split()) for text in texts) for texts in (same, other))
    assert before == after, "a token takes the place of a token"
    assert not any(token in text for text in other for token in words.all_special_tokens)


def test_a_masked_language_model_is_trained_once(masked, monkeypatch):
    monkeypatch.setattr("ecomopt.compress.augment.Trainer", None)
    again = masked_language_model(TEXTS, with_mask(), width=32, layers=1, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(masked.parameters(), again.parameters()))


@pytest.mark.parametrize("change", [dict(texts=[]), dict(p=1.5), dict(n=0), dict(k=0), dict(seed=-1)])
def test_bad_input(masked, change):
    given = dict(texts=TEXTS, n=4, model=masked, tokenizer=with_mask()) | change
    with pytest.raises(EcomoptError): mask_augment(**given)


def test_nothing_to_train_on_or_to_mask_with():
    with pytest.raises(EcomoptError, match="no texts"): masked_language_model([], with_mask())
    with pytest.raises(EcomoptError, match="no mask token"): masked_language_model(TEXTS, tiny.tokenizer())


# ---------------------------------------------------------------- near-copies

@pytest.mark.parametrize(("text", "held_out", "is_copy"), [
    ("It broke after two days of use!", "it broke  after TWO days", True),
    ("It broke after two days, and I sent it back to the shop", "it broke after two days", False),
    ("It broke after two days", "It broke after two days, and I sent it back to the shop", True),
    ("Great phone", "great phone.", True),
    ("Great phone", "A great phone", False),
    ("!!!", "???", True),  # no words at all
    ("It was broken when it came", "It broke after two days", False),
])
def test_near_copies(text, held_out, is_copy):
    assert without_near_copies([text], ["something else entirely", held_out]) == [text] * (not is_copy)


WORDY = st.lists(st.lists(st.sampled_from("abcd"), max_size=6).map(" ".join), max_size=6)


@given(WORDY, WORDY)
def test_what_is_kept_is_in_order_once_and_no_copy(texts, held_out):
    kept = without_near_copies(texts, held_out)
    assert kept == [text for text in dict.fromkeys(texts) if text in kept]
    assert not set(kept) & set(held_out)
    assert without_near_copies(kept, held_out) == kept
    assert without_near_copies(texts, []) == list(dict.fromkeys(texts))


# ---------------------------------------------------------------- a language model

def writer():
    """A random language model whose texts end."""
    lm = tiny.language_model()
    lm.model.config.eos_token_id = lm.model.generation_config.eos_token_id = lm.tokenizer.pad_token_id
    return lm


def test_it_writes_sentences_of_the_shop_and_remembers_them(monkeypatch):
    lm = writer()
    before = copy.deepcopy(lm.model.state_dict())
    options = dict(n=70, lm=lm, epochs=2, learning_rate=1e-2)
    found = generate_augment(TEXTS * 20, **options)
    assert found and len(found) <= 70 and len(set(found)) == len(found)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), lm.model.state_dict().values()))
    assert not set(found) & set(TEXTS), "copies of the shop's own text teach nothing"
    assert generate_augment(TEXTS * 20, **options, seed=1) != found
    fewer = generate_augment(TEXTS * 20, **options, held_out=found[:1])
    assert found[0] not in fewer and set(fewer) < set(found)
    monkeypatch.setattr("ecomopt.compress.augment._generate", None)
    assert generate_augment(TEXTS * 20, **options) == found


def test_a_writer_that_repeats_is_refused_and_nothing_is_kept(monkeypatch):
    monkeypatch.setattr("ecomopt.compress.augment._sampled", lambda lm, n, *others: n * ["it was great"])
    for _ in range(2):
        with pytest.raises(EcomoptError, match="Of 30 texts only 1 "): generate_augment(TEXTS, 30, writer())


def test_texts_without_an_end_are_left_out():
    lm = writer()
    def generate(start, **others): return torch.tensor([[0, 5, 6, 0], [0, 5, 6, 7], [0, 0, 0, 0]])
    lm.model = SimpleNamespace(device="cpu", generate=generate)
    assert _sampled(lm, 3, 0, 1.0) == [lm.tokenizer.decode([5, 6])]


@pytest.mark.parametrize("change", [dict(texts=[]), dict(texts="one"), dict(n=0), dict(lm=tiny.language_model())])
def test_what_it_cannot_write(change):
    given = dict(texts=TEXTS, n=4, lm=writer()) | change
    with pytest.raises(EcomoptError): generate_augment(**given)


def test_near_copies_are_found_in_chinese():
    copy, other = "这个手机真好用，物流也快", "屏幕坏了，客服不理人"
    assert without_near_copies([copy, other], ["这个手机很好用，物流也快"]) == [other]


@pytest.mark.parametrize("make, words", [
    (lambda: generate_augment(TEXTS, 2, tiny.language_model(), temperature=0), "temperature"),
    (lambda: masked_language_model(TEXTS, with_mask(), width=100), "width"),
])
def test_wrong_numbers_are_refused_before_training(make, words):
    with pytest.raises(EcomoptError, match=words): make()


def test_an_ensemble_with_another_member_is_another_teacher():
    one, two = tiny.classifier(), tiny.classifier(seed=1)
    first, second = (Ensemble([one, replace(two, max_length=n)]) for n in (64, 16))
    assert fingerprint(first) != fingerprint(second)
