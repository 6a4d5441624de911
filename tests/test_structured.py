"""Structured pruning: the pruned model equals the original with the removed units' output weights set to zero,
in every architecture, also after saving; and bad input."""
import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForTokenClassification,
    BertTokenizer,
    PreTrainedTokenizerFast,
)

from ecomopt import EcomoptError
from ecomopt.compress.distill import transformer_layers
from ecomopt.compress.structured import _PARTS, FirstTokenLayer, PrunedLinear, _taylor, _Units, prune_structured
from ecomopt.core.artifact import load, save
from ecomopt.core.data import Task
from ecomopt.core.generate import LanguageModel
from ecomopt.core.measure import count_macs, count_parameters
from ecomopt.core.train import Classifier, fingerprint

WORDS = (
    "the phone case broke after two days and support never replied great value fits well would buy again sound is poor"
).split()
TEXTS = [
    "the phone case broke after two days",
    "great value, fits well!",
    "support never replied",
    "sound is poor and the case broke",
]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!'é好"


def wordpiece() -> BertTokenizer:
    """Letters, words of the shop, and words that it never uses."""
    tokens = [
        "unused",
        "[PAD]",
        *(f"##{c}" for c in LETTERS),
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *LETTERS,
        *WORDS,
        "##s",
        "##ed",
        "house",
    ]
    return BertTokenizer(vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))})


def byte_pairs() -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding, as LLaMA-type models have it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([*TEXTS, "a house with windows and another house", "windows " * 3] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


SIZES = {
    "bert": dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96),
    "distilbert": dict(dim=64, n_layers=3, n_heads=4, hidden_dim=96),
    "llama": dict(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96
    ),
}
HEADS = {"bert": 4, "distilbert": 4, "llama": 2}  # units: query heads with one key head


def tiny(kind: str, auto=AutoModelForSequenceClassification, **others) -> Classifier:
    torch.manual_seed(0)
    tokenizer = byte_pairs() if kind == "llama" else wordpiece()
    labels = dict(id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1})
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
        **SIZES[kind],
        **labels,
        **others,
    )
    return Classifier(auto.from_config(config).eval(), tokenizer)


def task() -> Task:
    rows = Dataset.from_dict({"text": TEXTS * 3, "label": [0, 1, 0, 0] * 3, "group": [str(i) for i in range(12)]})
    return Task("shop", ("negative", "positive"), rows, rows, rows, None)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5)


def zeroed(classifier: Classifier, small: Classifier, units: dict[str, int]) -> Classifier:
    """The original with the columns of every unit that `small` lacks set to zero."""
    original = copy.deepcopy(classifier)
    for old, new in zip(transformer_layers(original.model), transformer_layers(small.model)):
        for kind, total in units.items():
            first, *_, last = _PARTS[classifier.model.config.model_type][kind]
            rows = {tuple(row.tolist()) for row in new.get_submodule(first).weight}
            size = old.get_submodule(first).out_features // total
            gone = [u for u in range(total) if tuple(old.get_submodule(first).weight[u * size].tolist()) not in rows]
            old.get_submodule(last).weight.data.unflatten(1, (total, -1))[:, gone] = 0
    return original


@pytest.fixture(scope="module", params=SIZES)
def original(request):
    return tiny(request.param)


# units

@pytest.mark.parametrize("importance", ["magnitude", "taylor", "random"])
@pytest.mark.parametrize("heads, neurons", [(2, 40), ([4, 2, 2], [96, 1, 50])])
def test_equals_the_original_with_those_units_set_to_zero(original, heads, neurons, importance):
    before = fingerprint(original)
    small = prune_structured(original, heads=heads, neurons=neurons, importance=importance, task=task())
    kind = original.model.config.model_type
    assert close(small.logits(TEXTS), zeroed(original, small, {"heads": HEADS[kind], "neurons": 96}).logits(TEXTS))
    assert not torch.allclose(small.logits(TEXTS), original.logits(TEXTS), atol=1e-3)
    assert fingerprint(original) == before and small.model is not original.model


def test_shapes_are_smaller_and_may_differ(original):
    small = prune_structured(original, heads=[4, 2, 2], neurons=[90, 40, 7])
    parts = _PARTS[original.model.config.model_type]
    shapes = [
        [tuple(layer.get_submodule(parts[kind][i]).weight.shape) for kind in ("heads", "neurons") for i in (0, -1)]
        for layer in transformer_layers(small.model)
    ]
    assert shapes == [[(16 * h, 64), (64, 16 * h), (n, 64), (64, n)] for h, n in ((4, 90), (2, 40), (2, 7))]
    assert count_parameters(small.model) < count_parameters(original.model)


def test_uniform_sizes_are_a_plain_model(original):
    small = prune_structured(original, layers=2, neurons=40)
    plain = type(small.model)(small.model.config).eval()
    plain.load_state_dict(small.model.state_dict())
    assert close(Classifier(plain, small.tokenizer).logits(TEXTS), small.logits(TEXTS))
    assert not any(isinstance(module, PrunedLinear) for module in small.model.modules())


def test_pruning_twice(original):
    twice = prune_structured(
        prune_structured(original, neurons=[96, 50, 30], heads=[4, 2, 2]), layers=[1, 2], neurons=[20, 10]
    )
    assert [
        layer.get_submodule(_PARTS[original.model.config.model_type]["neurons"][0]).out_features
        for layer in transformer_layers(twice.model)
    ] == [20, 10]
    assert close(
        prune_structured(prune_structured(original, neurons=[96, 50, 30]), neurons=30).logits(TEXTS),
        prune_structured(original, neurons=30).logits(TEXTS),
    )


def test_taylor_finds_the_neuron_that_matters():
    """Neurons whose activation is always zero have no importance by gradient; by magnitude they may have."""
    original = tiny("bert")
    dense = original.model.bert.encoder.layer[0].intermediate.dense
    dense.weight.data[:48] *= 3
    dense.bias.data[:48] = -1e4
    small = prune_structured(original, neurons=[48, 96, 96], importance="taylor", task=task())
    assert close(small.logits(TEXTS), original.logits(TEXTS))
    assert not close(prune_structured(original, neurons=[48, 96, 96]).logits(TEXTS), original.logits(TEXTS))


def test_taylor_is_the_mean_absolute_derivative_over_examples():
    """From the output weights of a neuron: the sum of gradient times weight is the derivative by its gate."""
    original, expected = tiny("bert"), torch.zeros(96)
    last = original.model.bert.encoder.layer[1].output.dense
    for text, label in zip(task().train["text"], task().train["label"]):
        original.model.zero_grad()
        original.model(**original.tokenizer(text, return_tensors="pt"), labels=torch.tensor([label])).loss.backward()
        expected += (last.weight * last.weight.grad).sum(0).abs() / 12
    plan = [_Units(1, "neurons", _PARTS["bert"]["neurons"], 96, 10)]
    assert close(_taylor(original, transformer_layers(original.model), plan, task())[0], expected)


def test_magnitude_does_not_depend_on_the_scale():
    """Input weights times ten and output weights divided by ten: the same neurons are kept."""
    original = tiny("bert")
    scaled = copy.deepcopy(original)
    layer = scaled.model.bert.encoder.layer[0]
    layer.intermediate.dense.weight.data[::2] *= 10
    layer.output.dense.weight.data[:, ::2] /= 10
    weights = [
        prune_structured(model, neurons=20).model.bert.encoder.layer[0].intermediate.dense.weight
        for model in (original, scaled)
    ]
    assert close(*(F.normalize(weight) for weight in weights))


def test_random_is_its_seed(original):
    a, b, c = (
        fingerprint(prune_structured(original, neurons=10, importance="random", seed=seed)) for seed in (1, 1, 2)
    )
    assert a == b != c


def test_macs_and_parameters_are_the_predicted_ones():
    heads, neurons, d, L, P = (4, 1, 2), (96, 33, 7), 64, 20, 512
    small = prune_structured(tiny("bert"), heads=heads, neurons=neurons)
    V = small.model.config.vocab_size
    assert (
        count_macs(small.model, L)
        == sum(L * (4 * d * 16 * h + 2 * d * f) + 2 * L**2 * 16 * h for h, f in zip(heads, neurons)) + d**2 + 2 * d
    )
    layers = sum(4 * d * 16 * h + 3 * 16 * h + d + 2 * d * f + f + d + 4 * d for h, f in zip(heads, neurons))
    assert count_parameters(small.model) == (V + P + 2) * d + 2 * d + layers + d**2 + d + 2 * d + 2


# layers

@pytest.mark.parametrize("wanted, kept", [(3, [0, 1, 2]), (2, [0, 2]), (1, [0]), ([1, 2], [1, 2]), ((2,), [2])])
def test_layers_are_the_ones_asked_for(original, wanted, kept):
    small, parts = prune_structured(original, layers=wanted), _PARTS[original.model.config.model_type]
    assert small.model.config.num_hidden_layers == len(kept)
    for layer, i in zip(transformer_layers(small.model), kept, strict=True):
        assert torch.equal(
            layer.get_submodule(parts["neurons"][0]).weight,
            transformer_layers(original.model)[i].get_submodule(parts["neurons"][0]).weight,
        )


def test_a_pruned_language_model_generates_as_without_a_cache():
    random = tiny("llama", AutoModelForCausalLM, tie_word_embeddings=True)
    small = prune_structured(
        LanguageModel(random.model, random.tokenizer), layers=[1, 2], heads=[4, 2], neurons=[50, 20], texts=TEXTS
    )
    inputs = small.tokenizer(TEXTS[:1], return_tensors="pt")
    with torch.inference_mode():
        cached, plain = (
            small.model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=use) for use in (True, False)
        )
    assert (
        type(small) is LanguageModel
        and torch.equal(cached, plain)
        and small.model.lm_head.weight is small.model.model.embed_tokens.weight
    )


# first token

@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_first_token_changes_nothing(kind, attention):
    original = tiny(kind, attn_implementation=attention)
    small = prune_structured(original, first_token=True)
    assert isinstance(transformer_layers(small.model)[-1], FirstTokenLayer)
    for texts in (TEXTS, TEXTS[:1]):
        assert close(small.logits(texts), original.logits(texts))  # with padding, and with no mask
    assert count_macs(small.model) < count_macs(original.model)
    assert prune_structured(small, first_token=True).model.state_dict().keys() == original.model.state_dict().keys()


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_first_token_has_the_same_gradients(kind):
    original = tiny(kind)
    small = prune_structured(original, first_token=True)
    gradients = []
    for classifier in (original, small):
        batch = classifier.tokenizer(TEXTS, padding=True, return_tensors="pt")
        # in float32 the order of the sums matters: 1e-6 of the largest
        classifier.model.double()(**batch, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        gradients.append({name: p.grad for name, p in classifier.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(close(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize(
    "mask", [None, torch.ones(2, 1, 5, 5, dtype=torch.bool).tril(), torch.randn(2, 1, 5, 5), torch.randn(2, 1, 1, 5)]
)
def test_first_token_takes_any_mask(mask):
    layer = tiny("bert").model.bert.encoder.layer[-1]
    hidden = torch.randn(2, 5, 64)
    assert close(FirstTokenLayer(layer)(hidden, mask, None, encoder_attention_mask=None), layer(hidden, mask)[:, :1])


def test_first_token_uses_what_replaces_a_linear_layer():
    """A layer that is replaced in place, as quantization does, is the one that is called."""
    class Doubled(nn.Linear):
        def forward(self, x): return 2 * super().forward(x)

    original = tiny("bert")
    small = prune_structured(original, first_token=True)
    for name, module in list(original.model.bert.encoder.layer[-1].named_modules()):
        if not isinstance(module, nn.Linear): continue
        for classifier in (original, small):
            old = transformer_layers(classifier.model)[-1].get_submodule(name)
            new = Doubled(old.in_features, old.out_features)
            new.load_state_dict(old.state_dict())
            transformer_layers(classifier.model)[-1].set_submodule(name, new)
    assert close(small.logits(TEXTS), original.logits(TEXTS))


def test_first_token_drops_out_in_training_only():
    small = prune_structured(tiny("bert"), first_token=True)
    batch = small.tokenizer(TEXTS, padding=True, return_tensors="pt")
    small.model.train()
    assert not torch.equal(small.model(**batch).logits, small.model(**batch).logits)
    small.model.eval()
    assert torch.equal(small.model(**batch).logits, small.model(**batch).logits)


# saving

@pytest.mark.slow
def test_loads_in_a_fresh_process(tmp_path):
    everything = {
        "bert": prune_structured(
            tiny("bert"), layers=[0, 2], heads=[1, 3], neurons=[96, 5], texts=TEXTS, first_token=True
        ),
        "distilbert": prune_structured(tiny("distilbert"), heads=3, neurons=10, texts=TEXTS, first_token=True),
        "llama": prune_structured(tiny("llama"), layers=2, heads=[2, 4], neurons=[1, 9], texts=TEXTS),
    }
    for kind, small in everything.items(): save(small, tmp_path / kind)
    code = ("import json, sys, ecomopt; texts = json.loads(sys.argv[1]);"
            "print(json.dumps([ecomopt.load(path).logits(texts).tolist() for path in sys.argv[2:]]))")
    paths = [str(tmp_path / kind) for kind in everything]
    answer = subprocess.run(
        [sys.executable, "-c", code, json.dumps(TEXTS), *paths], capture_output=True, text=True, check=True
    )
    for small, there in zip(everything.values(), json.loads(answer.stdout)):
        assert close(torch.tensor(there), small.logits(TEXTS))


def test_a_loaded_artifact_can_be_pruned_again(tmp_path, original):
    small = load(
        save(prune_structured(original, heads=[4, 2, 2], neurons=[90, 40, 7], texts=TEXTS), tmp_path / "small")
    )
    assert prune_structured(small, layers=[1, 2], neurons=[3, 3]).logits(TEXTS).shape == (4, 2)


# vocabulary

def test_trimming_changes_no_answer(original):
    small = prune_structured(original, texts=TEXTS)
    assert close(small.logits(TEXTS), original.logits(TEXTS))
    rows, before = (classifier.model.get_input_embeddings().weight.shape[0] for classifier in (small, original))
    assert rows == small.model.config.vocab_size == len(small.tokenizer) < before
    assert sorted(small.tokenizer.get_vocab().values()) == list(range(rows))


def test_special_tokens_are_found_under_their_new_ids(original):
    small = prune_structured(original, texts=TEXTS)
    for name, token in original.tokenizer.special_tokens_map.items():
        assert small.tokenizer.special_tokens_map[name] == token
    assert (
        small.model.config.pad_token_id
        == small.tokenizer.pad_token_id
        == small.tokenizer.convert_tokens_to_ids(original.tokenizer.pad_token)
    )
    padding = original.model.get_input_embeddings().padding_idx
    assert small.model.get_input_embeddings().padding_idx == (None if padding is None else small.tokenizer.pad_token_id)


KINDS = {kind: (tiny(kind), prune_structured(tiny(kind), texts=TEXTS)) for kind in ("bert", "llama")}
SENTENCES = st.lists(
    st.one_of(st.sampled_from([*WORDS, "house", "houses", "windows"]), st.text(LETTERS, max_size=8)), max_size=6
).map(" ".join)


@settings(max_examples=60)
@given(text=SENTENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_unseen_texts_are_encoded_as_well_as_before(kind, text):
    """Nothing becomes unknown, and what is decoded is the same."""
    before, after = (classifier.tokenizer for classifier in KINDS[kind])
    old, new = before(text)["input_ids"], after(text)["input_ids"]
    assert before.decode(old, skip_special_tokens=True) == after.decode(new, skip_special_tokens=True)
    if before.unk_token: assert (after.unk_token_id in new) == (before.unk_token_id in old)


@settings(max_examples=30)
@given(words=st.lists(st.sampled_from(" ".join(TEXTS).split()), min_size=1))
def test_words_of_the_texts_are_tokenized_as_before(words):
    """In any order: WordPiece looks at one word at a time."""
    before, after = (classifier.tokenizer for classifier in KINDS["bert"])
    assert before.tokenize(" ".join(words)) == after.tokenize(" ".join(words))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trimmed_tokenizer_survives_saving(tmp_path, kind):
    small = KINDS[kind][1]
    texts = [*TEXTS, "unseen houses, 好 naïve!"]
    again = load(save(small, tmp_path / "small"))
    assert small.tokenizer.is_fast and again.tokenizer.is_fast
    assert again.encode(texts) == small.encode(texts) and again.tokenizer.get_vocab() == small.tokenizer.get_vocab()
    assert prune_structured(again, texts=texts[:1]).model.config.vocab_size <= small.model.config.vocab_size


def test_texts_may_be_any_iterable():
    assert fingerprint(prune_structured(tiny("bert"), texts=(text for text in TEXTS))) == fingerprint(KINDS["bert"][1])


# bad input

@pytest.mark.parametrize(
    "wrong, what",
    [
        (dict(layers=0), "0 layers"),
        (dict(layers=4), "4 layers"),
        (dict(layers=0.5), "0.5 layers"),
        (dict(layers=[]), r"layers \[\]"),
        (dict(layers=[0, 3]), "layers"),
        (dict(layers=[2, 0]), "layers"),
        (dict(layers=[1, 1]), "layers"),
        (dict(neurons=0), "0 neurons"),
        (dict(neurons=97), "97 neurons"),
        (dict(neurons=0.5), "0.5 neurons"),
        (dict(neurons=[9, 9]), "2 numbers for 3"),
        (dict(neurons=[9, 9, 0]), "0 neurons"),
        (dict(layers=2, neurons=[9, 9, 9]), "3 numbers for 2"),
        (dict(heads=0), "0 heads"),
        (dict(heads=5), "5 heads"),
        (dict(heads="12"), "2 numbers"),
        (dict(importance="weight"), "'weight'"),
        (dict(importance="taylor"), "no examples"),
        (dict(texts="one text"), "not texts"),
        (dict(texts=[]), "not texts"),
        (dict(texts=[None]), "not texts"),
    ],
)
def test_bad_input_is_refused_before_anything_is_copied(monkeypatch, wrong, what):
    original = tiny("bert")
    monkeypatch.setattr(copy, "deepcopy", lambda model: pytest.fail("work was begun"))
    with pytest.raises(EcomoptError, match=what): prune_structured(original, **wrong)


def test_heads_that_share_a_key_stay_together():
    with pytest.raises(EcomoptError, match="do not divide into groups of 2"): prune_structured(tiny("llama"), heads=3)


def test_unsupported_models_are_refused():
    bert = tiny("bert")
    with pytest.raises(EcomoptError, match="unsupported architecture BertForTokenClassification"):
        prune_structured(replace(bert, model=BertForTokenClassification(bert.model.config)), layers=1)
    with pytest.raises(EcomoptError, match="unsupported architecture GPT2"):
        prune_structured(
            Classifier(
                AutoModelForSequenceClassification.from_config(
                    AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, pad_token_id=1)
                ),
                bert.tokenizer,
            )
        )
    with pytest.raises(EcomoptError, match="unsupported architecture LlamaFor.*last token"):
        prune_structured(tiny("llama"), first_token=True)


def test_quantized_layers_are_refused():
    original = tiny("bert")
    original.model.bert.encoder.layer[1].output.dense = nn.Identity()
    with pytest.raises(EcomoptError, match="another kind"): prune_structured(original, neurons=9)
    original.model.bert.embeddings.word_embeddings = nn.Identity()
    with pytest.raises(EcomoptError, match="another kind"): prune_structured(original, texts=TEXTS)


def test_taylor_wants_the_classifier_s_own_task():
    with pytest.raises(EcomoptError, match="does not predict bad, good"):
        prune_structured(tiny("bert"), neurons=9, importance="taylor", task=replace(task(), labels=("bad", "good")))


def test_other_tokenizers_are_refused():
    backend = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)]))
    with pytest.raises(EcomoptError, match="WordPiece and byte-pair"):
        other = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="b")
        prune_structured(replace(tiny("bert"), tokenizer=other), texts=TEXTS)


def test_a_fingerprint_depends_on_special_modules():
    """The same weights in another structure are another model: caches must not mix them up."""
    model = tiny("bert")
    assert fingerprint(prune_structured(model, first_token=True)) != fingerprint(model)
