"""Converts between whole tensors and this process's parts, for FSDP2 and DeepSpeed, which divide tensors."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from trainers.engine.distributed import zero


@runtime_checkable
class Configured(Protocol):
    """A network with a config.json, such as diffusers' have."""

    def to_json_string(self) -> str: ...


class Part(NamedTuple):
    """This process's part of a tensor that is divided like a parameter, such as its average."""

    tensor: Tensor
    parameter: Tensor

    @property
    def shape(self) -> torch.Size:
        return shape_of(self.parameter)

    def whole(self) -> Tensor:
        """Gathers all parts. Collective if the tensor is divided."""
        if zero.holds_part(self.parameter):
            return zero.whole_of(self.tensor, self.parameter)
        if isinstance(self.parameter, DTensor):
            own, part = self.parameter, self.tensor.to(self.parameter.device)
            mesh, placements, shape = own.device_mesh, own.placements, own.shape
            divided = DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=own.stride())
            return divided.full_tensor()
        return self.tensor


def shape_of(parameter: Tensor) -> torch.Size:
    """Returns the shape of the whole weight; under ZeRO-3 the network holds an empty one."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def part_of(parameter: Tensor) -> Part:
    """Returns the part of a parameter that this process updates and averages; shares its memory."""
    if zero.holds_part(parameter):
        return Part(zero.part_of(parameter), parameter)
    return Part(local(parameter.detach()), parameter)


def part_from(whole: Tensor, parameter: Tensor) -> Tensor:
    """Takes this process's part of a whole tensor, on the device and with the parameter's memory layout.

    Fused AdamW walks through memory: state in another layout would belong to other elements of the weight.
    """
    if zero.holds_part(parameter):
        return zero.part_from(whole, parameter)
    return local(like(whole, parameter.detach()))


def weight_of(parameter: Tensor) -> Tensor | Part:
    """Returns the whole weight if there is one, else the part: ZeRO-2 divides the updates but keeps whole weights."""
    return parameter.detach() if zero.is_divided(parameter) else part_of(parameter)


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds a part of the weight only."""
    return isinstance(parameter, DTensor) or zero.is_sharded(parameter)


def local(tensor: Tensor) -> Tensor:
    """Returns this process's part; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(value: Tensor | Part) -> Tensor:
    """Gathers all parts. Collective if there are several."""
    if isinstance(value, Part):
        return value.whole()
    return value.full_tensor() if isinstance(value, DTensor) else value


def refresh(networks: dict[str, nn.Module], masters: bool = False) -> None:
    """Updates the engine's other copies of the weights, after `part_of` the parameters was written to. Collective.

    FSDP2 keeps weights gathered by a forward pass until a backward pass. DeepSpeed keeps whole weights and the
    optimizer's copy, which `masters` updates.
    """
    if (inner := zero.optimizer_of(networks)) is not None:
        zero.refresh(inner, masters)
    for network in networks.values():
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def like(saved: Tensor, own: Tensor) -> Tensor:
    """Shards a whole tensor and gives it the memory layout of the network's own."""
    if isinstance(own, DTensor):
        return distribute_tensor(saved.to(own.device), own.device_mesh, own.placements)
    if saved.shape != own.shape or saved.stride() == own.stride():
        return saved
    return torch.empty_like(own, device=saved.device, dtype=saved.dtype).copy_(saved)


def optimizer_state(networks: dict[str, nn.Module], optimizer: Optimizer) -> dict[str, Tensor | Part]:
    """Returns the optimizer state by "network.parameter.key"."""
    found: dict[str, Tensor | Part] = {}
    inner = zero.optimizer_of(networks)
    for name, parameter in trained_parameters(networks).items():
        if inner is not None:
            state = zero.optimizer_parts(inner, parameter)
        else:
            state = {key: torch.as_tensor(value) for key, value in optimizer.state.get(parameter, {}).items()}
        for key, value in state.items():
            found[f"{name}.{key}"] = value if inner is None or value.ndim == 0 else Part(value, parameter)
    return found


def load_optimizer_state(
    networks: dict[str, nn.Module], optimizer: Optimizer, saved: dict[nn.Parameter, dict[str, Tensor]]
) -> None:
    """Loads whole optimizer state by parameter."""
    if (inner := zero.optimizer_of(networks)) is not None:
        zero.load_optimizer(inner, saved)
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        number: {key: value if value.ndim == 0 else like(value, p) for key, value in saved[p].items()}
        for number, p in enumerate(parameters)
        if p in saved
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def trained_parameters(networks: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Returns the trained parameters by "network.parameter"."""
    return {
        f"{name}.{key}": parameter
        for name, network in networks.items()
        for key, parameter in network.named_parameters()
        if parameter.requires_grad
    }


def configuration(network: Configured) -> dict[str, Any]:
    """Returns a network's config.json, with the class name from before FSDP2 derived its own class."""
    plain = next(each for each in type(network).__mro__ if not issubclass(each, FSDPModule))
    return json.loads(network.to_json_string()) | {"_class_name": plain.__name__}
