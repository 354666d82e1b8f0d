"""Low-rank adapters (arXiv 2106.09685) by peft: W x + scale alpha / r B A x, with only A and B trained."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from datasets_lib.errors import InputError
from trainers.common.lora.files import ADAPTER


def add_lora(
    option: str,
    network: PeftAdapterMixin,
    targets: list[str] | str,
    settings: dict[str, Any],
    without: str | None = None,
) -> nn.Module:
    """Freezes a network of diffusers or transformers and gives it an adapter with float32 weights.

    `targets` are endings of modules' names, or a regular expression for whole names; modules that match `without` are
    left out. Raises ValueError, naming the `option`, if no module matches.
    """
    network.requires_grad_(False)
    try:
        config = LoraConfig(**settings, target_modules=targets, exclude_modules=without)
        network.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as error:
        linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        endings = dict.fromkeys(re.sub(r".*\.(?=\D)", "", name) for name in linear)  # to_out.0 of a.b.to_out.0
        advice = f"modules of {type(network).__name__} end in {', '.join(list(endings)[:12])}"
        raise InputError(f"{option} = {targets}: no adapter can be put there ({error}); {advice}") from None
    cast_training_params(network, torch.float32)  # small updates vanish in half precision
    return network


@contextmanager
def lora_scaled(networks: Iterable[nn.Module], scale: float) -> Iterator[None]:
    """Scales the adapters inside the block; 0 switches them off, which gives exactly the base model."""
    layers = [module for network in networks for module in network.modules() if isinstance(module, LoraLayer)]
    try:
        for layer in layers:
            layer.set_scale(ADAPTER, scale)
            # not by peft's enable_adapters: it sets requires_grad, on one of FSDP2's two tensors of a weight only
            layer._disable_adapters = scale == 0.0
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1.0)
            layer._disable_adapters = False
