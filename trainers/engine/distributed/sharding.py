"""Tensors that FSDP2 and DeepSpeed divide over the processes: this one's part, the whole, and the way back."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from trainers.engine.distributed import zero


class Part(NamedTuple):
    """This process's part of a tensor that is divided over the processes as a parameter is, such as its average."""

    tensor: Tensor
    parameter: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        return shape_of(self.parameter)

    def whole(self) -> Tensor:
        """All parts together. Collective where it is divided."""
        if zero.holds_part(self.parameter):
            return zero.whole_of(self.tensor, self.parameter)
        if isinstance(self.parameter, DTensor):
            own, part = self.parameter, self.tensor.to(self.parameter.device)
            place = {"shape": own.shape, "stride": own.stride(), "run_check": False}
            return DTensor.from_local(part, own.device_mesh, own.placements, **place).full_tensor()
        return self.tensor


def shape_of(parameter: Tensor) -> torch.Size:
    """Of the whole weight: ZeRO-3 leaves an empty one in the network."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def part_of(parameter: Tensor) -> Part:
    """What this process moves and averages of a parameter, the same memory."""
    if zero.holds_part(parameter):
        return Part(zero.part_of(parameter), parameter)
    return Part(local(parameter.detach()), parameter)


def part_from(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, on the device and laid out in memory as the parameter's own.

    Fused AdamW walks through memory: state in another layout than its weight would belong to other elements.
    """
    if zero.holds_part(parameter):
        return zero.part_from(whole, parameter)
    return local(like(whole, parameter.detach()))


def weight_of(parameter: Tensor) -> Tensor | Part:
    """A whole weight, or what can be made whole: ZeRO-2 divides what is moved, and keeps whole weights."""
    return parameter.detach() if zero.is_divided(parameter) else part_of(parameter)


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process has a part of the weight alone."""
    return isinstance(parameter, DTensor) or zero.is_sharded(parameter)


def local(tensor: Tensor) -> Tensor:
    """This process's part, the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(value: Tensor | Part) -> Tensor:
    """All parts together. Collective where there are several."""
    if isinstance(value, Part):
        return value.whole()
    return value.full_tensor() if isinstance(value, DTensor) else value


def refresh(networks: dict[str, nn.Module], masters: bool = False) -> None:
    """After `part_of` the parameters was written to: what the engine keeps of the weights beside it.

    FSDP2 keeps what it gathered in a forward pass until a backward pass, DeepSpeed whole weights, and with `masters`
    the optimizer's own. Collective.
    """
    if (inner := zero.optimizer_of(networks)) is not None:
        zero.refresh(inner, masters)
    for network in networks.values():
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def like(saved: Tensor, own: Tensor) -> Tensor:
    """A whole tensor sharded and laid out in memory as the network's own."""
    if isinstance(own, DTensor):
        return distribute_tensor(saved.to(own.device), own.device_mesh, own.placements)
    if saved.shape != own.shape or saved.stride() == own.stride():
        return saved
    return torch.empty_like(own, device=saved.device, dtype=saved.dtype).copy_(saved)


def optimizer_state(networks: dict[str, nn.Module], optimizer: Optimizer) -> dict[str, Tensor | Part]:
    """The state of what is trained, by "network.parameter.key"."""
    found: dict[str, Tensor | Part] = {}
    inner = zero.optimizer_of(networks)
    for name, network in networks.items():
        for key, parameter in trained_parameters(network).items():
            if inner is not None:
                state = zero.optimizer_parts(inner, parameter)
                own = {k: value if value.ndim == 0 else Part(value, parameter) for k, value in state.items()}
            else:
                own = {k: torch.as_tensor(value) for k, value in optimizer.state.get(parameter, {}).items()}
            found |= {f"{name}.{key}.{k}": value for k, value in own.items()}
    return found


def load_optimizer_state(
    networks: dict[str, nn.Module], optimizer: Optimizer, saved: dict[nn.Parameter, dict[str, Tensor]]
) -> None:
    """Takes the whole state of what is trained, by parameter."""
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


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def configuration(network: nn.Module) -> dict[str, Any]:
    """What a diffusers network's config.json says, with the name of the class that FSDP2 derived its own from."""
    plain = next(each for each in type(network).__mro__ if not issubclass(each, FSDPModule))
    return json.loads(network.to_json_string()) | {"_class_name": plain.__name__}
