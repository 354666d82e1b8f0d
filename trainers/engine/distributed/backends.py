"""The backends of training on several processes (DDP, FSDP2, DeepSpeed): checks, preparation, description."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import nn
from torch.optim import Optimizer

from datasets_lib.errors import InputError
from trainers.base import Trainer, TrainerConfig
from trainers.engine.distributed import deepspeed, fsdp
from trainers.engine.optim.table import OPTIMIZERS

ASKED_BY = {"ACCELERATE_USE_FSDP": DistributedType.FSDP, "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED}
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, *ASKED_BY.values())


def check_devices() -> None:
    """Raises ValueError if this machine has fewer GPUs than processes, or if DeepSpeed is asked for and missing."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise InputError("the launcher chose DeepSpeed, which is not installed: pip install diffloop[deepspeed]")
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and "LOCAL_RANK" not in os.environ:
        raise InputError("ACCELERATE_USE_DEEPSPEED = true: needs a launcher; start with accelerate launch or torchrun")
    here, count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if 0 < count < here and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise InputError(
            f"LOCAL_WORLD_SIZE = {here}: more processes than the {count} GPUs that are visible on this machine; start "
            f"at most {count} (--num_processes, --nproc_per_node), or look at CUDA_VISIBLE_DEVICES"
        )


def check_engine(accelerator: Accelerator) -> None:
    """Raises ValueError for an engine or an option of it that is not supported, or that accelerate ignores."""
    engine = accelerator.distributed_type
    if engine not in SUPPORTED:
        raise InputError(
            f"the launcher chose {engine.value}: not supported; launch with DDP (accelerate launch --multi_gpu), or "
            "with FSDP2 or DeepSpeed (accelerate launch --config_file configs/accelerate/fsdp2.yaml, zero2.yaml or "
            "zero3_offload.yaml)"
        )
    for flag, asked in ASKED_BY.items():
        if engine != asked and parse_flag_from_env(flag):
            raise InputError(
                f"{flag} = true: {asked.value} was asked for, and accelerate runs {engine.value} on "
                f"{accelerator.device.type} instead; launch on two GPUs or more, or without {asked.value}"
            )
    if deepspeed.in_use(accelerator):
        deepspeed.check_deepspeed(accelerator)
    if engine == DistributedType.FSDP:
        fsdp.check_fsdp(accelerator)


def check_optimizer(accelerator: Accelerator, config: TrainerConfig) -> None:
    """Raises ValueError for an optimizer that the engine would silently compute differently, by its row."""
    engine, able = _row_name(accelerator), OPTIMIZERS[config.optimizer].engines
    if engine not in able:
        others = [name for name, row in OPTIMIZERS.items() if engine in row.engines]
        raise InputError(
            f"optimizer = {config.optimizer}: not supported with {engine}, which divides weights and state over the "
            f"processes and would compute it otherwise; set it to {' or '.join(others)}, or launch with "
            f"{' or '.join(able)}"
        )


def _row_name(accelerator: Accelerator) -> str:
    """Names the engine as in the table of optimizers."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.deepspeed_config['zero_optimization']['stage']}"
    return "FSDP2" if accelerator.distributed_type == DistributedType.FSDP else "DDP"


def prepare(
    accelerator: Accelerator, trainer: Trainer, networks: dict[str, nn.Module], optimizer: Optimizer
) -> tuple[list[nn.Module], AcceleratedOptimizer]:
    """Prepares networks and optimizer for the engine; raises ValueError for what the engine does not support."""
    check_optimizer(accelerator, trainer.config)
    if deepspeed.in_use(accelerator):
        return deepspeed.prepare(accelerator, trainer, networks, optimizer)
    if accelerator.distributed_type == DistributedType.FSDP:
        fsdp.shard_by_blocks(accelerator, networks)
    *prepared, wrapped = accelerator.prepare(*networks.values(), optimizer)
    return prepared, wrapped


def engine_of(accelerator: Accelerator) -> str:
    """Describes the engine at the start of a run: processes and nodes, what is sharded, the backend."""
    engine, count = accelerator.distributed_type, accelerator.num_processes
    if count == 1 and engine not in ASKED_BY.values():
        return "one process"
    nodes = count // int(os.environ.get("LOCAL_WORLD_SIZE", count))
    name = "DDP"
    if engine == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        blocks = ", ".join(plugin.transformer_cls_names_to_wrap or ()) or "the network"
        kept = "" if plugin.reshard_after_forward else ", kept until the backward pass is over"
        name = f"FSDP2, 1/{count} of the network in each process, gathered by {blocks}{kept}"
    if deepspeed.in_use(accelerator):
        name = _deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"], count)
    return f"{name}; {count} process{'es' * (count > 1)} on {nodes} node{'s' * (nodes > 1)}, {dist.get_backend()}"


def _deepspeed(settings: dict[str, Any], count: int) -> str:
    divided = {2: "gradients and optimizer state", 3: "weights, gradients and optimizer state"}[settings["stage"]]
    parts = {"offload_optimizer": "optimizer", "offload_param": "weights"}
    kept = [what for option, what in parts.items() if (settings.get(option) or {}).get("device") == "cpu"]
    in_memory = f", {' and '.join(kept)} in main memory" if kept else ""
    return f"DeepSpeed ZeRO-{settings['stage']}, 1/{count} of {divided} in each process{in_memory}"
