"""A closed or full standard output or error ends nothing: neither a run, nor a script, nor Python's own last flush."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from processes import environment
from repository import ROOT

from trainers.engine.run.output import lasting_output

PRINTS = """
import sys
from trainers.engine.run.output import lasting_output
with lasting_output():
    for number in range(20_000):
        print("a line of the run", number)
        print("a bar", number, file=sys.stderr, flush=True)
open(sys.argv[1], "w").write("done")
"""


def run(folder, shell):
    """(exit code, what is left to read) of a shell command with PRINTS as $0 and its file as $1."""
    (folder / "prints.py").write_text(PRINTS)
    command = f"'{sys.executable}' '{folder}/prints.py' '{folder}/done' {shell}"
    env = environment({"PYTHONPATH": str(ROOT)})
    found = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=env, capture_output=True, text=True, timeout=60
    )
    assert (folder / "done").is_file(), found.stderr[-500:]
    return found.returncode, found.stdout + found.stderr


@pytest.mark.parametrize(
    "shell",
    ["2>&1 | head -c 3000 > /dev/null", "2> /dev/null | head -c 100 > /dev/null", "2>&1 >/dev/full", ">/dev/full 2>/dev/full",
     "2>&1 >&-", "2>&-", ">&- 2>&-", "2>&1 | true"],
)  # fmt: skip
def test_the_reader_goes_and_the_work_is_done(tmp_path, shell):
    code, text = run(tmp_path, shell)
    assert code == 0
    assert "Traceback" not in text
    assert "Exception ignored" not in text


def test_what_can_be_written_is_written(capsys):
    with lasting_output():
        print("a name \udcff that no encoding has", flush=True)
        print("an error", file=sys.stderr)
    assert capsys.readouterr() == ("a name \\udcff that no encoding has\n", "an error\n")


def test_the_streams_are_put_back(monkeypatch):
    mine = io.StringIO()
    monkeypatch.setattr(sys, "stdout", mine)
    with lasting_output():
        assert sys.stdout is not mine
        assert not sys.stdout.isatty()  # whatever else is asked of it
    assert sys.stdout is mine


def test_output_returns_with_the_space(monkeypatch):
    """A log on a full disk has a gap, and no end."""

    class Disk(io.StringIO):
        full = True

        def write(self, text):
            if self.full:
                raise OSError(28, os.strerror(28))
            return super().write(text)

    disk = Disk()
    monkeypatch.setattr(sys, "stdout", disk)
    with lasting_output():
        print("lost")
        disk.full = False
        print("written")
    assert disk.getvalue() == "written\n"


class Gone(io.StringIO):
    """A stream without a descriptor, whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError(32, os.strerror(32))


def test_a_stream_without_a_descriptor_may_go_too(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Gone())
    with lasting_output():
        print("lost")
        sys.stdout.writelines(["lost", "too"])
        print("and this", flush=True)
