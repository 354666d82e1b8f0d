"""Tables of scripts/benchmarks/bench.py: what they count, and where they are written. Nothing here asserts a speed."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from marks import slow
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
    assert bench.markdown([{"scale": 1.5, "accuracy": (0.5, 0.25)}]).splitlines()[-1] == "| 1.5 | 0.5 / 0.25 |"
    with pytest.raises(
        ValueError, match="has no place for the table; write <!-- data --> and <!-- end of data --> where"
    ):
        bench.write("data", ROWS, "scripts/benchmarks/bench.py data", document)


@pytest.mark.parametrize("table", bench.TABLES)
def test_each_table_has_a_module_a_place_and_a_row_of_the_readme(table):
    assert importlib.util.find_spec(f"scripts.benchmarks.{table}")
    assert f"<!-- {table} -->" in bench.TABLES[table].read_text()
    assert f"| `bench.py {table}" in (ROOT / "scripts/benchmarks/README.md").read_text()


@pytest.mark.parametrize("task", ["conditional_ddpm", slow("vae"), slow("lora")])
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


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["one process", "DDP"])
def test_what_processes_send_each_other_is_the_gradient_and_a_few_numbers(engine):
    run = scale.run(engine, "ddpm", 2, 1)
    row = scale.row([run], [run])
    assert row["examples_per_second_each"] > 0
    assert row["trained_mib"] > 0.1
    assert row["reduced_gradients_mib_per_step"] == (row["trained_mib"] if engine == "DDP" else 0)
    assert 0 < row["other_bytes_per_step"] < 200 if engine == "DDP" else row["other_bytes_per_step"] == 0


def test_efficiency_is_by_process_and_pair():
    held, messages = {"weights": 2**21, "gradients": 2**20}, {"all_reduce": 2**20 + 9}
    runs = [{"batch": 6, "step_seconds": s, "held": held, "messages": messages} for s in (1.0, 0.8, 2.0)]
    row = scale.row(runs, [{"step_seconds": seconds} for seconds in (1.0, 0.6, 1.4)])
    assert row == {
        "examples_per_second_each": 6.0, "efficiency": pytest.approx(0.75), "trained_mib": 2.0,
        "reduced_gradients_mib_per_step": 1.0, "other_bytes_per_step": 9, "ratios": pytest.approx([1.0, 0.75, 0.7]),
    }  # fmt: skip
