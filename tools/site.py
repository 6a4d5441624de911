"""The site, in two steps: stage the notebooks with their stored outputs, render them. Nothing is executed.

    python -m tools.site           into _site/

SITE_URL, the address that the site will have, makes its addresses absolute where they must be.
"""
import ast
import base64
import functools
import os
import re
import shutil
import struct
import subprocess
import sys
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import numpy as np
import yaml
from execnb.nbio import mk_cell, read_nb, write_nb
from math_core import LatexToMathML
from nbdev.process import NBProcessor, Processor
from nbdev.processors import add_show_docs, hide_

from tools import pages
from tools.pages import folded, repository, staged_name
from tools.run import LOOKS, NBS, ROOT, duration, is_stale, notebooks

# ---------------------------------------------------------------- stage

MARKUP = re.compile(r"""
    (?P<code>
        ^[ ]*(?P<fence>`{3,}|~{3,}) .*? ^[ ]*(?P=fence)
      | (?P<ticks>(?<!`)`+(?!`)) .*? (?<!`)(?P=ticks)(?!`)
      | \\. )
  | \$\$ (?P<display> .+? ) \$\$
  | \$ (?=\S) (?P<inline> (?:[^$\n]|\n(?!\s*\n))+? ) (?<=\S) \$ (?!\d)
  | (?P<link> \]\( [^)\s]*? ) \d+_ (?P<page> \w+\.ipynb )
  | (?P<equations> \b[Ee]quations?\s+\(\d+\) (?: (?:,|,?\s+and|,?\s+to)\s+\(\d+\) )* )
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


def translate(markdown: str, numbers: frozenset[str] = frozenset()) -> str:
    "Markdown with its math as MathML, links to notebooks and to numbered equations as the site has them; code stays."
    def piece(m: re.Match) -> str:
        if m["code"]: return m["code"]
        if m["page"]: return m["link"] + m["page"]
        if m["equations"]: return re.sub(r"(?:equations?\s+)?\((\d+)\)", linked, m["equations"], flags=re.I)
        return mathml(m["display"] or m["inline"], display=bool(m["display"]))

    def linked(m: re.Match) -> str: return f"[{m[0]}](#equation-{m[1]})" if m[1] in numbers else m[0]

    return MARKUP.sub(piece, markdown)


# ---------------------------------------------------------------- the glossary

GLOSSARY = NBS / "explain" / "73_transformer.ipynb"
AMBIGUOUS = set(  # common words
    "batch gate graph head key layer mask parameter query runtime scale value weight".split())
NOT_PROSE = r"""
    ^\#.*$ | ^:::.*$ | ^[ ]*(?P<fence>`{3,}|~{3,}) .*? ^[ ]*(?P=fence) | `[^`\n]+` | \$\$.*?\$\$ | \$[^$\n]+\$
  | !?\[[^\]]*\]\([^)]*\) | <[^>]+> | ^\|.*$ | ^\*\ .*\*.*$"""


@functools.cache
def glossary() -> tuple[dict[str, str], re.Pattern]:
    "The anchor of each term of the glossary, and a pattern of what is no prose, or a term in it."
    rows = re.findall(r'<a id=\\?"(term-[\w-]+)\\?"></a>([^|]+?) \|', GLOSSARY.read_text("utf8"))
    terms = {re.sub(r" \(.*\)", "", name): anchor for anchor, names in rows for name in names.split(", ")}
    terms = {name.lower(): anchor for name, anchor in terms.items()
             if re.match(r"\[?[a-z]", name, re.I) and name not in AMBIGUOUS}
    words = "|".join(re.escape(name).replace(r"\ ", r"\s+") for name in sorted(terms, key=len, reverse=True))
    pattern = rf"{NOT_PROSE} | (?<![\w-])(?P<term>{words})(?:s|es)?(?![\w-])"
    return terms, re.compile(pattern, re.M | re.S | re.X | re.I)


def with_terms(markdown: str, seen: set[str], page: Path) -> str:
    "Markdown in which the first use of each term, of those not seen before on the page, leads to the glossary."
    terms, pattern = glossary()
    target = os.path.relpath(staged_name(GLOSSARY).with_suffix(".html"), page.parent)

    def linked(m: re.Match) -> str:
        anchor = m["term"] and terms[" ".join(m["term"].lower().split())]
        if not anchor or anchor in seen: return m[0]
        seen.add(anchor)
        return f'<a class="term" href="{target}#{anchor}">{m[0]}</a>'

    return pattern.sub(linked, markdown)


# ---------------------------------------------------------------- pieces of a page

def figure(png: str, caption: str, alt: str, width: int | None = None) -> str:
    "A picture with its caption and alt text, in HTML, which both renderers leave alone."
    wide, high = struct.unpack(">II", base64.b64decode(png[:32])[16:24])
    size = f'width="{width or wide}" height="{round(high * (width or wide) / wide)}"'
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    image = f'<img src="data:image/png;base64,{png}" alt="{escape(alt)}" {size}>'
    return f'<figure class="figure{" wide" * ((width or wide) > 680)}">{image}{below}</figure>'


def looks(source: str) -> dict:
    "The directives of a cell that say how it looks, such as `fig-cap`: YAML behind `#|`."
    lines = "".join(found[0] for found in LOOKS.finditer(source))
    return yaml.safe_load(re.sub(r"^#\| ?", "", lines, flags=re.M)) or {}


def figures(nb) -> None:
    "Make the pictures of a notebook figures with captions and alt texts."
    for cell in nb.cells:
        pictures = [out for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
        if not pictures: continue
        said, none = looks(cell.source), [""] * len(pictures)
        captions, alts = (np.atleast_1d(said.get(key, "")).tolist() + none for key in ("fig-cap", "fig-alt"))
        for out, caption, alt in zip(pictures, captions, alts):
            png, width = out["data"]["image/png"], out.get("metadata", {}).get("image/png", {}).get("width")
            out["data"] = {"text/html": figure("".join("".join(png).split()), caption, alt, width)}
        cell.source = re.sub(r"^#\|\s*fig\b.*\n(?:^#\|  .*\n)*", "", cell.source, flags=re.M)


class references(Processor):
    "Turn the `show_doc` cells that nbdev adds below exported definitions into folded tables of their arguments."

    def begin(self):
        if not (name := self.nb.module_): return
        self.module, self.api = pages.imported(name), os.path.relpath(pages.api_page(name), self.nb.page_.parent)

    def cell(self, cell):
        if not getattr(cell, "has_sd", False): return
        name = re.fullmatch(r"show_doc\((.+)\)", cell.source)[1]
        table, public = pages.arguments(self.module, name), name.partition(".")[0] in self.module.__all__
        body = [table] * bool(table) + [f"[`{name}` in the API reference]({self.api}#{name})"] * public
        text = folded(f"{name}: arguments", "\n\n".join(body)) if table else "".join(body)
        cell.update(cell_type="markdown", source=f'<div id="def-{name}">\n\n{text}\n\n</div>\n' if text else None)


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
    "Say below the title when and where the page was executed, whether its sources changed since, and where they are."

    def begin(self):
        ran = self.nb.metadata.get("ecomopt")
        if not ran or all(cell.cell_type != "code" for cell in self.nb.cells): return
        versions = ", ".join(f"{name} {number}" for name, number in ran["versions"].items())
        text = f"Executed {ran['date']} in {duration(ran['seconds'])} min on {ran['cpu']}; {versions}."
        if self.nb.stale_:
            text += " <strong>The code has changed since: the outputs are those of the earlier code.</strong>"
        links = " · ".join(f'<a href="{href}"{more}>{label}</a>' for label, href, more in self.links())
        html = f'<div class="executed"><p>{text}</p><p class="page-links">{links}</p></div>'
        self.nb.cells.insert(1, mk_cell(f"```{{=html}}\n{html}\n```\n", "markdown"))

    def links(self):
        "What a reader may want of the page: the notebook, its module, and both where the repository is published."
        path, page, name = self.nb.file_.relative_to(ROOT), self.nb.page_, self.nb.module_
        yield "Download the notebook", path.name, " download"
        if name:
            yield "API reference", os.path.relpath(pages.api_page(name), page.parent).replace(".qmd", ".html"), ""
        if address := repository():
            yield "Source", f"{address}/blob/{pages.BRANCH}/{path}", ""
            if address.startswith("https://github.com/"):
                colab = address.replace("https://github.com", "https://colab.research.google.com/github")
                yield "Open in Colab (online)", f"{colab}/blob/{pages.BRANCH}/{path}", ""


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


class texts(Processor):
    "Translate the Markdown of cells and of their outputs."

    def begin(self):
        prose = "\n".join(cell.source or "" for cell in self.nb.cells if cell.cell_type == "markdown")
        self.numbers, self.seen = frozenset(re.findall(r"\\tag\{(\d+)\}", prose)), set()
        self.has_terms = self.nb.file_.parent != NBS and self.nb.file_ != GLOSSARY

    def cell(self, cell):
        if cell.cell_type == "markdown" and cell.source:
            if self.has_terms: cell.source = with_terms(cell.source, self.seen, self.nb.page_)
            cell.source = translate(cell.source, self.numbers)
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if "text/markdown" in data: data["text/markdown"] = translate("".join(data["text/markdown"]), self.numbers)


def staged(path: Path):
    "A notebook as the renderers read it."
    nb = read_nb(path)
    nb.file_, nb.page_, nb.module_ = path, staged_name(path), pages.module_of(path)
    nb.stale_ = is_stale(nbformat.read(path, 4))
    figures(nb)
    NBProcessor(path, [add_show_docs, references, title, executed, hide_, tidy, texts], nb=nb).process()
    nb.metadata = {"kernelspec": nb.metadata["kernelspec"]}
    return nb


def stage(to: Path) -> None:
    "Write into `to` what Quarto and smalldocs read: the pages, the files beside them and `_quarto.yml`."
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(NBS, to, ignore=shutil.ignore_patterns("*.ipynb", ".*", "small"))
    for path in notebooks(): write_nb(staged(path), to / staged_name(path))
    made, config = pages.made(), yaml.safe_load((ROOT / "_quarto.yml").read_text("utf8"))
    for name, text in made.items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_text(text, "utf8")
    site = config["website"]
    site["sidebar"]["contents"] = pages.contents(site["sidebar"]["contents"], made)
    if "SITE_URL" in os.environ: site["site-url"] = os.environ["SITE_URL"]
    if repository(): site["repo-url"] = repository()
    (to / "_quarto.yml").write_text(yaml.safe_dump(config, sort_keys=False), "utf8")


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
    made = staged / "_site"
    for file in made.rglob("*.css"): file.write_text(IMPORT.sub("", file.read_text("utf8")), "utf8")
    for file in made.rglob("*.html"): file.write_text(CDN.sub("", file.read_text("utf8")), "utf8")
    for path in notebooks(): shutil.copy(path, made / path.relative_to(NBS))  # to download
    (made / "llms.txt").write_text(pages.llms_txt(staged), "utf8")
    if "SITE_URL" in os.environ:  # the page for what is not found is shown at any address
        missing, root = made / "404.html", urlsplit(os.environ["SITE_URL"]).path.rstrip("/")
        missing.write_text(missing.read_text("utf8").replace("<head>", f'<head><base href="{root}/">', 1), "utf8")
    shutil.rmtree(site, ignore_errors=True)
    made.replace(site)


def build(staged: Path = ROOT / "_stage", site: Path = ROOT / "_site") -> Path:
    "Stage and render every notebook with its stored outputs."
    stage(staged)
    render(staged, site)
    return site


if __name__ == "__main__":
    print(build() / "index.html")
