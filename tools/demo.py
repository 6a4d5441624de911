"""The main job: run the quickstart in full, stage by stage, and show its table, its figure and its artifact."""
import os
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import matplotlib
import nbformat
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import TrainerCallback, trainer

from tools.generate import QUICKSTART
from tools.run import ROOT, duration

FOLDER = ROOT / "_demo"
BUSY = 0.2  # of the cores, used by others
COLUMNS = "accuracy %", "95 % interval", "p50 ms", "sentences/s", "× throughput", "MB"


@dataclass
class Stage:
    """A section of the quickstart that has code."""

    title: str
    sources: list[str] = field(default_factory=list)
    seconds: float = 0.0  # that it took when the stored outputs were made


def stages() -> list[Stage]:
    "The sections of the quickstart, in order."
    nb = nbformat.read(QUICKSTART, 4)
    took, found = iter(nb.metadata.get("ecomopt", {}).get("cell_seconds", [])), [Stage("Import")]
    for cell in nb.cells:
        titles = re.findall(r"^## (.+)", cell.source, re.M) if cell.cell_type == "markdown" else []
        found += [Stage(title) for title in titles]
        if cell.cell_type == "code":
            found[-1].seconds += next(took, 10.0)
            found[-1].sources.append(cell.source.replace("fast = True", "fast = False"))
    return [stage for stage in found if stage.sources]


class Steps(TrainerCallback):
    """Shows how far a training is."""

    def __init__(self, progress: Progress): self.progress = progress

    def on_step_end(self, args, state, control, **others):
        "One step more of the stage under way."
        self.progress.update(self.progress.task_ids[-1], total=state.max_steps, completed=state.global_step)


@contextmanager
def shown(progress: Progress):
    "Every training in the block shows its steps."
    steps = Steps(progress)
    trainer.DEFAULT_CALLBACKS.append(steps)
    try: yield
    finally: trainer.DEFAULT_CALLBACKS.remove(steps)


def busy() -> float:
    "The fraction of all cores that other processes use now."
    psutil.cpu_percent()
    time.sleep(1)
    return psutil.cpu_percent() / 100


def run(console: Console) -> dict:
    "Run all stages; return the variables of the quickstart."
    todo, namespace, spent, planned = stages(), {}, 0.0, 0.0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress, shown(progress):
        for number, stage in enumerate(todo, 1):
            left = sum(one.seconds for one in todo[number - 1:]) * (max(spent / planned, 1.0) if planned > 5 else 1.0)
            bar = progress.add_task(f"{number}/{len(todo)} {stage.title}, about {duration(left)} left", total=None)
            start = time.perf_counter()
            for source in stage.sources: exec(compile(source, stage.title, "exec"), namespace)
            seconds = time.perf_counter() - start
            spent, planned = spent + seconds, planned + stage.seconds
            progress.remove_task(bar)
            console.print(f"{number}/{len(todo)}  {duration(seconds):>6}  {stage.title}", highlight=False)
    return namespace


def show(namespace: dict, console: Console) -> None:
    "The table of the comparison, aligned."
    rows = namespace["comparison"].table[list(COLUMNS)]
    table = Table("", box=None, pad_edge=False)
    for name in rows.columns: table.add_column(name, justify="right")
    for name, row in rows.iterrows(): table.add_row(name, *map(str, row))
    console.print(table)


def save_figure(namespace: dict) -> None:
    "The figure of the comparison."
    namespace["comparison"].plot().savefig(FOLDER / "tradeoff.png", dpi=150)


def main() -> None:
    "Run the quickstart and say where everything lies."
    matplotlib.use("agg")
    console, seconds, others = Console(highlight=False), sum(stage.seconds for stage in stages()), busy()
    console.print(f"The quickstart in full: about {duration(seconds)} min, less where trainings are in the cache.")
    if others > BUSY:
        console.print(f"This machine is busy: other processes use {others:.0%} of its cores. "
                      f"Expect {duration(seconds / max(1 - others, 0.1))} min or more.")
    FOLDER.mkdir(exist_ok=True)
    os.chdir(FOLDER)
    namespace = run(console)
    save_figure(namespace)
    show(namespace, console)
    for name, path in (("figure", "tradeoff.png"), ("artifact", "small")):
        console.print(f"{name:9}{FOLDER.name}/{path}")


if __name__ == "__main__":
    main()
