"""The task's networks as the loop trains them: prepared by accelerate, checkpointed, compiled."""

from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from trainers.base import RunInfo, Trainer
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import RunConfig
from trainers.engine.distributed import backends
from trainers.engine.distributed.launch import weight_dtype
from trainers.engine.run.clock import Clock
from trainers.engine.run.context import DataSets
from trainers.engine.run.run_folder import CHECKPOINT_NAME

SHOWN_CAPTIONS = 64  # that a task may draw at validations


def build_trainer(accelerator: Accelerator, run: RunConfig, clock: Clock, data: DataSets) -> Trainer:
    """Makes the task's trainer, told where it runs, for how long, and what its data holds; it has no networks yet."""
    trainer = run.trainer_class(run.config, run.base)
    texts = data.train.captions()
    labels = [dataset.highest_label for dataset in data if dataset is not None]
    trainer.run = RunInfo(
        device=accelerator.device,
        weight_dtype=weight_dtype(accelerator),
        start_step=clock.origin_step,
        total_steps=clock.total_steps,
        label_names=data.train.label_names,
        highest_label=max((label for label in labels if label is not None), default=None),
        captions=None if texts is None else list(islice(dict.fromkeys(islice(texts, 1000)), SHOWN_CAPTIONS)),
        encoded_by=data.train.encoded_by,
    )
    trainer.setup()
    return trainer


def init_networks(trainer: Trainer) -> dict[str, nn.Module]:
    """Builds the task's networks, whose random weights depend on the run's seed alone."""
    torch.manual_seed(trainer.base.seed)
    return trainer.init_modules()


def prepare_networks(
    accelerator: Accelerator, trainer: Trainer, networks: dict[str, nn.Module], optimizer: Optimizer, base: BaseConfig
) -> tuple[Optimizer, dict[str, nn.Module]]:
    """Sets the trainer's `modules` and `unwrapped`; returns the prepared optimizer, and the networks without numbers.

    The latter are copies as they were before wrappers and shards, which an export fills.

    Raises ValueError for an option that a network does not support, and for a network named like a folder of the run.
    """
    reserved = {"samples", Path(base.logging_dir).parts[0]}
    for name, network in networks.items():
        if name in reserved or CHECKPOINT_NAME.fullmatch(name):
            raise ValueError(f"network {name} would share the run's folder {name}; rename it, or base.logging_dir")
        network.train()  # from_pretrained returns networks in eval mode
        if accelerator.device.type == "cuda" if base.channels_last is None else base.channels_last:
            network.to(memory_format=torch.channels_last)  # of weights with four axes; activations follow them
        if base.gradient_checkpointing and hasattr(network, "gradient_checkpointing_enable"):  # transformers'
            network.gradient_checkpointing_enable({"use_reentrant": False})
        elif base.gradient_checkpointing:
            _method(network, name, "enable_gradient_checkpointing", "gradient_checkpointing")()
        if base.enable_xformers_memory_efficient_attention:
            option = "enable_xformers_memory_efficient_attention"
            _method(network, name, option, option)()
    meta_networks = {name: filled(network, _without_numbers(network)) for name, network in networks.items()}
    prepared, optimizer = backends.prepare(accelerator, trainer, networks, optimizer)
    trainer.modules = dict(zip(networks, prepared, strict=True))
    trainer.unwrapped = networks
    if base.compile:
        _compile(networks, base.compile_repeated_blocks)
    return optimizer, meta_networks


def filled(network: nn.Module, numbers: dict[str, Tensor]) -> nn.Module:
    """A copy of a network with these parameters and buffers instead of its own, which are not copied."""
    memo: dict[int, object] = {}  # what deepcopy finds here it takes instead of copying
    for key, parameter in network.named_parameters():
        memo[id(parameter)] = nn.Parameter(numbers[key], requires_grad=False)
    for key, buffer in network.named_buffers():
        memo[id(buffer)] = numbers[key]
    return copy.deepcopy(network, memo)


def _without_numbers(network: nn.Module) -> dict[str, Tensor]:
    own = dict(network.named_parameters()) | dict(network.named_buffers())
    return {key: tensor.detach().to("meta") for key, tensor in own.items()}


def _compile(networks: dict[str, nn.Module], only_blocks: bool) -> None:
    """In place, as a wrapper would change the names in checkpoints; a network that names no blocks is compiled whole.

    Raises ValueError where the blocks alone are asked for and no network names any.
    """
    with_blocks = {name for name, network in networks.items() if getattr(network, "_repeated_blocks", None)}
    if only_blocks and not with_blocks:
        raise ValueError(
            f"base.compile_repeated_blocks = true: the networks ({', '.join(networks)}) name no repeated blocks; set "
            "it to false"
        )
    for name, network in networks.items():
        if hasattr(network, "to_json_string"):
            network.to_json_string()  # the first call adds to its config, whose length compiled code is guarded by
        (network.compile_repeated_blocks if only_blocks and name in with_blocks else network.compile)()


def _method(network: nn.Module, name: str, method: str, option: str) -> Any:
    if not hasattr(network, method):
        raise ValueError(f"base.{option} = true: network {name} ({type(network).__name__}) does not support it")
    return getattr(network, method)
