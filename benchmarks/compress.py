"""The stack: this library's whole chain beside other tools on the same teachers, time-interleaved in one process.

    TRAIN=1 python -m benchmarks.compress 0 1    only trains what the students of these seeds need and the cache lacks
    python -m benchmarks.compress 0 1            measures these seeds; without any, all that were not measured yet
"""
import copy
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nncf
import onnxruntime
import openvino
import pandas as pd
import torch
from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic
from torch import nn

from ecomopt import Classifier, Task, convert, distill, finetune, load, load_task, prune_structured, quantize, save
from ecomopt.accelerate.cascade import fit_cascade
from ecomopt.compress.augment import Ensemble, without_near_copies
from ecomopt.compress.distill import ngram_augment, teacher_logits
from ecomopt.core.artifact import _write_tokenizer, disk_bytes
from ecomopt.core.measure import _predict, time_interleaved
from ecomopt.core.verdict import noninferiority_test
from tools.bench import report
from tools.lessons import food_sentences, held_out
from tools.seeds import digits, each_once, over_seeds, right_answers

SEEDS, THREADS, ROUNDS, CALLS, CALIBRATION = [0, 1, 2, 3, 4], 2, 7, 40, 304
RUNTIMES = "OpenVINO", "ONNX Runtime"
MEMBERS, AUGMENTED, EPOCHS = 3, 20_000, 4
MARGINS, DEFERRED = {"at 2 points": 0.02, "at 1 point": 0.01}, (0.05, 0.15)
STUDENTS = {  # sizes, the least count of a word in the vocabulary, bits of the embeddings
    "ours": (dict(layers=5, neurons=128, heads=2), 2, 4),
    "ours, smaller": (dict(layers=3, neurons=192, heads=4), 3, 3),
}
NOTES = (
    f"Reviews (test split) and independent Amazon sentences, {THREADS} threads, tokenization included. One teacher a "
    "seed (MiniLM, four epochs), with all models made from it; hyperparameters were selected on the validation split. "
    f"Our students learn from the mean of {MEMBERS} teachers, in {EPOCHS} passes over the sentences of the task, those "
    f"of food reviews and {AUGMENTED:,} n-gram augmented ones, the same for all seeds. Accuracy: of all test "
    "sentences, mean of the seeds, with an interval that counts seeds and sentences; retained: of the same seed's "
    "teacher, mean. at 2 points, at 1: what the non-inferiority test with that margin says, by seeds. Cascades: the "
    "student in OpenVINO answers, and leaves that fraction of the validation sentences to the teacher in int8; "
    "their bytes are those of both. Throughput and p50: median of the seeds; × of both: ratio to the float32 teacher, "
    f"time-interleaved in one process ({ROUNDS} rounds of the test split in batches of 32, and of {CALLS} sentences "
    "one by one), median and range of the seeds. MB: all files that are needed, tokenizer included. Gain of the "
    "runtime alone: the teacher in OpenVINO, float32. Gain of the compression alone: the student in float32."
)


class Foreign(nn.Module):
    """A function from token ids and mask to logits, where a `Classifier` has its model."""
    device = torch.device("cpu")

    def __init__(self, config, function: Callable):
        super().__init__()
        self.config, self.function = config, function

    def forward(self, input_ids, attention_mask, **others):
        return SimpleNamespace(logits=torch.as_tensor(self.function(input_ids, attention_mask)))


class Logits(nn.Module):
    """A model with a tensor for its output, which is what exporters like."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def batches(classifier: Classifier, texts: list[str], size: int = 8) -> list[dict]:
    """Padded batches to trace or to calibrate with."""
    ids = classifier.encode(texts)
    padded = [
        classifier.tokenizer.pad({"input_ids": ids[i : i + size]}, return_tensors="pt")
        for i in range(0, len(ids), size)
    ]
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in padded]


def torch_dynamic(classifier: Classifier, texts: list[str], folder: Path) -> Callable:
    """`torch.ao.quantization.quantize_dynamic`, all linear layers."""
    model = Logits(torch.ao.quantization.quantize_dynamic(copy.deepcopy(classifier.model), {nn.Linear}, torch.qint8))
    torch.save(model.state_dict(), folder / "model.pt")  # for its size only
    return model


def torchao_dynamic(classifier: Classifier, texts: list[str], folder: Path) -> Callable:
    """torchao: int8 weights, int8 inputs whose range is found at every call."""
    sys.path.append(".peers")  # where `make bench` puts it
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = Logits(copy.deepcopy(classifier.model))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    torch.save(model.state_dict(), folder / "model.pt")
    return model


def onnx_int8(classifier: Classifier, texts: list[str], folder: Path) -> Callable:
    """ONNX Runtime: dynamic int8 with a scale a channel."""
    example, names = batches(classifier, texts[:2], 2)[0], ["input_ids", "attention_mask"]
    axes = {name: {0: "batch", 1: "length"} for name in names}
    with tempfile.TemporaryDirectory() as plain:
        torch.onnx.export(Logits(classifier.model), tuple(example.values()), f"{plain}/float.onnx", input_names=names,
            output_names=["logits"], dynamic_axes=axes, dynamo=False)
        quant_pre_process(f"{plain}/float.onnx", f"{plain}/ready.onnx", skip_symbolic_shape=True)
        quantize_dynamic(f"{plain}/ready.onnx", folder / "model.onnx", per_channel=True, weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]


def openvino_float(
    classifier: Classifier, texts: list[str], folder: Path, change: Callable = lambda model: model
) -> Callable:
    """OpenVINO in float32, or what `change` makes of it."""
    example = batches(classifier, texts[:8])[0]
    openvino.save_model(
        change(openvino.convert_model(Logits(classifier.model), example_input=example)),
        folder / "model.xml",
        compress_to_fp16=False,
    )
    settings = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    run = openvino.Core().compile_model(folder / "model.xml", "CPU", settings)
    return lambda ids, mask: run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]


def openvino_int8(classifier: Classifier, texts: list[str], folder: Path) -> Callable:
    """OpenVINO and NNCF: static int8, calibrated on sentences of the train split."""
    data = nncf.Dataset(batches(classifier, texts[:CALIBRATION]))
    return openvino_float(
        classifier, texts, folder, lambda model: nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER)
    )


def foreign(classifier: Classifier, make: Callable, texts: list[str]) -> tuple[Classifier, int]:
    """Another's model in place of ours, and the bytes of all its files."""
    with tempfile.TemporaryDirectory() as folder:
        function = make(classifier, texts, Path(folder))
        _write_tokenizer(classifier.tokenizer, Path(folder))
        classifier.model.config.save_pretrained(folder)
        return replace(classifier, model=Foreign(classifier.model.config, function)), disk_bytes(folder)


def artifact(classifier: Classifier) -> tuple[Classifier, int]:
    """One of our own as it comes back from disk, and the bytes of all its files."""
    with tempfile.TemporaryDirectory() as folder:
        path = save(classifier, f"{folder}/artifact")
        return load(path), disk_bytes(path)


class Answered(Ensemble):
    """The mean of some teachers, whose answers are kept in the cache: teachers share them."""

    def logits(self, texts: list[str], batch_size: int = 32) -> torch.Tensor:
        return torch.stack([teacher_logits(member, list(texts)) for member in self.members]).mean(0)


def with_lessons(task: Task) -> Task:
    """The task with all texts that the teachers answer."""
    augmented = without_near_copies(ngram_augment(task.train["text"][:], AUGMENTED, 0), held_out(task))
    return task.with_transfer(food_sentences(task), "food").with_transfer(augmented, "augmented")


def words_of(lessons: Task) -> Counter:
    """How often each word occurs in the texts, augmented ones apart."""
    known = lessons.transfer.filter(lambda row: row["domain"] != "augmented")["text"]
    return Counter(word for text in [*lessons.train["text"], *lessons.valid["text"], *known]
                   for word in re.findall(r"\w+|[^\w\s]", text.lower()))


def student_of(name: str, seed: int) -> Classifier:
    """Ours, in float: cut from its teacher, embeddings of few bits, taught by the mean of some teachers."""
    sizes, least, bits = STUDENTS[name]
    options = dict(first_token=True, importance="taylor", task=task)
    texts = [word for word, count in words.items() if count >= least]
    start = prune_structured(teachers[seed], texts=texts, **sizes, **options)
    mean = Answered([teachers[(seed + i) % len(SEEDS)] for i in range(MEMBERS)])
    return distill(mean, lessons, quantize(start, bits, linear=False), epochs=EPOCHS, learning_rate=2e-4, seed=seed)


def models_of(seed: int) -> dict[str, tuple[Classifier, int]]:
    """All models of a seed, and the bytes of each."""
    teacher, texts, ours = teachers[seed], task.train["text"][:], {}
    for name in STUDENTS:
        student = student_of(name, seed)
        made = {"float32 eager": student, "int8 eager": quantize(student)}
        made |= {f"int8 in {r}": convert(student, r.lower().replace(" ", ""), "int8", task) for r in RUNTIMES}
        ours |= {f"{name}, {how}": artifact(model) for how, model in made.items()}
    small, large = ours["ours, int8 in OpenVINO"][0], convert(teacher, "openvino", "int8", task)
    for deferred in DEFERRED:
        ours[f"ours, cascade, {deferred:.0%} deferred"] = artifact(fit_cascade([small, large], task, deferred))
    return {
        "float32 eager (teacher)": artifact(teacher),
        "quantize_dynamic": foreign(teacher, torch_dynamic, texts),
        "torchao int8": foreign(teacher, torchao_dynamic, texts),
        "ONNX Runtime int8": foreign(teacher, onnx_int8, texts),
        "OpenVINO float32": foreign(teacher, openvino_float, texts),
        "OpenVINO + NNCF int8": foreign(teacher, openvino_int8, texts), **ours}


def measured(seed: int) -> list[dict]:
    """One row a model: speed beside the teacher's, bytes, verdicts, and which sentences it gets right."""
    models, first = models_of(seed), "float32 eager (teacher)"
    classifiers = {name: model for name, (model, _) in models.items()}
    answers = {name: _predict(name, c, pooled.text.tolist(), task.labels, 32) for name, c in classifiers.items()}
    rounds, _ = time_interleaved(classifiers, task.test["text"][:], ROUNDS, CALLS, 32, seed)
    rates, p50, actual = rounds["sentences/s"], rounds["p50 ms"], pooled.label.to_numpy()
    return [{"model": name, "sentences/s": rates[name].median(), "× throughput": (rates[name] / rates[first]).median(),
        "p50 ms": p50[name].median(), "× p50": (p50[first] / p50[name]).median(), "MB": size / 1e6,
        "1/× bytes": models[first][1] / size,
        "right": digits(answers[name] == actual),
        **{at: noninferiority_test(answers[first], answers[name], actual, margin).outcome.split(" with")[0]
           for at, margin in MARGINS.items()}} for name, (_, size) in models.items()]


only_train = "TRAIN" in os.environ
if not only_train: torch.set_num_threads(THREADS)  # else as OMP_NUM_THREADS says: processes train side by side
task = load_task("reviews", tests=("amazon",))
lessons = with_lessons(task)
words = words_of(lessons)
pooled = pd.concat([part.to_pandas().assign(test=name) for name, part in {"reviews": task.test, **task.tests}.items()])
teachers = {seed: finetune("minilm", task, epochs=4, seed=seed) for seed in SEEDS}
if only_train:
    for seed in map(int, sys.argv[1:] or SEEDS):
        for name in STUDENTS: student_of(name, seed)
    sys.exit()
seeds, rows, measured_in = each_once("compress", measured, SEEDS)
table, right, groups = over_seeds(rows, "× throughput"), right_answers(rows), pd.DataFrame(rows).groupby("model")
for test in pooled.test.unique():
    is_in = (pooled.test == test).to_numpy()
    table[f"accuracy, {test}"] = pd.Series({name: found[:, is_in].mean() for name, found in right.items()})
for at in MARGINS:
    table[at] = groups[at].agg(lambda x: ", ".join(f"{n} {outcome}" for outcome, n in x.value_counts().items()))
report("compress", table.round(4).reset_index(), seeds, NOTES, measured_in)
