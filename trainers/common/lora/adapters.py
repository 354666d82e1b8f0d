"""Low-rank adapters, arXiv 2106.09685, through peft: W x + scale alpha / r B A x, with A and B alone trained."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

ADAPTER = "default"  # peft's name for it
INITIALISATIONS = {"gaussian": "gaussian", "kaiming": True}  # of A; B starts at 0


def add_lora(
    option: str, network: nn.Module, targets: list[str] | str, settings: dict[str, Any], without: str | None = None
) -> nn.Module:
    """Freezes a network of diffusers or transformers and gives it an adapter with float32 weights.

    `targets` are endings of modules' names, or a pattern (regular expression) that matches whole names; `without` is
    a pattern of those to leave out. Raises ValueError, naming the `option`, where none fits.
    """
    network.requires_grad_(False)
    initial = INITIALISATIONS[settings.pop("init_lora_weights")]
    try:
        places = {"target_modules": targets, "exclude_modules": without}
        config = LoraConfig(**settings | places, init_lora_weights=initial)
        network.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as error:
        linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        endings = dict.fromkeys(re.sub(r".*\.(?=\D)", "", name) for name in linear)  # to_out.0 of a.b.to_out.0
        advice = f"modules of {type(network).__name__} end in {', '.join(list(endings)[:12])}"
        raise ValueError(f"{option} = {targets}: no adapter can be put there ({error}); {advice}") from None
    cast_training_params(network, torch.float32)  # small updates vanish in half precision
    return network


@contextmanager
def lora_scaled(networks: Iterable[nn.Module], scale: float) -> Iterator[None]:
    """The adapters act `scale` times as strongly inside; at 0 they are left out, and the base comes back exactly."""
    layers = [module for network in networks for module in network.modules() if isinstance(module, LoraLayer)]
    try:
        for layer in layers:
            layer.set_scale(ADAPTER, scale)
            # peft's enable_adapters switches requires_grad as well: of two tensors that FSDP2 has for a weight, one
            layer._disable_adapters = scale == 0.0
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1.0)
            layer._disable_adapters = False
