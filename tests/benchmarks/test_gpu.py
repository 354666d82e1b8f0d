"""scripts/benchmarks/gpu.py without a card: its sections with the smallest networks, its limits of time, its tables."""

from __future__ import annotations

import io
import json
import time
import tomllib
from contextlib import redirect_stdout

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from repository import ROOT

import train
from scripts.benchmarks import gpu
from scripts.benchmarks.on_gpu import correct, preflight, section, tables
from scripts.benchmarks.on_gpu.section import Asked, Skip
from scripts.benchmarks.on_gpu.tiny_runs import difference

BENCHMARKS = ROOT / "scripts" / "benchmarks"


def rows_of(name, tmp_path, end=float("inf")):
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    section.run(name, Asked(tmp_path, "cpu", True, end), out)
    found = json.loads((out / f"{name}.json").read_text())
    assert found["card"] == "no card"
    return {row["case"]: row for row in found["rows"]}


def test_correct(tmp_path):
    rows = rows_of("correct", tmp_path)
    assert all(row["holds"] for row in rows.values())
    assert rows["ddpm: float32 beside the CPU"]["difference"] == 0.0  # that is the CPU
    assert 0 < rows["lora: bf16 beside the CPU's float32"]["difference"] < 1e-2
    assert rows["a NaN is skipped and written down"]["note"] == "skipped: [3]"
    assert len(rows) == 14


@pytest.mark.slow
def test_speed_and_knobs(tmp_path):
    rows = rows_of("speed", tmp_path)
    assert not any("holds" in row for row in rows.values())  # no case failed
    assert all(0 < rows[name]["loop_ratio"] < 3 and rows[name]["memory_gib"] > 0 for name in ("DDPM", "LoRA"))
    assert "times the plain script in float32" in rows["DDPM, beside a plain script"]["note"]
    assert "a stall of" in rows["a save of the whole fine-tune"]["note"]
    rows = rows_of("knobs", tmp_path)
    assert list(rows) == [
        "eager float32, optimizer not fused",
        "TF32",
        "bf16",
        "channels_last",
        "fused optimizer",
        "caches",
        "batch 16",
        "batch 32",
    ]
    assert all(row["images_per_second"] > 0 for row in rows.values())
    assert rows["eager float32, optimizer not fused"]["ratio"] == 1.0


def test_preflight(tmp_path, monkeypatch):
    def called(asked, script, *arguments):
        with redirect_stdout(io.StringIO()) as printed:
            assert train.main(list(map(str, arguments))) == 0
        return printed.getvalue()

    monkeypatch.setattr(preflight, "called", called)
    [row] = rows_of("preflight", tmp_path).values()
    assert row["holds"] is None  # of a card alone
    assert row["said_gib"] == pytest.approx(row["gib"], rel=0.2)
    assert row["took_seconds"] > 0 < row["said_seconds"]


def test_what_fails_or_has_no_time_is_a_row(tmp_path, monkeypatch, capsys):
    def fails():
        raise ValueError("too bad")

    def skips():
        raise Skip("bitsandbytes is not installed")

    monkeypatch.setattr(correct, "cases", lambda asked: {"a": fails, "b": skips, "c": lambda: {"holds": True}})
    rows = rows_of("correct", tmp_path)
    assert (rows["a"]["holds"], rows["a"]["note"]) == (False, "ValueError: too bad")
    assert rows["b"]["note"] == "skipped: bitsandbytes is not installed"
    assert rows["c"]["holds"]

    def fills():
        raise torch.OutOfMemoryError("CUDA out of memory")

    note = "skipped: it does not fit into the card's memory"
    assert section.outcome(lambda: section.if_it_fits(fills)) == {"note": note}
    assert section.outcome(fills)["holds"] is False
    rows = rows_of("correct", tmp_path, end=0)
    assert [row["note"] for row in rows.values()] == ["not run: no time was left"] * 3
    monkeypatch.setattr(correct, "cases", lambda asked: fails())
    assert rows_of("correct", tmp_path)["the section"]["note"] == "ValueError: too bad"


@pytest.mark.parametrize("code", [0, 1])
def test_sections_share_the_minutes_and_the_tables_are_written(code, tmp_path, monkeypatch, capsys):
    called = []

    def run_section(name, seconds, options):
        called.append((name, round(seconds)))
        found = {
            "command": "c",
            "date": "d",
            "card": "H",
            "driver": "1",
            "cuda": "13",
            "cores": 2,
            "versions": {"torch": "2"},
        }
        rows = [
            {"case": "x", "holds": code == 0 or name != "knobs", "ratio": 0.98765},
            {"case": "y", "note": "skipped: | z"},
        ]
        (options.out / f"{name}.json").write_text(json.dumps(found | {"rows": rows}))
        return "done"

    monkeypatch.setattr(gpu, "run_section", run_section)
    assert gpu.main([str(tmp_path / "out")]) == code
    assert called == [("card_tests", 60), ("correct", 80), ("speed", 150), ("knobs", 60), ("preflight", 70)]
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert text.startswith(
        "## Tests that need a card\n\n`c`, d: H, driver 1, CUDA 13, 2 cores, torch 2.\n\n| case | holds | ratio | note |"
    )
    assert "| x | yes | 0.988 |  |\n| y |  |  | skipped: / z |" in text
    assert ("| x | **no** |" in text) == (code == 1)
    called.clear()
    gpu.main([str(tmp_path / "out"), "--minutes", "1"])
    assert called[:2] == [("card_tests", 60), ("correct", 60)]
    called.clear()
    gpu.main([str(tmp_path / "out"), "--sections", "learning", "--minutes", "6"])
    assert called == [("learning", 360)]
    gpu.main([str(tmp_path / "out"), "--minutes", "0"])
    assert "knobs: not run, no time was left" in capsys.readouterr().out


def test_a_section_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    options = gpu.argparse.Namespace(out=tmp_path, device="cpu", tiny=True)
    with monkeypatch.context() as patched:
        patched.setattr(gpu, "GRACE", 0.3)
        assert gpu.run_section("knobs", 0.1, options) == "stopped"
    monkeypatch.setattr(gpu, "GRACE", 60)
    options.out = tmp_path / "no folder"
    assert gpu.run_section("knobs", 0.01, options) == "ended with exit code 1"


def test_a_script_ends_with_the_time_of_its_section(tmp_path):
    late, early = (Asked(tmp_path, "cpu", True, end) for end in (0.0, time.monotonic() + 60))
    with pytest.raises(Skip, match=r"-c was stopped, as the section's time was over"):
        section.called(late, "-c", "import time; time.sleep(60)")
    with pytest.raises(RuntimeError, match=r"(?s)train.py ended with 2: .*no-such-config.json"):
        section.called(early, "train.py", "no-such-config.json")


def test_what_was_measured_when_the_time_was_over_is_said(tmp_path, monkeypatch):
    def look():
        rows = json.loads((tmp_path / "out" / "correct.json").read_text())["rows"]
        return {"seen": [row.get("note") for row in rows]}

    monkeypatch.setattr(correct, "cases", lambda asked: {"a": lambda: {"holds": True}, "b": look})
    assert rows_of("correct", tmp_path)["b"]["seen"] == [None, "stopped: its time was over"]


def test_differences_and_numbers():
    assert difference([1.0, 2.0, 3.3], [1.0, 2.0, 3.0]) == pytest.approx(0.15)
    with pytest.raises(ValueError, match="one run has 1 steps and the other 2"):
        difference([1.0], [1.0, 2.0])
    assert [tables.shown(value) for value in (None, True, False, 12345.6, 0.00012345, 7)] == [
        "",
        "yes",
        "**no**",
        "12,346",
        "0.000123",
        "7",
    ]


def test_the_wheels_are_what_our_own_bounds_allow():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for name in ("bitsandbytes",) for text in project["optional-dependencies"][name]]
    bounds = {each.name.lower(): each.specifier for each in map(Requirement, project["dependencies"] + extras)}
    lines = [line for line in (BENCHMARKS / "gpu_wheels.txt").read_text().splitlines() if not line.startswith("#")]
    for name, _, version in (line.partition("==") for line in lines):
        assert Version(version) in bounds.get(name, Requirement("any").specifier), name
    for name, version in (
        ("torch", "2.11.0"),
        ("torchvision", "0.26.0"),
        ("accelerate", "1.15.0"),
        ("transformers", "5.17.0"),
        ("torchmetrics", "1.9.0"),
    ):
        assert Version(version) in bounds[name], name


def test_the_first_line_says_whether_the_tables_were_run_and_the_readme_repeats_it():
    line = (ROOT / "docs" / "gpu.md").read_text().splitlines()[2]
    assert line.startswith("These tables have ")
    assert line.partition(":")[0].removeprefix("These tables ") in (ROOT / "README.md").read_text()
    for name, each in gpu.SECTIONS.items():
        assert (BENCHMARKS / "on_gpu" / f"{name}.py").is_file()
        wanted = f"{each.seconds:g}" if each.by_default else "by its own call"
        assert f"| `{name}` | {wanted} |" in (ROOT / "docs" / "gpu.md").read_text()
    assert sum(each.seconds for each in gpu.SECTIONS.values() if each.by_default) == 7 * 60


@pytest.mark.slow
def test_correct_of_all_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(correct, "TINY_TASKS", correct.TASKS)
    rows = rows_of("correct", tmp_path)
    assert len(rows) == 14 + 3 * (len(correct.TASKS) - 2)
    assert all(row["holds"] for row in rows.values())


@pytest.mark.slow
def test_the_whole_command_on_a_cpu(tmp_path):
    assert gpu.main([str(tmp_path), "--device", "cpu", "--tiny", "--minutes", "10"]) == 0
    assert {path.stem for path in tmp_path.glob("*.json")} == set(gpu.SECTIONS) - {"learning"}
    assert gpu.main([str(tmp_path), "--device", "cpu", "--tiny", "--minutes", "10", "--sections", "learning"]) == 0
    rows = json.loads((tmp_path / "learning.json").read_text())["rows"]
    assert [row["holds"] for row in rows] == [None, None]
    assert ["lora_accuracy" in row["note"] for row in rows] == [False, True]
