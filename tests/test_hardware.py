"""What a machine can do: measured, drawn, and refused where there is no such device."""
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomopt import EcomoptError
from ecomopt.core import hardware
from ecomopt.core.hardware import Hardware, describe_hardware, plot_roofline


def small() -> Hardware: return describe_hardware(0.001, n=64)


def test_it_is_plain_data():
    machine = small()
    again = json.loads(json.dumps(machine.to_dict()))
    assert again["macs_per_s"] == machine.macs_per_s and again["instructions"] == list(machine.instructions)
    assert machine.bytes_per_s > 0 and machine.macs_per_s["float32"] > 0 and machine.cores > 0


@pytest.mark.parametrize(
    "wrong", [dict(seconds=0), dict(seconds=float("nan")), dict(n=0), dict(device="cuda:99"), dict(device="toaster")]
)
def test_bad_input(wrong):
    with pytest.raises(EcomoptError): describe_hardware(**{"seconds": 0.001, "n": 64, **wrong})


@pytest.mark.parametrize(
    "text, instructions",
    [
        (
            "model name\t: Epyc\nflags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16\n",
            ("avx2", "avx512f", "avx512_vnni", "avx512_bf16"),
        ),
        ("model name\t: Xeon\nflags\t\t: avx2 amx_int8 amx_bf16\n", ("avx2", "amx_int8", "amx_bf16")),
        ("processor\t: 0\nFeatures\t: fp asimd asimdhp i8mm sve\n", ("asimd", "asimdhp", "i8mm", "sve")),
        ("processor\t: 0\n", ()),
    ],
)
def test_instructions_are_those_of_the_system(monkeypatch, text, instructions):
    monkeypatch.setattr(hardware.Path, "read_text", lambda *args, **others: text)
    assert hardware._cpu()[1] == instructions


def test_a_system_without_cpuinfo(monkeypatch):
    def nothing(*args, **others): raise FileNotFoundError
    monkeypatch.setattr(hardware.Path, "read_text", nothing)
    name, instructions = hardware._cpu()
    assert name and len(instructions) == 1


def test_a_precision_without_a_product_is_left_out(monkeypatch):
    def product(n, precision, device):
        if precision == "int8": raise RuntimeError("no such kernel")
        return lambda: None
    monkeypatch.setattr(hardware, "_product", product)
    assert small().macs_per_s.keys() == {"float32", "bfloat16"}


@settings(max_examples=20)
@given(st.floats(1e8, 1e14), st.floats(1e6, 1e12), st.floats(1e-3, 1e5))
def test_the_roof_is_drawn_where_it_belongs(peak, bandwidth, intensity):
    import matplotlib.pyplot as plt
    machine = Hardware("x", 1, (), None, "cpu", 1, bandwidth, {"float32": peak})
    point = pd.DataFrame([dict(name="a", precision="float32", intensity=intensity, rate=peak)])
    figure = plot_roofline(machine, point)
    x, y = figure.axes[0].lines[0].get_data()
    plt.close(figure)
    assert x[0] < intensity < x[-1] and np.allclose(y * 1e9, np.minimum(peak, bandwidth * x))
