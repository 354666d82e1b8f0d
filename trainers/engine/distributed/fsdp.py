"""FSDP2: the modules that it gathers one by one, and the launcher's options that a run refuses."""

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from datasets_lib.errors import InputError

# for diffusers' networks that do not name theirs
UNET_BLOCKS = ("ResnetBlock2D", "Attention")
# the embedding separately: a DiT also calls that of its first block outside the block
TRANSFORMER_BLOCKS = ("BasicTransformerBlock", "CombinedTimestepLabelEmbeddings")


def check_fsdp(accelerator: Accelerator) -> None:
    """Raises ValueError for options of the launcher that are not supported."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise InputError(f"fsdp_version = {plugin.fsdp_version}: must be 2")
    if plugin.cpu_ram_efficient_loading:
        where = "frozen networks would be empty on all processes but the first"
        raise InputError(f"fsdp_cpu_ram_efficient_loading = true: {where}; set it to false")
    if plugin.activation_checkpointing:
        instead = "set base.gradient_checkpointing instead"
        raise InputError(f"fsdp_activation_checkpointing = true: it renames weights; {instead}")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        instead = "set it to false, and base.gradient_checkpointing to true if memory is short"
        raise InputError(f"fsdp_offload_params = true: not supported; {instead}")


def shard_by_blocks(accelerator: Accelerator, networks: dict[str, nn.Module]) -> None:
    """Chooses the modules that FSDP2 gathers one by one: those named by the launcher, else the network's blocks."""
    if len(networks) > 1:
        raise InputError(
            f"FSDP2 shards one network, and this run trains {len(networks)} ({', '.join(networks)}); launch with DDP, "
            "or train one of them"
        )
    [(name, network)] = networks.items()
    plugin, there = accelerator.state.fsdp_plugin, {type(module).__name__ for module in network.modules()}
    asked = plugin.transformer_cls_names_to_wrap
    missing = [each for each in asked or () if each not in there]
    if missing:
        raise InputError(
            f"fsdp_transformer_layer_cls_to_wrap names {', '.join(missing)}, and network {name} has none; leave the "
            "option out, or choose among its modules"
        )
    if asked is None:
        own = TRANSFORMER_BLOCKS if there.intersection(TRANSFORMER_BLOCKS) else UNET_BLOCKS
        blocks = getattr(network, "_no_split_modules", None) or own
        plugin.transformer_cls_names_to_wrap = sorted(there.intersection(blocks))
    if plugin.mixed_precision_policy is not None:  # gradients are summed in float32, as DDP does
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)
