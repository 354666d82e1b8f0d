"""A training step in the style of diffusers' examples: AdamW that is not fused, EMAModel, a loss read in every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn


def plain_step(network: nn.Module, loss: Callable[[], Tensor], precision: str = "no") -> Callable[[], None]:
    """Returns the step. Convolutions may use TF32, as they do unless a script forbids it."""
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    averaged = EMAModel(network.parameters(), decay=0.995)
    averaged.to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def step() -> None:
        before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, True
        with autocast:
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        averaged.step(network.parameters())
        value.detach().item()  # these scripts show it in their progress bars
        torch.backends.cudnn.allow_tf32 = before

    return step
