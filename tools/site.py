"""The site, in two steps: stage the notebooks with their stored outputs, render them. Nothing is executed.

    python tools/site.py           into _site/
"""
import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import nbformat
import pandas as pd
import yaml
from execnb.nbio import mk_cell, write_nb
from fastcore.docments import DocmentTbl
from math_core import LatexToMathML
from nbdev.process import NBProcessor, Processor
from nbdev.processors import add_show_docs, hide_

from tools.run import NBS, ROOT, duration, is_stale, notebooks

# ---------------------------------------------------------------- stage

MARKUP = re.compile(r"""
    (?P<code>
        ^[ ]*(?P<fence>`{3,}|~{3,}) .*? ^[ ]*(?P=fence)
      | (?P<ticks>(?<!`)`+(?!`)) .*? (?<!`)(?P=ticks)(?!`)
      | \\. )
  | \$\$ (?P<display> .+? ) \$\$
  | \$ (?=\S) (?P<inline> (?:[^$\n]|\n(?!\s*\n))+? ) (?<=\S) \$ (?!\d)
  | (?P<link> \]\( [^)\s]*? ) \d+_ (?P<page> \w+\.ipynb )
""", re.MULTILINE | re.DOTALL | re.VERBOSE)
TEX = LatexToMathML(fancy_error=False)


def mathml(tex: str, display: bool) -> str:
    "TeX as MathML, which needs no script; a `\\tag{n}` stands at the right, to link to as `#equation-n`."
    tag = re.search(r"\\tag\{(.+?)\}", tex)
    math = TEX.convert_with_local_state(tex.replace(tag[0], "") if tag else tex, displaystyle=display)
    # Punctuation as entities: Markdown has nothing to interpret inside.
    math = re.sub(r"(<[^>]*>|&\w+;)|[^\w\s]|_", lambda m: m[1] or f"&#{ord(m[0])};", math)
    number = f'<span id="equation-{tag[1]}">({tag[1]})</span>' if tag else ""
    return f'<span class="equation">{math}{number}</span>' if display else math


def translate(markdown: str) -> str:
    "Markdown with its math as MathML and its links to notebooks as the site names them; code stays as it is."
    def piece(m: re.Match) -> str:
        if m["code"]: return m["code"]
        if m["page"]: return m["link"] + m["page"]
        return mathml(m["display"] or m["inline"], display=bool(m["display"]))
    return MARKUP.sub(piece, markdown)


def folded(summary: str, markdown: str) -> str:
    "Markdown behind a line to click on."
    return f"<details>\n<summary>{summary}</summary>\n\n{markdown}\n\n</details>\n"


class references(Processor):
    "Turn the `show_doc` cells that nbdev adds below exported definitions into folded tables of their arguments."

    def begin(self):
        for cell in self.nb.cells:
            if "default_exp" in cell.directives_:
                name = cell.directives_["default_exp"][0]
                self.module = importlib.import_module("ecomopt" if name == "__init__" else f"ecomopt.{name}")

    def cell(self, cell):
        if not getattr(cell, "has_sd", False): return
        name = re.fullmatch(r"show_doc\((.+)\)", cell.source)[1]
        try: table = str(DocmentTbl(attrgetter(name)(self.module)))
        except NameError: table = ""  # a type in quotes that the module does not import: the code above says it all
        cell.update(cell_type="markdown", source=folded(f"{name}: arguments", table) if table else None)


class title(Processor):
    "Make `# Title` and `> sentence` the page's title and description."

    def begin(self):
        first = self.nb.cells[0]
        found = re.match(r"# (.+)\n+> ((?:.+\n?)+)", first.source)
        if not found: return
        front = {"title": found[1], "description": " ".join(found[2].split())}
        first.source = first.source[found.end():].strip() or None
        self.nb.cells.insert(0, mk_cell(f"---\n{yaml.safe_dump(front, allow_unicode=True)}---", "raw"))


class executed(Processor):
    "Say below the title when and where the page was executed, and whether its sources changed since."

    def begin(self):
        ran = self.nb.metadata.get("ecomopt")
        if not ran: return
        versions = ", ".join(f"{name} {number}" for name, number in ran["versions"].items())
        text = f"Executed {ran['date']} in {duration(ran['seconds'])} min on {ran['cpu']}; {versions}."
        if self.nb.stale:
            text += " <strong>The code has changed since: the outputs are those of the earlier code.</strong>"
        self.nb.cells.insert(1, mk_cell(f'<p class="executed">{text}</p>\n', "markdown"))


class tidy(Processor):
    "Leave what a reader needs: imports and sizes folded; neither `default_exp` nor `fast`."

    def cell(self, cell):
        if cell.cell_type != "code": return
        tags, lines = cell.metadata.get("tags", []), cell.parsed_() or []
        if cell.source.startswith("fast = True") or "default_exp" in cell.directives_: cell.source = None; return
        if "parameters" in tags: summary = "Sizes"
        elif lines and all(isinstance(line, (ast.Import, ast.ImportFrom)) for line in lines): summary = "Imports"
        else: return
        cell.source = f"#| code-fold: true\n#| code-summary: {summary}\n{cell.source}"


def texts(cell):
    "Translate the Markdown of a cell and of its outputs."
    if cell.cell_type == "markdown": cell.source = translate(cell.source)
    for out in cell.get("outputs", []):
        data = out.get("data", {})
        if "text/markdown" in data: data["text/markdown"] = translate("".join(data["text/markdown"]))


def staged_name(path: Path) -> Path:
    "Where a notebook stands on the site: `compress/20_distill.ipynb` becomes `compress/distill.ipynb`."
    path = path.relative_to(NBS)
    return path.with_name(re.sub(r"^\d+_", "", path.name))


def benchmarks(results: list[Path]) -> str:
    "The page of the benchmarks, from the results of full runs."
    page = ["---\ntitle: Benchmarks\ndescription: This library and what else you could use, in one run.\n---\n"]
    for path in results:
        result = json.loads(path.read_text("utf8"))
        table = pd.DataFrame(result.pop("table")).to_html(index=False, border=0, float_format="{:,.4g}".format)
        name, notes = result.pop("name"), result.pop("notes", [])
        page += [f"## {name}\n", *([notes] if isinstance(notes, str) else notes), f"\n```{{=html}}\n{table}\n```\n"]
        page += [folded("How it was run", f"```yaml\n{yaml.safe_dump(result, sort_keys=False)}```")]
    return "\n".join(page)


def architectures(table: dict[str, dict[str, str]]) -> str:
    "The page of what each step does with each architecture, from what `tools/architectures.py` found."
    reasons = {}
    for name, row in table.items():
        for step, found in row.items():
            if found != "works": reasons.setdefault((step, found.partition(": ")[2]), []).append(name)
    short = pd.DataFrame(table).T.map(lambda found: str(found).partition(":")[0]).to_html(border=0)
    return "\n".join([
        "---\ntitle: Architectures\ndescription: Which step works with which model, and why not.\n---\n",
        "Every step was tried on a small random model of every architecture. *Works* means that the logits stay what "
        "the step promises and that the result, saved and loaded, has the same logits. *Refused* means an error "
        "before anything is changed; the reasons are listed below the table. A test keeps this table true.\n",
        f"```{{=html}}\n{short}\n```\n",
        "## Reasons\n",
        *(f"* **{step}**, {', '.join(names)}: {why}" for (step, why), names in sorted(reasons.items())),
    ])


def stage(to: Path) -> None:
    "Write into `to` what Quarto and smalldocs read: the pages, the files beside them and `_quarto.yml`."
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(NBS, to, ignore=shutil.ignore_patterns("*.ipynb", ".*", "quickstart", "quickstart-fast"))
    for path in notebooks():
        page = NBProcessor(path, [add_show_docs, references, title, executed, hide_, tidy, texts])
        page.nb.stale = is_stale(nbformat.read(path, 4))
        page.process()
        page.nb.metadata = {"kernelspec": page.nb.metadata["kernelspec"]}
        write_nb(page.nb, to / staged_name(path))
    table = json.loads((NBS / "architectures.json").read_text("utf8"))
    (to / "architectures.qmd").write_text(architectures(table), "utf8")
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    if results: (to / "benchmarks.qmd").write_text(benchmarks(results), "utf8")
    config = (ROOT / "_quarto.yml").read_text("utf8").splitlines(keepends=True)
    (to / "_quarto.yml").write_text("".join(line for line in config if results or "benchmarks.qmd" not in line), "utf8")


# ---------------------------------------------------------------- render

# A font from the network: the system's do as well. An address may have semicolons of its own.
IMPORT = re.compile(r"""@import\s*(?:url\(\s*["']?https?:[^)]*\)|"https?:[^"]*"|'https?:[^']*')[^;]*;?""")
CDN = re.compile(
    r"""<script[^>]*src="https://[^>]*></script>\s*|<script[^>]*>\s*define\('jquery'.*?</script>\s*""", re.S
)


def render(staged: Path, site: Path) -> None:
    "Render with Quarto, or with smalldocs where there is none, and replace `site` when all went well."
    quarto = shutil.which("quarto")
    renderer = [quarto] if quarto else [sys.executable, "-m", "smalldocs.cli"]
    subprocess.run([*renderer, "render", staged], check=True)
    for file in (staged / "_site").rglob("*.css"): file.write_text(IMPORT.sub("", file.read_text("utf8")), "utf8")
    for file in (staged / "_site").rglob("*.html"): file.write_text(CDN.sub("", file.read_text("utf8")), "utf8")
    shutil.rmtree(site, ignore_errors=True)
    (staged / "_site").replace(site)


def build(staged: Path = ROOT / "_stage", site: Path = ROOT / "_site") -> Path:
    "Stage and render every notebook with its stored outputs."
    stage(staged)
    render(staged, site)
    return site


if __name__ == "__main__":
    print(build() / "index.html")
