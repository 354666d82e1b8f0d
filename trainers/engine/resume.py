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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from trainers.engine.changes import harmless_changes, trajectory_changes
from trainers.engine.checkpoint import FORMAT
from trainers.engine.clock import Clock
from trainers.engine.config import RunConfig
from trainers.engine.divergence import Divergence
from trainers.engine.ema import EMA
from trainers.engine.manifest import DamagedCheckpoint, list_checkpoints, verify
from trainers.engine.metering import Meter
from trainers.engine.options import BaseConfig
from trainers.engine.snapshot import DIFFUSERS_WEIGHTS, TRAINABLE_WEIGHTS, parameter_names, trained_state
from trainers.engine.tracking import WANDB_ID_FILE


def set_aside_later(accelerator: Accelerator, base: BaseConfig, resumed_from: Path, steps_done: int) -> None:
    """Renames checkpoints after the step from which a run goes on: `latest` must not return to the branch it left.

    W&B, which cannot take logged steps back, gets a new run for the new branch.
    """
    output_dir = Path(base.output_dir)
    later = [
        folder
        for step, folder in list_checkpoints(output_dir)
        if step >= steps_done and folder.resolve() != resumed_from.resolve()
    ]
    if not (later and accelerator.is_main_process):
        return
    prefix, metrics = f"set-aside-{secrets.token_hex(2)}-", output_dir / "metrics.jsonl"
    for folder in later:
        aside = folder.with_name(prefix + folder.name)
        print(f"WARNING: {folder} is of another run from step {steps_done} on: renamed to {aside.name}", flush=True)
        folder.rename(aside)
    if metrics.exists():  # it is cut next
        shutil.copy(metrics, output_dir / (prefix + metrics.name))
    (output_dir / base.logging_dir / WANDB_ID_FILE).unlink(missing_ok=True)


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
        inside = list_checkpoints(folder)
        if inside and not (folder / "manifest.json").exists():
            raise FileNotFoundError(
                f"resume_from_checkpoint = {name}: a folder of checkpoints; name one, such as {inside[0][1]}"
            )
        if folder.is_dir():
            verify(folder)
            return folder
    there = ", ".join(folder.name for _, folder in list_checkpoints(output_dir)) or "none"
    raise FileNotFoundError(f"resume_from_checkpoint = {name}: no such folder; checkpoints in {output_dir}: {there}")


def read_state(
    accelerator: Accelerator, folder: Path | None, run: RunConfig, clock: Clock, train_set: Any
) -> tuple[dict[str, Any], Clock]:
    """The saved state and the clock that goes on from it; no state and the clock as it is for a run from step 0.

    Raises ValueError that lists every change which alters the training and is not in `base.allow_changes`.
    """
    if folder is None:
        return {}, clock
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{folder}: written by another version of diffloop (format {state.get('format')}, not {FORMAT})"
        )
    clock = clock.resumed_at(state["step"], state["slot"])
    changes = trajectory_changes(state, run, clock, train_set)
    refused = [change for change in changes if not set(change.names) & set(run.base.allow_changes)]
    if refused:
        names = ",".join(dict.fromkeys([*run.base.allow_changes, *(change.names[0] for change in refused)]))
        raise ValueError(
            f"{folder}: the training would go on differently; undo these changes, or accept them with "
            f"base.allow_changes=[{names}]:\n" + "\n".join(f"  {change.text}" for change in refused)
        )
    for text in [*harmless_changes(state, run), *(f"{change.text} (allowed)" for change in changes)]:
        accelerator.print(f"Changed since the checkpoint: {text}")
    return state, clock


def load(
    accelerator: Accelerator,
    folder: Path,
    state: dict[str, Any],
    networks: dict[str, nn.Module],
    ema: EMA | None,
    optimizer: Optimizer,
    meter: Meter,
    divergence: Divergence,
) -> None:
    """Loads weights, averages, optimizer state and counts; reads and compares everything before it changes anything.

    Raises ValueError where the checkpoint holds other networks or other shapes than the run.
    """
    weights, averages = read_weights(folder, networks), {}
    for name in networks:
        if ema is not None:
            if not (folder / f"{name}_ema").is_dir():
                raise ValueError(
                    f"{folder} has no {name}_ema: it was written with use_ema: false; set use_ema to false"
                )
            averages |= {f"{name}.{key}": tensor for key, tensor in _read(folder / f"{name}_ema").items()}
    moments = _named_optimizer_state(folder, networks, optimizer)
    put_weights(weights, networks)
    if ema is not None:
        ema.load({name: _like(averages[name], average) for name, average in ema.averages.items()})
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    if accelerator.scaler is not None and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    meter.load(state["meter"])
    divergence.load(state["divergence"])


def read_weights(folder: Path, networks: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """The trained weights and buffers of a checkpoint by network; ValueError where they do not fit these networks."""
    weights = {name: _read(folder / name) for name in networks}
    for name, network in networks.items():
        _compare(folder / name, weights[name], trained_state(network))
    return weights


@torch.no_grad()
def put_weights(weights: dict[str, dict[str, Tensor]], networks: dict[str, nn.Module]) -> None:
    for name, network in networks.items():
        for key, tensor in trained_state(network).items():
            tensor.copy_(_like(weights[name][key], tensor))


def _read(folder: Path) -> dict[str, Tensor]:
    for name in (DIFFUSERS_WEIGHTS, TRAINABLE_WEIGHTS):
        if (folder / name).is_file():
            return _tensors(folder / name)
    raise ValueError(f"{folder} holds no weights; the checkpoint is of a run with other networks")


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no safetensors file ({error}); the checkpoint was not written by diffloop"
        ) from None


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
    for name, tensor in _tensors(folder / "optimizer.safetensors").items():
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
