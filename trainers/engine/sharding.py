"""Tensors that FSDP2 spreads over the processes: this one's part, the whole, and the way back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

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


def local(tensor: Tensor) -> Tensor:
    """This process's part, the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All parts together. Collective where the tensor is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def forget_gathered(networks: dict[str, nn.Module]) -> None:
    """After weights were changed: FSDP2 keeps what it gathered in a forward pass until a backward pass."""
    for network in networks.values():
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def like(saved: Tensor, own: Tensor) -> Tensor:
    """A whole tensor sharded and laid out in memory as the network's own.

    Fused AdamW walks through memory: state in another layout than its weight would belong to other elements.
    """
    if isinstance(own, DTensor):
        return distribute_tensor(saved.to(own.device), own.device_mesh, own.placements)
    if saved.shape != own.shape or saved.stride() == own.stride():
        return saved
    return torch.empty_like(own, device=saved.device, dtype=saved.dtype).copy_(saved)


def shard_of(part: Tensor, own: Tensor) -> Tensor:
    """This process's part as one of a tensor that is sharded as `own` is."""
    if not isinstance(own, DTensor):
        return part
    place = {"device_mesh": own.device_mesh, "placements": own.placements, "run_check": False}
    return DTensor.from_local(part.to(own.device), **place, shape=own.shape, stride=own.stride())


def configuration(network: nn.Module) -> dict[str, Any]:
    """What a diffusers network's config.json says, with the name of the class that FSDP2 derived its own from."""
    plain = next(each for each in type(network).__mro__ if not issubclass(each, FSDPModule))
    return json.loads(network.to_json_string()) | {"_class_name": plain.__name__}
