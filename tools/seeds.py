"""Benchmarks that take hours: what was measured with each teacher is kept, and one table is made of all seeds."""
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from ecomopt.core.verdict import mean_interval
from tools.bench import conditions

KEPT = Path(__file__).resolve().parents[1] / "benchmarks" / "kept"


def kept(path: Path) -> dict[str, dict]:
    """What was measured for each seed, and under which conditions."""
    return json.loads(path.read_text("utf8")) if path.exists() else {}


def each_once(name: str, measure: Callable[[int], list[dict]], seeds: list[int]) -> tuple[list[int], list[dict], dict]:
    """The seeds that were measured, their rows and conditions; what KEPT/NAME.json has is not measured again.

    Seeds on the command line take the place of `seeds`: hours of work can be done in parts. Ends where fewer than
    three seeds were measured: too few for a table.
    """
    path = KEPT / f"{name}.json"
    for seed in map(str, sys.argv[1:] or seeds):
        if seed in kept(path): continue
        found = {**conditions(name), "rows": measure(int(seed))}
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(kept(path) | {seed: found}, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
        part.replace(path)
    found = kept(path)
    if len(found) < 3: sys.exit(f"{len(found)} seeds were measured; three make a table.")
    parts = [part for _, part in sorted(found.items())]
    dates = sorted({part["date"] for part in parts})
    measured = {
        "date": " to ".join(dict.fromkeys([dates[0], dates[-1]])),
        "machine": "; ".join(dict.fromkeys(part["machine"] for part in parts)),
        "script": ", ".join(dict.fromkeys(str(part.get("script")) for part in parts)),
        "versions": {package: ", ".join(dict.fromkeys(part["versions"][package] for part in parts))
                     for package in parts[0]["versions"]}}
    return sorted(map(int, found)), [row for part in parts for row in part["rows"]], measured


def digits(right: np.ndarray) -> str:
    """Which test texts a model gets right, in a row that is kept: a digit each."""
    return "".join(map(str, right.astype(int)))


def right_answers(rows: list[dict]) -> dict[str, np.ndarray]:
    """Which test texts each model gets right, [seeds, texts]."""
    models = {row["model"]: [] for row in rows}
    for row in rows: models[row["model"]].append([digit == "1" for digit in row["right"]])
    return {name: np.array(found) for name, found in models.items()}


def over_seeds(rows: list[dict], *ranges: str) -> pd.DataFrame:
    """Medians of each model, the range of some columns, and accuracy beside that of the first model, the teacher.

    The interval of the accuracy counts seeds and texts; `retained` is of the same seed's teacher.
    """
    groups, right = pd.DataFrame(rows).groupby("model", sort=False), right_answers(rows)
    table, teacher = groups.median(numeric_only=True), next(iter(right.values())).mean(1)
    for column in ranges:
        table[f"{column}, range"] = groups[column].agg(lambda x: f"{x.min():.3g} to {x.max():.3g}")
    quality = {}
    for name, found in right.items():
        (accuracy, low, high), retained = mean_interval(found), found.mean(1) / teacher
        quality[name] = {
            "accuracy": accuracy, "interval": f"{low:.3f} to {high:.3f}", "retained": retained.mean(),
            "retained, range": f"{retained.min():.3f} to {retained.max():.3f}"}
    return table.join(pd.DataFrame.from_dict(quality, orient="index"))
