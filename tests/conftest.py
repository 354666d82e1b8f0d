"""Fixtures: the tiny configs of configs/tests, runs in this process."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import processes
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from repository import ROOT, tiny

from datasets_lib.sources import digits
from train import train
from trainers.engine.config.config import load_config

LAUNCH = ("test_distributed", "test_documents", "test_nodes", "test_stopping")  # several processes at once, as users do


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long matrices too")


def pytest_configure(config):
    processes.launch_all = config.getoption("--slow")
    digits.read_digits = functools.cache(digits.read_digits)  # of each tiny run a twentieth


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="cuda: needs a card"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file stays on one worker, for its fixtures; files that launch are as one, so that none runs beside another.

    Marks of groups would do, but xdist 3.8 does not see them under pytest 9.2.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "launched" if Path(nodeid.partition("::")[0]).stem in LAUNCH else super()._split_scope(nodeid)

    return Files(config, log)


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Every test starts as a new process would: accelerate keeps what was launched in class attributes."""
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(1)  # as in launched processes: another number sums in another order
    for variable in list(os.environ):
        if variable.startswith("ACCELERATE_"):
            monkeypatch.delenv(variable)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def tiny_config(tmp_path):
    """config(task="ddpm", **{"base.seed": 1, ...}) -> path of a copy of configs/tests/<task>.json with these values."""

    def make(task="ddpm", name="config", **values):
        document = json.loads(tiny(task).read_text())
        document["base"]["output_dir"] = str(tmp_path / name)
        for key, value in values.items():
            section, _, option = key.partition(".")
            document[section][option] = value
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(document))
        return path

    return make


@pytest.fixture
def run_in_process(tiny_config):
    """run(name, task, **options) -> folder of a run that was trained in this process."""

    def run(name="run", task="ddpm", **values):
        folder = train(load_config(tiny_config(task, name, **values), trust_code=True))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return folder

    return run


@pytest.fixture
def network_without_dropout(tmp_path):
    """The tiny UNet without dropout, which is keyed by micro-batch: for comparisons of splits."""
    settings = json.loads((ROOT / "configs/tests/models/unet2d.json").read_text()) | {"dropout": 0.0}
    (tmp_path / "network.json").write_text(json.dumps(settings))
    return str(tmp_path / "network.json")
