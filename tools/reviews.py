"""Reviews in the benchmarks: a teacher for each seed, the best students we know to make, and how all are measured."""
import re
import tempfile
from collections import Counter
from functools import cache

import pandas as pd
import torch

from ecomopt import Classifier, Task, distill, finetune, load, load_task, prune_structured, quantize, save
from ecomopt.compress.augment import Ensemble, without_near_copies
from ecomopt.compress.distill import ngram_augment, teacher_logits
from ecomopt.core.artifact import disk_bytes
from ecomopt.core.measure import _predict, time_interleaved
from ecomopt.core.verdict import noninferiority_test
from tools.seeds import digits, over_seeds, right_answers

SEEDS, THREADS, ROUNDS, CALLS = [0, 1, 2, 3, 4], 2, 7, 40
MEMBERS, AUGMENTED, EPOCHS = 3, 20_000, 4
MARGINS = {"at 2 points": 0.02, "at 1 point": 0.01}
STUDENTS = {  # sizes, the least count of a word in the vocabulary, bits of the embeddings
    "ours": (dict(layers=5, neurons=128, heads=2), 2, 4),
    "ours, smaller": (dict(layers=3, neurons=192, heads=4), 3, 3),
}
MADE = (
    f"learn from the mean of {MEMBERS} teachers, in {EPOCHS} passes over the sentences of the task, those of food "
    f"reviews and {AUGMENTED:,} n-gram augmented ones, the same for all seeds; students of two seeds share "
    "one or two of their teachers"
)
MEASURED = (
    "Accuracy: of all test sentences, mean of the seeds, with an interval that counts seeds and sentences; retained: "
    "of the same seed's teacher, mean. at 2 points, at 1: what the non-inferiority test with that margin says, by "
    "seeds. Throughput and p50: median of the seeds; × of both: ratio to the teacher (PyTorch, float32, SDPA "
    "attention), time-interleaved in one "
    f"process ({ROUNDS} rounds of the test split in batches of 32, and of {CALLS} sentences one by one), median and "
    "range of the seeds. MB: all files that are needed, tokenizer included."
)


# ---------------------------------------------------------------- texts

@cache
def task() -> Task:
    """Reviews, with the independent Amazon sentences as a second test set."""
    return load_task("reviews", tests=("amazon",))


def held_out() -> list[str]:
    """All texts that no training may see."""
    return [text for part in (task().valid, task().test, *task().tests.values()) for text in part["text"]]


@cache
def pooled() -> pd.DataFrame:
    """The sentences of all test sets."""
    parts = {"reviews": task().test, **task().tests}
    return pd.concat([part.to_pandas().assign(test=name) for name, part in parts.items()])


@cache
def with_food() -> Task:
    """The task with sentences of food reviews as unlabelled text, without near copies of any that is held out."""
    sentences = [s for text in load_task("food").train["text"] for s in re.split(r"(?<=[.!?])\s+", text)]
    food = without_near_copies([s for s in sentences if 20 < len(s) < 200], held_out())
    return task().with_transfer(food, "food")


@cache
def lessons() -> Task:
    """The task with all texts that the teachers of our students answer."""
    augmented = ngram_augment(task().train["text"][:], AUGMENTED, 0)
    return with_food().with_transfer(without_near_copies(augmented, held_out()), "augmented")


@cache
def words() -> Counter:
    """How often each word occurs in the texts, augmented ones apart."""
    known = [*task().train["text"], *task().valid["text"], *with_food().transfer["text"]]
    return Counter(word for text in known for word in re.findall(r"\w+|[^\w\s]", text.lower()))


# ---------------------------------------------------------------- models

@cache
def teacher(seed: int) -> Classifier:
    """A teacher."""
    return finetune("minilm", task(), epochs=4, seed=seed, bf16=True)


class Answered(Ensemble):
    """The mean of some teachers, whose answers are kept in the cache: students share them."""

    def logits(self, texts: list[str], batch_size: int = 32) -> torch.Tensor:
        return torch.stack([teacher_logits(member, list(texts)) for member in self.members]).mean(0)


def taught(by: Classifier, name: str, seed: int) -> Classifier:
    """A student of ours, in float: cut from MiniLM, embeddings of few bits, with the answers of a teacher."""
    sizes, least, bits = STUDENTS[name]
    texts = [word for word, count in words().items() if count >= least]
    options = dict(texts=texts, first_token=True, importance="taylor", task=task())
    start = quantize(prune_structured(teacher(seed), **sizes, **options), bits, linear=False)
    return distill(by, lessons(), start, epochs=EPOCHS, learning_rate=2e-4, seed=seed, bf16=True)


def student(name: str, seed: int) -> Classifier:
    """Ours, taught by the mean of some teachers."""
    return taught(Answered([teacher((seed + i) % len(SEEDS)) for i in range(MEMBERS)]), name, seed)


def artifact(classifier: Classifier) -> tuple[Classifier, int]:
    """One of our own as it comes back from disk, and the bytes of all its files."""
    with tempfile.TemporaryDirectory() as folder:
        path = save(classifier, f"{folder}/artifact")
        return load(path), disk_bytes(path)


# ---------------------------------------------------------------- measure

def measured(models: dict[str, tuple[Classifier, int]], seed: int) -> list[dict]:
    """A row for each model and its bytes: speed beside the first's, verdicts, and which sentences it gets right."""
    first, classifiers = next(iter(models)), {name: model for name, (model, _) in models.items()}
    texts, actual = pooled().text.tolist(), pooled().label.to_numpy()
    answers = {name: _predict(name, model, texts, task().labels, 32) for name, model in classifiers.items()}
    rounds, _ = time_interleaved(classifiers, task().test["text"][:], ROUNDS, CALLS, 32, seed)
    rates, p50 = rounds["sentences/s"], rounds["p50 ms"]
    return [{
        "model": name, "sentences/s": rates[name].median(), "× throughput": (rates[name] / rates[first]).median(),
        "p50 ms": p50[name].median(), "× p50": (p50[first] / p50[name]).median(), "MB": size / 1e6,
        "1/× bytes": models[first][1] / size, "right": digits(answers[name] == actual),
        **{at: noninferiority_test(answers[first], answers[name], actual, margin).outcome.split(" with")[0]
           for at, margin in MARGINS.items()}} for name, (_, size) in models.items()]


def table(rows: list[dict], *ranges: str) -> pd.DataFrame:
    """All seeds in one table, with the accuracy on each test set and how often each verdict was given."""
    found, right, groups = over_seeds(rows, *ranges), right_answers(rows), pd.DataFrame(rows).groupby("model")
    for test in pooled().test.unique():
        is_in = (pooled().test == test).to_numpy()
        found[f"accuracy, {test}"] = pd.Series({name: one[:, is_in].mean() for name, one in right.items()})
    for at in MARGINS:
        found[at] = groups[at].agg(lambda x: ", ".join(f"{n} {outcome}" for outcome, n in x.value_counts().items()))
    return found.round(4).reset_index()
