"""Does tuning pay? Equal budgets for grid, random, ours and its peers, on two known functions and on a table of real trainings."""
import copy
import itertools
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from time import process_time

import pandas as pd
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, Trainer, set_seed

from ecomopt import Classifier, load_model, load_task, shrink
from ecomopt.core.train import run, tokenized, training_arguments

SURFACE = Path(__file__).with_name("tune_reviews.csv")
LEVELS = {
    "layers": [1, 2, 3],
    "batch_size": [8, 32],
    "weight_decay": [0.0, 0.01, 0.1],
    "learning_rate": [float(f"{10 ** (-5 + k / 3):.1e}") for k in range(10)],  # 1e-5 … 1e-2
}


# ---------------------------------------------------------------- the table of real trainings

@cache
def student(layers: int) -> tuple[Classifier, Dataset]:
    """MiniLM with fewer layers, half of its heads, a quarter of its neurons, and the words of the task; and what it reads."""
    set_seed(0)
    small = shrink(load_model("minilm", task.labels), layers=layers, heads=6, neurons=384, texts=task.train["text"], first_token=True)
    return small, tokenized(small, task.train)


def trained(layers: int, **settings) -> dict:
    """Fine-tune a student for an epoch of the labelled sentences: what the validation split says, and seconds of one core."""
    small, rows = copy.deepcopy(student(layers)[0]), student(layers)[1]
    args = training_arguments(epochs=1, seed=0, **settings)
    start = process_time()
    run(Trainer(small.model, args, train_dataset=rows, data_collator=DataCollatorWithPadding(small.tokenizer)))
    seconds = process_time() - start
    logits, labels = small.logits(task.valid["text"]), torch.tensor(task.valid["label"])
    right = logits.argmax(1) == labels
    return {"loss": round(F.cross_entropy(logits, labels).item(), 5), "accuracy": round(right.float().mean().item(), 5), "seconds": round(seconds, 2)}


def missing() -> Iterator[dict]:
    """The settings that the table does not have yet."""
    done = set(pd.read_csv(SURFACE)[list(LEVELS)].itertuples(index=False, name=None)) if SURFACE.exists() else set()
    return (dict(zip(LEVELS, values)) for values in itertools.product(*LEVELS.values()) if values not in done)


def fill(limit: int | None = None) -> None:
    """Compute what is missing of the table, a line a training; it may be killed at any time."""
    torch.set_num_threads(1)
    for settings in itertools.islice(missing(), limit):
        line = pd.DataFrame([settings | trained(**settings)])
        line.to_csv(SURFACE, mode="a", header=not SURFACE.exists(), index=False)


task = load_task("reviews")
if __name__ == "__main__": fill(int(sys.argv[1]) if sys.argv[1:] else None)
