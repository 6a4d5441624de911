"""Every notebook runs from top to bottom with `fast=True`."""
import time
from pathlib import Path

import nbformat
import pytest
from papermill.exceptions import PapermillExecutionError

from tools import site


def describe(name: str, error: PapermillExecutionError) -> str:
    """The place, source and message of a failed cell."""
    number = error.cell_index  # counted from 1: papermill counts from 0, and has put its parameters cell before
    where = f"{name}: cell {number}: {error.ename}: {error.evalue}"
    return "\n\n".join([where, error.source, "\n".join(error.traceback)])


# from the last to the first: the site's tests run them from the first to the last, and the two meet in the middle
@pytest.mark.parametrize("path", site.notebooks()[::-1], ids=lambda path: str(path.relative_to(site.NBS)))
def test_notebook_runs(path: Path, record_property):
    name, start = str(path.relative_to(site.ROOT)), time.perf_counter()
    try:
        site.execute(path, fast=True)
    except PapermillExecutionError as error:
        pytest.fail(describe(name, error), pytrace=False)
    finally:
        record_property(name, time.perf_counter() - start)


@pytest.mark.parametrize("between", [0, 2])
def test_a_failed_cell_is_named(monkeypatch, tmp_path, between):
    """The message has the cell's number, source and error, and no executed copy is kept."""
    monkeypatch.setattr(site, "NBS", tmp_path)
    monkeypatch.setattr(site, "RUN", tmp_path / "run")
    sources = ["fast = True", *[f"x = {n}" for n in range(between)], "wrong = 1 / 0"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nb.cells[0].metadata["tags"] = ["parameters"]
    nb.metadata["kernelspec"] = dict(name="python3", display_name="python3", language="python")
    path = tmp_path / "broken.ipynb"
    nbformat.write(nb, path)
    with pytest.raises(PapermillExecutionError) as caught: site.execute(path, fast=True)
    place, source, traceback = describe("broken.ipynb", caught.value).split("\n\n", 2)
    assert place == f"broken.ipynb: cell {len(sources)}: ZeroDivisionError: division by zero"
    assert source == "wrong = 1 / 0" and "ZeroDivisionError" in traceback
    assert not list((tmp_path / "run").rglob("*.ipynb"))
