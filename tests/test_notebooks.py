"""Every notebook runs from top to bottom with `fast=True`, and its stored outputs are those of its cells."""
import time
from pathlib import Path

import nbformat
import pytest
from papermill.exceptions import PapermillExecutionError

from tools import run


def describe(name: str, error: PapermillExecutionError) -> str:
    """The place, source and message of a failed cell."""
    number = error.cell_index  # counted from 1: papermill counts from 0, and has put its parameters cell before
    where = f"{name}: cell {number}: {error.ename}: {error.evalue}"
    return "\n\n".join([where, error.source, "\n".join(error.traceback)])


@pytest.mark.slow
@pytest.mark.parametrize("path", run.notebooks(), ids=lambda path: str(path.relative_to(run.NBS)))
def test_notebook_runs(path: Path, record_property, tmp_path):
    name, start = str(path.relative_to(run.ROOT)), time.perf_counter()
    try:
        run.execute(path, fast=True, cwd=tmp_path)
    except PapermillExecutionError as error:
        pytest.fail(describe(name, error), pytrace=False)
    finally:
        record_property(name, time.perf_counter() - start)


@pytest.mark.parametrize("between", [0, 2])
def test_a_failed_cell_is_named(tmp_path, between):
    """The message has the cell's number, source and error, and the notebook stays as it was."""
    path = notebook(tmp_path, *[f"x = {n}" for n in range(between)], "wrong = 1 / 0")
    before = path.read_bytes()
    with pytest.raises(PapermillExecutionError) as caught: run.execute(path, fast=True)
    place, source, traceback = describe("broken.ipynb", caught.value).split("\n\n", 2)
    assert place == f"broken.ipynb: cell {between + 2}: ZeroDivisionError: division by zero"
    assert source == "wrong = 1 / 0" and "ZeroDivisionError" in traceback
    assert path.read_bytes() == before


# ---------------------------------------------------------------- stored outputs

def notebook(folder: Path, *sources: str) -> Path:
    """A notebook with a parameters cell and these."""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in ("fast = True", *sources)])
    nb.cells[0].metadata["tags"] = ["parameters"]
    nb.metadata["kernelspec"] = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nb, folder / "small.ipynb")
    return folder / "small.ipynb"


@pytest.mark.parametrize("path", run.notebooks(), ids=lambda path: str(path.relative_to(run.NBS)))
def test_stored_outputs_belong_to_the_cells_they_stand_under(path):
    nb = nbformat.read(path, 4)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    ran = nb.metadata.get("ecomopt", {}).get("cells", [])
    assert ran or not code, "it was never executed in full: `make run`"
    changed = {key for key, cell in zip(run.cell_keys(nb), code) if cell.outputs} - set(ran)
    assert not changed, "its code was changed after it was executed: `make run`"


def test_a_run_stores_what_a_reader_needs(tmp_path, monkeypatch):
    """Outputs of a full run, without stderr and places of this machine, and how they came about."""
    path = notebook(
        tmp_path, "import sys, tempfile\nprint('oh', file=sys.stderr)\nprint(fast, tempfile.mkdtemp())\n6 * 7"
    )
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "module_file", lambda name: None)
    run.run([path])
    nb = nbformat.read(path, 4)
    text, value = nb.cells[1].outputs
    assert text.text == "False …\n" and value.data["text/plain"] == "42"
    assert len(nb.cells) == 2 and nb.cells[1].execution_count is None
    ran = nb.metadata["ecomopt"]
    assert (
        ran.keys() == {"cells", "modules", "date", "cpu", "seconds", "cell_seconds", "versions"}
        and len(ran["cell_seconds"]) == 2
    )
    assert not run.is_stale(nb)
    nb.cells[1].source += " + 1"
    assert run.is_stale(nb)


def test_captions_do_not_make_outputs_stale():
    """What only changes the looks of a page does not count; what changes what is run or exported does."""
    def keys(source: str) -> list[str]:
        return run.cell_keys(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]))

    looks = '#| fig-cap: "A"\n#| fig-alt:\n#|   - "B\n#|     C"\n#| code-fold: true\n#| label: fig-x\n'
    assert keys(looks + "f()") == keys("f()")
    for other in ("#| export\nf()", "#| eval: false\nf()", looks + "g()", "#  a comment\nf()"):
        assert keys(other) != keys("f()")
    assert keys(looks + "#| export\nf()") == keys("#| export\nf()")


def test_an_edit_during_the_run_is_not_overwritten(tmp_path):
    path = notebook(tmp_path, "1")
    executed = run.execute(path, fast=False)
    notebook(tmp_path, "2")
    with pytest.raises(ValueError, match="edited while"): run.store(path, executed, 1.0)
    assert nbformat.read(path, 4).cells[1].outputs == []


def test_a_changed_module_makes_all_that_import_it_stale(tmp_path, monkeypatch):
    """Also through other modules: 12_train imports core.data, which imports core.assets. nbdev's comments do not."""
    nb = nbformat.read(run.NBS / "core" / "12_train.ipynb", 4)
    files, before = {}, run.modules_key(nb)
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *args: real(self, *args) + files.get(self.name, ""))
    for text, same in (("# %% ../../nbs/core/10_assets.ipynb #1\n", True), ("x = 1\n", False)):
        files["assets.py"] = text
        assert (run.modules_key(nb) == before) is same
    files.clear()
    files["gp.py"] = "x = 1\n"
    assert run.modules_key(nb) == before


def test_what_only_refuses_or_explains_does_not_make_outputs_stale():
    plain = run.essence("def f(x=1):\n    return x")
    same = [
        'def f(x: int = 1) -> int:\n    "One."\n    return x  # itself',
        "def f(x=1):\n    if x < 0:\n        do = 'Give another.'\n        raise ValueError(do)\n    return x",
    ]
    other = [
        "def f(x=2):\n    return x",
        "def f(x=1):\n    if x < 0: return 0\n    return x",
        "def f(x=1):\n    if x < 0: raise ValueError\n    else: x = 2\n    return x",
        "def f(x=1):\n    if (x := 2) < 0: raise ValueError\n    return x",
        "def f(x=1):\n    'One.'.split(x)\n    return x",
        "def f(x=1):\n    if x < 0:\n        if x: return 2\n        raise ValueError\n    return x",
        "def f(x=1):\n    if x.pop(): raise ValueError\n    return x",
    ]
    typed, other_type = ("@register_step('f')\ndef f(x: %s = 1): return x" % kind for kind in ("int", "float"))
    assert run.essence(typed) != run.essence(other_type)  # the decorator may read them
    assert {run.essence(text) for text in same} == {plain}
    assert plain not in {run.essence(text) for text in other}
