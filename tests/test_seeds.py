"""Benchmarks seed by seed: what was measured is kept, and one table is made of all."""
import json
import sys

import numpy as np
import pytest

from tools import seeds


def test_a_seed_is_measured_once_and_three_make_a_table(tmp_path, monkeypatch):
    measured = []
    def measure(seed):
        measured.append(seed)
        right = np.arange(50) % (5 + seed) > 0
        return [{"model": name, "× throughput": speed * (1 + seed), "right": seeds.digits(right[:40 + 10 * speed])}
                for name, speed in (("teacher", 1), ("student", 1))]
    monkeypatch.setattr(seeds, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(sys, "argv", ["benchmark", "2", "0"])
    with pytest.raises(SystemExit, match="2 seeds were measured"): seeds.each_once("some", measure, [0, 1, 2])
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    found, rows, conditions = seeds.each_once("some", measure, [0, 1, 2])
    assert found == [0, 1, 2] and measured == [2, 0, 1] and len(rows) == 6
    assert {"date", "machine", "script", "versions"} == conditions.keys() and ";" not in conditions["machine"]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["some.json"]

    table = seeds.over_seeds(rows, "× throughput")
    right = [sum(n % (5 + seed) > 0 for n in range(50)) / 50 for seed in range(3)]
    assert list(table.index) == ["teacher", "student"] and table.loc["student", "retained"] == 1
    assert table.loc["student", "× throughput"] == 2 and table.loc["student", "× throughput, range"] == "1 to 3"
    assert table.loc["student", "accuracy"] == pytest.approx(np.mean(right))


def test_other_conditions_are_all_said(tmp_path, monkeypatch):
    rows = [{"model": "teacher", "right": "1101"}]
    def part(date, machine): return {"date": date, "machine": machine, "versions": {"torch": "2"}, "rows": rows}
    parts = {"0": part("2026-11-29", "A"), "1": part("2026-11-28", "A"), "2": part("2026-11-30", "B")}
    parts["2"]["script"] = "new"
    (tmp_path / "some.json").write_text(json.dumps(parts))
    monkeypatch.setattr(seeds, "KEPT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    _, _, conditions = seeds.each_once("some", None, [0, 1, 2])
    assert conditions == {
        "date": "2026-11-28 to 2026-11-30", "machine": "A; B", "script": "None, new", "versions": {"torch": "2"}}
