"""Execute notebooks in full and store their outputs in place: those whose code, or whose modules, changed since.

    python tools/run.py                      what changed since it was last executed
    python tools/run.py 20_distill gp        of these, by a part of their names
    python tools/run.py --all                everything

A notebook is written when it has finished, so a run that was killed goes on where it was. The key of its sources,
the date, versions, CPU and seconds are kept in its metadata.
"""
import argparse
import ast
import functools
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import nbformat
import papermill
from nbdev.clean import clean_nb
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from traitlets.config import Config

from tools.bench import machine
from tools.lint import Cell, imported

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
PACKAGES = "ecomopt", "torch", "transformers"
SHARP = 'get_config().InlineBackend.figure_formats = {"retina"}'  # figures of twice the resolution
WIDGETS = "application/vnd.jupyter.widget-view+json"
# Directives that say how a page looks, and the lines that go on with one: outputs do not depend on them.
LOOKS = re.compile(r"^#\|\s*(?:fig|tbl|code|label|layout)\b.*\n?(?:^#\|  .*\n?)*", re.M)


def notebooks() -> list[Path]:
    "Every notebook of the book, in reading order."
    found = (path for path in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    return sorted(found, key=lambda path: (path.parent != NBS, path.name))


# ---------------------------------------------------------------- what a notebook depends on

def digest(texts: list[str]) -> str:
    "Sixteen hexadecimal digits that identify texts."
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def cell_keys(nb: nbformat.NotebookNode) -> list[str]:
    "Identify each code cell of a notebook; captions, alt texts and folds do not count."
    return [digest([LOOKS.sub("", cell.source)]) for cell in nb.cells if cell.cell_type == "code"]


@functools.cache
def homes() -> dict[str, str]:
    "The module of each name of the top level, read from the source: importing it would not see a change."
    tree = ast.parse((ROOT / "ecomopt" / "__init__.py").read_text("utf8"))
    table = next(ast.literal_eval(node.value) for node in tree.body
                 if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES")
    return {name: module for module, names in table.items() for name in names.split()}


def module_file(name: str) -> Path | None:
    "The file of what is imported by a name, such as `core.data.Task` or `Task`; None for the package itself."
    parts = homes().get(name, name).split(".")
    path = ROOT.joinpath("ecomopt", *parts[:2]).with_suffix(".py")
    return path if len(parts) > 1 and path.exists() else None


@functools.cache
def module_imports(path: Path) -> frozenset[Path]:
    "The modules of the package that a module imports, and theirs."
    found = {path}
    for node in ast.walk(ast.parse(path.read_text("utf8"))):
        if not isinstance(node, ast.ImportFrom): continue
        parts = (node.module or "").split(".")
        if not node.level and parts[0] != "ecomopt": continue
        base = (path.parents[node.level - 1] if node.level else ROOT).joinpath(*parts)
        names = [base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)]
        found.update(name for name in names if name.is_file() and name.name != "__init__.py")
    return frozenset(found.union(*(module_imports(other) for other in found - {path})))


EFFECTS = {"read", "readinto", "write", "pop"}  # methods that do more than to answer


def refuses(node: ast.AST) -> bool:
    "Is this an `if` that only raises? Whether other code catches the error, or a page prints it, is not seen."
    if not isinstance(node, ast.If) or node.orelse or not isinstance(node.body[-1], ast.Raise): return False
    parts = [*ast.walk(node.test), *(part for line in node.body for part in ast.walk(line))]
    leaves = ast.Return, ast.Yield, ast.Break, ast.Continue, ast.NamedExpr
    return not any(isinstance(part, leaves) or getattr(part, "attr", "") in EFFECTS for part in parts)


def is_text(node: ast.AST) -> bool:
    "Is this a docstring?"
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def essence(source: str) -> str:
    "A module without what cannot change the outputs of a run that passed: comments, docstrings, types and refusals."
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.decorator_list:  # decorators may read the types
            for part in ast.walk(node.args):
                if isinstance(part, ast.arg): part.annotation = None
            node.returns = None
        if isinstance(getattr(node, "body", None), list):
            node.body = [part for part in node.body if not refuses(part) and not is_text(part)]
    return ast.unparse(tree)


def modules_key(nb: nbformat.NotebookNode) -> str:
    "Identify what all modules that a notebook imports, directly or not, compute."
    cells = [Cell(number, cell) for number, cell in enumerate(nb.cells, 1)]
    files = {module_file(name) for cell in cells for name in imported(cell)} - {None}
    files = sorted(frozenset().union(*map(module_imports, files)))
    return digest([essence(file.read_text("utf8")) for file in files])


def is_stale(nb: nbformat.NotebookNode) -> bool:
    "Did the code, or a module that it imports, change since the notebook was executed?"
    ran = nb.metadata.get("ecomopt", {})
    return (ran.get("cells"), ran.get("modules")) != (cell_keys(nb), modules_key(nb))


# ---------------------------------------------------------------- execute

def execute(path: Path, fast: bool, cwd: Path | None = None) -> nbformat.NotebookNode:
    "Run a copy of a notebook; in the notebook's own folder, as JupyterLab does, if no other is given."
    scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # a process may outlive the kernel for a moment
    with scratch as folder, patch.dict(os.environ, IPYTHONDIR=folder, TMPDIR=f"{folder}/tmp"):
        Path(folder, "tmp").mkdir()  # what the notebook leaves behind goes with it
        profile = Path(folder, "profile_default")  # of this run, whatever IPython does for the user otherwise
        profile.mkdir()
        (profile / "ipython_kernel_config.py").write_text(SHARP)
        # the kernel's sockets: no port that others could reach
        sockets = Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}})
        options = {"kernel_name": "python3", "cwd": cwd or path.parent, "progress_bar": False, "config": sockets}
        return papermill.execute_notebook(path, None, {"fast": fast}, **options)


def portable(text: str) -> str:
    "Text without the places of this machine."
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/[\w.-]+(/tmp/[\w.-]+)?", "…", text)
    return text.replace(str(ROOT), ".").replace(str(Path.home()), "~")


def kept(outputs: list) -> list:
    "The outputs that are stored: no stderr, no state of widgets, no paths of this machine."
    found = []
    for out in outputs:
        if out.get("name") == "stderr" or WIDGETS in out.get("data", {}): continue
        if "text" in out: out["text"] = portable(out["text"])
        for kind, value in out.get("data", {}).items():
            if isinstance(value, str) and kind.startswith("text/"): out["data"][kind] = portable(value)
        found.append(out)
    return found


def store(path: Path, executed: nbformat.NotebookNode, seconds: float) -> None:
    "Put the outputs of an executed copy into the notebook, and say in its metadata how they came about."
    nb = nbformat.read(path, 4)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    ran = [
        cell
        for cell in executed.cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    if [cell.source for cell in code] != [cell.source for cell in ran]:
        raise ValueError("its code was edited while it was executed")
    for cell, copy in zip(code, ran): cell.outputs = kept(copy.outputs)
    nb.metadata["ecomopt"] = dict(
        cells=cell_keys(nb),
        modules=modules_key(nb),
        date=datetime.now(UTC).date().isoformat(),
        cpu=machine(),
        seconds=round(seconds),
        cell_seconds=[round(cell.metadata.get("papermill", {}).get("duration") or 0, 1) for cell in ran],
        versions={"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    )
    write(nb, path)


def write(nb: nbformat.NotebookNode, path: Path) -> None:
    "Write a notebook as nbdev cleans it, all of it or nothing."
    plain = json.loads(nbformat.writes(nb))
    clean_nb(plain, allowed_metadata_keys=["ecomopt"], allowed_cell_metadata_keys=["tags"], clean_ids=False)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(plain, indent=1, ensure_ascii=False, sort_keys=True) + "\n", "utf8")
    part.replace(path)


# ---------------------------------------------------------------- the command

def duration(seconds: float) -> str:
    "Seconds as minutes and seconds."
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def run(paths: list[Path]) -> None:
    "Execute notebooks in turn; a bar shows how many are done, and the time left by what each took last time."
    took = {path: nbformat.read(path, 4).metadata.get("ecomopt", {}).get("seconds", 60) for path in paths}
    console, expected, spent = Console(), 0.0, 0.0
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(paths))
        for path in paths:
            left = sum(took[other] for other in paths[paths.index(path):]) * (spent / expected if expected else 1)
            progress.update(bar, description=f"{path.relative_to(ROOT)}, about {duration(left)} left")
            start, note = time.perf_counter(), ""
            executed = execute(path, fast=False)
            seconds = time.perf_counter() - start
            try: store(path, executed, seconds)
            except ValueError as error: note = f": {error}; not stored, run it again"
            expected, spent = expected + took[path], spent + seconds
            console.print(f"{duration(seconds):>6}  {path.relative_to(ROOT)}{note}", highlight=False, soft_wrap=True)
            progress.advance(bar)


def main(words: list[str] | None = None) -> None:
    "Find what is to be executed, and execute it."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names of notebooks")
    parser.add_argument("--all", action="store_true", help="also what did not change")
    known = parser.parse_args(words)
    chosen = [
        path
        for path in notebooks()
        if not known.names or any(name in str(path.relative_to(NBS)) for name in known.names)
    ]
    todo = [path for path in chosen if known.all or is_stale(nbformat.read(path, 4))]
    print(f"{len(todo)} of {len(chosen)} notebooks are to be executed.", flush=True)
    run(todo)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(main())
