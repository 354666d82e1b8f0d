"""The import rule of the layout, read from the source; and what must not be loaded before a config is checked."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

OWN = ("train", "trainers", "datasets_lib", "scripts", "tests")
FILES = sorted(
    path.relative_to(ROOT) for folder in ("trainers", "datasets_lib") for path in (ROOT / folder).rglob("*.py")
)
HEAVY = ("diffusers", "transformers", "peft")


def imports(path):
    """(module, whether the import stands at the top level) of a file."""
    tree = ast.parse((ROOT / path).read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        yield from ((name, id(node) in top) for name in names if name != "__future__")


def allowed(path):
    """The own modules that a file may import."""
    if path.parts[0] == "datasets_lib":
        return ("datasets_lib",)
    if path.parts[1] in ("common", "engine"):
        extra = ("trainers.TRAINERS", "trainers.base", f"trainers.{path.parts[1]}")
        return (*extra, "trainers") if path.parts[1:] == ("engine", "config", "config.py") else extra
    return ("trainers.base", "trainers.common") if path.name not in ("__init__.py", "base.py") else ()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_what_its_place_allows(path):
    own = [name for name, _ in imports(path) if name.split(".")[0] in OWN]
    good = [name for name in own if any(name == root or name.startswith(root + ".") for root in allowed(path))]
    if path.parts[1:] == ("engine", "config", "config.py"):  # the table is all that the engine knows of tasks
        good = [name for name in own if name in ("trainers", "trainers.TRAINERS") or name in good]
    assert own == good


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.parts == ("trainers",)], ids=str)
def test_tasks_and_the_contract_load_heavy_libraries_late(path):
    assert [name for name, at_top in imports(path) if at_top and name.split(".")[0] in HEAVY] == []


def test_a_config_is_checked_without_the_heavy_libraries():
    code = (
        "import sys; from train import main; code = main(['configs/tests/ddpm.json', 'base.seed=-1']);"
        "print(code, [m for m in ('diffusers', 'transformers', 'peft', 'accelerate', 'datasets') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "2 []"


def test_the_loop_is_a_page():
    [function] = [n for n in ast.parse((ROOT / "train.py").read_text()).body if getattr(n, "name", "") == "train"]
    assert function.end_lineno - function.lineno + 1 <= 100
