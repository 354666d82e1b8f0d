"""What a checkpoint's files hold, compared with the run's networks and put into them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from trainers.engine.changes import show
from trainers.engine.sharding import configuration, like
from trainers.engine.snapshot import DIFFUSERS_WEIGHTS, TRAINABLE_WEIGHTS, parameter_names, trained_state


def compare_shape(folder: Path, network: nn.Module, allow_changes: list[str]) -> None:
    """Raises ValueError where the network's own configuration, such as its dropout, is not the checkpoint's."""
    if not ((folder / "config.json").is_file() and hasattr(network, "to_json_string")):
        return
    saved, own = json.loads((folder / "config.json").read_text(encoding="utf-8")), configuration(network)
    found = [f"{k}: {show(saved.get(k))} -> {show(own.get(k))}" for k in own if saved.get(k) != own[k] and k[0] != "_"]
    if found and "network" not in allow_changes:
        raise ValueError(
            f"{folder}: the network changed ({'; '.join(found)}); undo that, or accept it with "
            "base.allow_changes=[network]"
        )


def read_weights(folder: Path, networks: dict[str, nn.Module], suffix: str = "") -> dict[str, dict[str, Tensor]]:
    """The trained weights and buffers of a checkpoint by network, averaged ones with the suffix "_ema".

    Raises ValueError where they do not fit these networks.
    """
    weights = {name: read_tensors(folder / f"{name}{suffix}") for name in networks}
    for name, network in networks.items():
        _compare(folder / f"{name}{suffix}", weights[name], trained_state(network))
    return weights


@torch.no_grad()
def put_weights(weights: dict[str, dict[str, Tensor]], networks: dict[str, nn.Module]) -> None:
    for name, network in networks.items():
        for key, tensor in trained_state(network).items():
            tensor.copy_(like(weights[name][key], tensor))


def read_tensors(folder: Path) -> dict[str, Tensor]:
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


def named_optimizer_state(folder: Path, networks: dict[str, nn.Module], optimizer: Optimizer) -> dict[int, dict]:
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
            key: value if value.ndim == 0 else like(value, parameters[number]) for key, value in saved[name].items()
        }
        for number, name in enumerate(order)
        if name in saved
    }
