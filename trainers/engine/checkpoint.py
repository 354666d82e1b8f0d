"""Checkpoints: a collective snapshot of everything trained, a staged write that no crash leaves half done, and loading.

A folder checkpoint-N counts only with a manifest that names every file with its size and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from trainers.engine.clock import Clock
from trainers.engine.ema import EMA

NAME = re.compile(r"checkpoint-([1-9]\d*)")
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRAINABLE_WEIGHTS = "trainable.safetensors"


class DamagedCheckpoint(ValueError):
    """A checkpoint whose manifest is missing or disagrees with its files."""


@dataclass
class Snapshot:
    """Everything trained at one step, on the CPU: files of tensors and files of text by path within the checkpoint."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    texts: dict[str, str]


def snapshot(networks: dict[str, nn.Module], ema: EMA | None, optimizer: Optimizer, state: dict[str, Any]) -> Snapshot:
    """Copies weights, averages and optimizer state to the CPU by name. Collective: every rank must call it."""
    step, tensors, texts = state["step"], {}, {"state.json": json.dumps(state, indent=1)}
    for name, network in networks.items():
        weights = {key: full_tensor(tensor) for key, tensor in trained_state(network).items()}
        sets = {name: (weights, {})}
        if ema is not None:
            averages = {
                key: full_tensor(ema.averages[f"{name}.{key}"]) for key in weights if f"{name}.{key}" in ema.averages
            }
            sets[f"{name}_ema"] = ({**weights, **averages}, ema.settings(step))
        for folder, (values, settings) in sets.items():
            if _in_diffusers_format(network):
                texts[f"{folder}/config.json"] = json.dumps(
                    {**json.loads(network.to_json_string()), **settings}, indent=2
                )
                tensors[f"{folder}/{DIFFUSERS_WEIGHTS}"] = values
            else:
                tensors[f"{folder}/{TRAINABLE_WEIGHTS}"] = values
    tensors["optimizer.safetensors"] = _optimizer_tensors(networks, optimizer)
    return Snapshot(step, tensors, texts)


def trained_state(network: nn.Module) -> dict[str, Tensor]:
    """A network's weights and buffers by name, without what is frozen."""
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in network.state_dict().items() if name not in frozen}


def _in_diffusers_format(network: nn.Module) -> bool:
    from diffusers import ModelMixin

    return isinstance(network, ModelMixin) and all(p.requires_grad for p in network.parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """A CPU copy that shares no memory; shards are gathered."""
    whole = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
    return whole.to("cpu", copy=True).contiguous()


def _parameter_names(networks: dict[str, nn.Module]) -> dict[int, str]:
    return {id(p): f"{name}.{key}" for name, network in networks.items() for key, p in network.named_parameters()}


def _optimizer_tensors(networks: dict[str, nn.Module], optimizer: Optimizer) -> dict[str, Tensor]:
    names = _parameter_names(networks)
    return {
        f"{names[id(parameter)]}.{key}": full_tensor(torch.as_tensor(value))
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def save(accelerator: Accelerator, output_dir: Path, taken: Snapshot, keep: int | None) -> Path:
    """Writes the snapshot to output_dir/checkpoint-N and prunes old ones, or leaves the folder as it was.

    Every rank must call it. Raises OSError on every rank where the main process could not write.
    """
    final = output_dir / f"checkpoint-{taken.step}"
    staging = output_dir / f".tmp-checkpoint-{taken.step}-{os.getpid()}"
    error = None
    if accelerator.is_main_process:
        try:
            write(taken, staging)
            _publish(staging, final)
        except OSError as failure:
            error = f"checkpoint-{taken.step} could not be written to {output_dir}: {failure}; older ones are intact"
            shutil.rmtree(staging, ignore_errors=True)
    [error] = broadcast_object_list([error])
    if error:
        raise OSError(error)
    if accelerator.is_main_process and keep is not None:
        for step, folder in list_checkpoints(output_dir)[keep:]:
            trash = folder.rename(output_dir / f".trash-checkpoint-{step}-{os.getpid()}")
            shutil.rmtree(trash)
    accelerator.wait_for_everyone()
    return final


def write(taken: Snapshot, folder: Path) -> None:
    """Writes and flushes every file, the manifest last. Makes no collective call."""
    mode = 0o666 & ~_umask()
    for path, values in taken.tensors.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        save_file(values, folder / path, metadata={"format": "pt"})
        (folder / path).chmod(mode)  # safetensors writes files that only their owner can read
    for path, text in taken.texts.items():
        (folder / path).write_text(text, encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(folder)): [path.stat().st_size, _sha256(path)] for path in files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _publish(staging: Path, final: Path) -> None:
    if final.exists():  # left by a run that was resumed from an earlier step
        shutil.rmtree(final.rename(final.parent / f".trash-{final.name}-{os.getpid()}"))
    staging.rename(final)
    _flush(final.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that is called checkpoint-N, newest first; symbolic links do not count."""
    if not output_dir.is_dir():
        return []
    found = [
        (NAME.fullmatch(path.name), path) for path in output_dir.iterdir() if path.is_dir() and not path.is_symlink()
    ]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def verify(folder: Path) -> None:
    """Raises DamagedCheckpoint where a file is missing, or differs from the manifest in size or content."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, (size, digest) in manifest.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size or _sha256(path) != digest:
                raise DamagedCheckpoint(f"{folder}: {name} is missing or not what was written")
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder} is damaged: {error}") from None


def find(accelerator: Accelerator, output_dir: Path, resume: str | bool | None) -> Path | None:
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


def run_state(clock: Clock, steps_done: int, train_set: Any, meter: dict, scaler: GradScaler | None) -> dict[str, Any]:
    """What a resumed run needs beside tensors; randomness and data order follow from step and slot."""
    return {
        "step": steps_done,
        "slot": clock.slot_at(steps_done),
        "global_batch_size": clock.global_batch_size,
        "num_examples": len(train_set),
        "fingerprint": train_set.fingerprint,
        "meter": meter,
        "scaler": scaler.state_dict() if scaler is not None else None,
    }


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
    names = _parameter_names(networks)
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
