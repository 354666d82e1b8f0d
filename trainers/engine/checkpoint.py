"""Checkpoints: a collective snapshot of everything trained, and a staged write that no crash leaves half done.

A folder checkpoint-N counts only with a manifest that names every file with its size and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainers.engine.clock import Clock
from trainers.engine.ema import EMA

NAME = re.compile(r"checkpoint-([1-9]\d*)")
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRAINABLE_WEIGHTS = "trainable.safetensors"


@dataclass
class Snapshot:
    """Everything trained at one step, on the CPU: files of tensors and files of text by path within the checkpoint."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    texts: dict[str, str]


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


def snapshot(
    networks: dict[str, nn.Module], ema: EMA | None, optimizer: Optimizer, state: dict[str, Any], wanted: bool
) -> Snapshot:
    """Copies weights, averages and optimizer state to the CPU by name. Collective: every rank must call it.

    Where it is not `wanted`, on all ranks but the one that writes, shards are sent and nothing is kept.
    """
    step, tensors, texts = state["step"], {}, {"state.json": json.dumps(state, indent=1)}
    for name, network in networks.items():
        weights = {key: full_tensor(tensor, wanted) for key, tensor in trained_state(network).items()}
        sets = {name: (weights, {})}
        if ema is not None:
            averages = {key: full_tensor(tensor, wanted) for key, tensor in ema.averages_of(name).items()}
            sets[f"{name}_ema"] = (weights | averages, ema.settings(step))
        for folder, (values, settings) in sets.items():
            if _in_diffusers_format(network):
                tensors[f"{folder}/{DIFFUSERS_WEIGHTS}"] = values
                texts[f"{folder}/config.json"] = json.dumps(json.loads(network.to_json_string()) | settings, indent=2)
            else:
                tensors[f"{folder}/{TRAINABLE_WEIGHTS}"] = values
    tensors["optimizer.safetensors"] = _optimizer_tensors(networks, optimizer, wanted)
    return Snapshot(step, tensors, texts)


def trained_state(network: nn.Module) -> dict[str, Tensor]:
    """A network's weights and buffers by name, without what is frozen."""
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in network.state_dict().items() if name not in frozen}


def _in_diffusers_format(network: nn.Module) -> bool:
    from diffusers import ModelMixin

    return isinstance(network, ModelMixin) and all(p.requires_grad for p in network.parameters())


def full_tensor(tensor: Tensor, wanted: bool) -> Tensor:
    """A CPU copy that shares no memory, or an empty tensor where it is not wanted; every rank gathers shards."""
    whole = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
    return whole.to("cpu", copy=True).contiguous() if wanted else torch.empty(0)


def parameter_names(networks: dict[str, nn.Module]) -> dict[int, str]:
    return {id(p): f"{name}.{key}" for name, network in networks.items() for key, p in network.named_parameters()}


def _optimizer_tensors(networks: dict[str, nn.Module], optimizer: Optimizer, wanted: bool) -> dict[str, Tensor]:
    names = parameter_names(networks)
    return {
        f"{names[id(parameter)]}.{key}": full_tensor(torch.as_tensor(value), wanted)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def save(accelerator: Accelerator, output_dir: Path, taken: Snapshot, keep: int | None) -> Path:
    """Writes the snapshot to output_dir/checkpoint-N and prunes old ones, or leaves the folder as it was.

    Every rank must call it. Raises OSError on every rank where the main process could not write.
    """
    final = output_dir / f"checkpoint-{taken.step}"
    staging = output_dir / f".tmp-checkpoint-{taken.step}-{secrets.token_hex(4)}"
    error = None
    if accelerator.is_main_process:
        try:
            write(taken, staging)
            staging.rename(final)
            _flush(output_dir)
        except (OSError, SafetensorError) as failure:
            error = f"checkpoint-{taken.step} could not be written to {output_dir}: {failure}; older ones are intact"
            shutil.rmtree(staging, ignore_errors=True)
    [error] = broadcast_object_list([error])
    if error:
        raise OSError(error)
    if accelerator.is_main_process and keep is not None:
        for _, folder in list_checkpoints(output_dir)[keep:]:
            _prune(folder)
    accelerator.wait_for_everyone()
    return final


def _prune(folder: Path) -> None:
    """Removes an old checkpoint; a failure is told, and is no reason to stop the training."""
    trash = folder.with_name(f".trash-{folder.name}-{secrets.token_hex(4)}")
    try:
        shutil.rmtree(folder.rename(trash))
    except OSError as error:
        print(f"WARNING: {folder.name} could not be removed: {error}", flush=True)


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
    manifest = {str(path.relative_to(folder)): [path.stat().st_size, sha256(path)] for path in files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


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


def sha256(path: Path) -> str:
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
