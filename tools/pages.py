"""The pages that no notebook makes: the API reference, benchmarks, architectures, what is not found, and llms.txt."""
import ast
import configparser
import importlib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pandas as pd
import yaml
from fastcore.docments import DocmentTbl
from pygments import lex
from pygments.lexers import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, String
from typer import rich_utils
from typer.main import get_command
from typer.testing import CliRunner

from tools.bench import script
from tools.charts import bars, number
from tools.run import NBS, ROOT, homes, notebooks

SETTINGS = configparser.ConfigParser(inline_comment_prefixes=None)
SETTINGS.read(ROOT / "settings.ini", "utf8")
BRANCH = SETTINGS["DEFAULT"]["branch"]


def repository() -> str:
    "The address of the published repository: of the settings, or of the workflow that builds the site; or none."
    found = SETTINGS["DEFAULT"].get("git_url")
    if not found and "GITHUB_REPOSITORY" in os.environ:
        found = "{GITHUB_SERVER_URL}/{GITHUB_REPOSITORY}".format_map(os.environ)
    return found.rstrip("/")


def staged_name(path: Path) -> Path:
    "Where a notebook stands on the site: `compress/20_distill.ipynb` becomes `compress/distill.ipynb`."
    path = path.relative_to(NBS)
    return path.with_name(re.sub(r"^\d+_", "", path.name))


def folded(summary: str, markdown: str) -> str:
    "Markdown behind a line to click on."
    return f"<details>\n<summary>{summary}</summary>\n\n{markdown}\n\n</details>\n"


def page(title: str, description: str, *parts: str) -> str:
    "A page in Markdown."
    front = yaml.safe_dump({"title": title, "description": description}, allow_unicode=True, sort_keys=False)
    return "\n\n".join([f"---\n{front}---", *parts]) + "\n"


def html(text: str) -> str:
    "HTML that stays as it is."
    return f"```{{=html}}\n{text}\n```"


# ---------------------------------------------------------------- the API reference

def module_of(path: Path) -> str:
    "The module that a notebook exports, such as `core.data`; nothing if it exports none."
    found = re.search(r'"#\| default_exp (\S+?)"', path.read_text("utf8"))
    return found[1] if found else ""


def modules() -> dict[str, Path]:
    "The modules of the package in reading order, each with the notebook that exports it."
    return {name: path for path in notebooks() if (name := module_of(path))}


def imported(name: str) -> ModuleType:
    "A module of the package."
    return importlib.import_module("ecomopt" if name == "__init__" else f"ecomopt.{name}")


def source_file(name: str) -> Path:
    "The file of a module."
    return ROOT.joinpath("ecomopt", *name.split(".")).with_suffix(".py")


def api_page(name: str) -> Path:
    "The page of a module."
    return Path("api", *("ecomopt" if name == "__init__" else name).split(".")).with_suffix(".qmd")


class Arguments(DocmentTbl):
    "A table of arguments whose types and defaults fit into its cells."

    def __init__(self, documented: object):
        super().__init__(documented)
        for row in self.dm.values():
            for column in ("anno", "default"):
                value = row.get(column, inspect.Parameter.empty)
                if value is inspect.Parameter.empty: continue
                text = value.__name__ if isinstance(value, type) else str(value)
                if column == "anno":  # without modules, and without what typer reads
                    text = re.sub(r"^(?:\w+\.)*Annotated\[|\b(?:\w+\.)+(?=\w)|, <.*", "", text)
                row[column] = "" if text.startswith("<") else escape(text, quote=False).replace("|", r"\|")
            if isinstance(row["docment"], str): row["docment"] = row["docment"].replace("|", r"\|")


def arguments(module: ModuleType, name: str) -> str:
    "The table of the arguments of a function or class; empty if it has none."
    try: return re.sub(r"\| None \|$", "| |", str(Arguments(attrgetter(name)(module))), flags=re.M)
    except (NameError, TypeError): return ""  # a type in quotes that the module does not import, or a property


def definitions(tree: ast.Module, public: list[str]) -> Iterator[tuple[str, ast.AST]]:
    "The public names of a module and the public methods of its classes, in the order of the file."
    for node in tree.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = [node.name] if hasattr(node, "name") else [target.id for target in targets if hasattr(target, "id")]
        for name in set(names) & set(public):
            yield name, node
            for method in getattr(node, "body", []) if isinstance(node, ast.ClassDef) else []:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    yield f"{name}.{method.name}", method


def call(name: str, node: ast.AST) -> str:
    "How a name is used: a call with its arguments and defaults, or the value of a constant if it is short."
    if isinstance(node, ast.ClassDef):
        init = [part for part in node.body if getattr(part, "name", "") == "__init__"]
        if init: return call(name, init[0])
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
        parts = [ast.unparse(f.target) + (f"={ast.unparse(f.value)}" if f.value else "") for f in fields]
    elif isinstance(node, ast.FunctionDef):
        if any(ast.unparse(one).endswith("property") for one in node.decorator_list): return name
        for arg in ast.walk(node.args):
            if isinstance(arg, ast.arg): arg.annotation = None
        args = node.args
        if args.args and args.args[0].arg in ("self", "cls"): args.args.pop(0)
        parts = list(filter(None, re.split(r", (?![^(\[{]*[)\]}])", ast.unparse(args))))
    else:
        text = ast.unparse(node)
        return text if len(text) < 200 else name
    line = f"{name}({', '.join(parts)})"
    return line if len(line) < 80 else f"{name}(\n    " + ",\n    ".join(parts) + "\n)"


def command_help() -> list[str]:
    "The section with what each command prints with --help."
    from ecomopt.optimize.cli import app
    parts = ["## The commands"]
    for name, command in get_command(app).commands.items():
        for inner in getattr(command, "commands", [""]):
            words = [name, *filter(None, [inner]), "--help"]
            with patch.multiple(rich_utils, MAX_WIDTH=88, FORCE_TERMINAL=False):
                lines = CliRunner().invoke(app, words, prog_name="ecomopt").output.splitlines()
            text = "\n".join(line.rstrip() for line in lines).strip()
            parts += [f"### ecomopt {name} {inner}".strip(), f"```text\n{text}\n```"]
    return parts


def api(name: str, notebook: Path) -> str:
    "The page of a module: its public names with their arguments and docstrings, and its source."
    module, file = imported(name), source_file(name)
    text = file.read_text("utf8")
    chapter = os.path.relpath(staged_name(notebook), api_page(name).parent)
    parts = [f"Made by the chapter [{chapter_title(notebook)}]({chapter})."]
    if name == "optimize.cli": parts += command_help()
    for full, node in definitions(ast.parse(text), module.__all__):
        line, level = node.lineno, "###" if "." in full else "##"
        doc = (ast.get_docstring(node) or "") if hasattr(node, "name") else ""
        doc = re.sub(r"^Example: (.+)$", r"Example: `\1`", doc, flags=re.M)
        links = [f"[source](#line-{line})"]
        if "." not in full and hasattr(node, "name"): links.append(f"[in the chapter]({chapter}#def-{full})")
        parts += [f"{level} {full} {{#{full}}}", f"```python\n{call(full, node)}\n```", doc.replace("$", r"\$"),
                  arguments(module, full), f"[{' · '.join(links)}]{{.page-links}}"]
    title = f"ecomopt.{name}" if name != "__init__" else "ecomopt"
    place = file.relative_to(ROOT).as_posix()
    if address := repository(): place = f'<a href="{address}/blob/{BRANCH}/{place}">{place}</a>'
    shown = f'<details class="source"><summary>Source: {place}</summary>{highlighted(text)}</details>'
    return page(title, (module.__doc__ or "").strip().split("\n")[0], *filter(None, parts), html(shown))


# The classes that both renderers colour.
TOKENS = [(Keyword.Namespace, "im"), (Keyword, "kw"), (Comment, "co"), (String, "st"), (Number, "dv"),
          (Name.Function, "fu"), (Name.Class, "fu"), (Name.Decorator, "at"), (Operator.Word, "kw")]


def highlighted(text: str) -> str:
    "Python with an anchor at each line."
    lines = [""]
    for kind, value in lex(text, PythonLexer(stripnl=False)):
        style = next((name for token, name in TOKENS if kind in token), "")
        for n, part in enumerate(value.split("\n")):
            if n: lines.append("")
            if part: lines[-1] += f'<span class="{style}">{escape(part)}</span>' if style else escape(part)
    code = "\n".join(f'<span id="line-{n}">{line}</span>' for n, line in enumerate(lines, 1))
    return f'<pre class="sourceCode python"><code class="sourceCode python">{code}</code></pre>'


def chapter_title(notebook: Path) -> str:
    "The title of a notebook."
    return "".join(json.loads(notebook.read_text("utf8"))["cells"][0]["source"]).partition("\n")[0].removeprefix("# ")


def api_index(found: dict[str, Path]) -> str:
    "The first page of the reference: names of the top level, and the modules."
    defined = {public: name for name in found for public in imported(name).__all__}
    names = "\n".join(f"| [`{name}`]({api_page(defined[name]).relative_to('api')}#{name}) | `ecomopt.{home}` |"
                      for name, home in sorted(homes().items(), key=lambda pair: pair[0].lower()))
    rows = "\n".join(f"| [`{imported(name).__name__}`]({api_page(name).relative_to('api')}) | "
                     f"{(imported(name).__doc__ or '').strip()} |" for name in found)
    return page("API reference", "Every public name, with its arguments, its source and the chapter that explains it.",
                "## Names of the top level", "`from ecomopt import …` imports only what is used.",
                f"| name | module |\n|:--|:--|\n{names}",
                "## Modules", f"| module | what it is for |\n|:--|:--|\n{rows}")


# ---------------------------------------------------------------- benchmarks

@dataclass
class Question:
    "What a benchmark answers: which numbers its chart shows, and what its sentence says."

    asked: str
    label: str  # the column with the names
    value: str  # the column with the numbers
    unit: str
    where: Callable[[dict, list[dict]], bool] = lambda row, rows: True  # which rows are compared
    lower: bool = False  # is lower better?
    more: str = ""  # what else to say of the winner
    says: Callable[[dict[str, dict]], str] | None = None  # a sentence in place of who wins


SMALLER = "It keeps {retained:.1%} of the teacher's accuracy and has {MB:.3g} MB."
QUESTIONS = {
    "compress": Question("How small and fast is a whole chain, beside other tools?", "model", "× throughput",
                         "times the throughput of the float32 teacher", more=SMALLER),
    "optimize": Question("Does one call find a faster model than a recipe written by hand?", "model", "× throughput",
                         "times the throughput of the float32 teacher", more=SMALLER),
    "static": Question("How good is a model without attention?", "model", "retained",
                       "of the teacher's accuracy on product reviews", lambda row, rows: row["task"] == "reviews"),
    "quickstart": Question("What do the lines of the quickstart gain?", "model", "× throughput",
                           "times the throughput of the teacher", more=SMALLER),
    "runtime": Question("Which runtime generates fastest?", "what", "a second", "tokens a second",
                        lambda row, rows: row["what"].startswith("language model")),
    "serve": Question("How many requests does a server answer?", "server", "requests/s", "requests a second",
                      lambda row, rows: not row["during"] and row["clients"] == max(r["clients"] for r in rows)),
    "tune": Question("Which tuner comes nearest to the best in twenty trials?", "method", "median",
                     "above the lowest value of Hartmann-6, median",
                     lambda row, rows: row["problem"] == "Hartmann-6" and row["what"].startswith("regret"), lower=True),
    "recipes": Question(
        "Does it pay to search recipes with a model of their costs?", "search", "mean trainings, of random's",
        "of the trainings of random search", lower=True, says=lambda rows:
        "The constrained search needs {mean trainings, of random's:.3g} times the trainings of random search, when it "
        "minimizes {minimize} on a table of {recipes} recorded recipes.".format_map(rows["constrained"])),
    "base": Question("What do students of a teacher of BERT-base size gain?", "model", "× throughput",
                     "times the throughput of the float32 teacher", more=SMALLER),
    "distill": Question(
        "What does distillation cost in training time?", "what", "ms a step", "ms a step", lower=True, says=lambda rows:
        f"An epoch on cached teacher logits takes {number(rows['epoch: distillation, cached logits']['ratio'])} times "
        "as long as one on labels; a step of `DistillationTrainer` takes "
        f"{number(rows['step: DistillationTrainer']['ratio'])} times as long as one of a hand-written loop."),
    "gpu": Question("What does half of the bits gain on an accelerator?", "what", "× float32", "times float32",
                    lambda row, rows: row["what"].startswith("step")),
}
OURS = re.compile(r"ours|ecomopt|student|Distill|distillation|constrained|torch int")


def shown(value: object) -> str:
    "A value of a table: three significant digits, also in ranges that are text; nothing where there is none."
    if value is None: return ""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)): return str(value)
    if isinstance(value, str): return re.sub(r"(?<![\w.])\d+\.\d{2,}(?![\w.])", lambda m: number(float(m[0])), value)
    return f"{value:,}" if isinstance(value, int) else number(value)


def answer(question: Question, table: list[dict]) -> str:
    "One sentence and one chart: who wins."
    rows = [row for row in table if row.get(question.value) is not None and question.where(row, table)]
    if not rows: return ""
    found = [(str(row[question.label]).removeprefix("language model, "), float(row[question.value]), row)
             for row in rows]
    found.sort(key=lambda one: one[1], reverse=not question.lower)
    (name, value, best), others = found[0], found[1:]
    if question.says: text = question.says({row[question.label]: row for row in rows})
    else:
        text = f"**{name}: {number(value)}** {question.unit}"
        text += f", ahead of {others[0][0]} with {number(others[0][1])}." if others else "."
        if question.more and best.get("retained"): text += " " + question.more.format_map(best)
    chart = bars([(label, number_, bool(OURS.search(label))) for label, number_, _ in found], question.unit)
    note = f"{question.unit[0].upper()}{question.unit[1:]}; {'shorter' if question.lower else 'longer'} is better."
    return f"{text}\n\n" + html(f'<figure class="figure">{chart}<figcaption>{escape(note)}</figcaption></figure>')


def benchmarks(results: list[Path]) -> str:
    "The page of the benchmarks, from the results of full runs."
    parts, order = [], list(QUESTIONS)
    for path in sorted(results, key=lambda path: order.index(path.stem) if path.stem in order else len(order)):
        result = json.loads(path.read_text("utf8"))
        table, name, notes = result.pop("table"), result.pop("name"), result.pop("notes", "")
        question = QUESTIONS.get(name)
        cells = pd.DataFrame([{column: shown(value) for column, value in row.items()} for row in table]).fillna("")
        parts += [f"## {question.asked if question else name.capitalize()} {{#{name}}}"]
        if question: parts += [answer(question, table)]
        if result.pop("script", None) != script(name):
            parts += ["The script has changed since this was measured."]
        parts += [html(cells.to_html(index=False, border=0)),
                  folded("How it was run", f"{notes}\n\n```yaml\n{yaml.safe_dump(result, sort_keys=False)}```")]
    return page("Benchmarks", "This library and what else you could use, measured in one run.", *parts)


# ---------------------------------------------------------------- the rest

def architectures(table: dict[str, dict[str, str]]) -> str:
    "The page of what each step does with each architecture, from what `tools/architectures.py` found."
    reasons = {}
    for name, row in table.items():
        for step, found in row.items():
            if found != "works": reasons.setdefault((step, found.partition(": ")[2]), []).append(name)
    short = pd.DataFrame(table).T.map(lambda found: str(found).partition(":")[0]).to_html(border=0)
    return page(
        "Architectures", "Which step works with which model, and why not.",
        "Every step was tried on a small random classifier of every architecture. *Works* means that the logits stay "
        "what the step promises and that the result, saved and loaded, has the same logits. *Refused* means an error "
        "before anything is changed; the reasons are listed below the table. A test keeps this table true.",
        html(short), "## Reasons",
        "\n".join(f"* **{step}**, {', '.join(names)}: {why}" for (step, why), names in sorted(reasons.items())),
    )


def not_found() -> str:
    "What is shown at an address that has no page."
    return page("Page not found", "There is no page at this address.",
                "The [start page](index.ipynb) lists all chapters; the search box finds a word in any of them.")


def made() -> dict[str, str]:
    "All these pages by their place."
    found, results = modules(), sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    texts = {"architectures.qmd": architectures(json.loads((NBS / "architectures.json").read_text("utf8")))}
    if results: texts["benchmarks.qmd"] = benchmarks(results)
    texts |= {"404.qmd": not_found(), "api/index.qmd": api_index(found)}
    return texts | {api_page(name).as_posix(): api(name, path) for name, path in found.items()}


def contents(listed: list, made: dict[str, str]) -> list:
    "The table of contents with the API reference at its end, and without pages that were not made."
    def kept(entries):
        for entry in entries:
            if isinstance(entry, dict): yield entry | {"contents": list(kept(entry["contents"]))}
            elif not entry.endswith(".qmd") or entry in made: yield entry

    parts: dict[str, list] = {}
    for name in made:
        if len(path := Path(name).with_suffix("").parts) == 3:
            parts.setdefault(path[1], []).append({"text": path[2], "href": name})
    reference = [{"text": "ecomopt", "href": "api/ecomopt.qmd"}]
    reference += [{"section": part, "contents": entries} for part, entries in parts.items()]
    return [*kept(listed), {"section": "API reference", "href": "api/index.qmd", "contents": reference}]


def flat(entries: list) -> list[str]:
    "The pages of a table of contents, in its order."
    found = []
    for entry in entries:
        if isinstance(entry, str): found.append(entry)
        else: found += [name for name in [entry.get("href")] if name] + flat(entry.get("contents", []))
    return found


def front(file: Path) -> dict:
    "The front matter of a staged page."
    text = file.read_text("utf8")
    if file.suffix == ".ipynb": text = "".join(json.loads(text)["cells"][0]["source"])
    return yaml.safe_load(re.split(r"^---$", text, flags=re.M)[1])


def llms_txt(staged: Path) -> str:
    "What a language model should know of the site: each page with its sentence, section by section (llmstxt.org)."
    site, root = yaml.safe_load((staged / "_quarto.yml").read_text("utf8"))["website"], os.environ.get("SITE_URL", "")
    lines = [f"# {site['title']}\n\n> {site['description']}\n"]
    for entry in site["sidebar"]["contents"]:
        lines += [f"\n## {entry['section']}\n"] if isinstance(entry, dict) else []
        for name in flat([entry]):
            said = front(staged / name)
            address = f"{root.rstrip('/')}/" * bool(root) + re.sub(r"\.\w+$", ".html", name)
            lines.append(f"- [{said['title']}]({address}): {said['description']}")
    return "\n".join(lines) + "\n"
