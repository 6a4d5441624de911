"""The lint: every notebook keeps the rules, and each rule is seen to fire on a small notebook that breaks it."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.lint import ROOT, Cell, Notebook, lint, lint_all, lint_book, lint_script

FLOORS = {"core.data": 11, "core.train": 12, "core.measure": 14, "compress.distill": 20}
HEADER = [
    "md:# Data\n\n> Rows that a model learns from.",
    "#| default_exp core.data",
    "params:fast = True",
    "import math",
]
FUNCTION = '''#| export
def halve(
    x: float,  # any number
) -> float:  # half of it
    "Half of `x`."
    return x / 2'''
EXERCISE = ["md:**1.** Halve a number.", "def check(f): assert f(4) == 2", "#| code-fold: true\ncheck(lambda x: x / 2)"]
ENDING = ["md:## Exercises", *EXERCISE * 3, "md:## References\n\nEuclid, *Elements*."]
GOOD = [*HEADER, FUNCTION, *["md:Two.", "assert halve(4) == 2"] * 3, *ENDING]


def raw(text: str) -> dict:
    """A cell as JSON, from "md:…", "params:…" or code."""
    kind, _, body = text.partition(":") if text.startswith(("md:", "params:")) else ("code", "", text)
    cell = dict(source=body.splitlines(keepends=True), metadata=dict(tags=["parameters"]) if kind == "params" else {})
    if kind == "md": return cell | dict(cell_type="markdown")
    return cell | dict(cell_type="code", outputs=[], execution_count=None)


def findings(cells: list[str], path: str = "core/11_data.ipynb") -> list[str]:
    return lint(Notebook(Path(path), [Cell(n, raw(text)) for n, text in enumerate(cells, 1)]), FLOORS)


def bad(*cells: str) -> list[str]:
    """The good notebook with cells put after the header, so the first of them is cell 5."""
    return [*HEADER, *cells, *GOOD[len(HEADER):]]


@pytest.mark.slow
def test_book_keeps_the_rules():
    found = lint_all()
    assert not found, "\n" + "\n".join(found)


def test_ruff_finds_nothing():
    checked = [name for name in ("nbs", "tests", "tools", "benchmarks") if (ROOT / name).exists()]
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", *checked]
    ran = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_good_notebook_has_no_findings():
    assert findings(GOOD) == []


BROKEN = {
    # layers
    "import from a higher module": (
        bad("from ecomopt.core.measure import measure"),
        "cell 5: imports core.measure.measure of notebook 14",
    ),
    "import of a higher module": (
        bad("from ecomopt.core import measure"),
        "cell 5: imports core.measure of notebook 14",
    ),
    "lazy name": (bad("from ecomopt import EcomoptError, distill"), "cell 5: imports distill of notebook 20"),
    "lazy attribute": (bad("import ecomopt", "ecomopt.distill(1)"), "cell 6: imports distill of notebook 20"),
    "plain import": (bad("import ecomopt.compress.distill"), "cell 5: imports compress.distill of notebook 20"),
    "import inside a function": (
        bad("def f():\n    from ecomopt import measure\n    return measure"),
        "cell 5: imports measure of notebook 14",
    ),
    "own module in the library": (
        bad("#| export\nfrom ecomopt.core.data import Task"),
        "cell 5: imports core.data.Task of notebook 11",
    ),
    # header
    "no title": (["md:Data", *GOOD[1:]], "cell 1: the first cell is `# Title`"),
    "no sentence": (["md:# Data", *GOOD[1:]], "cell 1: the first cell is `# Title`"),
    "wrong module": (
        [GOOD[0], "#| default_exp core.task", *GOOD[2:]],
        "cell 2: the place of this notebook asks for `#| default_exp core.data`",
    ),
    "late module": ([GOOD[0], *GOOD[2:], GOOD[1]], "one `#| default_exp` cell, second"),
    "no module": ([GOOD[0], *GOOD[2:]], "cell 1: exports code and has no"),
    "no parameters": (
        [*GOOD[:2], *GOOD[3:]],
        "one cell tagged `parameters`, and one for the sizes if they differ; not 0",
    ),
    "late sizes": (bad("params:rows = 1"), "cell 3: the parameters, then the sizes, are the first code cells"),
    "three parameter cells": (bad(*["params:rows = 1"] * 2), "one for the sizes if they differ; not 3"),
    "other parameter": ([*GOOD[:2], "params:slow = True", *GOOD[3:]], "cell 3: the parameters cell says `fast = True`"),
    "sizes in the parameters": (
        [*GOOD[:2], "params:fast = True\nrows = 1", *GOOD[3:]],
        "cell 3: the parameters cell says",
    ),
    "late parameters": (
        [*GOOD[:2], GOOD[3], GOOD[2], *GOOD[4:]],
        "cell 4: the parameters, then the sizes, are the first",
    ),
    "fast in the reader's code": (bad("rows = 1 if fast else 2"), "cell 5: `fast` is asked for"),
    "fast as a condition": (bad("if not fast: x = 1"), "cell 5: `fast` is asked for"),
    "late imports": ([*GOOD[:3], "x = 1", *GOOD[3:]], "cell 4: the imports come right after the parameters"),
    # imports
    "mixed cell": (bad("import os\n\nprint(os.name)"), "cell 5: imports stand alone"),
    "star": (bad("from math import *"), "cell 5: `import *`"),
    # size
    "long cell": (bad("x = 1\n" * 26), "cell 5: 26 lines of code"),
    "long method": (bad("class A:\n    def f(self):\n" + "        x = 1\n" * 26), "cell 5: f has 27 lines"),
    "long cell with a class": (bad("x = 1\nclass A:\n" + "    x = 1\n" * 26), "cell 5: 28 lines of code"),
    "long cells": (
        [*HEADER, *["x = 1\n" * 9] * 40, *ENDING],
        "code cells that export nothing have a median of 9 lines",
    ),
    "few cells": ([*HEADER, *ENDING], "15 cells; a technique has 20 to 70"),
    "many cells": (bad(*["x = 1"] * 60), "cells; a technique has 20 to 70"),
    # never
    "control character": (bad("md:4P/\beta"), "cell 5: a control character"),
    "pip magic": (bad("%pip install torch"), "cell 5: a pip cell"),
    "pip shell": (bad("!python -m pip install torch"), "cell 5: a pip cell"),
    "pip script": (bad("%%bash\npip install torch"), "cell 5: a pip cell"),
    "eval false": (bad("#| eval: false\nx = 1"), "cell 5: `#| eval: false`"),
    "hidden assertion": (bad("#| hide\nassert True"), "cell 5: a hidden assertion"),
    "assertion not included": (bad("#| include: false\nassert True"), "cell 5: a hidden assertion"),
    "assertion not echoed": (bad("#| echo: false\nassert True"), "cell 5: a hidden assertion"),
    "filter": (bad("warnings.filterwarnings('ignore')"), "cell 5: a warning filter"),
    "simple filter": (bad("if fast: warnings.simplefilter('ignore')"), "cell 5: a warning filter"),
    "latency": (bad("assert measurement.latency_ms < 20"), "cell 5: depends on the machine's speed"),
    "percentiles of two": (bad("assert student.p50 < teacher.p50"), "cell 5: depends on the machine's speed"),
    "speedup": (bad("assert ok and speedup > 5"), "cell 5: depends on the machine's speed"),
    "clock": (bad("assert time.time() - start < 1"), "cell 5: depends on the machine's speed"),
    "machine path": (bad("path = '/" "tmp/x'"), "cell 5: a path of one machine"),
    "machine path in text": (bad("md:See `/" "work/x`."), "cell 5: a path of one machine"),
    "unfinished": (bad("md:TO" "DO: more"), "cell 5: an unfinished place"),
    "not implemented": (bad("def f(): raise NotImplemented" "Error"), "cell 5: an unfinished place"),
    # layout
    "walrus in a call": (bad("print(x := 1)"), "cell 5: a walrus inside a call: print((x := 1))"),
    "walrus deep in a call": (bad("print([y for x in a if (y := x)])"), "cell 5: a walrus inside a call"),
    "side effects": (bad("[print(x) for x in a]\nx = 1"), "cell 5: a comprehension for its side effects"),
    "two long assignments": (
        bad("a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), 1"),
        "cell 5: several assignments in one line",
    ),
    "semicolon": (bad("a = 1; b = 2"), "cell 5: two statements in one line: a = 1"),
    "method from outside": (
        bad("Task.sample = _sample"),
        "cell 5: a method or attribute put into a class from outside",
    ),
    "method by a name": (bad("class A:\n    fit = _fit"), "cell 5: write the method in the class: fit = _fit"),
    "several by name": (bad("class A:\n    fit, tell = _fit, _tell"), "cell 5: write the method in the class"),
    "lambda": (bad("class A:\n    x = property(lambda self: 1)"), "cell 5: write the method in the class"),
    # documented
    "no docstring": (bad("#| export\ndef f() -> None: pass"), "cell 5: f has no docstring"),
    "class without docstring": (bad("#| export\nclass A: pass"), "cell 5: A has no docstring"),
    "method without docstring": (
        bad('#| export\nclass A:\n    "A."\n    def f(self) -> None: pass'),
        "cell 5: A.f has no docstring",
    ),
    "no hint": (bad('#| export\ndef f(\n    x,  # a number\n) -> None:\n    "F."'), "cell 5: f: no type hint for x"),
    "no return hint": (bad('#| export\ndef f():\n    "F."'), "cell 5: f: no type hint for what it returns"),
    "no comment": (
        bad('#| export\ndef f(\n    x: int,\n) -> None:\n    "F."'),
        "cell 5: f: no comment beside the parameter x",
    ),
    "shared comment": (
        bad('#| export\ndef f(\n    x: int, y: int,  # numbers\n) -> None:\n    "F."'),
        "cell 5: f: no comment beside the parameter x",
    ),
    "init without comment": (
        bad('#| export\nclass A:\n    "A."\n    def __init__(self, x: int): self.x = x'),
        "cell 5: A.__init__: no comment beside the parameter x",
    ),
    "field without comment": (
        bad('#| export\n@dataclass\nclass A:\n    "A."\n    x: int'),
        "cell 5: A: no comment beside the field x",
    ),
    # exercises
    "no exercises": ([*GOOD[:10], *["x = 1"] * 10, GOOD[-1]], "no `## Exercises` section"),
    "no references": (GOOD[:-1], "no `## References` section"),
    "two exercises": ([*GOOD[:-4], "md:x", GOOD[-1]], "2 folded solutions"),
    "solution without check": ([*GOOD[:-3], "md:x", *GOOD[-2:]], "3 solutions and 2 cells that check them"),
}


@pytest.mark.parametrize("cells, expected", BROKEN.values(), ids=BROKEN)
def test_rule_fires(cells, expected):
    assert any(expected in line for line in findings(cells)), findings(cells)


@pytest.mark.parametrize("cells", [
    bad("from ecomopt import EcomoptError"),
    bad("#| export\nfrom pathlib import Path"),
    bad("from ecomopt.core.data import Task"),  # a subprocess may need the notebook's own module
    bad("with warnings.catch_warnings():\n    warnings.simplefilter('ignore')"),
    bad("assert 0 < row.p50 <= row.p95 <= row.p99"),
    bad("assert 'latency' in table.columns and size < 5"),
    bad("#| hide\nx = 1"),
    bad("!ls\n%matplotlib inline"),
    bad("x = 1\n" * 25),
    bad("class A:\n" + "    x = 1\n" * 40),
    [*GOOD[:3], "params:rows = 1 if fast else 2", *GOOD[3:]],
    bad("a, b = 1, 2\nwhile (x := f()): print(x)"),
    bad("[x for x in a]"),
    bad("plt.plot();"),
    bad('#| export\ndef _private(x): return x'),
    bad('#| export\nclass A(dict):\n    "A."\n    def update(self, other): "As in dict."'),
])
def test_rule_does_not_fire(cells):
    assert findings(cells) == []


def test_quickstart_may_show_what_comes_later():
    tour = ["md:# Start\n\n> A tour.", "params:fast = True", "from ecomopt import distill"]
    assert findings(tour, "start/01_quickstart.ipynb") == []


@pytest.mark.parametrize(
    "change, expected",
    [
        (dict(source="x = 1\ny = 2"), "cell 5: the source is not a list of lines"),
        (dict(outputs=[dict(output_type="stream", name="stderr", text=["1"])]), "cell 5: stores what went to stderr"),
        (dict(outputs=[dict(output_type="error", ename="E")]), "cell 5: stores an error"),
        (
            dict(outputs=[dict(output_type="display_data", data={"application/vnd.jupyter.widget-view+json": {}})]),
            "cell 5: stores the state of a widget",
        ),
        (
            dict(outputs=[dict(output_type="stream", name="stdout", text=["see /root/x"])]),
            "cell 5: stores a path of one machine",
        ),
        (dict(outputs=[dict(output_type="stream", name="stdout", text=["x" * 1_000_001])]), "stores 1,000,0"),
        (dict(outputs=[dict(output_type="display_data", data={"image/png": ""})]), "cell 5: a figure without `#|"),
        (dict(execution_count=3), "cell 5: has an execution count"),
    ],
)
def test_rule_of_the_file_fires(change, expected):
    cells = [raw(text) for text in bad("x = 1")]
    cells[4] |= change
    found = lint(Notebook(Path("core/11_data.ipynb"), [Cell(n, cell) for n, cell in enumerate(cells, 1)]), FLOORS)
    assert len(found) == 1 and expected in found[0]


def test_titles_and_numbers_are_unique(tmp_path):
    for name in ("10_one", "10_two"):
        cells = [raw(text) for text in ("md:# Same\n\n> Sentence.", "params:fast = True")]
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(dict(cells=cells)))
    assert lint_book(tmp_path) == [
        f"nbs/10_two.ipynb: cell 1: the same {what} as nbs/10_one.ipynb" for what in ("title", "number")
    ]


@pytest.mark.parametrize("text, line", [
    ("x = 1\n# TO" "DO: y = 2", 2),
    ("def f():\n    raise NotImplemented" "Error", 2),
    ("import pytest\n@pytest.mark.skip\ndef test_x(): pass", 2),
    ("import pytest\n@pytest.mark.skip(reason='slow')\ndef test_x(): pass", 2),
    ("import pytest\ndef test_x():\n    pytest.skip('later')", 3),
    ("import pytest\npytest.skip('all', allow_module_level=True)", 2),
])
def test_unfinished_scripts_are_found(tmp_path, text, line):
    (tmp_path / "test_x.py").write_text(text)
    found = lint_script(tmp_path / "test_x.py", tmp_path)
    assert len(found) == 1 and found[0].startswith(f"test_x.py: line {line}: ")


def test_conditional_skips_are_fine(tmp_path):
    lines = [
        "import pytest", "@pytest.mark.skipif(True, reason='')", "def test_x():", "    if not 1: pytest.skip('none')"]
    (tmp_path / "test_x.py").write_text("\n".join(lines))
    assert lint_script(tmp_path / "test_x.py", tmp_path) == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "Makefile"])
def test_documents_name_no_machine(name):
    text = (ROOT / name).read_text(encoding="utf8")
    assert "/" "work/" not in text and "/" "tmp/" not in text
