"""Does tuning pay? Equal budgets for grid, random, ours and peers, on two functions and a table of real trainings."""
import copy
import hashlib
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from statistics import median
from time import process_time

import numpy as np
import pandas as pd
import skopt
import torch
from datasets import Dataset
from scipy.stats import bootstrap
from skopt.benchmarks import branin, hart6
from skopt.space import Integer, Real
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, Trainer, set_seed

from ecomopt import Classifier, load_model, load_task, prune_structured
from ecomopt.core.train import run, tokenized, training_arguments
from ecomopt.tune.bayes import Tuner
from ecomopt.tune.search import GridSearch, ListSearch, RandomSearch, Searcher, search
from tools.bench import report

sys.path.append(".peers")  # where `make bench` puts it
import optuna  # noqa: E402

SURFACE = Path(__file__).with_name("tune_reviews.csv")
RUNS = Path(__file__).parents[1] / ".cache" / "benchmark_tune.jsonl"
SEEDS, BUDGET = list(range(20)), 20
LEVELS = {
    "layers": [1, 2],
    "batch_size": [8, 32, 128],
    "weight_decay": [0.0, 0.01, 0.1],
    "learning_rate": [float(f"{10 ** (-5 + k / 3):.1e}") for k in range(10)],  # 1e-5 … 1e-2
}


# ---------------------------------------------------------------- the table of real trainings

@cache
def student(layers: int) -> tuple[Classifier, Dataset]:
    """MiniLM with fewer layers, half of its heads, a quarter of its neurons, the task's words; and the train inputs."""
    set_seed(0)
    teacher, texts = load_model("minilm", task.labels), task.train["text"]
    small = prune_structured(teacher, layers=layers, heads=6, neurons=384, texts=texts, first_token=True)
    return small, tokenized(small, task.train)


def trained(layers: int, **params) -> dict:
    """Fine-tune a student for an epoch of the labelled sentences: loss and accuracy (validation), CPU seconds."""
    small, rows = copy.deepcopy(student(layers)[0]), student(layers)[1]
    args = training_arguments(epochs=1, seed=0, **params)
    start = process_time()
    run(Trainer(small.model, args, train_dataset=rows, data_collator=DataCollatorWithPadding(small.tokenizer)))
    seconds = process_time() - start
    logits, labels = small.logits(task.valid["text"]), torch.tensor(task.valid["label"])
    loss = F.cross_entropy(logits, labels).item()
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return {"loss": round(loss, 5), "accuracy": round(accuracy, 5), "seconds": round(seconds, 2)}


def missing() -> Iterator[dict]:
    """The hyperparameters that the table does not have yet."""
    done = set()
    if SURFACE.exists(): done = set(pd.read_csv(SURFACE)[list(LEVELS)].itertuples(index=False, name=None))
    return (dict(zip(LEVELS, values)) for values in itertools.product(*LEVELS.values()) if values not in done)


def fill() -> None:
    """Compute what is missing of the table, a line a training; it may be killed at any time."""
    torch.set_num_threads(1)
    for params in missing():
        line = pd.DataFrame([params | trained(**params)])
        line.to_csv(SURFACE, mode="a", header=not SURFACE.exists(), index=False)


# ---------------------------------------------------------------- what is searched

@cache
def surface() -> dict[tuple, float]:
    """Place in LEVELS → loss on the validation split."""
    rows = pd.read_csv(SURFACE)
    def place(row): return tuple(values.index(row[name]) for name, values in LEVELS.items())
    return {place(row): row["loss"] for row in rows.to_dict("records")}


def known(function: Callable, params: dict) -> float: return function(list(params.values()))
def tabulated(params: dict) -> float: return surface()[tuple(params.values())]


PROBLEMS = {  # name → objective, space, levels of the grid
    "Branin": (partial(known, branin), {"x": Real(-5.0, 10.0), "y": Real(0.0, 15.0)}, {"x": 5, "y": 4}),
    "Hartmann-6": (partial(known, hart6), {f"x{i}": Real(0.0, 1.0) for i in range(6)}, 2),
    "reviews": (tabulated, {name: Integer(0, len(values) - 1) for name, values in LEVELS.items()},
                {"layers": 2, "batch_size": 2, "weight_decay": 1, "learning_rate": 5}),
}


def lowest(problem: str) -> float:
    """The value of the best point there is."""
    return {"Branin": 0.39788736, "Hartmann-6": -3.32236801}.get(problem) or min(surface().values())


# ---------------------------------------------------------------- methods: values in the order of the trials

def by_searcher(make: Callable, objective: Callable, space: dict, seed: int, budget: int) -> list[float]:
    """Ours, and those of the chapter on random search."""
    return [trial.value for trial in search(objective, make(space, seed), budget, show_progress_bar=False)]


def shuffled_grid(levels, space: dict, seed: int) -> ListSearch:
    """The points of a grid in random order."""
    return ListSearch(space, np.random.default_rng(seed).permutation(GridSearch(space, levels).points).tolist())


def by_skopt(objective: Callable, space: dict, seed: int, budget: int) -> list[float]:
    """`gp_minimize` as it comes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = skopt.gp_minimize(
            lambda x: objective(dict(zip(space, x))), list(space.values()), n_calls=budget, random_state=seed
        )
    return found.func_vals.tolist()


def by_optuna(sampler: type, objective: Callable, space: dict, seed: int, budget: int) -> list[float]:
    """A sampler of Optuna as it comes."""
    def run(trial):
        def suggest(name, d):
            return (trial.suggest_float if isinstance(d, Real) else trial.suggest_int)(name, d.low, d.high)
        return objective({name: suggest(name, d) for name, d in space.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(sampler=sampler(seed=seed))
    study.optimize(run, n_trials=budget)
    return [trial.value for trial in study.trials]


def methods(levels) -> dict[str, Callable]:
    """All, under the same budget."""
    return {
        "grid": partial(by_searcher, partial(shuffled_grid, levels)),
        "random": partial(by_searcher, RandomSearch),
        "ours": partial(by_searcher, Tuner),
        "skopt gp_minimize": by_skopt,
        "Optuna TPE": partial(by_optuna, optuna.samplers.TPESampler),
        "Optuna GP": partial(by_optuna, optuna.samplers.GPSampler),
    }


# ---------------------------------------------------------------- runs, kept on disk so that a killed benchmark goes on

def version(problem: str) -> str:
    """What the results depend on: our code and, for the table, its content."""
    files = [*Path(__file__).parents[1].glob("ecomopt/tune/*.py"), *([SURFACE] if problem == "reviews" else [])]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:12]


def kept(key: list, compute: Callable[[], list]) -> list[float]:
    """A result from the disk, or computed and written there."""
    lines = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    found = [values for one, values in lines if one == key]
    if found: return found[0]
    values = [float(value) for value in compute()]
    RUNS.parent.mkdir(exist_ok=True)
    with RUNS.open("a") as file: file.write(json.dumps([key, values]) + "\n")
    return values


def run_of(problem: str, method: str, seed: int) -> list[float]:
    """The values of a run; those of peers do not depend on our code."""
    objective, space, levels = PROBLEMS[problem]
    is_ours = method in ("grid", "random", "ours") or problem == "reviews"
    what = version(problem) if is_ours else skopt.__version__ + optuna.__version__
    return kept([problem, method, seed, BUDGET, what], lambda: methods(levels)[method](objective, space, seed, BUDGET))


def interval(values: list[float]) -> str:
    """95 % bootstrap interval of the median."""
    if len(set(values)) == 1: return f"{values[0]:.4g}"
    low, high = bootstrap([values], np.median, method="percentile", rng=0).confidence_interval
    return f"{low:.4g} to {high:.4g}"


def regrets(problem: str) -> list[dict]:
    """Best of the budget above the lowest value, one row a method."""
    rows = []
    for method in methods(PROBLEMS[problem][2]):
        above = [min(run_of(problem, method, seed)) - lowest(problem) for seed in SEEDS]
        found = {"median": median(above), "interval": interval(above)}
        rows.append({"problem": problem, "method": method, "what": f"regret, best of {BUDGET}", **found})
        print(rows[-1], flush=True)
    return rows


def trials_until(goal: float, searcher: Searcher) -> Iterator[int]:
    """How many trials it takes until a value is good enough."""
    while not searcher.trials or searcher.best.value > goal:
        params = searcher.ask()
        searcher.tell(params, tabulated(params))
    yield len(searcher.trials)


def reach(method: str, make: Callable[[dict, int], Searcher]) -> dict:
    """Trials until within one per cent of the table's best."""
    goal, space = 1.01 * lowest("reviews"), PROBLEMS["reviews"][1]
    def first(seed):
        key = ["reach", method, seed, version("reviews")]
        return kept(key, lambda: trials_until(goal, make(space, seed)))[0]
    found = [first(seed) for seed in SEEDS]
    numbers = {"median": median(found), "interval": interval(found)}
    return {"problem": "reviews", "method": method, "what": "trials to within 1 %", **numbers}


# ---------------------------------------------------------------- what a suggestion costs

def seconds_of_ours(X: list[list], y: list[float], space: dict) -> float:
    tuner = Tuner(space)
    for x, value in zip(X, y): tuner.tell(dict(zip(space, x)), value)
    start = process_time()
    tuner.ask()
    return process_time() - start


def seconds_of_skopt(X: list[list], y: list[float], space: dict) -> float:
    optimizer = skopt.Optimizer(list(space.values()), n_initial_points=10, random_state=0)
    optimizer.tell(X[:-1], y[:-1], fit=False)
    start = process_time()
    optimizer.tell(X[-1], y[-1])
    optimizer.ask()
    return process_time() - start


def suggestion(rounds: int = 7) -> list[dict]:
    """Milliseconds of one core for a suggestion after 100 trials on Hartmann-6; the two are interleaved."""
    objective, space, _ = PROBLEMS["Hartmann-6"]
    X = np.random.default_rng(0).random((100, 6)).tolist()
    y = [objective(dict(zip(space, x))) for x in X]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = [(seconds_of_ours(X, y, space), seconds_of_skopt(X, y, space)) for _ in range(rounds + 1)]
    table = 1000 * pd.DataFrame(times[1:], columns=["ours", "skopt gp_minimize"])  # the first is a warm-up
    what = {"problem": "Hartmann-6", "what": "ms a suggestion after 100 trials"}
    return [what | {"method": method, "median": ms.median(), "interval": f"{ms.min():.0f} to {ms.max():.0f}"}
            for method, ms in table.items()]


N_TABLE = len(list(itertools.product(*LEVELS.values())))
NOTES = (
    f"Budget of {BUDGET} trials, {len(SEEDS)} seeds; medians and 95 % bootstrap intervals of the median (of times: "
    f"range). Regret: the best value above the lowest there is. Reviews: a table of {N_TABLE} real fine-tunings of a "
    "small student (layers × batch size × weight decay × learning rate), cross-entropy on the validation split; all "
    "search the entries of the table. The grid has 20 points on Branin and reviews, 64 on Hartmann-6, in random order. "
    "Peers with their defaults: gp_minimize (gp_hedge, ten random points first), "
    f"Optuna {optuna.__version__} (ten random points first)."
)

optuna.logging.set_verbosity(optuna.logging.ERROR)
task = load_task("reviews")
if __name__ == "__main__":
    torch.set_num_threads(1)
    problems = sys.argv[1:] or list(PROBLEMS)  # some alone: to keep their runs, without a report
    if "reviews" in problems: fill()
    rows = [row for problem in problems for row in regrets(problem)]
    if problems == list(PROBLEMS):
        rows += [reach("random", RandomSearch), reach("ours", Tuner), *suggestion()]
        table = pd.DataFrame(rows)
        table["median"] = table["median"].map("{:.4g}".format)
        report("tune", table, SEEDS, NOTES)
