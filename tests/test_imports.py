"""The import rule of the layout, read from the source; and what must not be loaded before a config is checked."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

OWN = ("train", "trainers", "datasets_lib", "scripts", "tests")
FILES = sorted(
    path.relative_to(ROOT) for folder in ("trainers", "datasets_lib") for path in (ROOT / folder).rglob("*.py")
)
SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "scripts").rglob("*.py"))
ALL = {path.with_suffix("").as_posix().removesuffix("/__init__"): path for path in (*FILES, *SCRIPTS, Path("train.py"))}
CYCLES = [  # that are known; a line goes when its cycle is opened
    ["trainers/engine/config.py", "trainers/engine/rehearsal.py"],
]
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
        return (*extra, "trainers") if path.parts[1:] == ("engine", "config.py") else extra
    return ("trainers.base", "trainers.common") if path.name not in ("__init__.py", "base.py") else ()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_what_its_place_allows(path):
    own = [name for name, _ in imports(path) if name.split(".")[0] in OWN]
    good = [name for name in own if any(name == root or name.startswith(root + ".") for root in allowed(path))]
    if path.parts[1:] == ("engine", "config.py"):  # the table is all that the engine knows of tasks
        good = [name for name in own if name in ("trainers", "trainers.TRAINERS") or name in good]
    assert own == good


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.parts == ("trainers",)], ids=str)
def test_tasks_and_the_contract_load_heavy_libraries_late(path):
    assert [name for name, at_top in imports(path) if at_top and name.split(".")[0] in HEAVY] == []


def files_imported(path):
    """The own files that a file imports, wherever in it; `from a import b` is a/b.py where there is one, else a."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = [(alias.name,) for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
        for each in names:
            # a script finds one beside it by its bare name, too
            places = [folder + name.replace(".", "/") for name in each for folder in ("", "scripts/")]
            yield from [ALL[place] for place in places if place in ALL][:1]


def cycles(graph):
    """The groups of files each of which leads to every other one of its group, and to itself."""
    reached = {path: set() for path in graph}
    for path, found in reached.items():
        ahead = [path]
        while ahead:
            new = set(graph[ahead.pop()]) - found
            found |= new
            ahead += new
    groups = {frozenset(other for other in reached[path] if path in reached[other]) for path in graph}
    return sorted(sorted(map(str, group)) for group in groups if group)


def test_a_cycle_is_found_and_named():
    graph = {"a": ["b", "d"], "b": ["c"], "c": ["a"], "d": ["e", "f"], "e": ["d"], "f": [], "g": ["a", "g"]}
    assert cycles(graph) == [["a", "b", "c"], ["d", "e"], ["g"]]


def test_every_way_to_import_counts(tmp_path):
    file = tmp_path / "file.py"
    file.write_text(
        "import torch\nimport trainers.base as base\nfrom trainers import TRAINERS, vae\nif TYPE_CHECKING:\n"
        "    from train import train\ndef f():\n    from peer_trainer import build_peer_unet\n"
    )
    found = sorted(map(str, files_imported(file)))
    assert found == [
        "scripts/peer_trainer.py",
        "train.py",
        "trainers/__init__.py",
        "trainers/base.py",
        "trainers/vae.py",
    ]


def test_files_import_each_other_in_no_cycle():
    """Those for type checking and in functions count, too: a file can be read without the files that use it."""
    found = cycles({path: list(files_imported(path)) for path in ALL.values()})
    assert found == CYCLES, "\n".join(", ".join(group) for group in found)


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
