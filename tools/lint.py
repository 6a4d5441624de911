"""The rules of CONTRIBUTING.md, checked: `python tools/lint.py` prints each place that breaks one.

A place in a notebook is `path: cell N: what`, all cells counted from 1; in a script, `path: line N: what`.
"""
import ast
import io
import json
import re
import sys
import tokenize
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Iterator

from IPython.core.inputtransformer2 import TransformerManager

from ecomopt import _HOME_OF

ROOT = Path(__file__).resolve().parents[1]
TECHNIQUE = {"core", "compress", "accelerate", "tune", "optimize"}
TOUR = {"", "start"}  # the index and the quickstart show what comes later
MACHINERY = 10  # notebooks of lower numbers explain no technique: the package, its checks
MAX_LINES, MAX_MEDIAN, CELLS, EXERCISES = 25, 6, range(20, 71), range(3, 6)
MAX_VALUE = 30  # characters of a value in `a, b = x, y`
MAX_OUTPUTS = 1_000_000  # bytes of the stored outputs of a notebook
IMPORTS = (ast.Import, ast.ImportFrom)

# Written in two parts, so that this file does not find itself.
UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|NotImplemented" r"Error)\b")
MACHINE_PATH = re.compile(r"(?<![\w.])/(work|tmp|home|root)/")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
PIP = re.compile(r"^\s*[!%].*\bpip\b|^%%(?s:.*)\bpip install\b", re.M)
TIME = re.compile(
    r"\b(\w*(seconds|latency|elapsed|duration|speedup|throughput|perf_counter)\w*"
    r"|\w+_(ms|per_s)|p(50|95|99)\w*|time\.\w+)\b"
)
Finding = tuple[int, str]  # the number of the cell, 0 for the notebook as a whole; what is wrong


class Cell:
    """One cell, with what the rules ask of it."""

    def __init__(self, number: int, raw: dict):
        self.number, self.raw = number, raw
        self.text = "".join(raw["source"])
        self.is_code = raw["cell_type"] == "code"
        self.is_parameters = "parameters" in raw["metadata"].get("tags", [])
        self.directives = {key: value.strip() for key, value in re.findall(r"^#\|\s*([\w-]+):?(.*)$", self.text, re.M)}
        self.lines = [line for line in self.text.splitlines() if not line.startswith("#|")]
        self.outputs = raw.get("outputs", [])

    @cached_property
    def tree(self) -> ast.Module:
        """The cell's Python, its magics turned into calls as IPython does; empty for text."""
        return ast.parse(TransformerManager().transform_cell(self.text) if self.is_code else "")

    def nodes(self, *types: type) -> list:
        """All nodes of these types, nested ones too."""
        return [node for node in ast.walk(self.tree) if isinstance(node, types)]

    @property
    def has_imports(self) -> bool: return any(isinstance(node, IMPORTS) for node in self.tree.body)

    @property
    def exported(self) -> bool: return not self.directives.keys().isdisjoint({"export", "exporti", "exports"})

    @property
    def folded(self) -> bool: return self.directives.get("code-fold") == "true"

    @property
    def hidden(self) -> bool:
        off = "false" in (self.directives.get("include"), self.directives.get("echo"))
        return off or not self.directives.keys().isdisjoint({"hide", "hide_input"})


@dataclass
class Notebook:
    """A notebook and its place in the book: `core/11_data.ipynb` is number 11, in the folder `core`."""

    path: Path  # below nbs/
    cells: list[Cell]

    @classmethod
    def read(cls, file: Path, nbs: Path) -> "Notebook":
        cells = json.loads(file.read_text(encoding="utf8"))["cells"]
        return cls(file.relative_to(nbs), [Cell(number, cell) for number, cell in enumerate(cells, 1)])

    @property
    def code(self) -> list[Cell]: return [cell for cell in self.cells if cell.is_code]

    @property
    def folder(self) -> str: return "/".join(self.path.parts[:-1])

    @property
    def number(self) -> int: return int(re.match(r"\d*", self.path.name)[0] or 1000)  # no number: after all others

    @property
    def module(self) -> str: return ".".join([*self.path.parts[:-1], re.sub(r"^\d+_", "", self.path.stem)])

    @property
    def is_technique(self) -> bool: return self.folder in TECHNIQUE and self.number >= MACHINERY

    @property
    def title(self) -> str: return self.cells[0].text.partition("\n")[0] if self.cells else ""


# ---------------------------------------------------------------- the rules

def layers(nb: Notebook, floors: dict[str, int]) -> Iterator[Finding]:
    """A notebook imports only from notebooks with lower numbers; outside exported cells also from its own module."""
    if nb.folder in TOUR: return
    for cell in nb.code:
        for name in sorted(imported(cell)):
            floor = floors.get(_HOME_OF.get(name) or ".".join(name.split(".")[:2]), 0)
            if floor > nb.number or (floor == nb.number > 0 and cell.exported):
                yield cell.number, f"imports {name} of notebook {floor}; a notebook imports only from lower numbers"


def imported(cell: Cell) -> set[str]:
    """What a cell takes from the package: `core.data.Task` from its module, `Task` from the top."""
    names = {ast.unparse(node) for node in cell.nodes(ast.Attribute)}  # ecomopt.distill(…)
    for node in set(cell.nodes(*IMPORTS)) - {child for block in typing_only(cell.tree) for child in ast.walk(block)}:
        prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        names |= {prefix + alias.name for alias in node.names}
    return {name.removeprefix("ecomopt.") for name in names if name.startswith("ecomopt.")}


def typing_only(tree: ast.Module) -> list[ast.If]:
    """The blocks that only editors and type checkers read: `if TYPE_CHECKING:`."""
    return [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]


def header(nb: Notebook) -> Iterator[Finding]:
    """Title and sentence, `default_exp`, parameters, sizes, imports: in this order."""
    if not nb.cells or not re.match(r"# .+\n\n> .+", nb.cells[0].text):
        yield 1, "the first cell is `# Title`, an empty line and `> one sentence`"
    rest = list(nb.code)
    exports = [cell for cell in rest if "default_exp" in cell.directives]
    if exports:
        module = nb.module if nb.number else "__init__"
        if len(exports) > 1 or nb.cells[1] is not exports[0]:
            yield exports[-1].number, "one `#| default_exp` cell, second in the notebook"
        if exports[0].directives["default_exp"] != module:
            yield exports[0].number, f"the place of this notebook asks for `#| default_exp {module}`"
        rest.remove(exports[0])
    elif any(cell.exported for cell in rest):
        yield 1, "exports code and has no `#| default_exp` cell"
    if not rest: return
    parameters = [cell for cell in rest if cell.is_parameters]
    if len(parameters) not in (1, 2):
        yield 0, f"one cell tagged `parameters`, and one for the sizes if they differ; not {len(parameters)}"
        return
    first, *sizes = parameters
    if not re.fullmatch(r"fast = True *(#.*)?", first.text):
        yield first.number, "the parameters cell says `fast = True` and nothing else"
    if rest[:len(parameters)] != parameters:
        yield first.number, "the parameters, then the sizes, are the first code cells after `default_exp`"
    elif any(cell.has_imports for cell in rest) and not rest[len(parameters)].has_imports:
        yield rest[len(parameters)].number, "the imports come right after the parameters and sizes"
    for cell in rest:
        if cell not in parameters and any(node.id == "fast" for node in cell.nodes(ast.Name)):
            yield cell.number, "`fast` is asked for; the sizes for fast and full stand in the cell below the parameters"


def imports(nb: Notebook) -> Iterator[Finding]:
    """Imports are explicit and alone in their cell."""
    for cell in nb.code:
        if cell.has_imports and not all(isinstance(node, IMPORTS) for node in cell.tree.body):
            yield cell.number, "imports stand alone in their cell"
        if any(alias.name == "*" for node in cell.nodes(ast.ImportFrom) for alias in node.names):
            yield cell.number, "`import *`"


def size(nb: Notebook) -> Iterator[Finding]:
    """Short cells; a technique in 20 to 70 of them."""
    for cell in nb.code:
        classes = cell.nodes(ast.ClassDef)
        whole = len(cell.tree.body) == 1 and (classes or typing_only(cell.tree))  # one class, or a table of imports
        if len(cell.lines) > MAX_LINES and not whole:
            yield cell.number, f"{len(cell.lines)} lines of code; at most {MAX_LINES}"
        for method in (node for one in classes for node in one.body if isinstance(node, ast.FunctionDef)):
            lines = method.end_lineno - method.lineno + 1
            if lines > MAX_LINES: yield cell.number, f"{method.name} has {lines} lines; at most {MAX_LINES}"
    if not nb.is_technique: return
    middle = median([len(cell.lines) for cell in nb.code if not cell.exported] or [0])
    if middle > MAX_MEDIAN:
        yield 0, f"code cells that export nothing have a median of {middle:g} lines; at most {MAX_MEDIAN}"
    if len(nb.cells) not in CELLS: yield 0, f"{len(nb.cells)} cells; a technique has {CELLS[0]} to {CELLS[-1]}"


def never(nb: Notebook) -> Iterator[Finding]:
    """What no cell has."""
    for cell in nb.cells:
        if MACHINE_PATH.search(cell.text): yield cell.number, "a path of one machine; use tempfile or a relative path"
        if CONTROL.search(cell.text):
            yield cell.number, "a control character, perhaps from a \\b or \\f that was meant for TeX"
        if UNFINISHED.search(cell.text): yield cell.number, "an unfinished place"
    for cell in nb.code:
        asserts = cell.nodes(ast.Assert)
        if PIP.search(cell.text): yield cell.number, "a pip cell; requirements are in settings.ini"
        if cell.directives.get("eval") == "false": yield cell.number, "`#| eval: false`: the tests run it all the same"
        if cell.hidden and asserts: yield cell.number, "a hidden assertion"
        if sets_filter(cell.tree): yield cell.number, "a warning filter outside `with warnings.catch_warnings()`"
        for node in asserts:
            if about_time(node): yield cell.number, f"depends on the machine's speed: {ast.unparse(node)}"


def layout(nb: Notebook) -> Iterator[Finding]:
    """Code that reads top to bottom, one thing a line; methods stand in their classes."""
    for cell in nb.code:
        yield from ((cell.number, what) for what in crowded(cell.tree))
        for node in cell.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if any(
                isinstance(t, ast.Attribute) and t.attr != t.attr.upper() and ast.unparse(t.value)[:1].isupper()
                for t in targets
            ):
                yield cell.number, f"a method or attribute put into a class from outside: {ast.unparse(node)[:50]}"
        for node in (child for one in cell.nodes(ast.ClassDef) for child in one.body if isinstance(child, ast.Assign)):
            if re.search(r"\blambda\b", text := ast.unparse(node)) or re.search(r"= .*(?<![\w.'\"])_[a-z]\w*", text):
                yield cell.number, f"write the method in the class: {text[:50]}"


def crowded(tree: ast.AST) -> Iterator[str]:
    """What is too much for one line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            inside = [part for argument in (*node.args, *node.keywords) for part in ast.walk(argument)]
            if any(isinstance(part, ast.NamedExpr) for part in inside):
                yield f"a walrus inside a call: {ast.unparse(node)[:50]}"
        if isinstance(node, ast.Expr) and isinstance(node.value, (ast.ListComp, ast.SetComp, ast.DictComp)):
            if node is not tree.body[-1]: yield f"a comprehension for its side effects: {ast.unparse(node)[:50]}"
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Tuple)
            and isinstance(node.targets[0], ast.Tuple)
        ):
            if any(len(ast.unparse(value)) > MAX_VALUE for value in node.value.elts):
                yield f"several assignments in one line, one of them long: {ast.unparse(node)[:50]}"
        for block in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if isinstance(block, list) and len({one.lineno for one in block}) < len(block):
                yield f"two statements in one line: {ast.unparse(block[0])[:50]}"


def stored(nb: Notebook) -> Iterator[Finding]:
    """Stored outputs are what a reader needs: no warnings, widgets, paths; described figures; not too much."""
    for cell in nb.code:
        text = json.dumps(cell.outputs)
        if cell.raw["execution_count"] is not None:
            yield cell.number, "has an execution count; `make export` removes it"
        if any(out.get("name") == "stderr" for out in cell.outputs): yield cell.number, "stores what went to stderr"
        if "application/vnd.jupyter.widget" in text: yield cell.number, "stores the state of a widget"
        if any(out.get("output_type") == "error" for out in cell.outputs): yield cell.number, "stores an error"
        if MACHINE_PATH.search(text): yield cell.number, "stores a path of one machine"
        if any(kind.startswith("image/") for out in cell.outputs for kind in out.get("data", {})):
            missing = [name for name in ("fig-cap", "fig-alt") if name not in cell.directives]
            if missing: yield cell.number, f"a figure without `#| {'`, `#| '.join(missing)}`"
    size = sum(len(json.dumps(cell.outputs)) for cell in nb.code)
    if size > MAX_OUTPUTS: yield 0, f"stores {size:,} bytes of outputs; at most {MAX_OUTPUTS:,}"


def sets_filter(node: ast.AST) -> bool:
    """Is a warning filter set that outlives its block?"""
    if isinstance(node, ast.With) and any("catch_warnings" in ast.unparse(item) for item in node.items): return False
    is_filter = isinstance(node, ast.Call) and re.search(r"\b(filterwarnings|simplefilter)$", ast.unparse(node.func))
    return bool(is_filter) or any(map(sets_filter, ast.iter_child_nodes(node)))


def about_time(node: ast.Assert) -> bool:
    """Does an assertion depend on speed? Signs, and the order of the percentiles of one measurement, do not."""
    for part in ast.walk(node):
        if not isinstance(part, ast.Compare): continue
        if not any(isinstance(op, (ast.Lt, ast.LtE, ast.Gt, ast.GtE)) for op in part.ops): continue
        operands = [ast.unparse(operand) for operand in (part.left, *part.comparators)]
        different = {re.sub(r"\bp\d+", "p", operand) for operand in operands if operand != "0"}
        if len(different) > 1 and TIME.search(ast.unparse(part)): return True
    return False


def sources(nb: Notebook) -> Iterator[Finding]:
    """A source is a list of lines: Quarto loses the newlines of a single string."""
    for cell in nb.cells:
        if cell.raw["source"] != cell.text.splitlines(keepends=True):
            yield cell.number, "the source is not a list of lines"


def documented(nb: Notebook) -> Iterator[Finding]:
    """Every public name of the library has a docstring, type hints, and a comment beside each parameter."""
    for cell in nb.code:
        if not cell.exported: continue
        tokens = tokenize.generate_tokens(io.StringIO(cell.text).readline)
        comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
        for node in cell.tree.body:
            for what in undocumented(node, comments): yield cell.number, what


def undocumented(node: ast.AST, comments: set[int], owner: ast.ClassDef | None = None) -> Iterator[str]:
    """What the documentation of a definition lacks; `comments` are the lines of the cell that have one."""
    if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)): return
    is_init = node.name == "__init__"
    if node.name.startswith("_") and not is_init: return
    name = f"{owner.name}.{node.name}" if owner else node.name
    if not is_init and not ast.get_docstring(node): yield f"{name} has no docstring"
    if isinstance(node, ast.ClassDef):
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            fields = [child for child in node.body if isinstance(child, ast.AnnAssign)]
            yield from (f"{name}: no comment beside the field {field.target.id}" for field in bare(fields, comments))
        for child in node.body: yield from undocumented(child, comments, node)
        return
    if owner and owner.bases and not is_init: return  # the base says what an override takes and returns
    args = [arg for arg in (*node.args.args, *node.args.kwonlyargs) if arg.arg not in ("self", "cls")]
    yield from (f"{name}: no type hint for {arg.arg}" for arg in args if not arg.annotation)
    if not node.returns and not is_init: yield f"{name}: no type hint for what it returns"
    yield from (f"{name}: no comment beside the parameter {arg.arg}" for arg in bare(args, comments))


def bare(nodes: list, comments: set[int]) -> list:
    """The nodes without a comment on lines of their own."""
    starts = [node.lineno for node in nodes]
    return [node for node in nodes if starts.count(node.lineno) > 1
            or comments.isdisjoint(range(node.lineno, node.end_lineno + 1))]


def ending(nb: Notebook) -> Iterator[Finding]:
    """A technique ends with exercises, each with a check and a folded solution, and with references."""
    if not nb.is_technique: return
    heading, sections = None, {"Exercises": [], "References": []}
    for cell in nb.cells:
        if not cell.is_code: heading = [heading, *re.findall(r"^## (.+)", cell.text, re.M)][-1]
        sections.setdefault(heading, []).append(cell)
    for wanted in ("Exercises", "References"):
        if not sections[wanted]: yield 0, f"no `## {wanted}` section"
    if not (cells := sections["Exercises"]): return
    solutions = [cell for cell in cells if cell.folded]
    checks = [cell for cell in cells if not cell.folded and cell.nodes(ast.Assert)]
    if len(solutions) not in EXERCISES:
        wanted = f"{EXERCISES[0]} to {EXERCISES[-1]}"
        yield cells[0].number, f"{len(solutions)} folded solutions (`#| code-fold: true`), not {wanted}"
    if len(checks) < len(solutions):
        yield cells[0].number, f"{len(solutions)} solutions and {len(checks)} cells that check them with `assert`"


RULES = [header, imports, size, never, layout, stored, sources, documented, ending]


# ---------------------------------------------------------------- the findings

def lint(nb: Notebook, floors: dict[str, int]) -> list[str]:
    """The findings of one notebook, in the order of its cells; `floors` has the number of each module."""
    found = [*layers(nb, floors), *(finding for rule in RULES for finding in rule(nb))]
    return [f"nbs/{nb.path}: {f'cell {number}: ' if number else ''}{what}" for number, what in sorted(found)]


def lint_book(nbs: Path = ROOT / "nbs") -> list[str]:
    """The findings of all notebooks; no two share a title or a number."""
    files = [file for file in sorted(nbs.rglob("*.ipynb")) if ".ipynb_checkpoints" not in file.parts]
    book = [Notebook.read(file, nbs) for file in files]
    floors = {nb.module: nb.number for nb in book}
    found = [line for nb in book for line in lint(nb, floors)]
    for attribute in ("title", "number"):
        seen = {}
        for nb in book:
            other = seen.setdefault(getattr(nb, attribute), nb)
            if other is not nb: found.append(f"nbs/{nb.path}: cell 1: the same {attribute} as nbs/{other.path}")
    return found


def lint_script(file: Path, root: Path = ROOT) -> list[str]:
    """The findings of a Python file: unfinished places, and tests that are always skipped."""
    text = file.read_text(encoding="utf8")
    found = [(n, "an unfinished place") for n, line in enumerate(text.splitlines(), 1) if UNFINISHED.search(line)]
    for node in ast.walk(ast.parse(text)):
        marks = getattr(node, "decorator_list", [])
        skips = [mark for mark in marks if re.match(r"pytest\.mark\.skip\b", ast.unparse(mark))]
        if isinstance(node, (ast.Module, ast.FunctionDef)):
            skips += [line for line in node.body if re.match(r"pytest\.skip\(", ast.unparse(line))]
        found += [(skip.lineno, "a test that is always skipped") for skip in skips]
    return [f"{file.relative_to(root)}: line {number}: {what}" for number, what in sorted(found)]


def lint_all() -> list[str]:
    """The findings of the repository."""
    files = [file for folder in ("tests", "tools", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))]
    return lint_book() + [line for file in files for line in lint_script(file)]


if __name__ == "__main__":
    findings = lint_all()
    print(*findings, sep="\n")
    sys.exit(bool(findings))
