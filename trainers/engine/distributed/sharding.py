"""Tensors that FSDP2 and DeepSpeed divide over the processes: this one's part, the whole, and the way back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from trainers.engine.distributed import zero

# of diffusers' networks that do not name theirs
UNET_BLOCKS = ("ResnetBlock2D", "Attention")
# the embedding apart from its block: a DiT calls that of its first block once more, outside of it
TRANSFORMER_BLOCKS = ("BasicTransformerBlock", "CombinedTimestepLabelEmbeddings")


def shard_by_blocks(accelerator: Accelerator, networks: dict[str, nn.Module]) -> None:
    """Tells FSDP2 which modules are gathered one by one: those that the launch names, else the network's blocks.

    Raises ValueError for more than one network, and for modules that the network does not have.
    """
    if len(networks) > 1:
        raise ValueError(
            f"FSDP2 shards one network, and this run trains {len(networks)} ({', '.join(networks)}); launch with DDP, "
            "or train one of them"
        )
    [(name, network)] = networks.items()
    plugin, there = accelerator.state.fsdp_plugin, {type(module).__name__ for module in network.modules()}
    asked = plugin.transformer_cls_names_to_wrap
    missing = [each for each in asked or () if each not in there]
    if missing:
        raise ValueError(
            f"fsdp_transformer_layer_cls_to_wrap names {', '.join(missing)}, and network {name} has none; leave the "
            "option out, or choose among its modules"
        )
    if asked is None:
        own = TRANSFORMER_BLOCKS if there.intersection(TRANSFORMER_BLOCKS) else UNET_BLOCKS
        blocks = getattr(network, "_no_split_modules", None) or own
        plugin.transformer_cls_names_to_wrap = sorted(there.intersection(blocks))
    if plugin.mixed_precision_policy is not None:  # gradients are summed in float32, as DDP does
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)


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
        if zero.is_sharded(self.parameter) or zero.is_divided(self.parameter):
            return zero.whole_of(self.tensor, self.parameter)
        if isinstance(self.parameter, DTensor):
            return _as_dtensor(self.tensor, self.parameter).full_tensor()
        return self.tensor


def shape_of(parameter: Tensor) -> torch.Size:
    """Of the whole weight: ZeRO-3 leaves an empty one in the network."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def part_of(parameter: Tensor) -> Part:
    """What this process moves and averages of a parameter, the same memory."""
    if zero.is_sharded(parameter) or zero.is_divided(parameter):
        return Part(zero.part_of(parameter), parameter)
    return Part(local(parameter.detach()), parameter)


def part_from(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, on the device and laid out in memory as the parameter's own.

    Fused AdamW walks through memory: state in another layout than its weight would belong to other elements.
    """
    if zero.is_sharded(parameter) or zero.is_divided(parameter):
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
    for network in networks.values():
        if zero.zero_optimizer(network) is not None:
            zero.refresh(network, masters)
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


def _as_dtensor(part: Tensor, own: DTensor) -> DTensor:
    place = {"device_mesh": own.device_mesh, "placements": own.placements, "run_check": False}
    return DTensor.from_local(part.to(own.device), **place, shape=own.shape, stride=own.stride())


def optimizer_state(networks: dict[str, nn.Module], optimizer: Optimizer) -> dict[str, Tensor | Part]:
    """The state of what is trained, by "network.parameter.key"."""
    found: dict[str, Tensor | Part] = {}
    for name, network in networks.items():
        for key, parameter in trained_parameters(network).items():
            if zero.zero_optimizer(network) is not None:
                state = zero.optimizer_parts(network, parameter)
                own = {k: value if value.ndim == 0 else Part(value, parameter) for k, value in state.items()}
            else:
                own = {k: torch.as_tensor(value) for k, value in optimizer.state.get(parameter, {}).items()}
            found |= {f"{name}.{key}.{k}": value for k, value in own.items()}
    return found


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def configuration(network: nn.Module) -> dict[str, Any]:
    """What a diffusers network's config.json says, with the name of the class that FSDP2 derived its own from."""
    plain = next(each for each in type(network).__mro__ if not issubclass(each, FSDPModule))
    return json.loads(network.to_json_string()) | {"_class_name": plain.__name__}
