"""The stack: this library's whole chain beside other tools on the same teacher, time-interleaved in one process."""
import copy
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import nncf
import numpy as np
import onnxruntime
import openvino
import pandas as pd
import torch
from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic
from scipy.stats import binomtest
from torch import nn
from torch.nn import functional as F

from ecomopt import Classifier, Task, distill, finetune, load, load_task, prune_structured, quantize, save
from ecomopt.compress import quantize as ours
from ecomopt.compress.quantize import QuantizedEmbedding, unpack_bits
from ecomopt.core.artifact import disk_bytes
from ecomopt.core.measure import quality, time_interleaved
from tools.bench import report

SEEDS, THREADS, ROUNDS, CALLS, CALIBRATION = [0, 1, 2, 3, 4], 2, 7, 40, 304
NOTES = (
    f"Reviews, test split, {THREADS} threads, tokenization included. Five teachers (MiniLM, four epochs), each with "
    "all models made from it; hyperparameters were selected on the validation split. Accuracy: mean, smallest and "
    "largest of the seeds; interval: Wilson, 95 %, of that mean on one test set; retained: of the same seed's "
    "teacher, mean. Throughput and p50: median of the seeds; × of both: ratio to the float32 teacher, "
    f"time-interleaved in one process ({ROUNDS} rounds of all sentences in batches of 32, and of {CALLS} sentences "
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
        classifier.tokenizer.save_pretrained(folder)
        classifier.model.config.save_pretrained(folder)
        return replace(classifier, model=Foreign(classifier.model.config, function)), disk_bytes(folder)


def artifact(classifier: Classifier) -> tuple[Classifier, int]:
    """One of our own as it comes back from disk, and the bytes of all its files."""
    with tempfile.TemporaryDirectory() as folder:
        path = save(classifier, f"{folder}/artifact")
        return load(path), disk_bytes(path)


def plain_linear(self, x: torch.Tensor, add: torch.Tensor | None = None, inplace: bool = False) -> torch.Tensor:
    """What `Int8Linear.integer_matmul` computes, of a float input and in operations that every runtime has."""
    y = F.linear(x, unpack_bits(self.weight, self.bits, self.in_features) * self.scale[:, None], self.bias)
    if self.activation == "gelu": y = F.gelu(y)
    return y if add is None else y + add


def ours_openvino(classifier: Classifier, texts: list[str], folder: Path) -> Callable:
    """Our artifact, loaded, put into OpenVINO: int8 in its kernels."""
    model = copy.deepcopy(classifier.model)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedEmbedding):
            model.set_submodule(name, nn.Embedding.from_pretrained(module(torch.arange(module.num_embeddings))))
    with (
        patch.object(ours.Int8Linear, "quantize_input", lambda self, x, out=None: x),
        patch.object(ours.Int8Linear, "integer_matmul", plain_linear),
    ):
        return openvino_int8(replace(classifier, model=model), texts, folder)


def student_of(teacher: Classifier, task: Task, seed: int) -> Classifier:
    """Ours, in float: fewer layers, neurons and heads, words that occur twice, 4-bit embeddings; then distilled."""
    shop = [*task.train["text"], *task.valid["text"], *task.transfer["text"]]
    words = Counter(word for text in shop for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    start = prune_structured(teacher, layers=4, neurons=256, heads=4, first_token=True, importance="taylor", task=task,
        texts=[word for word, count in words.items() if count > 1])
    return distill(
        teacher, task, quantize(start, embedding_bits=4, linear=False), augment=60_000, learning_rate=1e-4, seed=seed
    )


def models_of(seed: int) -> dict[str, tuple[Classifier, int]]:
    """All models of a seed, and the bytes of each."""
    sample = task.sample(transfer=9_000, seed=seed)
    teacher = finetune("minilm", sample, epochs=4, seed=seed)
    student, texts = student_of(teacher, sample, seed), sample.train["text"][:]
    eager, size = artifact(quantize(student))
    converted, _ = foreign(eager, ours_openvino, texts)
    with_sentences = size + len(json.dumps(texts[:CALIBRATION]).encode())
    return {
        "float32 eager (teacher)": artifact(teacher),
        "quantize_dynamic": foreign(teacher, torch_dynamic, texts),
        "torchao int8": foreign(teacher, torchao_dynamic, texts),
        "ONNX Runtime int8": foreign(teacher, onnx_int8, texts),
        "OpenVINO float32": foreign(teacher, openvino_float, texts),
        "OpenVINO + NNCF int8": foreign(teacher, openvino_int8, texts),
        "ours, float32 eager": artifact(student),
        "ours, int8 eager": (eager, size),
        "ours, int8 in OpenVINO": (converted, with_sentences)}


def measured(seed: int) -> list[dict]:
    """One row a model: accuracy, speed beside the teacher's, bytes."""
    models, first = models_of(seed), "float32 eager (teacher)"
    classifiers = {name: model for name, (model, _) in models.items()}
    accuracy = {
        name: quality(c.logits(texts).argmax(1).numpy(), actual, task.labels)["accuracy"]
        for name, c in classifiers.items()
    }
    rounds, _ = time_interleaved(classifiers, texts, ROUNDS, CALLS, 32, seed)
    rates, p50 = rounds["sentences/s"], rounds["p50 ms"]
    return [{"model": name, "accuracy": accuracy[name], "retained": accuracy[name] / accuracy[first],
        "sentences/s": rates[name].median(), "× throughput": (rates[name] / rates[first]).median(),
        "p50 ms": p50[name].median(), "× p50": (p50[first] / p50[name]).median(), "MB": size / 1e6,
        "1/× bytes": models[first][1] / size} for name, (_, size) in models.items()]


torch.set_num_threads(THREADS)
task = load_task("reviews")
texts, actual = task.test["text"][:], np.array(task.test["label"])
rows = pd.DataFrame([row for seed in SEEDS for row in measured(seed)])
groups = rows.groupby("model", sort=False)
table, span = groups.median(), lambda column: groups[column].agg(lambda x: f"{x.min():.3g} to {x.max():.3g}")
table["accuracy"], table["retained"] = groups["accuracy"].mean(), groups["retained"].mean()
bounds = [binomtest(round(mean * len(texts)), len(texts)).proportion_ci(method="wilson") for mean in table["accuracy"]]
table["interval"] = [f"{b.low:.3f} to {b.high:.3f}" for b in bounds]
for name in ("accuracy", "retained", "× throughput"): table[f"{name}, range"] = span(name)
report("compress", table.round(4).reset_index(), SEEDS, NOTES)
