"""What is generated equals what the notebooks say, and the notebooks are clean. `make export` mends all of these."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tools.charts import tradeoff
from tools.generate import INDEX, ROOT, TRADEOFF, filled, points, readme
from tools.pages import chapter_title
from tools.run import notebooks


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """A copy of the notebooks, cleaned and exported anew."""
    folder = tmp_path_factory.mktemp("export")
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".*", "small"))
    scripts = Path(sys.executable).parent
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([scripts / command], cwd=folder, env={**os.environ, "PYTHONPATH": ""}, check=True)
    return folder


def differences(one: Path, other: Path, suffix: str) -> list[str]:
    """The files of two trees that differ or are in one of them alone."""
    def read(tree: Path) -> dict[str, bytes]:
        files = [file for file in tree.rglob(f"*{suffix}") if ".ipynb_checkpoints" not in file.parts]
        return {str(file.relative_to(tree)): file.read_bytes() for file in files}

    a, b = read(one), read(other)
    return sorted(name for name in a | b if a.get(name) != b.get(name))


@pytest.mark.xdist_group("export")
def test_package_is_what_the_notebooks_export(export):
    assert differences(ROOT / "ecomopt", export / "ecomopt", ".py") == []


@pytest.mark.xdist_group("export")
def test_notebooks_are_clean(export):
    assert differences(ROOT / "nbs", export / "nbs", ".ipynb") == []


def test_readme_is_the_index_notebook():
    assert (ROOT / "README.md").read_text(encoding="utf8") == readme()


def test_readme_shows_the_code_and_the_results_of_the_quickstart():
    """What it shows is made from the stored quickstart; and it is there, code, table and figure."""
    assert [cell.source for cell in filled(nbformat.read(INDEX, 4)).cells] == [
        cell.source for cell in nbformat.read(INDEX, 4).cells
    ]
    text = (ROOT / "README.md").read_text(encoding="utf8")
    assert "× throughput" in text and "](nbs/quickstart.png)" in text
    lines = [line for line in re.search(r"```python\n(.*?)```", text, re.S)[1].splitlines() if line.strip()]
    assert len(lines) <= 12 and all(
        word in "".join(lines) for word in ("load_task", "distill(", "quantize(", "save(", "load(")
    )


def test_the_figure_of_the_readme_shows_the_stored_results():
    assert TRADEOFF.read_text("utf8") == tradeoff(points())
    assert f"](nbs/{TRADEOFF.name})" in (ROOT / "README.md").read_text(encoding="utf8")


def test_a_chapter_has_one_name():
    """In the README and where a sentence names it: `see [Title](…)`, not a name of its own."""
    titles, wrong = {path.name: chapter_title(path) for path in notebooks()}, []
    for path in notebooks():
        text = "\n".join("".join(cell.source) for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
        name = r"\[([^]]+)\]" if path == INDEX else r"(?<=[a-z,(]\s)\[([A-Z][^]]+)\]"
        for said, target in re.findall(name + r"\([^)\s]*?(\w+\.ipynb)", text):
            if not titles[target].startswith(said) and said != "quickstart": wrong.append((path.name, said, target))
    assert wrong == []


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_shows_what_the_index_shows(tmp_path):
    def cell(kind: str, text: str, *tags: str) -> dict:
        return dict(cell_type=kind, metadata=dict(tags=tags), source=text.splitlines(keepends=True))

    links = "[start](start/01_quickstart.ipynb), [rules](../CONTRIBUTING.md), [up](#top), [web](https://example.org)"
    cells = [
        cell("markdown", f"# Shop\n\n> One sentence.\n\n{links}"),
        cell("code", "fast = True", "parameters"),
        cell("code", "#| hide\nimport os"),
        cell("code", "#| code-fold: true\nprint(1)"),
    ]
    index = tmp_path / "index.ipynb"
    index.write_text(json.dumps(dict(cells=cells)), encoding="utf8")
    links = "[start](nbs/start/01_quickstart.ipynb), [rules](CONTRIBUTING.md), [up](#top), [web](https://example.org)"
    assert readme(index) == f"# Shop\n\n> One sentence.\n\n{links}\n\n```python\nprint(1)\n```\n"
