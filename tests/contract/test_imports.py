"""The import rules of the layout, read from the source; and what must not be loaded before a config is checked."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from repository import ROOT

FOLDERS = ("trainers", "datasets_lib", "scripts")
FILES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
MODULES["train"] = (ROOT / "train.py").relative_to(ROOT)
HEAVY = ("diffusers", "transformers", "peft")

# A file imports from its own room, and from those above its own in this list; a task from no other task.
ORDER = (
    "datasets_lib.errors",
    "datasets_lib.foreign",
    "datasets_lib.file_hashes",
    "datasets_lib.checks",
    "datasets_lib.example",
    "datasets_lib.images",
    "datasets_lib.example_checks",
    "datasets_lib.own_data",
    "datasets_lib.sources",
    "datasets_lib.streaming",
    "datasets_lib.report",
    "datasets_lib",
    "trainers.version",
    "trainers.options",
    "trainers.model_configs",
    "trainers.weight_files",
    "trainers.single_file",
    "trainers.pretrained",
    "trainers.engine.config.eval_networks",
    "trainers.engine.config.base_options",
    "trainers.task_options",
    "trainers.base",
    "trainers.common.class_pipeline",  # of which finished runs hold a copy: imports nothing of ours
    "trainers.common.model_files",
    "trainers.common.unet2d",
    "trainers.common.autoencoder",
    "trainers.common.diffusion",
    "trainers.common.text_to_image",
    "trainers.common.lora",
    "trainers",
    "trainers.engine.optim.table",  # a config names one of its rows
    "trainers.engine.config",
    "trainers.engine.distributed",
    "trainers.engine.run",
    "trainers.engine.optim",
    "trainers.engine.encoders",
    "trainers.engine.data",
    "trainers.engine.tracking",
    "trainers.engine.checkpoint",
    "trainers.engine.validation",
    "trainers.engine.export",
    "trainers.engine.dry_run",
    "train",
    "trainers.inference",
    "scripts",
    "scripts.data",
    "scripts.benchmarks",
)
FOREIGN = (
    "datasets_lib.errors",
    "datasets_lib.foreign",
    "datasets_lib.checks",
)  # what everybody raises, shows, opens and reads with
CONTRACT = (
    "datasets_lib.file_hashes",
    "trainers.version",
    "trainers.options",
    "trainers.model_configs",
    "trainers.weight_files",
    "trainers.single_file",
    "trainers.pretrained",
    "trainers.task_options",
    "trainers.base",
)  # between loop and tasks
ENGINE_ROOMS = [
    room.rpartition(".")[2] for room in ORDER if room.startswith("trainers.engine.") and room.count(".") == 2
]


def imports(path):
    """(module, whether the import stands at the top level) of a file; `if TYPE_CHECKING` and functions count, too."""
    tree = ast.parse((ROOT / path).read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from ((name, id(node) in top) for name in names if name != "__future__")


def module_of(name):
    """The module of ours that an imported name is or comes from; None for a library's."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name if name in MODULES else None


def own_imports(path):
    return {found for name, _ in imports(path) if (found := module_of(name)) is not None}


def room_of(module):
    return max((room for room in ORDER if f"{module}.".startswith(f"{room}.")), key=len)


def is_task(module):
    return room_of(module) == "trainers" and module != "trainers"


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_what_its_place_allows(module):
    own = room_of(module)
    for imported in own_imports(MODULES[module]):
        room, told = room_of(imported), f"{module} imports {imported}"
        assert ORDER.index(room) <= ORDER.index(own), f"{told}, which is below it"
        if is_task(module):
            assert room in (*CONTRACT, *FOREIGN) or room.startswith("trainers.common"), told
        if own.startswith("trainers.engine"):  # of tasks it knows the table alone
            assert (
                imported == "trainers"
                or room in (*CONTRACT, *FOREIGN, "datasets_lib.example")
                or room.startswith("trainers.engine")
            ), told
        if own.startswith("trainers.common"):
            assert room in (*CONTRACT, *FOREIGN) or room.startswith("trainers.common"), told


def test_no_files_import_each_other():
    graph = {module: own_imports(path) - {module} for module, path in MODULES.items()}
    done, way = set(), []

    def visit(module):
        assert module not in way, f"a cycle of imports: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            way.append(module)
            for imported in sorted(graph[module]):
                visit(imported)
            done.add(way.pop())

    for module in graph:
        visit(module)


def test_the_engine_has_rooms_and_nothing_else():
    found = [path for path in (ROOT / "trainers" / "engine").iterdir() if path.name != "__pycache__"]
    assert sorted(path.name for path in found) == sorted([*ENGINE_ROOMS, "__init__.py"])


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.parts == ("trainers",)], ids=str)
def test_tasks_and_the_contract_load_heavy_libraries_late(path):
    assert [name for name, at_top in imports(path) if at_top and name.split(".")[0] in HEAVY] == []


def test_a_config_is_checked_without_the_heavy_libraries():
    code = (
        "import sys; from train import main; code = main(['configs/tests/ddpm.json', 'base.seed=-1']);"
        "print(code, [m for m in ('torch', 'diffusers', 'transformers', 'peft', 'accelerate', 'datasets') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "2 []"


@pytest.mark.slow
def test_a_run_loads_no_library_that_it_does_not_use(tmp_path):
    options = ["configs/tests/ddpm.json", f"base.output_dir={tmp_path / 'run'}", "base.max_train_steps=1"]
    names = ("sklearn", "pandas", "datasets", "torchmetrics", "torch_fidelity", "wandb", "tensorboard", "matplotlib")
    code = f"import sys; from train import main; code = main({options}); print(code, sorted(set({names}) & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "0 []"
