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


INSTRUCTIONS = {  # what decides how fast a CPU multiplies integers, the best first
    "amx_int8": "AMX", "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX VNNI", "avx512f": "AVX-512", "avx2": "AVX2"}


def machine() -> str:
    """The CPU by its name, its instructions for products, and how many of its cores are ours."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    cpu = found.get("model name") or platform.processor() or platform.machine()
    flags = found.get("flags", "").split()
    cpu += next((f" with {name}" for flag, name in INSTRUCTIONS.items() if flag in flags), "")
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
