"""Copies of finished runs as somebody could send them: importable folders with a module that must not run."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path

NAME = "evil_run.evil"  # of the module
EVIL = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
class T: pass
def build(args, split): return None
"""


@contextmanager
def evil_copy(finished, tmp_path, monkeypatch):
    """A copy whose folder can be imported, with a module beside its files; fails if that was imported."""
    folder = Path(shutil.copytree(finished, tmp_path / "evil_run"))
    (folder / "evil.py").write_text(EVIL)
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    assert not (folder / "ran").exists()
