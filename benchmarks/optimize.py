"""One call beside fixed recipes and other tools: reviews, five teachers, time-interleaved in one process.

    python -m benchmarks.optimize 0 1    these seeds; without any, all that were not measured yet

A seed takes about 50 minutes; what a search found is kept in .cache.
"""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ecomopt import Classifier, Goal, Recipe, Task, finetune, load, load_task, optimize, save
from ecomopt.accelerate.runtime import convert
from ecomopt.core.artifact import disk_bytes
from ecomopt.core.measure import _predict, time_interleaved
from ecomopt.core.verdict import noninferiority_test
from ecomopt.optimize.optimize import _tfidf
from tools.bench import report
from tools.lessons import food_sentences
from tools.peers import Model2Vec
from tools.seeds import digits, each_once, over_seeds

SEEDS, THREADS, ROUNDS, CALLS, BUDGET = [0, 1, 2, 3, 4], 2, 7, 40, "20min"
FOUND = Path(__file__).parents[1] / ".cache" / "benchmark_optimize"
FIXED = Recipe([  # the best hand-written recipe of this repository
    {"prune_structured": {"layers": 4, "neurons": 256, "heads": 4, "vocabulary": True, "min_count": 2,
                          "first_token": True, "importance": "taylor"}},
    {"quantize_embeddings": {"bits": 4}},
    {"distill": {"augment": 60_000, "learning_rate": 1e-4}},
    {"convert": {"runtime": "openvino", "precision": "int8"}},
])
GOALS = {"latency": Goal(max_drop=0.01, minimize="latency"), "bytes": Goal(max_drop=0.02, minimize="bytes")}
NOTES = (
    f"Reviews, test split, {THREADS} threads, tokenization included. One teacher for each seed (MiniLM, four epochs). "
    "Its task has unlabelled sentences of food reviews as transfer text, beside its own. "
    f"ours: `optimize`, budget {BUDGET}, by latency with at most one point of drop, and by bytes with at most two; "
    "trained, chosen on the validation split, tested here. Accuracy: mean of the seeds, with an interval that counts "
    "seeds and sentences; retained: of the same seed's teacher, mean. × throughput, × p50: of the float32 teacher in "
    "the same rounds, median of the seeds. "
    "met: seeds of which the non-inferiority test at one point says met, not met, not resolvable."
)


def searched(name: str, goal: Goal, task: Task, teacher: Classifier, seed: int) -> Classifier:
    """What `optimize` finds; searched once."""
    path = FOUND / f"{name}-{seed}"
    if not path.exists():
        result = optimize(task, teacher, goal, BUDGET, seed, THREADS)
        FOUND.mkdir(parents=True, exist_ok=True)
        (FOUND / f"{name}-{seed}.json").write_text(json.dumps(result.data))
        result.save(path)
    return load(path)


def models_of(seed: int) -> dict[str, Classifier | Model2Vec]:
    """The teacher of a seed and all that is made of it."""
    teacher = finetune("minilm", task, epochs=4, seed=seed)
    made = {"float32 eager (teacher)": teacher}
    for runtime in ("onnxruntime", "openvino"):
        made[f"{runtime} int8"] = convert(teacher, runtime, "int8", task)
    made["model2vec"] = Model2Vec(teacher, task, seed)
    made["fixed recipe"] = dataclasses.replace(FIXED, seed=seed).run(task, teacher, measure=False).model
    for name, goal in GOALS.items(): made[f"ours, by {name}"] = searched(name, goal, task, teacher, seed)
    return made


def bytes_of(model: Classifier | Model2Vec, name: str) -> int:
    """Of the artifact."""
    path = FOUND / "measured" / name.replace(" ", "_")
    if isinstance(model, Model2Vec): return model.bytes(path)
    return disk_bytes(save(model, path))


def measured(seed: int) -> list[dict]:
    """One row a model: speed beside the teacher's, bytes, verdict, and which sentences it gets right."""
    models, first = models_of(seed), "float32 eager (teacher)"
    answers = {name: _predict(name, m, texts, task.labels, 32) for name, m in models.items()}
    rounds, _ = time_interleaved(models, texts, ROUNDS, CALLS, 32, seed)
    rates, p50, size = rounds["sentences/s"], rounds["p50 ms"], bytes_of(models[first], first)
    return [{
        "model": name, "× throughput": (rates[name] / rates[first]).median(),
        "× p50": (p50[first] / p50[name]).median(), "p50 ms": p50[name].median(),
        "MB": bytes_of(model, name) / 1e6, "1/× bytes": size / bytes_of(model, name),
        "verdict": noninferiority_test(answers[first], answers[name], actual, 0.01).outcome.split(" with")[0],
        "right": digits(answers[name] == actual),
    } for name, model in models.items()]


torch.set_num_threads(THREADS)
task = load_task("reviews")
task = task.with_transfer(food_sentences(task), "food")
texts, actual = task.test["text"][:], np.array(task.test["label"])
seeds, rows, measured_in = each_once("optimize", measured, SEEDS)
table = over_seeds(rows, "× throughput", "1/× bytes")
verdicts = pd.crosstab(*(pd.DataFrame(rows)[column] for column in ("model", "verdict")))
table = table.join(verdicts.reindex(columns=["met", "not met", "not resolvable"], fill_value=0))
baseline = _tfidf(task, texts, actual)
table.loc[baseline["name"], ["accuracy", "MB"]] = baseline["accuracy"], baseline["disk_bytes"] / 1e6
report("optimize", table.round(4).reset_index(names="model"), seeds, NOTES, measured_in)
