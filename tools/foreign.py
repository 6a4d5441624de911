"""Classifiers quantized or run by other tools, for the benchmarks: only compared with."""
import copy
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nncf
import numpy as np
import openvino
import torch
from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic
from torch import nn

from ecomopt import Classifier
from ecomopt.accelerate.runtime import _open_onnxruntime
from ecomopt.core.artifact import _write_tokenizer, disk_bytes

CALIBRATION = 304  # sentences


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
    run = _open_onnxruntime({"onnx": np.fromfile(folder / "model.onnx", np.uint8)}, "int8", torch.get_num_threads())
    return lambda ids, mask: run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})


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
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    settings |= {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
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


TOOLS = {
    "quantize_dynamic": torch_dynamic, "torchao int8": torchao_dynamic, "ONNX Runtime int8": onnx_int8,
    "OpenVINO float32": openvino_float, "OpenVINO + NNCF int8": openvino_int8}
