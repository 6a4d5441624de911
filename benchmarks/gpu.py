"""Mixed precision and runtimes on an accelerator; where there is none it says so and writes nothing."""
import contextlib
import sys
from time import perf_counter

import numpy as np
import pandas as pd
import torch
from transformers import set_seed

from ecomopt import Classifier, EcomoptError, convert, describe_hardware, load_model, load_task
from ecomopt.accelerate.precision import PRECISIONS, fit, supports_precision
from ecomopt.core.measure import interleave, time_interleaved
from tools.bench import report

SEEDS, EPOCHS, ROUNDS = [0, 1, 2], 2, 7
SENTENCES, TOKENS, STEPS = 256, 128, 10  # of the step that is timed; steps a round

if not torch.cuda.is_available():
    print("gpu: not measured, torch sees no CUDA device here")
    sys.exit()

hardware = describe_hardware(device="cuda", n=8192)
PEAKS = [f"{precision} {rate / 1e12:.1f} · 10¹² MACs/s" for precision, rate in hardware.macs_per_s.items()]
NOTES = (
    f"Device: {hardware.gpu}, torch {torch.__version__}, CUDA {torch.version.cuda}; float32 without TF32. "
    f"Memory bandwidth {hardware.bytes_per_s / 1e9:.0f} GB/s; products of 8192 × 8192: {', '.join(PEAKS)}. "
    f"Step: forward and backward of MiniLM, {SENTENCES} sentences of {TOKENS} tokens, {ROUNDS} interleaved rounds of "
    f"{STEPS}, median of the rounds and of the ratios; peak memory above what was there before. "
    f"Training: MiniLM on reviews, {EPOCHS} epochs in batches of 32, the loss times 2⁻²⁰; accuracy on the test split, "
    "mean and range of the seeds; steps a second from text to trained model. "
    "Inference: sentences a second, test split, batches of 128, interleaved, median of the ratios to float32 eager; "
    "same labels as it."
)
AVAILABLE = [precision for precision in PRECISIONS if supports_precision(precision, "cuda")]
TRAINING = {precision: {"precision": precision} for precision in AVAILABLE} | {
    "float16, no scale": {"precision": "float16", "loss_scaling": False}
}
task = load_task("reviews")
texts, actual = task.test["text"][:], np.array(task.test["label"])
set_seed(0)  # the weights of the head are drawn
start = load_model("minilm", task.labels)
start.model.cuda()


def step(precision: str) -> None:
    """Forward and backward of one large batch."""
    with contextlib.nullcontext() if precision == "float32" else torch.autocast("cuda", getattr(torch, precision)):
        loss = start.model(torch.full((SENTENCES, TOKENS), 1000, device="cuda")).logits.float().square().mean()
    loss.backward()
    start.model.zero_grad()


def steps(precision: str) -> None:
    """Some, until the device is done."""
    for _ in range(STEPS): step(precision)
    torch.cuda.synchronize()


def peak_memory(precision: str) -> int:
    """Bytes that one step needs above those that are there before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(precision)
    return torch.cuda.max_memory_allocated() - before


def stepping() -> list[dict]:
    """Speed and memory of a step in each precision."""
    seconds = interleave({name: lambda _, name=name: steps(name) for name in AVAILABLE}, [[None]] * ROUNDS)
    return [
        {
            "what": f"step, {name}",
            "ms": 1000 * np.median(seconds[name]) / STEPS,
            "× float32": np.median(seconds["float32"] / seconds[name]),
            "peak MB": peak_memory(name) / 1e6,
        }
        for name in AVAILABLE
    ]


def training(name: str, seed: int) -> tuple[dict, Classifier]:
    """One training: accuracy, speed, skipped steps."""
    began = perf_counter()
    model, rows = fit(start, task, epochs=EPOCHS, loss_weight=2.0**-20, seed=seed, **TRAINING[name])
    seconds = perf_counter() - began
    return {
        "what": f"train, {name}",
        "accuracy": np.mean(model.logits(texts).argmax(1).numpy() == actual),
        "steps/s": len(rows) / seconds,
        "skipped": int(rows["skipped"].sum()),
    }, model


def inference(classifier: Classifier) -> list[dict]:
    """All variants of a trained classifier that torch has, interleaved."""
    made = {}
    for runtime in ("eager", "sdpa", "compile"):
        for precision in ("float32", "bfloat16"):
            try: made[f"{runtime} {precision}"] = convert(classifier, runtime, precision)
            except EcomoptError as error: print(error)
    said = {name: c.logits(texts).argmax(1) for name, c in made.items()}
    rates = time_interleaved(made, texts, ROUNDS, 40, 128, 0)[0]["sentences/s"]
    return [
        {
            "what": f"infer, {name}",
            "sentences/s": rates[name].median(),
            "× float32": (rates[name] / rates["eager float32"]).median(),
            "same labels": (said[name] == said["eager float32"]).float().mean().item(),
        }
        for name in made
    ]


steps_table = stepping()
_, warm = training("float32", 0)
groups = pd.DataFrame([training(name, seed)[0] for seed in SEEDS for name in TRAINING]).groupby("what", sort=False)
span = groups["accuracy"].agg(lambda x: f"{x.min():.3f} to {x.max():.3f}")
trained = groups.median().assign(**{"accuracy": groups["accuracy"].mean(), "accuracy, range": span}).reset_index()
report(
    "gpu",
    pd.concat([pd.DataFrame(steps_table), trained, pd.DataFrame(inference(warm))], ignore_index=True).round(4),
    SEEDS,
    NOTES,
)
