"""The encoder in every runtime and precision; the language model beside openvino-genai and llama.cpp."""
import atexit
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import openvino_genai
import pandas as pd
import torch

from ecomopt import best_runtime, convert, finetune, load_language_model, load_task, quantize_language_model
from ecomopt.accelerate.runtime_llm import convert_language_model
from ecomopt.core.assets import fetch
from ecomopt.core.generate import greedy_decoding, losses, paired_perplexity
from ecomopt.core.hardware import describe_hardware
from ecomopt.core.measure import interleave, time_interleaved
from tools.bench import report

SEEDS, THREADS, ROUNDS, TOKENS, REVIEWS = [0, 1, 2], 2, 7, 64, 25
PROMPT = "Write a short product description for a stainless steel water bottle that keeps drinks cold for 24 hours."
NOTES = (
    f"{THREADS} threads; ratios to PyTorch in float32 (eager, SDPA attention), interleaved in one process, median and "
    f"IQR of {ROUNDS} rounds, of an encoder with each seed. "
    "Encoder: MiniLM, four epochs on reviews; sentences a second of the test split in batches of 32, tokenization "
    "included; the variant was chosen on the validation split of seed 0; same labels as in float32: test split, "
    f"mean of the seeds. Language model: SmolLM2-135M, tokens a second of {TOKENS} greedy tokens after a prompt; "
    f"perplexity on {REVIEWS} whole reviews of the test split against float32. "
    "openvino-genai and llama.cpp read the GGUF file (Q4_1) themselves, and generate with their own loops; our "
    "llama.cpp is `convert_language_model(runtime=\"llama.cpp\")`."
)


def encoder() -> list[dict]:
    """The chosen variant for each seed; all variants for the first."""
    task = load_task("reviews")
    teachers = {seed: finetune("minilm", task, epochs=4, seed=seed) for seed in SEEDS}
    texts, choice = task.test["text"][:], best_runtime(teachers[0], task, rounds=ROUNDS)
    print(choice.why, choice.table.to_string(), sep="\n")
    rows, ratios = [], {}
    for seed, teacher in teachers.items():
        converted = convert(teacher, choice.runtime, choice.precision, task)
        models = {"torch float32": teacher, f"{choice.runtime} {choice.precision}": converted}
        labels = {name: c.logits(texts).argmax(1) for name, c in models.items()}
        rates = time_interleaved(models, texts, ROUNDS, 40, 32, seed)[0]["sentences/s"]
        for name in models:
            ratios.setdefault(f"encoder, {name}", []).extend(rates[name] / rates["torch float32"])
            rows.append({
                "what": f"encoder, {name}",
                "a second": rates[name].median(),
                "same labels": (labels[name] == labels["torch float32"]).float().mean().item(),
            })
    means = pd.DataFrame(rows).groupby("what", sort=False).mean().reset_index().to_dict("records")
    return [row | spread(ratios[row["what"]]) for row in means]


def spread(ratios: list[float] | np.ndarray) -> dict:
    """The median of ratios and their interquartile range."""
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return {"×": middle, "IQR": f"{low:.2f} to {high:.2f}"}


def genai(path: str) -> Callable:
    """openvino-genai reads the GGUF file."""
    backend = dict(ATTENTION_BACKEND="SDPA")  # the default backend caches the prompt of the last round
    pipe = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=THREADS, **backend)
    config = openvino_genai.GenerationConfig(max_new_tokens=TOKENS, ignore_eos=True, do_sample=False)
    return lambda _: pipe.generate(PROMPT, config)


def llama(path: str, ids: list[int]) -> Callable:
    """llama.cpp reads the GGUF file."""
    model = import_module("llama_cpp").Llama(path, n_threads=THREADS, n_threads_batch=THREADS, n_ctx=512, verbose=False)
    atexit.register(model.close)

    def generate(_):
        model.reset()  # clears the cached prompt of the last round
        for n, _ in enumerate(model.generate(ids, temp=0.0), 1):
            if n == TOKENS: return

    return generate


def language_model() -> list[dict]:
    """All runtimes generate the same number of tokens, interleaved."""
    lm = load_language_model("smollm2")
    path = str(next(fetch("smollm2").glob("*.gguf")))
    models = {"torch float32": lm}
    models |= {f"torch int{bits}": quantize_language_model(lm, bits) for bits in (8, 4)}
    for runtime in ("openvino", *["llama.cpp"] * has_llama):
        for bits in (8, 4): models[f"ours, {runtime}, {bits} bits"] = convert_language_model(lm, bits, runtime=runtime)
    ids = lm.encode([PROMPT], chat=True)
    calls = {name: lambda _, m=m: greedy_decoding(m.model, ids, TOKENS) for name, m in models.items()}
    calls["openvino-genai, Q4_1"] = genai(path)
    if has_llama: calls["llama.cpp, Q4_1"] = llama(path, ids[0])
    else: print("llama.cpp: not measured, llama-cpp-python is not installed")
    seconds = {name: s[:, 0] for name, s in interleave(calls, [[None]] * ROUNDS).items()}
    table = pd.DataFrame(load_task("reviews").test[:])
    reviews = table.groupby("group", sort=False).text.agg(" ".join).tolist()[:REVIEWS]
    loss = {name: losses(m, reviews) for name, m in models.items()}

    def row(name):
        ratio = seconds["torch float32"] / seconds[name]
        change, peer = None, None
        if name in loss: change = paired_perplexity(loss["torch float32"], loss[name])["perplexity_change"]
        if "llama.cpp, Q4_1" in seconds: peer = np.median(seconds["llama.cpp, Q4_1"] / seconds[name])
        return {
            "what": f"language model, {name}",
            "a second": TOKENS / np.median(seconds[name]),
            **spread(ratio),
            "perplexity": change,
            "× llama.cpp": peer,
        }

    return [row(name) for name in calls]


sys.path.append(".peers")
torch.set_num_threads(THREADS)
has_llama = find_spec("llama_cpp") is not None
hardware = describe_hardware()
rates = ", ".join(f"{precision} {rate / 1e9:.1f}" for precision, rate in hardware.macs_per_s.items())
bandwidth = f"{hardware.bytes_per_s / 1e9:.0f} GB/s"
found = f" CPU: {', '.join(hardware.instructions)}; reads {bandwidth}; 10⁹ MACs/s: {rates}."
report("runtime", pd.DataFrame(encoder() + language_model()).round(4), SEEDS, NOTES + found)
