"""Static students beside other models without attention, on three tasks, time-interleaved in one process.

    python -m benchmarks.static 0 1    these seeds; without any, all that were not measured yet
"""
import re
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ecomopt import Classifier, Task, finetune, load_task, quantize, save, static_student
from ecomopt.core.artifact import disk_bytes
from ecomopt.core.measure import _predict, time_interleaved
from tools.bench import report
from tools.peers import Model2Vec, TfIdf
from tools.seeds import digits, each_once, over_seeds

SEEDS, THREADS, ROUNDS, CALLS, PER_SOURCE = [0, 1, 2, 3, 4], 2, 7, 40, 1000
FINETUNING = {"reviews": dict(epochs=4), "food": dict(epochs=2, max_length=64), "source": dict(epochs=2)}
DISTILLING = {  # food reviews are long, and all of them have labels
    "reviews": {}, "food": dict(max_length=256, augment=20_000, alpha=0.5), "source": dict(augment=20_000)}
NOTES = (
    f"Test splits, {THREADS} threads, tokenization included. reviews: is a sentence positive; food: has a whole review "
    "five stars or fewer; source: which of five kinds of text a sentence comes from (real texts, the task is ours). "
    f"Teachers: MiniLM, one for each seed. Static students: ten passes, the table in 8 bits. model2vec: distilled from "
    "the same teacher's encoder, fine-tuned on the labelled texts. Accuracy: mean of the seeds, with an interval that "
    "counts seeds and sentences; retained: of the same seed's teacher, mean. × throughput: of the teacher in the same "
    f"{ROUNDS} rounds (batches of 32), median and range of the seeds."
)


def source_task() -> Task:
    """Sentences of five kinds of text; at most one of each food review."""
    reviews = load_task("reviews")
    first = [re.split(r"(?<=[.!?])\s+", text)[0] for text in load_task("food").train["text"]]
    food = [text for text in first if 20 < len(text) < 200]
    rows = pd.concat([
        reviews.transfer.to_pandas().rename(columns={"domain": "source"}),
        reviews.train.to_pandas().assign(source="reviews"),
        pd.DataFrame({"text": food, "source": "food"}),
    ])[["text", "source"]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "source.csv")
        rows.groupby("source").sample(PER_SOURCE, random_state=0).to_csv(path, index=False)
        return Task.from_csv(path, "text", "source", test=0.25, seed=0)


def bytes_of(model: Classifier | TfIdf | Model2Vec) -> int:
    """On disk."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model")
        return disk_bytes(save(model, path)) if isinstance(model, Classifier) else model.bytes(path)


def measured(name: str, task: Task, seed: int) -> list[dict]:
    """One row a model: speed beside the teacher's, bytes, and which texts it gets right."""
    teacher = finetune("minilm", task, seed=seed, **FINETUNING[name])
    student = static_student(teacher, task, seed=seed, **DISTILLING[name])
    models = {"teacher": teacher, "ours, static": quantize(student, 8), "model2vec": Model2Vec(teacher, task, seed),
              "TF-IDF + logistic regression": TfIdf(task)}
    texts, actual = task.test["text"][:], np.array(task.test["label"])
    answers = {who: _predict(who, model, texts, task.labels, 32) for who, model in models.items()}
    rounds, _ = time_interleaved(models, texts, ROUNDS, CALLS, 32, seed)
    rates, p50 = rounds["sentences/s"], rounds["p50 ms"]
    return [{
        "task": name, "model": who, "sentences/s": rates[who].median(), "p50 ms": p50[who].median(),
        "× throughput": (rates[who] / rates["teacher"]).median(), "MB": bytes_of(model) / 1e6,
        "right": digits(answers[who] == actual),
    } for who, model in models.items()]


torch.set_num_threads(THREADS)
tasks = {"reviews": load_task("reviews"), "food": load_task("food"), "source": source_task()}
seeds, rows, measured_in = each_once(
    "static", lambda seed: [row for name, task in tasks.items() for row in measured(name, task, seed)], SEEDS)
tables = {name: over_seeds([row for row in rows if row["task"] == name], "× throughput") for name in tasks}
report("static", pd.concat(tables, names=["task"]).round(4).reset_index(), seeds, NOTES, measured_in)
