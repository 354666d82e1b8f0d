"""Prepares the task's networks for training: by accelerate, with checkpointed activations, compiled."""

from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from datasets_lib.errors import InputError
from datasets_lib.example import ImageData
from trainers.base import RunInfo, Trainer
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import RunConfig
from trainers.engine.distributed import backends
from trainers.engine.distributed.launch import weight_dtype
from trainers.engine.distributed.sharding import Configured
from trainers.engine.run.clock import Clock
from trainers.engine.run.context import DataSets
from trainers.engine.run.run_folder import CHECKPOINT_NAME

SHOWN_CAPTIONS = 64  # from which a task may choose prompts for validations


def build_trainer(accelerator: Accelerator, run: RunConfig, clock: Clock, data: DataSets) -> Trainer:
    """Makes the task's trainer and sets its `run`; it has no networks yet."""
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
        no_labels=data.train.no_labels,
        captions=None if texts is None else list(islice(dict.fromkeys(islice(texts, 1000)), SHOWN_CAPTIONS)),
        class_captions=_class_captions(data.train) if run.base.has_class_images else (),
        encoded_by=data.train.encoded_by,
    )
    trainer.setup()
    return trainer


def _class_captions(train_set: ImageData) -> list[str]:
    return list(dict.fromkeys(train_set.captions("class_caption") or ()))


def init_networks(trainer: Trainer) -> dict[str, nn.Module]:
    """Builds the task's networks, whose random weights depend on the run's seed alone."""
    torch.manual_seed(trainer.base.seed)
    return trainer.init_modules()


def prepare_networks(
    accelerator: Accelerator, trainer: Trainer, networks: dict[str, nn.Module], optimizer: Optimizer, base: BaseConfig
) -> tuple[AcceleratedOptimizer, dict[str, nn.Module]]:
    """Sets the trainer's `modules` and `unwrapped`; returns the prepared optimizer, and empty copies of the networks.

    An export fills these copies, which have no wrappers and shards. Raises ValueError for an option that a network does
    not support, and for a network named like a folder of the run.
    """
    reserved = {"samples", Path(base.logging_dir).parts[0]}
    for name, network in networks.items():
        if name in reserved or CHECKPOINT_NAME.fullmatch(name):
            raise InputError(f"network {name} would share the run's folder {name}; rename it, or base.logging_dir")
        network.train()  # from_pretrained returns networks in eval mode
        if accelerator.device.type == "cuda" if base.channels_last is None else base.channels_last:
            network.to(memory_format=torch.channels_last)  # of weights with four axes; the activations follow
        of_transformers = getattr(network, "gradient_checkpointing_enable", None)
        if base.gradient_checkpointing and of_transformers is not None:
            of_transformers({"use_reentrant": False})
        elif base.gradient_checkpointing:
            _method(network, name, "enable_gradient_checkpointing", "gradient_checkpointing")()
        if base.enable_xformers_memory_efficient_attention:
            option = "enable_xformers_memory_efficient_attention"
            _method(network, name, option, option)()
    meta_networks = {name: _without_numbers(network) for name, network in networks.items()}
    prepared, wrapped = backends.prepare(accelerator, trainer, networks, optimizer)
    trainer.modules = dict(zip(networks, prepared, strict=True))
    trainer.unwrapped = networks
    if base.compile:
        _compile(networks, base.compile_repeated_blocks)
    return wrapped, meta_networks


def filled(network: nn.Module, numbers: dict[str, Tensor]) -> nn.Module:
    """Copies a network with these parameters and buffers instead of its own."""
    memo: dict[int, object] = {}  # deepcopy takes what it finds here
    for key, parameter in network.named_parameters():
        memo[id(parameter)] = nn.Parameter(numbers[key], requires_grad=False)
    for key, buffer in network.named_buffers():
        memo[id(buffer)] = numbers[key]
    return copy.deepcopy(network, memo)


def _without_numbers(network: nn.Module) -> nn.Module:
    own = [*network.named_parameters(), *network.named_buffers()]
    return filled(network, {key: tensor.detach().to("meta") for key, tensor in own})


def _compile(networks: dict[str, nn.Module], only_blocks: bool) -> None:
    """Compiles in place, as a wrapper would change names in checkpoints; networks without named blocks as a whole."""
    with_blocks = {name for name, network in networks.items() if getattr(network, "_repeated_blocks", None)}
    if only_blocks and not with_blocks:
        raise InputError(
            f"base.compile_repeated_blocks = true: the networks ({', '.join(networks)}) name no repeated blocks; set "
            "it to false"
        )
    for name, network in networks.items():
        if isinstance(network, Configured):
            network.to_json_string()  # the first call extends the config, whose length compiled code checks
        getattr(network, "compile_repeated_blocks" if only_blocks and name in with_blocks else "compile")()


def _method(network: nn.Module, name: str, method: str, option: str) -> Any:
    if not hasattr(network, method):
        raise InputError(f"base.{option} = true: network {name} ({type(network).__name__}) does not support it")
    return getattr(network, method)
