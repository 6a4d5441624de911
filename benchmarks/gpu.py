"""Mixed precision and runtimes on an accelerator; where there is none it says so and writes nothing."""
import sys
from time import perf_counter

import numpy as np
import pandas as pd
import torch

from ecomopt import Classifier, EcomoptError, convert, describe_hardware, load_model, load_task
from ecomopt.accelerate.precision import check_precision, fit
from ecomopt.core.measure import take_turns
from tools.bench import report

SEEDS, EPOCHS, ROUNDS = [0, 1, 2], 2, 7
TRAINING = {"float32": {}, "bfloat16": {}, "float16": {"scaled": True}, "float16, no scale": {"scaled": False}}

if not torch.cuda.is_available():
    print("gpu: not measured, torch sees no CUDA device here")
    sys.exit()

hardware = describe_hardware(device="cuda", n=8192)
NOTES = (f"Device: {hardware.gpu}, torch {torch.__version__}, CUDA {torch.version.cuda}. Read from its memory: {hardware.bytes_per_s / 1e9:.0f} GB/s; products of 8192 × 8192: "
         + ", ".join(f"{precision} {rate / 1e12:.1f} · 10¹² MACs/s" for precision, rate in hardware.macs_per_s.items())
         + f". Training: MiniLM on reviews, {EPOCHS} epochs, batches of 32, the loss as in a batch of 2²⁰ tokens; accuracy on the test split, mean and range of the seeds; "
         "steps a second and peak memory of the device: median of the seeds. Inference: sentences a second, test split, batches of 128, "
         f"{ROUNDS} rounds in turns, median of the ratios to float32 eager; labels equal to it.")
task = load_task("reviews")
texts, actual = task.test["text"][:], np.array(task.test["label"])
start = load_model("minilm", task.labels)
start.model.cuda()


def training(name: str, seed: int) -> tuple[dict, Classifier]:
    """One training: accuracy, speed, peak memory."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    began = perf_counter()
    model, steps = fit(start, task, name.partition(",")[0], EPOCHS, factor=2.0**-20, seed=seed, **TRAINING[name])
    torch.cuda.synchronize()
    seconds = perf_counter() - began
    return {"what": f"train, {name}", "accuracy": np.mean(model.logits(texts).argmax(1).numpy() == actual), "steps/s": len(steps) / seconds,
            "peak MB": torch.cuda.max_memory_allocated() / 1e6, "skipped": int(steps["skipped"].sum())}, model


def inference(classifier: Classifier) -> list[dict]:
    """All variants of a trained classifier that torch has, in turns."""
    made = {}
    for runtime in ("eager", "sdpa", "compile"):
        for precision in ("fp32", "bf16"):
            try: made[f"{runtime} {precision}"] = convert(classifier, runtime, precision)
            except EcomoptError as error: print(error)
    said = {name: c.logits(texts).argmax(1) for name, c in made.items()}
    rates = take_turns(made, texts, ROUNDS, 40, 128, 0)[0]["sentences/s"]
    return [{"what": f"infer, {name}", "sentences/s": rates[name].median(), "× eager fp32": (rates[name] / rates["eager fp32"]).median(),
             "labels equal": (said[name] == said["eager fp32"]).float().mean().item()} for name in made]


for precision in ("bfloat16", "float16"): check_precision(precision, "cuda")
training("float32", 0)  # warms up
runs = {(name, seed): training(name, seed) for seed in SEEDS for name in TRAINING}
groups = pd.DataFrame([row for row, _ in runs.values()]).groupby("what", sort=False)
span = groups["accuracy"].agg(lambda x: f"{x.min():.3f} to {x.max():.3f}")
table = groups.median().assign(**{"accuracy": groups["accuracy"].mean(), "accuracy, range": span}).reset_index()
table = pd.concat([table, pd.DataFrame(inference(runs["float32", 0][1]))], ignore_index=True)
report("gpu", table.round(4), SEEDS, NOTES)
