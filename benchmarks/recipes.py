"""Does the search over recipes pay? Constrained search against random search, on recorded results of real recipes.

    python -m benchmarks.recipes record 60   adds so many random recipes to recipes.csv; about a minute each
    python -m benchmarks.recipes             20 repetitions on the recorded table
"""
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ecomopt import EcomoptError, Goal, finetune, load_task
from ecomopt.core.measure import _predict
from ecomopt.optimize.candidates import RecipeSpace, _split, apply_steps, rung
from ecomopt.optimize.optimize import _PRIORS, _Search, _sized
from ecomopt.optimize.recipe import StepContext
from ecomopt.tune.constrained import ConstrainedSearch
from tools.bench import report

TABLE, RUNGS, SEEDS = Path(__file__).with_name("recipes.csv"), (0.1, 1 / 3, 1.0), list(range(20))
THREADS, MOST_AUGMENT, MAX_DROP = 2, 4_000, 0.03
COLUMNS = ["steps", "listed", "point", *(f"{name} {u:.2g}" for name in ("drop", "seconds") for u in RUNGS),
           "latency_ms", "throughput", "disk_bytes", "why"]
NOTES = (
    f"Reviews with 2,000 of the unlabelled sentences, at most {MOST_AUGMENT:,} augmented ones, so that a full training "
    "takes half a minute: recipes drawn at random from the space of `optimize`, and those of its list; drops on the "
    "valid split after 1/10, 1/3 and all of the texts, latency and bytes of the finished model. The task: a recipe no "
    f"worse than the best of the list, as fast or as small with a drop of {100 * MAX_DROP:g} points at most; how many "
    "there are is said, and a cost for which there is none is left out. The recipes of the list are neither asked for "
    "nor in the pool. trainings: fractions of the texts added up, so that a third counts as a third; candidates: how "
    f"many recipes were built. Median of {len(SEEDS)} repetitions, with quartiles; random search trains each recipe on "
    "all texts."
)


# ---------------------------------------------------------------- recording

def context() -> StepContext:
    """The task, with fewer texts to train on, and its teacher."""
    task = load_task("reviews").sample(transfer=2_000)
    return StepContext(task, finetune("minilm", load_task("reviews"), epochs=4, seed=0), 0)


def space_of(search: _Search) -> RecipeSpace:
    """The space of `optimize`, with fewer augmented texts."""
    kinds = search.space.kinds
    return RecipeSpace(kinds | {"distill": kinds["distill"] | {"augment": (0, MOST_AUGMENT)}})


def tried(search: _Search, steps: list[dict]) -> dict:
    """What a recipe gives after each rung, and what the finished model costs."""
    before, after = _split(steps)
    start, done, student, row = time.perf_counter(), 0, search.context.teacher, {}
    for fraction in RUNGS if before else RUNGS[-1:]:
        parts = rung(before, fraction, RUNGS)
        student, done = apply_steps(student, parts[done:], search.context), len(parts)
        model = apply_steps(student, after, search.context) if fraction == 1 else student
        found = _predict("model", model, search.texts, search.task.labels, 32)
        row[f"drop {fraction:.2g}"] = search.teacher_score - search.task.score(search.actual, found)
        row[f"seconds {fraction:.2g}"] = time.perf_counter() - start
    return row | search.costs(model, 3, 10)


def record(n: int) -> None:
    """Add recipes to the table: those of the list first."""
    torch.set_num_threads(THREADS)
    search = _Search(context(), Goal(), math.inf, THREADS, 1, None)
    search.prepare()
    space, table = space_of(search), pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=COLUMNS)
    table["point"] = [json.dumps(space.point(json.loads(steps)).tolist()) for steps in table["steps"]]  # of this space
    table.to_csv(TABLE, index=False)
    sized = (_sized(steps, space) for steps in _PRIORS)
    listed = [json.dumps(steps) for steps in sized if steps is not None]
    drawn = (json.dumps(steps) for _, steps in space.propose(np.random.default_rng(0), [], 20_000))
    new = [steps for steps in dict.fromkeys([*listed, *drawn]) if steps not in set(table["steps"])][:n]
    for steps in new:
        row = {"steps": steps, "listed": steps in listed, "point": json.dumps(space.point(json.loads(steps)).tolist())}
        try: row |= tried(search, json.loads(steps))
        except EcomoptError as error: row["why"] = error.what
        pd.DataFrame([row]).reindex(columns=COLUMNS).to_csv(TABLE, mode="a", header=False, index=False)
        print({k: v for k, v in row.items() if k != "point"}, flush=True)


# ---------------------------------------------------------------- searching the table

def constrained(table: pd.DataFrame, cost: str, is_hit: Callable[[int], bool], limit: float, seed: int) -> tuple:
    """Trainings, candidates and seconds until the search has a hit, trained on all texts."""
    pool = [(np.array(json.loads(point)), i) for i, point in zip(table.index, table["point"])]

    def propose(rng: np.random.Generator, good: list) -> list: return [pool[i] for i in rng.permutation(len(pool))]

    def seconds(i: int, before: float, after: float) -> float:
        return table.at[i, f"seconds {after:.2g}"] - (table.at[i, f"seconds {before:.2g}"] if before else 0)

    first = np.random.default_rng(seed).integers(len(pool))
    search = ConstrainedSearch(cost, {}, limit, propose, seconds, RUNGS, [pool[first]], seed)
    trainings, spent = 0.0, 0.0
    while found := search.ask():
        candidate, fraction = found
        row, before = table.loc[candidate.what], candidate.fraction
        if candidate.costs is None: search.tell_costs(candidate, {cost: row[cost]})
        if math.isnan(row["drop 0.1"]): fraction = 1.0  # nothing is trained
        search.tell_drop(candidate, fraction, row[f"drop {fraction:.2g}"])
        trainings, spent = trainings + fraction - before, spent + seconds(candidate.what, before, fraction)
        if fraction == 1 and is_hit(candidate.what): break
    return trainings, len(search.candidates), spent


def random(table: pd.DataFrame, is_hit: Callable[[int], bool], seed: int) -> tuple[float, int, float]:
    """The same for rows in a random order, each trained on all texts."""
    order = np.random.default_rng(seed).permutation(table.index)
    n = next((n for n, i in enumerate(order, 1) if is_hit(i)), len(order))
    return float(n), n, float(table.loc[order[:n], "seconds 1"].sum())


def quartiles(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def compared(table: pd.DataFrame, cost: str) -> list[dict]:
    """Both on the same table, minimizing one cost."""
    listed, pool = table[table["listed"]], table[~table["listed"]].reset_index(drop=True)
    good = listed[listed["drop 1"] <= MAX_DROP]
    best = good.loc[good[cost].idxmin()]
    hits = (pool[cost] <= best[cost]) & (pool["drop 1"] <= MAX_DROP)
    print(f"{cost}: {hits.sum()} of {len(pool)} are no worse than {best['steps']} with {best[cost]:.4g}")
    if not hits.any(): return []
    def is_hit(i): return bool(hits[i])
    found = {
        "random": [random(pool, is_hit, seed) for seed in SEEDS],
        "constrained": [constrained(pool, cost, is_hit, MAX_DROP, seed) for seed in SEEDS],
    }
    names, mean = ("trainings", "candidates", "seconds"), float(np.mean([run[0] for run in found["random"]]))
    return [{
        "minimize": cost, "search": name, **{n: quartiles(v) for n, v in zip(names, zip(*runs))},
        "mean trainings, of random's": round(float(np.mean([run[0] for run in runs])) / mean, 2),
        "recipes": len(pool), "no worse": int(hits.sum()),
    } for name, runs in found.items()]


def main() -> None:
    """Search the table for fast recipes and for small ones."""
    table = pd.read_csv(TABLE)
    table = table[table["why"].isna()].reset_index(drop=True)
    for u in RUNGS[:-1]: table[f"seconds {u:.2g}"] = table[f"seconds {u:.2g}"].fillna(table["seconds 1"])
    rows = [row for cost in ("latency_ms", "disk_bytes") for row in compared(table, cost)]
    report("recipes", pd.DataFrame(rows), SEEDS, NOTES)


if __name__ == "__main__":
    if sys.argv[1:2] == ["record"]: record(int(sys.argv[2]))
    else: main()
