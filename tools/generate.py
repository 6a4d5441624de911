"""What is made from something else: the README, the results in it, and the imports that only editors read.

    python -m tools.generate        each anew, where it is not what it should be
"""
import ast
import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import nbformat

from tools.charts import number, tradeoff
from tools.run import NBS, ROOT, write

INDEX, PACKAGE, QUICKSTART = (
    NBS / "index.ipynb",
    NBS / "core" / "00_package.ipynb",
    NBS / "start" / "01_quickstart.ipynb",
)
FIGURE, TRADEOFF = NBS / "quickstart.png", NBS / "tradeoff.svg"
STACK = ROOT / "benchmarks" / "results" / "compress.json"
ONE_CALL = STACK.with_name("optimize.json")
HIDDEN = re.compile(r"^#\|\s*(hide|include:\s*false|echo:\s*false|default_exp)", re.M)
LINK = re.compile(r"(\]\()(?![a-z]+:|#)")  # a link or image to a file; a file of the index lies in nbs/
BLOCK = re.compile(r"(<!-- (?P<name>\w+) -->\n)(?:(?!<!--).)*(\n<!-- end -->)", re.S)


# ---------------------------------------------------------------- the quickstart in the README

def quickstart() -> list:
    "The code cells of the quickstart."
    return [cell for cell in nbformat.read(QUICKSTART, 4).cells if cell.cell_type == "code"]


def code() -> str:
    "The lines of the quickstart that a reader types: its cells tagged `readme`."
    lines = "\n".join(cell.source for cell in quickstart() if "readme" in cell.metadata.get("tags", []))
    return "```python\n" + re.sub(r"^#\|.*\n", "", lines, flags=re.M) + "\n```"


def outputs(kind: str) -> list[str]:
    "The stored outputs of one kind, such as `text/html`."
    found = (out.get("data", {}).get(kind) for cell in quickstart() for out in cell.outputs)
    return [data for data in found if data]


def results() -> str:
    "The last table of the quickstart, in Markdown."
    html = outputs("text/html")[-1]
    table = ElementTree.fromstring(re.search(r"<table.*</table>", html, re.S)[0])
    rows = [[(cell.text or "").strip() for cell in row] for row in table.iter("tr")]
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + ":--|" + "--:|" * (len(rows[0]) - 1), *body])


def conditions() -> str:
    "When and where the quickstart was executed."
    ran = nbformat.read(QUICKSTART, 4).metadata["ecomopt"]
    return f"Measured {ran['date']} on {ran['cpu']}, by the [quickstart](start/01_quickstart.ipynb)."


def stack() -> dict:
    "The stored results of the benchmark of whole chains: this library beside other tools."
    return json.loads(STACK.read_text("utf8"))


def points() -> list[dict]:
    "Single models of that benchmark that are not eager as points of the figure; the first is the teacher."
    rows = [row for row in stack()["table"] if row.get("p50 ms") and row.get("accuracy")]
    found = {}
    for n, row in enumerate(rows):
        if n and re.search("eager|cascade", row["model"]): continue
        kind = row["model"].replace(" weights", "")  # of two kinds of int8 in one runtime, the faster
        if row["× throughput"] <= found.get(kind, {"speedup": 0})["speedup"]: continue
        found[kind] = {
            "name": row["model"] if n else "teacher", "accuracy": row["accuracy"], "latency": row["p50 ms"],
            "speedup": row["× throughput"], "bytes": 1e6 * row["MB"], "ours": row["model"].startswith("ours")}
    return list(found.values())


def summary() -> str:
    "What the benchmark says, in a sentence: the fastest model of ours that keeps 99 %, or most, beside its teacher."
    teacher, *others = points()
    ours = [point for point in others if point["ours"]]
    enough = [point for point in ours if point["accuracy"] >= 0.99 * teacher["accuracy"]]
    best = max(enough, key=lambda p: p["speedup"]) if enough else max(ours, key=lambda p: p["accuracy"])
    sizes = [number(point["bytes"] / 1e6) for point in (best, teacher)]
    kept, about = best["accuracy"] / teacher["accuracy"], stack()
    verdicts = next(row for row in about["table"] if row["model"] == best["name"])
    faster = f"{number(best['speedup'])} times as fast as its teacher in batches"
    faster += f" and {number(verdicts['× p50'])} times with one text alone"
    return (f"On real Amazon reviews, *{best['name']}* is {faster}, takes {sizes[0]} MB in place of {sizes[1]}, and "
            f"keeps {kept:.1%} of the accuracy (mean of {len(about['seeds'])} seeds, {about['machine']}, "
            f"{about['date']}). Is the drop below two points? By seeds: {verdicts['at 2 points']}. Below one? "
            f"{verdicts['at 1 point']}. (*Not resolvable*: the test sentences are too few to tell.)\n\n{one_call()}")


def one_call() -> str:
    "What the benchmark of `optimize` says of its search by latency."
    about = json.loads(ONE_CALL.read_text("utf8"))
    found = next(row for row in about["table"] if row["model"] == "ours, by latency")
    return (f"What one call finds in twenty minutes, `optimize` with at most one point of drop, for one text alone: "
            f"{number(found['× p50'])} times as fast, 1/{number(found['1/× bytes'])} of the bytes, "
            f"{found['retained']:.1%} of the accuracy; below one point, by seeds: {found['at 1 point']}.")


BLOCKS = {"code": code, "results": results, "conditions": conditions, "summary": summary}


def filled(index: nbformat.NotebookNode, blocks: dict[str, Callable[[], str]] = BLOCKS) -> nbformat.NotebookNode:
    "The index with what stands between `<!-- name -->` and `<!-- end -->` made anew."
    for cell in index.cells:
        cell.source = BLOCK.sub(lambda m: m[1] + blocks[m["name"]]() + m[3], cell.source)
    return index


def readme(index: Path = INDEX) -> str:
    "The Markdown of the index notebook as a README."
    parts = []
    for cell in json.loads(index.read_text(encoding="utf8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(LINK.sub(r"\1nbs/", text).replace("](nbs/../", "]("))
        elif not HIDDEN.search(text) and "parameters" not in cell["metadata"].get("tags", []):
            parts.append("```python\n" + re.sub(r"^#\|.*\n", "", text, flags=re.M) + "\n```")
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------- the imports for editors

def typing_block(package: nbformat.NotebookNode) -> str:
    "The cell of imports that only editors read, from the table of homes."
    table = next(cell.source for cell in package.cells if "\n_HOMES = {" in cell.source)
    homes = ast.literal_eval(re.search(r"_HOMES = (\{.*?\n\})", table, re.S)[1])
    lines = sorted(
        f"    from ecomopt.{module} import {name} as {name}"
        for module, names in homes.items()
        for name in names.split()
    )
    return "#| export\nif TYPE_CHECKING:  # made by `make export` from the table above\n" + "\n".join(lines)


def with_typing_block(package: nbformat.NotebookNode) -> nbformat.NotebookNode:
    "The package's notebook with that cell made anew."
    cell = next(cell for cell in package.cells if "if TYPE_CHECKING:" in cell.source and cell.cell_type == "code")
    cell.source = typing_block(package)
    return package


def main() -> None:
    "Make all of it anew."
    write(with_typing_block(nbformat.read(PACKAGE, 4)), PACKAGE)
    write(filled(nbformat.read(INDEX, 4)), INDEX)
    FIGURE.write_bytes(base64.b64decode(outputs("image/png")[-1]))
    TRADEOFF.write_text(tradeoff(points()), encoding="utf8")
    (ROOT / "README.md").write_text(readme(), encoding="utf8")


if __name__ == "__main__":
    main()
