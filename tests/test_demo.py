"""The demo: stages of the quickstart; one line each where the output is no terminal, what is left where it is one."""
import io
import re

import nbformat
import pandas as pd
import pytest
from rich.console import Console
from transformers import trainer

from tools import demo


@pytest.fixture
def tour(tmp_path, monkeypatch):
    """A quickstart of three stages; it was executed in 2 + 60 + 30 seconds."""
    new = nbformat.v4
    cells = [
        new.new_markdown_cell("# Tour"),
        new.new_code_cell("fast = True  # less"),
        new.new_code_cell("rows = 1 if fast else 7"),
        new.new_markdown_cell("Why?\n\n## Fine-tune\n\nText."),
        new.new_code_cell("x = rows"),
        new.new_code_cell("x += 1"),
        new.new_markdown_cell("## Compare"),
        new.new_code_cell("y = 2 * x"),
    ]
    nb = new.new_notebook(cells=cells, metadata={"ecomopt": {"cell_seconds": [1.0, 1.0, 40.0, 20.0, 30.0]}})
    nbformat.write(nb, tmp_path / "tour.ipynb")
    monkeypatch.setattr(demo, "QUICKSTART", tmp_path / "tour.ipynb")


def test_the_stages_are_the_sections_with_code(tour):
    assert [(stage.title, stage.seconds) for stage in demo.stages()] == [
        ("Import", 2.0),
        ("Fine-tune", 60.0),
        ("Compare", 30.0),
    ]


def test_trainings_afterwards_show_nothing(tour):
    before = list(trainer.DEFAULT_CALLBACKS)
    demo.run(Console(file=io.StringIO(), force_terminal=False, width=100))
    assert trainer.DEFAULT_CALLBACKS == before


def test_one_line_a_stage_where_the_output_is_no_terminal(tour):
    out = io.StringIO()
    assert demo.run(Console(file=out, force_terminal=False, width=100))["y"] == 16, "a full run, not a fast one"
    lines = out.getvalue().splitlines()
    assert [re.sub(r"\d+:\d\d", "0:00", line) for line in lines] == [
        "1/3    0:00  Import", "2/3    0:00  Fine-tune", "3/3    0:00  Compare"]


def test_a_terminal_shows_what_is_left(tour):
    out = io.StringIO()
    demo.run(Console(file=out, force_terminal=True, width=100))
    assert "about 1:32 left" in out.getvalue() and "about 0:30 left" in out.getvalue()


def test_the_table_is_aligned():
    table = pd.DataFrame({name: ["1.0", "22.75"] for name in demo.COLUMNS}, index=["teacher", "student, int8"])
    out = io.StringIO()
    demo.show({"comparison": type("Comparison", (), {"table": table})}, Console(file=out, width=120))
    head, *rows = out.getvalue().splitlines()
    ends = {tuple(match.end() for match in re.finditer(r"\d+\.\d+", row)) for row in rows}
    assert len(rows) == 2 and len(ends) == 1 and len(ends.pop()) == len(demo.COLUMNS)


@pytest.mark.parametrize("others, said", [(0.05, False), (0.5, True)])
def test_a_busy_machine_is_named(tour, monkeypatch, capsys, tmp_path, others, said):
    monkeypatch.setattr(demo, "busy", lambda: others)
    monkeypatch.setattr(demo, "FOLDER", tmp_path / "_demo")
    monkeypatch.setattr(demo, "run", lambda console: {"comparison": None})
    monkeypatch.setattr(demo, "show", lambda *args: None)
    monkeypatch.setattr(demo, "save_figure", lambda namespace: None)
    monkeypatch.chdir(tmp_path)
    demo.main()
    text = capsys.readouterr().out
    assert ("busy" in text) is said and "about 1:32 min" in text and ("Expect 3:04" in text) is said
