"""A collective copy of everything that is trained, on the CPU and by name: what a checkpoint is written from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

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
    """Everything that training changes: weights, averages, optimizer, open windows of metrics, place in the data."""

    networks: dict[str, nn.Module]  # without wrappers
    meta_networks: dict[str, nn.Module]  # without numbers, wrappers and shards: what an export fills
    optimizer: Optimizer
    ema: EMA | None
    meter: Meter
    nonfinite: NonFiniteSteps
    train_set: ImageData


@dataclass
class Snapshot:
    """Everything trained at one step, on the CPU: files of tensors and files of text by path within the checkpoint."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    texts: dict[str, str]

    @property
    def num_bytes(self) -> int:
        tensors = [tensor for values in self.tensors.values() for tensor in values.values()]
        return sum(tensor.nbytes for tensor in tensors) + sum(len(text.encode()) for text in self.texts.values())


def snapshot(state: TrainState, about: dict[str, Any], wanted: bool, kept: dict[str, Tensor]) -> Snapshot:
    """Copies weights, averages and optimizer state to the CPU by name, beside `about`, which becomes state.json.

    Collective: every rank must call it.

    Where it is not `wanted`, on all ranks but the one that writes, shards are sent and nothing is kept. What is `kept`
    by name of an earlier snapshot is written over: new pages of memory take six times as long as the copy.
    """

    def copied(values: dict[str, Tensor | Part], what: str) -> dict[str, Tensor]:
        return {key: _copied(tensor, wanted, kept, f"{what} {key}") for key, tensor in values.items()}

    networks, ema, step = state.networks, state.ema, about["step"]
    tensors: dict[str, dict[str, Tensor]] = {}
    texts = {"state.json": json.dumps(about, indent=1)}
    for name, network in networks.items():
        weights = copied(trained_state(network), f"{name}'s")
        sets = {name: (weights, {})}
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
        torch.cuda.synchronize()  # the copies are under way
    return Snapshot(step, tensors, texts)


def find_not_finite(networks: dict[str, nn.Module], ema: EMA | None, optimizer: Optimizer) -> str | None:
    """The first trained weight, average or optimizer state that is not finite on some rank. Collective.

    Buffers are left out: a mask may hold infinities.
    """
    found = gather_object([_not_finite_here(networks, ema, optimizer)])  # each rank has parts of its own under FSDP2
    return next((name for name in found if name is not None), None)


def _not_finite_here(networks: dict[str, nn.Module], ema: EMA | None, optimizer: Optimizer) -> str | None:
    parts = {
        f"weight {name}.{key}": sharding.part_of(parameter).tensor
        for name, network in networks.items()
        for key, parameter in trained_parameters(network).items()
    }
    parts |= {f"average {name}": average for name, average in (ema.averages if ema is not None else {}).items()}
    for name, value in sharding.optimizer_state(networks, optimizer).items():
        parameter, _, key = name.rpartition(".")
        parts[f"{key} of {parameter}"] = value.tensor if isinstance(value, Part) else sharding.local(value)
    by_device: dict[torch.device, list[str]] = {}
    for name, part in parts.items():
        by_device.setdefault(part.device, []).append(name)
    for listed in by_device.values():  # one wait per device, for sums: ten times as fast as a look at each element
        finite = torch.stack([parts[name].sum().isfinite() for name in listed]).tolist()
        for name in [name for name, is_finite in zip(listed, finite, strict=True) if not is_finite]:
            if not parts[name].isfinite().all():  # a sum of large numbers may overflow
                return name
    return None


def trained_state(network: nn.Module) -> dict[str, Tensor | Part]:
    """A network's weights and buffers by name, without what is frozen."""
    parameters = dict(network.named_parameters(remove_duplicate=False))  # tied ones by all of their names
    return {
        name: sharding.weight_of(parameters[name]) if name in parameters else tensor
        for name, tensor in network.state_dict().items()
        if name not in parameters or parameters[name].requires_grad
    }


def _in_diffusers_format(network: nn.Module) -> bool:
    from diffusers import ModelMixin

    return isinstance(network, ModelMixin) and all(p.requires_grad for p in network.parameters())


def full_tensor(tensor: Tensor | Part, wanted: bool) -> Tensor:
    """A CPU copy that shares no memory, or an empty tensor where it is not wanted; every rank gathers shards."""
    found = sharding.whole(tensor)
    return found.to("cpu", copy=True).contiguous() if wanted else torch.empty(0)


def _copied(tensor: Tensor | Part, wanted: bool, kept: dict[str, Tensor], name: str) -> Tensor:
    """The copy in the place of that name, as soon as the device is done."""
    found = sharding.whole(tensor)
    if not wanted:
        return torch.empty(0)
    place = kept.get(name)
    if place is None or (place.shape, place.dtype) != (found.shape, found.dtype):
        place = torch.empty(found.shape, dtype=found.dtype, pin_memory=found.is_cuda)
        kept[name] = place
    return place.copy_(found, non_blocking=True)
