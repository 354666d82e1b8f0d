"""The table of trackers: what a tracker gets, from which step it starts, and that one of a few lines is enough."""

from __future__ import annotations

import math
from typing import get_args, get_type_hints

import pytest
import torch
from accelerate.state import AcceleratorState
from repository import tiny
from run_folders import read_metrics

from train import train
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import load_config
from trainers.engine.dry_run.sandbox import open_dry_run
from trainers.engine.tracking import COMBINED, TRACKERS
from trainers.engine.tracking.external import ExternalTracker, opaque_pixels

SAVES = {"base.checkpointing_steps": 3, "base.validation_split": 0.1}


class Everything(ExternalTracker):
    """Records its calls."""

    def start(self):
        calls.append(("start", self.start_step, self.run.task, self.logging_dir.is_dir()))

    def log(self, values, step):
        calls.append(("log", values, step))

    def log_grids(self, grids, step):
        calls.append(("grids", {name: tuple(grid.shape) for name, grid in grids.items()}, step))

    def log_table(self, requests, pictures, step):
        calls.append(("table", requests, [{k: tuple(v.shape) for k, v in images.items()} for images in pictures], step))

    def log_pipeline(self, paths, metadata):
        calls.append(("pipeline", sorted(path.name for path in paths if path.exists()), metadata))

    def close(self):
        calls.append(("close", torch.distributed.is_initialized() or AcceleratorState._shared_state != {}))


class NumbersOnly(ExternalTracker):
    """As short as a tracker can be."""

    def start(self):
        calls.append(("start", self.run_id("numbers")))

    def log(self, values, step):
        calls.append(("log", values, step))


calls = []


@pytest.fixture
def run_with(monkeypatch, tiny_config):
    """run_with(class, **options) -> (folder, the calls that a run with this tracker made)."""

    def run(cls, *, task="ddpm", **options):
        monkeypatch.setitem(TRACKERS, "recorder", f"{__name__}:{cls.__name__}")
        calls.clear()
        loaded = load_config(tiny_config(task, **options))
        loaded.base.logger = "recorder"
        folder = train(loaded)
        AcceleratorState._reset_state(reset_partial_state=True)
        return folder, list(calls)

    return run


def kinds(found):
    return [call[0] for call in found]


def numbers(found):
    return [{"step": step} | values for kind, *rest in found if kind == "log" for values, step in [rest]]


def test_a_tracker_in_the_table_gets_everything(run_with):
    options = SAVES | {"base.save_model_steps": 4, "base.valid_steps": 3}
    folder, found = run_with(Everything, task="conditional_ddpm", **options)
    assert found[0] == ("start", 0, "conditional_ddpm", True)
    assert (found[-1], kinds(found).count("close")) == (("close", True), 1)
    lines = [{k: math.nan if v is None else v for k, v in line.items()} for line in read_metrics(folder)]
    assert numbers(found) == lines
    assert [(call[1].keys(), call[2]) for call in found if call[0] == "grids"] == [({"samples"}, 3), ({"samples"}, 6)]
    shapes = [{"samples": (10, 1, 16, 16)}] * 2  # by raw and by averaged weights
    tables = [call[1:] for call in found if call[0] == "table"]
    assert [(len(requests), *rest) for requests, *rest in tables] == [(10, shapes, 3), (10, shapes, 6)]
    pipelines = [call[1:] for call in found if call[0] == "pipeline"]
    assert [metadata for _, metadata in pipelines] == [{"step": 4, "epoch": 0.4}, {"step": 6, "epoch": 0.6}]
    assert all({"model_index.json", "unet", "scheduler"} <= set(names) for names, _ in pipelines)


def test_a_tracker_starts_at_the_step_that_a_run_is_resumed_from(run_with):
    run_with(Everything, **SAVES)
    folder, found = run_with(Everything, **SAVES, **{"base.resume_from_checkpoint": "checkpoint-3"})
    assert found[0] == ("start", 3, "ddpm", True)
    assert [line["step"] for line in numbers(found) if "loss" in line] == [4, 5, 6]
    assert [line["step"] for line in read_metrics(folder, prefix="loss")] == [1, 2, 3, 4, 5, 6]


def test_a_tracker_that_takes_numbers_alone_needs_two_methods(run_with):
    """Its id stays while the run goes on, and is another one on a branch: a service takes no steps back."""
    folder, found = run_with(NumbersOnly, **SAVES)
    assert set(kinds(found)) == {"start", "log"}
    latest = {"base.resume_from_checkpoint": "latest", "base.max_train_steps": 8}
    _, resumed = run_with(NumbersOnly, **SAVES, **latest)
    assert resumed[0] == found[0] == ("start", (folder / "logs" / "numbers-run-id").read_text())
    _, branch = run_with(NumbersOnly, **SAVES, **{"base.resume_from_checkpoint": "checkpoint-3"})
    assert branch[0] != found[0]


def test_every_word_of_the_option_is_a_row_or_stands_for_rows():
    words = get_args(get_type_hints(BaseConfig, include_extras=True)["logger"])
    assert sorted(words) == sorted([*TRACKERS, *COMBINED])
    assert {name for names in COMBINED.values() for name in names} <= TRACKERS.keys()


def test_a_tracker_that_does_not_start_ends_the_run(run_with, monkeypatch):
    def refuse(self):
        raise ValueError("the service does not answer; try later")

    monkeypatch.setattr(Everything, "start", refuse)
    with pytest.raises(ValueError, match="the service does not answer; try later"):
        run_with(Everything)


@pytest.mark.parametrize("logger", ["tensorboard", "wandb", "both"])
def test_a_dry_run_sends_nothing_anywhere(logger, tmp_path):
    options = [f"base.output_dir={tmp_path / 'run'}", f"base.logger={logger}"]
    with open_dry_run(load_config(tiny("ddpm"), options)) as rehearsal:
        assert rehearsal.short.base.logger == "none"


def test_what_is_transparent_is_white_where_no_alpha_is_taken():
    picture = torch.tensor([[0.0, 0.0], [0.5, 0.5], [1.0, 1.0], [1.0, 0.0]])[:, None]  # one opaque pixel, one clear one
    assert opaque_pixels(picture).tolist() == [[[0, 128, 255], [255, 255, 255]]]
    assert opaque_pixels(picture[:3]).tolist() == [[[0, 128, 255], [0, 128, 255]]]
