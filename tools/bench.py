"""What every benchmark ends with: a table on the screen, and a JSON file with the conditions it was measured under."""
import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
PACKAGES = "ecomopt", "torch", "transformers", "numpy", "scikit-learn"


def machine() -> str:
    """The CPU by its name, and how many of its cores are ours."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}"


def report(name: str, table: pd.DataFrame, seeds: list[int], notes: str, where: str | None = None) -> Path:
    """Print the table and write `benchmarks/results/NAME.json`; `where` it was measured, if not here and now."""
    print(f"\n{table.to_string(index=False)}\n\n{notes}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    result = {
        "name": name, "date": datetime.now(UTC).date().isoformat(), "machine": where or machine(),
        "seeds": seeds, "notes": notes,
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "table": json.loads(table.to_json(orient="records")),
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    print(f"\nwritten: {path.relative_to(RESULTS.parents[1])}")
    return path
