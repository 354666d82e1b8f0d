"""Copies everything trained to the CPU, by name; checkpoints are written from this copy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from datasets_lib.example import ImageData
from trainers.engine.distributed import sharding
from trainers.engine.distributed.sharding import Part, trained_parameters
from trainers.engine.optim.ema import EMA
from trainers.engine.optim.nonfinite import NonFiniteSteps
from trainers.engine.tracking.meters import Meter

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRAINABLE_WEIGHTS = "trainable.safetensors"


@dataclass
class TrainState:
    """Everything that training changes: weights, averages, optimizer, unlogged metrics, counters, place in the data."""

    networks: dict[str, nn.Module]  # without wrappers
    meta_networks: dict[str, nn.Module]  # unwrapped, unsharded, without weights; an export fills them
    optimizer: Optimizer
    ema: EMA | None
    meter: Meter
    nonfinite: NonFiniteSteps
    train_set: ImageData


@dataclass
class Snapshot:
    """A checkpoint in CPU memory: contents of tensor files and text files, by path within its folder."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    texts: dict[str, str]

    @property
    def num_bytes(self) -> int:
        tensors = [tensor for values in self.tensors.values() for tensor in values.values()]
        return sum(tensor.nbytes for tensor in tensors) + sum(len(text.encode()) for text in self.texts.values())


def snapshot(state: TrainState, about: dict[str, Any], wanted: bool, kept: dict[str, Tensor]) -> Snapshot:
    """Copies weights, averages and optimizer state to the CPU; `about` becomes state.json. Collective.

    Ranks on which it is not `wanted` send their shards and copy nothing. `kept`, the memory of an earlier snapshot, is
    overwritten: fresh pages of memory take six times as long as the copy.
    """

    def copied(values: Mapping[str, Tensor | Part], what: str) -> dict[str, Tensor]:
        return {key: _copied(tensor, wanted, kept, f"{what} {key}") for key, tensor in values.items()}

    networks, ema, step = state.networks, state.ema, about["step"]
    tensors: dict[str, dict[str, Tensor]] = {}
    texts = {"state.json": json.dumps(about, indent=1)}
    for name, network in networks.items():
        weights = copied(trained_state(network), f"{name}'s")
        sets: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {name: (weights, {})}
        if ema is not None:
            averages = copied(ema.averages_of(name), f"{name}'s averaged")
            sets[f"{name}_ema"] = (weights | averages, ema.settings(step))
        for folder, (values, settings) in sets.items():
            if _in_diffusers_format(network):
                tensors[f"{folder}/{DIFFUSERS_WEIGHTS}"] = values
                texts[f"{folder}/config.json"] = json.dumps(sharding.configuration(network) | settings, indent=2)
            else:
                tensors[f"{folder}/{TRAINABLE_WEIGHTS}"] = values
    tensors["optimizer.safetensors"] = copied(sharding.optimizer_state(networks, state.optimizer), "optimizer's")
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()  # waits for the copies
    return Snapshot(step, tensors, texts)


def find_not_finite(networks: dict[str, nn.Module], ema: EMA | None, optimizer: Optimizer) -> str | None:
    """Names a weight, average or optimizer state that is not finite on some rank, or None. Collective."""
    found = gather_object([_not_finite_here(networks, ema, optimizer)])  # FSDP2 gives each rank its part
    return next((name for name in found if name is not None), None)


def _not_finite_here(networks: dict[str, nn.Module], ema: EMA | None, optimizer: Optimizer) -> str | None:
    parts = {f"weight {name}": sharding.part_of(p).tensor for name, p in trained_parameters(networks).items()}
    parts |= {f"average {name}": average for name, average in (ema.averages if ema is not None else {}).items()}
    for name, value in sharding.optimizer_state(networks, optimizer).items():
        parameter, _, key = name.rpartition(".")
        parts[f"{key} of {parameter}"] = value.tensor if isinstance(value, Part) else sharding.local(value)
    return first_not_finite(parts)


def first_not_finite(parts: Mapping[str, Tensor]) -> str | None:
    """Returns the name of a tensor that holds NaN or infinity, or None; waits once for each device."""
    by_device: dict[torch.device, list[str]] = {}
    for name, part in parts.items():
        by_device.setdefault(part.device, []).append(name)
    for listed in by_device.values():  # sums are ten times as fast as checking each element
        finite = torch.stack([parts[name].sum().isfinite() for name in listed]).tolist()
        for name in [name for name, is_finite in zip(listed, finite, strict=True) if not is_finite]:
            if not parts[name].isfinite().all():  # a sum of large numbers may overflow
                return name
    return None


def trained_state(network: nn.Module) -> dict[str, Tensor | Part]:
    """Returns a network's weights and buffers by name, without frozen weights."""
    parameters = dict(network.named_parameters(remove_duplicate=False))  # tied weights under all of their names
    return {
        name: sharding.weight_of(parameters[name]) if name in parameters else tensor
        for name, tensor in network.state_dict().items()
        if name not in parameters or parameters[name].requires_grad
    }


def _in_diffusers_format(network: nn.Module) -> TypeGuard[sharding.Configured]:
    """Whether the checkpoint holds the network as save_pretrained would: diffusers', and trained as a whole."""
    from diffusers import ModelMixin

    return isinstance(network, ModelMixin) and all(p.requires_grad for p in network.parameters())


def full_tensor(tensor: Tensor | Part, wanted: bool) -> Tensor:
    """Gathers shards and copies the whole tensor to the CPU; returns an empty one if it is not wanted. Collective."""
    found = sharding.whole(tensor)
    return found.to("cpu", copy=True).contiguous() if wanted else torch.empty(0)


def _copied(tensor: Tensor | Part, wanted: bool, kept: dict[str, Tensor], name: str) -> Tensor:
    """Starts the copy to the memory kept under that name; it is complete once the device is done."""
    found = sharding.whole(tensor)
    if not wanted:
        return torch.empty(0)
    place = kept.get(name)
    if place is None or (place.shape, place.dtype) != (found.shape, found.dtype):
        place = torch.empty(found.shape, dtype=found.dtype, pin_memory=found.is_cuda)
        kept[name] = place
    return place.copy_(found, non_blocking=True)
