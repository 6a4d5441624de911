"""What each step does with each architecture, tried on tiny random models: the table of the site.

    python -m tools.architectures      writes nbs/architectures.json
"""
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

import ecomopt
from ecomopt import Classifier, EcomoptError
from tools.run import NBS, ROOT

sys.path.insert(0, str(ROOT / "tests"))
import tiny  # noqa: E402

TABLE = NBS / "architectures.json"
LABELS = "negative", "positive"
LAYERS, WIDTH, HEADS, POSITIONS = 4, 32, 4, 80
TOKENS = dict(pad_token_id=0, cls_token_id=2, bos_token_id=2, sep_token_id=3, eos_token_id=3)
SIZES = dict(
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=2 * WIDTH,
    max_position_embeddings=POSITIONS,
)
LLAMA = dict(SIZES, num_key_value_heads=2, head_dim=WIDTH // HEADS)
DEBERTA = dict(SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"], pooler_hidden_size=WIDTH)

# name on the page: (model_type of transformers, its sizes)
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "BERT": ("bert", SIZES),
    "DistilBERT": ("distilbert", dict(dim=WIDTH, hidden_dim=2 * WIDTH, n_layers=LAYERS, n_heads=HEADS,
                                      max_position_embeddings=POSITIONS)),
    "RoBERTa": ("roberta", SIZES),
    "XLM-R": ("xlm-roberta", SIZES),
    "CamemBERT": ("camembert", SIZES),
    "MPNet": ("mpnet", SIZES),
    "ELECTRA": ("electra", dict(SIZES, embedding_size=16)),
    "ALBERT": ("albert", dict(SIZES, embedding_size=16)),
    "DeBERTa": ("deberta", DEBERTA),
    "DeBERTa-v2": ("deberta-v2", DEBERTA),
    "DeBERTa-v3": ("deberta-v2", dict(DEBERTA, position_buckets=16, share_att_key=True, norm_rel_ebd="layer_norm",
                                      position_biased_input=False)),
    "ModernBERT": ("modernbert", dict(SIZES, local_attention=16, global_attn_every_n_layers=2)),
    "Longformer": ("longformer", dict(SIZES, attention_window=8)),
    "Funnel": ("funnel", dict(vocab_size=0, d_model=WIDTH, n_head=HEADS, d_head=8, d_inner=2 * WIDTH,
                              block_sizes=[2, 2])),
    "RoFormer": ("roformer", dict(SIZES, embedding_size=WIDTH)),
    "GPT-2": ("gpt2", dict(n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS)),
    "LLaMA": ("llama", LLAMA),
    "Qwen2": ("qwen2", LLAMA),
    "Qwen3": ("qwen3", LLAMA),
    "Gemma 2": ("gemma2", dict(LLAMA, sliding_window=16)),
    "Gemma 3": ("gemma3_text", dict(LLAMA, sliding_window=16)),
    "OPT": ("opt", dict(SIZES, ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH)),
    "BART": ("bart", dict(d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
                          decoder_attention_heads=HEADS, encoder_ffn_dim=2 * WIDTH, decoder_ffn_dim=2 * WIDTH,
                          max_position_embeddings=POSITIONS)),
    "T5": ("t5", dict(d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=LAYERS, num_heads=HEADS,
                      decoder_start_token_id=0)),
}


def checkpoint(name: str, folder: Path, seed: int = 0) -> Path:
    "A random checkpoint of an architecture and a tokenizer of a few words, as `save_pretrained` writes them."
    model_type, sizes = ARCHITECTURES[name]
    words = tiny.tokenizer()
    names = dict(id2label=dict(enumerate(LABELS)), label2id={label: i for i, label in enumerate(LABELS)})
    config = AutoConfig.for_model(model_type, **sizes | TOKENS | names | dict(vocab_size=len(words) + 8))
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    for weight in model.parameters():  # as drawn, all texts would get nearly the same logits
        if weight.dim() == 2: weight.data = torch.randn_like(weight) * 0.7 * weight.shape[1] ** -0.5
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def texts() -> list[str]:
    "Texts of many lengths."
    return tiny.task().train["text"][:20] + ["good", "bad battery " * 15]


# ---------------------------------------------------------------- steps

def same_after_reload(made: Classifier) -> None:
    "Raise unless a model, saved and loaded, answers as before."
    expected = made.logits(texts())
    with tempfile.TemporaryDirectory() as folder:
        found = ecomopt.load(ecomopt.save(made, Path(folder) / "model")).logits(texts())
    assert torch.allclose(found, expected, atol=1e-4), "the loaded model answers otherwise"


def close(made: Classifier, model: Classifier, tolerance: float) -> None:
    "Raise unless the logits are those of the float model, within a fraction of their spread."
    for batch_size in (1, 2, 3, 5, 32):
        expected, found = (one.logits(texts(), batch_size) for one in (model, made))
        error = ((found - expected).norm() / (expected - expected.mean(0)).norm()).item()
        assert error < tolerance, f"the logits are {error:.0%} of their spread from the float model's"


def kept(step: Callable, tolerance: float, model: Classifier, folder: Path) -> None:
    "A step that changes logits little."
    made = step(model)
    close(made, model, tolerance)
    same_after_reload(made)


def changed(step: Callable, model: Classifier, folder: Path) -> None:
    "A step after which a model is trained again."
    before = model.logits(texts())
    same_after_reload(step(model))
    assert torch.equal(model.logits(texts()), before), "the step changed the model it was given"


def trained(model: Classifier, folder: Path) -> None:
    "Fine-tune the checkpoint."
    made = ecomopt.finetune(folder, tiny.task(16), epochs=1, batch_size=8, max_length=64, cache=False, bf16=False)
    same_after_reload(made)


def distilled(model: Classifier, folder: Path) -> None:
    "Keep two layers and learn from the model."
    with patch.dict(os.environ, ECOMOPT_CACHE=str(folder / "cache")):
        made = ecomopt.distill(model, tiny.task(16), 2, epochs=1, batch_size=8, bf16=False)
    same_after_reload(made)


def converted(runtime: str, model: Classifier) -> Classifier:
    "The model in a runtime, in float32."
    return ecomopt.convert(model, runtime, "float32")


def calibrated(model: Classifier) -> Classifier:
    "In int8 with static ranges."
    return ecomopt.calibrate(ecomopt.quantize(model), texts())


INT8 = 0.3  # a random model has no margins: rounding its inputs to 8 bits moved the logits of the worst one by 16 %
STEPS: dict[str, Callable[[Classifier, Path], None]] = {
    "finetune": trained,
    "distill": distilled,
    "prune": partial(changed, lambda model: ecomopt.prune(model, 0.5)),
    "prune_structured": partial(changed, lambda model: ecomopt.prune_structured(model, layers=2, neurons=32, heads=2)),
    "quantize": partial(kept, lambda model: ecomopt.quantize(model), INT8),
    "share_weights": partial(kept, lambda model: ecomopt.share_weights(model, 8, 8), 0.15),
    "calibrate": partial(kept, calibrated, INT8),
    "prepare_qat": partial(kept, lambda model: ecomopt.prepare_qat(model, 8), 0.15),
    "OpenVINO": partial(kept, partial(converted, "openvino"), 1e-3),
    "ONNX Runtime": partial(kept, partial(converted, "onnxruntime"), 1e-3),
}


def outcome(step: str, model: Classifier, folder: Path) -> str:
    "What happens: works, refused and why, or wrong."
    try: STEPS[step](model, folder)
    except EcomoptError as error: return f"refused: {error.what}"
    except Exception as error: return f"wrong: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return "works"


def row(name: str, steps: list[str] | None = None) -> dict[str, str]:
    "What each step does with an architecture."
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = checkpoint(name, Path(directory, "model"))
        try: model = ecomopt.load_model(folder, LABELS, max_length=64)
        except EcomoptError as error: return {"load_model": f"refused: {error.what}"}
        found = {step: outcome(step, model, folder) for step in steps or STEPS}
    return {"load_model": "works", **found}


def main() -> None:
    "Write the table."
    logging.disable(logging.WARNING)
    table = {}
    for name in ARCHITECTURES:
        with contextlib.redirect_stderr(io.StringIO()): table[name] = row(name)
        print(name, json.dumps(table[name], indent=1), flush=True)
    TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", "utf8")


if __name__ == "__main__":
    main()
