"""Fixtures of data sets."""

from __future__ import annotations

import json

import pytest

from datasets_lib.inspect import main


@pytest.fixture
def inspect(tmp_path, capsys):
    """inspect(*arguments, **options of base) -> (exit code, lines of the report, what went to stderr)."""

    def run(*arguments, **base):
        (tmp_path / "config.json").write_text(json.dumps({"base": base, "ddpm": {}}))
        code = main([str(tmp_path / "config.json"), "--output", str(tmp_path / "sheet.png"), *arguments])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err

    return run
