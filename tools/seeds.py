"""Benchmarks that take hours: what was measured with each teacher is kept, and one table is made of all seeds."""
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from ecomopt.core.verdict import mean_interval
from tools.bench import machine

KEPT = Path(__file__).resolve().parents[1] / "benchmarks" / "kept"


def each_once(name: str, measure: Callable[[int], list[dict]], seeds: list[int]) -> tuple[list[int], str, list[dict]]:
    """The seeds that were measured, on which machines, and all rows; a seed that KEPT/NAME.json has is not repeated.

    Seeds on the command line take the place of `seeds`: hours of work can be done in parts.
    """
    path = KEPT / f"{name}.json"
    kept = json.loads(path.read_text("utf8")) if path.exists() else {}
    for seed in map(int, sys.argv[1:] or seeds):
        if str(seed) in kept: continue
        rows = measure(seed)
        kept[str(seed)] = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(),
                           "ecomopt": version("ecomopt"), "rows": rows}
        KEPT.mkdir(exist_ok=True)
        path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
    machines = dict.fromkeys(part["machine"] for part in kept.values())
    return sorted(map(int, kept)), "; ".join(machines), [row for part in kept.values() for row in part["rows"]]


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
