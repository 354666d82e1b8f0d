"""Resuming: the newest intact checkpoint, verified before anything is loaded, and loaded only if all of it fits."""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from trainers.engine.checkpoint import (
    DIFFUSERS_WEIGHTS,
    TRAINABLE_WEIGHTS,
    list_checkpoints,
    parameter_names,
    sha256,
    trained_state,
)
from trainers.engine.ema import EMA


class DamagedCheckpoint(ValueError):
    """A checkpoint whose manifest is missing or disagrees with its files."""


def set_aside_later(accelerator: Accelerator, output_dir: Path, steps_done: int) -> None:
    """Renames checkpoints after the step from which a run goes on: `latest` must not return to the branch it left."""
    later = [folder for step, folder in list_checkpoints(output_dir) if step > steps_done]
    if not (later and accelerator.is_main_process):
        return
    prefix, metrics = f"set-aside-{secrets.token_hex(2)}-", output_dir / "metrics.jsonl"
    for folder in later:
        aside = folder.with_name(prefix + folder.name)
        print(f"WARNING: {folder} is later than step {steps_done}: renamed to {aside.name}", flush=True)
        folder.rename(aside)
    if metrics.exists():  # it is cut next
        shutil.copy(metrics, output_dir / (prefix + metrics.name))


def verify(folder: Path) -> None:
    """Raises DamagedCheckpoint where a file is missing, or differs from the manifest in size or content."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, (size, digest) in manifest.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size or sha256(path) != digest:
                raise DamagedCheckpoint(f"{folder}: {name} is missing or not what was written")
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder} is damaged: {error}") from None


def find_checkpoint(accelerator: Accelerator, output_dir: Path, resume: str | bool | None) -> Path | None:
    """The intact checkpoint to resume from, the same on every rank; None where none is asked for or none exists.

    Raises FileNotFoundError for a name or path that is not there, DamagedCheckpoint where nothing intact is left.
    """
    if not resume:
        return None
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            answer = [_find_latest(output_dir) if resume in (True, "latest") else _find_named(output_dir, str(resume))]
        except (FileNotFoundError, DamagedCheckpoint) as error:
            answer = [error]
    [found] = broadcast_object_list(answer)
    if isinstance(found, Exception):
        raise found
    return found


def _find_latest(output_dir: Path) -> Path | None:
    candidates = list_checkpoints(output_dir)
    for _, folder in candidates:
        try:
            verify(folder)
            return folder
        except DamagedCheckpoint as error:
            print(f"WARNING: skipping a damaged checkpoint: {error}", flush=True)
    if candidates:
        raise DamagedCheckpoint(
            f"all {len(candidates)} checkpoints in {output_dir} are damaged; remove them to start anew"
        )
    print(f"No checkpoint in {output_dir}: starting at step 0", flush=True)
    return None


def _find_named(output_dir: Path, name: str) -> Path:
    for folder in (output_dir / name, Path(name)):
        if folder.is_dir():
            verify(folder)
            return folder
    there = ", ".join(folder.name for _, folder in list_checkpoints(output_dir)) or "none"
    raise FileNotFoundError(f"resume_from_checkpoint = {name}: no such folder; checkpoints in {output_dir}: {there}")


def read_state(folder: Path | None, train_set: Any, allow_changes: list[str]) -> dict[str, Any]:
    """The saved state, or that of a run at step 0.

    Raises ValueError where the data set is not the one that the checkpoint was trained on.
    """
    if folder is None:
        return {"step": 0, "slot": 0, "meter": {}, "scaler": None}
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    before, now = (state["num_examples"], state["fingerprint"]), (len(train_set), train_set.fingerprint)
    if before != now and "dataset" not in allow_changes:
        raise ValueError(
            f"{folder}: the data set changed from {before[0]} examples ({before[1]}) to {now[0]} ({now[1]}); "
            "give the old one, or accept it with base.allow_changes=[dataset]"
        )
    return state


def load(
    folder: Path, networks: dict[str, nn.Module], ema: EMA | None, optimizer: Optimizer, scaler: GradScaler | None
) -> None:
    """Loads weights, averages and optimizer state; reads and compares everything before it changes anything.

    Raises ValueError where the checkpoint holds other networks or other shapes than the run.
    """
    weights = {name: _read_weights(folder / name) for name in networks}
    averages = {}
    for name, network in networks.items():
        _compare(folder / name, weights[name], trained_state(network))
        if ema is not None:
            if not (folder / f"{name}_ema").is_dir():
                raise ValueError(
                    f"{folder} has no {name}_ema: it was written with use_ema: false; set use_ema to false"
                )
            averages |= {f"{name}.{key}": tensor for key, tensor in _read_weights(folder / f"{name}_ema").items()}
    state = _named_optimizer_state(folder, networks, optimizer)
    for name, network in networks.items():
        with torch.no_grad():
            for key, tensor in trained_state(network).items():
                tensor.copy_(_like(weights[name][key], tensor))
    if ema is not None:
        ema.load({name: _like(averages[name], average) for name, average in ema.averages.items()})
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    scale = json.loads((folder / "state.json").read_text(encoding="utf-8"))["scaler"]
    if scaler is not None and scale:
        scaler.load_state_dict(scale)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for name in (DIFFUSERS_WEIGHTS, TRAINABLE_WEIGHTS):
        if (folder / name).is_file():
            return load_file(folder / name)
    raise ValueError(f"{folder} holds no weights; the checkpoint is of a run with other networks")


def _compare(folder: Path, saved: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    differing = sorted(saved.keys() ^ own.keys()) or [key for key in own if saved[key].shape != own[key].shape]
    if differing:
        raise ValueError(
            f"{folder} does not fit this run's network: {len(differing)} tensors differ, first {differing[0]}"
        )


def _like(saved: Tensor, own: Tensor) -> Tensor:
    if isinstance(own, DTensor):
        return distribute_tensor(saved.to(own.device), own.device_mesh, own.placements)
    return saved


def _named_optimizer_state(folder: Path, networks: dict[str, nn.Module], optimizer: Optimizer) -> dict[int, dict]:
    """The saved state by the number that torch gives a parameter: its place in the groups."""
    saved: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "optimizer.safetensors").items():
        parameter, _, key = name.rpartition(".")
        saved.setdefault(parameter, {})[key] = tensor
    names = parameter_names(networks)
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    if not saved.keys() <= set(order):
        raise ValueError(f"{folder}/optimizer.safetensors has state for parameters that this run does not train")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        number: {
            key: value if value.ndim == 0 else _like(value, parameters[number]) for key, value in saved[name].items()
        }
        for number, name in enumerate(order)
        if name in saved
    }
