"""A network of features that costs nothing."""

from __future__ import annotations

import torch
from torch import nn


class Features(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)
