"""scripts/benchmarks/soak.py, for as short a time as it takes."""

from __future__ import annotations

import sys

import pytest

from scripts.benchmarks import bench, soak


@pytest.mark.slow
def test_a_short_soak(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {table} -->\n<!-- end of {table} -->\n" for table in ("soak", "soak_starts")))
    monkeypatch.setattr(soak, "PAGE", page)
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["soak.py", "--minutes", "3"])
    soak.main()
    text = page.read_text()
    assert "| steps, checkpoints, validations | 1 |" in text
    assert "| a stream with broken shards | 1 |" in text
    [cells] = [line.split("|")[1:-1] for line in text.splitlines()[-3:-1] if line.startswith("| 1 |")]
    _, starts, ended, tracebacks, _, wrong = map(str.strip, cells)
    assert (ended, tracebacks, wrong) == (starts, "0", "0")
