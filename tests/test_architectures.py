"""Every step on every architecture: it works or says why not, as the table of the site says."""
import json

import pytest

from tools import architectures

TABLE = json.loads(architectures.TABLE.read_text("utf8"))


def test_the_table_has_every_architecture_and_step():
    assert list(TABLE) == list(architectures.ARCHITECTURES)
    assert all(list(row) in ([*architectures.STEPS], ["load_model", *architectures.STEPS]) for row in TABLE.values())


def test_nothing_is_wrong():
    assert not [(name, step) for name, row in TABLE.items() for step, found in row.items() if found.startswith("wrong")]


def outcomes(row):
    """What is refused and works; the reasons too, but for those that a converter gives: some count its symbols."""
    runtimes = "OpenVINO", "ONNX Runtime"
    return {step: found.partition(": ")[0] if step in runtimes else found for step, found in row.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_the_table_is_what_happens(name):
    assert outcomes(architectures.row(name)) == outcomes(TABLE[name])
