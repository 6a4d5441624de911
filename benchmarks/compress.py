"""The stack: this library's whole chain beside other tools on the same teachers, time-interleaved in one process.

    TRAIN=1 python -m benchmarks.compress 0 1    only trains what the students of these seeds need and the cache lacks
    python -m benchmarks.compress 0 1            measures these seeds; without any, all that were not measured yet
"""
import os
import sys

import torch

from ecomopt import Classifier, convert, quantize
from ecomopt.accelerate.cascade import fit_cascade
from tools import reviews
from tools.bench import machine, report
from tools.foreign import TOOLS, foreign
from tools.reviews import SEEDS, STUDENTS, THREADS, artifact
from tools.seeds import each_once

RUNTIMES, DEFERRED = ("OpenVINO", "ONNX Runtime"), (0.05, 0.15)
FASTEST = "int8 weights" if "AMX" in machine() else "int8"
NOTES = (
    f"Reviews (test split) and independent Amazon sentences, {THREADS} threads, tokenization included. One teacher a "
    "seed (MiniLM, four epochs), with all models made from it; hyperparameters were selected on the validation split. "
    f"Our students {reviews.MADE}. int8 weights: int8_weight_only, computed in bfloat16 on a CPU with AMX. "
    f"Cascades: the student in OpenVINO ({FASTEST}) answers, and leaves that fraction of the validation sentences to "
    f"the teacher in the same precision; their bytes are those of both. {reviews.MEASURED} Gain of the "
    "runtime alone: the teacher in OpenVINO, float32. torchao: without `torch.compile`. Gain of the "
    "compression alone: the student in float32."
)


def models_of(seed: int) -> dict[str, tuple[Classifier, int]]:
    """All models of a seed, and the bytes of each."""
    teacher, task, ours = reviews.teacher(seed), reviews.task(), {}
    for name in STUDENTS:
        student = reviews.student(name, seed)
        made = {"float32 eager": student, "int8 eager": quantize(student)}
        made |= {f"int8 in {r}": convert(student, r.lower().replace(" ", ""), "int8", task) for r in RUNTIMES}
        made["int8 weights in OpenVINO"] = convert(student, "openvino", "int8_weight_only")
        ours |= {f"{name}, {how}": artifact(model) for how, model in made.items()}
    precision = "int8" if FASTEST == "int8" else "int8_weight_only"
    small, large = ours[f"ours, {FASTEST} in OpenVINO"][0], convert(teacher, "openvino", precision, task)
    for deferred in DEFERRED:
        cascade = fit_cascade([small, large], task, deferred)
        ours[f"ours, cascade in {FASTEST}, {deferred:.0%} deferred"] = artifact(cascade)
    others = {name: foreign(teacher, tool, task.train["text"][:]) for name, tool in TOOLS.items()}
    return {"float32 eager (teacher)": artifact(teacher), **others, **ours}


if "TRAIN" in os.environ:  # with the threads of OMP_NUM_THREADS: processes train side by side
    for seed in map(int, sys.argv[1:] or SEEDS):
        for name in STUDENTS: reviews.student(name, seed)
    sys.exit()
torch.set_num_threads(THREADS)
seeds, rows, measured_in = each_once("compress", lambda seed: reviews.measured(models_of(seed), seed), SEEDS)
report("compress", reviews.table(rows, "× throughput"), seeds, NOTES, measured_in)
