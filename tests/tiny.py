"""Small random models, so that tests take milliseconds."""
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ecomopt.core.data import Task
from ecomopt.core.generate import LanguageModel
from ecomopt.core.train import Classifier

WORDS = "the a is was it battery screen phone works broke great awful good bad very not love hate fast slow".split()


def tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of a few words and all letters."""
    letters = [chr(c) for c in range(97, 123)]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *letters, *(f"##{c}" for c in letters)]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def classifier(
    seed: int = 0, layers: int = 3, hidden: int = 64, labels: tuple[str, ...] = ("negative", "positive")
) -> Classifier:
    """A random BERT with a tokenizer."""
    torch.manual_seed(seed)
    words = tokenizer()
    ids = dict(enumerate(labels))
    config = BertConfig(vocab_size=len(words), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * hidden, id2label=ids, label2id={v: k for k, v in ids.items()})
    return Classifier(BertForSequenceClassification(config).eval(), words)


def distilbert(seed: int = 0) -> Classifier:
    """A random DistilBERT with the same tokenizer."""
    torch.manual_seed(seed)
    words = tokenizer()
    ids = {0: "negative", 1: "positive"}
    config = DistilBertConfig(
        vocab_size=len(words),
        dim=64,
        n_layers=2,
        n_heads=4,
        hidden_dim=96,
        id2label=ids,
        label2id={v: k for k, v in ids.items()},
    )
    return Classifier(DistilBertForSequenceClassification(config).eval(), words)


def language_model(seed: int = 0, tied: bool = True, **others) -> LanguageModel:
    """A random LLaMA with the same words, and no marks around a text."""
    torch.manual_seed(seed)
    words = tokenizer()
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    sizes = dict(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96
    )
    config = LlamaConfig(
        vocab_size=len(words),
        tie_word_embeddings=tied,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
        **sizes | others,
    )
    return LanguageModel(LlamaForCausalLM(config).eval(), words)


def task(rows: int = 60, seed: int = 0) -> Task:
    """Synthetic sentences whose label is decided by one word."""
    generator = torch.Generator().manual_seed(seed)
    def sentence(i: int) -> dict:
        body = [WORDS[j] for j in torch.randint(8, (5,), generator=generator).tolist()]
        return {"text": " ".join([*body, ("bad", "good")[i % 2]]), "label": i % 2, "group": str(i)}
    splits = [Dataset.from_list([sentence(i) for i in range(n)]) for n in (rows, 20, 20)]
    transfer = Dataset.from_list([{"text": sentence(i)["text"], "domain": "synthetic"} for i in range(rows)])
    return Task("tiny", ("negative", "positive"), *splits, transfer)


def written(model: Classifier | LanguageModel, folder: Path) -> Path:
    """A Hugging Face directory of a model and its tokenizer."""
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def edit_weights(folder: Path, change: Callable[[dict], dict]) -> None:
    """Change the tensors of such a directory."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


def interrupted_once(function: Callable) -> tuple[Callable, list]:
    """The function, interrupted when it is called first; and its calls."""
    calls = []
    def wrapper(*arguments):
        calls.append(arguments)
        if len(calls) == 1: raise KeyboardInterrupt
        return function(*arguments)
    return wrapper, calls
