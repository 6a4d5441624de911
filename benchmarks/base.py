"""A teacher of BERT-base size, and students that learned from its answers: the ratios that papers quote.

    python -m benchmarks.base 0    this seed; without any, all that were not measured yet; about an hour each
"""
import torch

from ecomopt import Classifier, convert, finetune
from tools import reviews
from tools.bench import report
from tools.reviews import SEEDS, STUDENTS, THREADS, artifact
from tools.seeds import each_once

NOTES = (
    f"Reviews (test split) and independent Amazon sentences, {THREADS} threads, tokenization included. A teacher a "
    "seed: mpnet, an encoder of 12 layers of width 768, fine-tuned in three epochs. Our students are cut from "
    "a MiniLM fine-tuned in four and learn from that teacher alone, with the texts of the compression "
    f"benchmark. {reviews.MEASURED}"
)


def models_of(seed: int) -> dict[str, tuple[Classifier, int]]:
    """The large teacher of a seed, in two precisions, and its students, with the bytes of each."""
    teacher = finetune("mpnet", reviews.task(), epochs=3, seed=seed, bf16=True)
    models = {"mpnet, float32 eager (teacher)": teacher}
    models["mpnet, int8 in OpenVINO"] = convert(teacher, "openvino", "int8", reviews.task())
    for name in STUDENTS:
        student = reviews.taught(teacher, name, seed)
        models[f"{name}, int8 in OpenVINO"] = convert(student, "openvino", "int8", reviews.task())
    return {name: artifact(model) for name, model in models.items()}


torch.set_num_threads(THREADS)
seeds, rows, measured_in = each_once("base", lambda seed: reviews.measured(models_of(seed), seed), SEEDS)
report("base", reviews.table(rows, "× throughput", "1/× bytes"), seeds, NOTES, measured_in)
