"""What every benchmark ends with: a table on the screen, and a JSON file with the conditions it was measured under."""
import hashlib
import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results"
PACKAGES = "ecomopt", "torch", "transformers", "numpy", "scikit-learn"


INSTRUCTIONS = {  # what decides how fast a CPU multiplies integers, the best first
    "amx_int8": "AMX", "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX VNNI", "avx512f": "AVX-512", "avx2": "AVX2"}


def machine() -> str:
    """The CPU by its name, its instructions for products, and how many of its cores are ours."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    cpu = found.get("model name") or platform.processor() or platform.machine()
    flags = (found.get("flags") or found.get("Features", "")).split()
    cpu += next((f" with {name}" for flag, name in INSTRUCTIONS.items() if flag in flags), "")
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}"


def script(name: str) -> str | None:
    """Sixteen digits that identify the script of a benchmark as it is now."""
    path = BENCHMARKS / f"{name}.py"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None


def conditions(name: str) -> dict:
    """When, where, by which script and with which versions something is measured."""
    return {
        "date": datetime.now(UTC).date().isoformat(), "machine": machine(), "script": script(name),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}}


def report(name: str, table: pd.DataFrame, seeds: list[int], notes: str, measured: dict | None = None) -> Path:
    """Print the table and write `benchmarks/results/NAME.json`; `measured`: the conditions, if not those of now."""
    print(f"\n{table.to_string(index=False)}\n\n{notes}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    rows = json.loads(table.to_json(orient="records"))
    result = {"name": name, **(measured or conditions(name)), "seeds": seeds, "notes": notes, "table": rows}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    print(f"\nwritten: {path.relative_to(RESULTS.parents[1])}")
    return path
