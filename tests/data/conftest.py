"""Fixtures of data sets."""

from __future__ import annotations

import json

import pytest
from script_calls import run_script

from scripts import inspect_data


@pytest.fixture
def inspect(tmp_path, capsys):
    """inspect(*arguments, **options of base) -> (exit code, lines of the report, what it says of an error)."""

    def run(*arguments, **base):
        task = {"ddpm": {}} if base.get("channels") == 1 else {"lora": {"pretrained_model_name_or_path": "some/base"}}
        (tmp_path / "config.json").write_text(json.dumps({"base": {"max_train_steps": 1, **base}, **task}))
        code, error = 0, ""
        try:
            run_script(inspect_data, tmp_path / "config.json", "--output", tmp_path / "sheet.png", *arguments)
        except SystemExit as exit:
            code, error = (exit.code, "") if isinstance(exit.code, int) else (1, exit.code)
        return code, capsys.readouterr().out.splitlines(), error

    return run
