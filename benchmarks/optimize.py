"""One call beside the best fixed recipe and other tools: reviews, five teachers, time-interleaved in one process.

    python -m benchmarks.optimize 0 1    these seeds; without any, all that were not measured yet

A seed takes about 50 minutes; what a search found is kept in .cache.
"""
import json
import os
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch

import ecomopt
from ecomopt import Classifier, Goal, convert, load, optimize
from tools import reviews
from tools.bench import report
from tools.foreign import TOOLS, foreign
from tools.peers import Model2Vec, TfIdf
from tools.reviews import SEEDS, THREADS, artifact
from tools.run import digest
from tools.seeds import each_once

BUDGET = "20min"
FOUND = Path(__file__).parents[1] / ".cache" / "benchmark_optimize"
GOALS = {"latency": Goal(max_drop=0.01, minimize="latency"), "bytes": Goal(max_drop=0.02, minimize="bytes")}
NOTES = (
    f"Reviews (test split) and independent Amazon sentences, {THREADS} threads, tokenization included. One teacher a "
    "seed (MiniLM, four epochs). "
    f"ours: `optimize`, budget {BUDGET} and an empty cache, by latency with at most one point of drop, and by bytes "
    "with at most two; its task has sentences of food reviews as unlabelled text, beside its own; trained, chosen on "
    f"the validation split, tested here. fixed recipe: the students of the compression benchmark, which "
    f"{reviews.MADE}. {reviews.MEASURED}"
)


def searched(name: str, goal: Goal, seed: int) -> Classifier:
    """What `optimize` finds; searched once with this code, goal and budget."""
    sources = sorted(path.read_text("utf8") for path in Path(ecomopt.__file__).parent.rglob("*.py"))
    path = FOUND / f"{name}-{seed}-{digest([*sources, str(goal), BUDGET])}"
    if not path.exists():
        with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, ECOMOPT_CACHE=cache):
            result = optimize(reviews.with_food(), reviews.teacher(seed), goal, BUDGET, seed, THREADS)
        FOUND.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(result.data))
        result.save(path)
    return load(path)


def peer(model: TfIdf | Model2Vec) -> tuple[TfIdf | Model2Vec, int]:
    """A model of another tool, and its bytes."""
    with tempfile.TemporaryDirectory() as folder: return model, model.bytes(Path(folder, "model"))


def models_of(seed: int) -> dict[str, tuple]:
    """The teacher of a seed and all that is made of it, with the bytes of each."""
    teacher, task = reviews.teacher(seed), reviews.with_food()
    ours = {f"ours, by {name}": artifact(searched(name, goal, seed)) for name, goal in GOALS.items()}
    others = "ONNX Runtime int8", "OpenVINO + NNCF int8"
    return {
        "float32 eager (teacher)": artifact(teacher),
        **{name: foreign(teacher, TOOLS[name], task.train["text"][:]) for name in others},
        "TF-IDF + logistic regression": peer(TfIdf(task)),
        "model2vec": peer(Model2Vec(teacher, task, seed)),
        "fixed recipe": artifact(convert(reviews.student("ours", seed), "openvino", "int8", task)),
        **ours}


torch.set_num_threads(THREADS)
seeds, rows, measured_in = each_once("optimize", lambda seed: reviews.measured(models_of(seed), seed), SEEDS)
report("optimize", reviews.table(rows, "× throughput", "1/× bytes"), seeds, NOTES, measured_in)
