"""Tables of scripts/benchmarks/bench.py: what they count, and where they are written. Nothing here asserts a speed."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from repository import ROOT

from scripts.benchmarks import bench, loop, scale

ROWS = [
    {"task": "ddpm", "median_ratio": 0.98765, "rates": [1.0, 2.0], "ms_per_step": {"data": 0.5, "all": 123.4}},
    {"task": "vae", "median_ratio": 1.0, "rates": [3.0], "ms_per_step": {"data": 1.0, "all": 1234.5}},
]


def test_a_table_takes_the_place_of_its_older_one(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    document = tmp_path / "performance.md"
    document.write_text("before\n<!-- loop -->\nold\n<!-- end of loop -->\nafter\n")
    path = bench.write("loop", ROWS, "scripts/benchmarks/bench.py loop", document)
    result = json.loads(path.read_text())
    assert result["rows"] == ROWS
    assert result["versions"]["torch"] == torch.__version__
    lines = document.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    assert lines[2].startswith("`scripts/benchmarks/bench.py loop`: ")
    assert lines[4:8] == [
        "| task | median ratio | ms per step |",
        "| --- | --- | --- |",
        "| ddpm | 0.988 | data 0.5, all 123 |",
        "| vae | 1 | data 1, all 1,234 |",
    ]
    bench.write(
        "loop",
        [{"engine": "DDP", "held_mib": ("-", 2.5)}],
        "scripts/benchmarks/bench.py loop",
        document,
        "assumed much",
    )
    lines = document.read_text().splitlines()
    assert lines[2].startswith("`scripts/benchmarks/bench.py loop`: assumed much, torch ")
    assert lines[4:7] == ["| engine | held mib |", "| --- | --- |", "| DDP | - / 2.5 |"]
    with pytest.raises(
        ValueError, match="has no place for the table; write <!-- data --> and <!-- end of data --> where"
    ):
        bench.write("data", ROWS, "scripts/benchmarks/bench.py data", document)


@pytest.mark.parametrize("table", bench.TABLES)
def test_each_table_has_a_module_a_place_and_a_row_of_the_readme(table):
    assert importlib.util.find_spec(f"scripts.benchmarks.{table}")
    assert f"<!-- {table} -->" in bench.TABLES[table].read_text()
    assert f"| `bench.py {table}" in (ROOT / "scripts/benchmarks/README.md").read_text()


@pytest.mark.parametrize("task", ["conditional_ddpm", "vae", "lora"])
def test_both_sides_train_and_the_parts_are_a_step(tmp_path, task):
    found = loop.compared(task, "smallest", str(tmp_path), 3, 2)
    assert len(found["diffloop"]) == len(found["bare"]) == 3
    ratios = [a / b for a, b in zip(found["diffloop"], found["bare"], strict=True)]
    assert found["ratios"] == ratios
    assert found["median_ratio"] == sorted(ratios)[1] > 0
    parts = found["ms_per_step"]
    assert {
        "data",
        "forward",
        "backward",
        "optimizer",
        "averaging",
        "randomness",
        "metering",
        "other",
        "all",
    } <= parts.keys()
    assert sum(ms for name, ms in parts.items() if name != "all") == pytest.approx(parts["all"], abs=0.02)


@pytest.mark.parametrize("task", loop.TASKS)
@pytest.mark.parametrize("size", ["smallest", "realistic"])
def test_the_runs_that_are_measured(task, size, tmp_path):
    run = loop.run_of(task, size, str(tmp_path), 15, 3)
    assert run.task == task
    assert (run.base.max_train_steps, run.base.logging_steps) == (15 + 3 * 15, 15)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_processes_send_each_other_is_the_gradient_and_a_few_numbers(processes):
    found = scale.launched("ddpm", processes, 2, 1)
    assert found["examples_per_second"] > 0
    assert found["gradient_bytes"] == (found["trained_bytes"] if processes > 1 else 0)
    assert 0 < found["other_bytes"] < 200 if processes > 1 else found["other_bytes"] == 0
    assert found["trained_bytes"] > 100_000


def test_efficiency_is_by_process_and_pair():
    runs = [
        {"examples_per_second": rate, "trained_bytes": 2**21, "gradient_bytes": 2**20, "other_bytes": 9}
        for rate in (10.0, 14.0, 12.0)
    ]
    alone = [{"examples_per_second": rate} for rate in (5.0, 10.0, 8.0)]
    row = scale.row("ddpm", 2, 1, runs, alone)
    assert (row["examples_per_second_each"], row["efficiency"], row["ratios"]) == (6.0, 0.75, [1.0, 0.7, 0.75])
    assert (row["trained_mib"], row["reduced_gradients_mib_per_step"], row["other_bytes_per_step"]) == (2.0, 1.0, 9)
