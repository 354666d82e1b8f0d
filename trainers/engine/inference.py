"""A trained run, ready to draw: its trainer with the weights of a checkpoint or of the finished pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from trainers.base import Trainer
from trainers.engine.config import RunConfig, check_config, load_config
from trainers.engine.encoding import FrozenStages
from trainers.engine.manifest import list_checkpoints, verify
from trainers.engine.restore import put_weights, read_weights

RAW, AVERAGED = "raw", "ema"


class SavedRun(NamedTuple):
    """What is on disk: a run's options and names of classes, and the checkpoint, or None for the finished pipeline."""

    run: RunConfig
    label_names: list[str] | None
    folder: Path  # of the run
    checkpoint: Path | None


def open_run(path: Path, overrides: list[str] | None = None) -> SavedRun:
    """A checkpoint, the newest one of a run, or a run's finished pipeline, with the run's options and `overrides`.

    Raises FileNotFoundError for a folder without any, ValueError for a damaged checkpoint and wrong options.
    """
    is_checkpoint = (path / "state.json").is_file()
    checkpoint = path if is_checkpoint else next((folder for _, folder in list_checkpoints(path)), None)
    if checkpoint is not None:
        verify(checkpoint)
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        run = check_config(state["config"], overrides)
        return SavedRun(run, state.get("label_names"), checkpoint.absolute().parent, checkpoint)
    if (path / "config.yaml").is_file() and (path / "model_index.json").is_file():
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        return SavedRun(load_config(path / "config.yaml", overrides), index.get("label_names"), path, None)
    raise FileNotFoundError(f"{path}: is no checkpoint, and holds no run with checkpoints or a finished pipeline")


def load_trainer(saved: SavedRun, weights: str | None = None, device: str | None = None) -> Trainer:
    """The run's trainer with trained weights: "ema", "raw", or None for averaged ones where the run has them.

    Raises ValueError for weights that are not there.
    """
    run = saved.run
    trainer = run.trainer_class(run.config, run.base)
    trainer.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    trainer.weight_dtype, trainer.label_names = torch.float32, saved.label_names
    networks = trainer.init_modules()
    held = AVERAGED if run.config.use_ema else RAW
    if saved.checkpoint is not None:
        if weights == AVERAGED and held == RAW:
            raise ValueError(f"{saved.checkpoint}: has no averaged weights, its run had use_ema: false; ask for raw")
        suffix = "_ema" if (weights or held) == AVERAGED else ""
        put_weights(read_weights(saved.checkpoint, networks, suffix), networks)
    elif weights not in (None, held):
        raise ValueError(f"{saved.folder}: has no checkpoints, and its pipeline holds the {held} weights only")
    else:
        _put_pipeline(run.trainer_class.load_pipeline(saved.folder), networks)
    trainer.unwrapped = trainer.modules = {k: network.to(trainer.device).eval() for k, network in networks.items()}
    trainer.encoded = FrozenStages(trainer.encoders(), trainer.device).encoded
    return trainer


def _put_pipeline(pipeline: Any, networks: dict[str, nn.Module]) -> None:
    for name, network in networks.items():
        found = pipeline if isinstance(pipeline, nn.Module) else getattr(pipeline, name)
        network.load_state_dict(found.state_dict())
