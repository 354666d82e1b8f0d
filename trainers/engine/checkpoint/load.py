"""Reads a checkpoint's files, compares them with the run's networks, and loads them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from datasets_lib.errors import InputError
from datasets_lib.foreign import read_json, shown
from trainers.engine.checkpoint.snapshot import DIFFUSERS_WEIGHTS, TRAINABLE_WEIGHTS, trained_state
from trainers.engine.checkpoint.state_file import MOST_BYTES
from trainers.engine.distributed import sharding
from trainers.engine.distributed.sharding import Configured, Part


def compare_shape(folder: Path, network: nn.Module, allow_changes: list[str]) -> None:
    """Raises ValueError if the network's configuration, such as its dropout, differs from the checkpoint's."""
    if not ((folder / "config.json").is_file() and isinstance(network, Configured)):
        return
    saved, own = read_json(folder / "config.json", MOST_BYTES), sharding.configuration(network)
    if not isinstance(saved, dict):
        raise InputError(f"{folder}: its config.json holds no mapping; the checkpoint was not written by diffloop")
    changed = [key for key in own if saved.get(key) != own[key] and key[0] != "_"]
    found = [f"{key}: {json.dumps(saved.get(key))} -> {json.dumps(own[key])}" for key in changed]
    if found and "network" not in allow_changes:
        raise InputError(
            f"{folder}: the network changed ({'; '.join(found)}); undo that, or accept it with "
            "base.allow_changes=[network]"
        )


def read_weights(folder: Path, networks: dict[str, nn.Module], suffix: str = "") -> dict[str, dict[str, Tensor]]:
    """Reads weights and buffers by network, averaged ones with the suffix "_ema"; ValueError if they do not fit."""
    weights = {name: read_tensors(folder / f"{name}{suffix}") for name in networks}
    for name, network in networks.items():
        saved, own = weights[name], trained_state(network)
        differing = sorted(saved.keys() ^ own.keys()) or [key for key in own if saved[key].shape != own[key].shape]
        if differing:
            count = f"{len(differing)} tensors differ, first {shown(differing[0])}"
            raise InputError(f"{folder / f'{name}{suffix}'} does not fit this run's network: {count}")
    return weights


@torch.no_grad()
def put_weights(weights: dict[str, dict[str, Tensor]], networks: dict[str, nn.Module]) -> None:
    for name, network in networks.items():
        for key, own in trained_state(network).items():
            if isinstance(own, Part):
                own.tensor.copy_(sharding.part_from(weights[name][key], own.parameter))
            else:
                own.copy_(sharding.like(weights[name][key], own))
    sharding.refresh(networks, masters=True)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    for name in (DIFFUSERS_WEIGHTS, TRAINABLE_WEIGHTS):
        if (folder / name).is_file():
            return _tensors(folder / name)
    raise InputError(f"{folder} holds no weights; the checkpoint is of a run with other networks")


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        what = f"{path} is not a safetensors file ({error})"
        raise InputError(f"{what}; the checkpoint was not written by diffloop") from None


def read_optimizer_state(folder: Path, networks: dict[str, nn.Module]) -> dict[nn.Parameter, dict[str, Tensor]]:
    """Reads the optimizer state by parameter; raises ValueError for parameters that this run does not train."""
    saved: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _tensors(folder / "optimizer.safetensors").items():
        parameter, _, key = name.rpartition(".")
        saved.setdefault(parameter, {})[key] = tensor
    own = sharding.trained_parameters(networks)
    if not saved.keys() <= own.keys():
        raise InputError(f"{folder}/optimizer.safetensors has state for parameters that this run does not train")
    return {own[name]: values for name, values in saved.items()}
