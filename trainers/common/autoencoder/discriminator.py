"""A patch discriminator, and the moving averages of its logits."""

from __future__ import annotations

import itertools
import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential


class PatchDiscriminator(nn.Module):
    """Classifies overlapping patches as real or reconstructed: pix2pix's network (arXiv 1611.07004) with group norm.

    [B, C, H, W] in [-1, 1] -> logits [B, 1, h, w]; `layers` convolutions halve the resolution. Batch norm would depend
    on how the batch is split, and mix real pictures with reconstructions.
    """

    def __init__(self, channels: int, layers: int = 3, base_channels: int = 64) -> None:
        super().__init__()
        widths = [base_channels * min(2**layer, 8) for layer in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for number, (narrow, wide) in enumerate(itertools.pairwise(widths), 1):
            stride = 2 if number < layers else 1
            norm = nn.GroupNorm(math.gcd(32, wide), wide)
            blocks += [nn.Conv2d(narrow, wide, 4, stride, 1, bias=False), norm, nn.LeakyReLU(0.2)]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.averages = LogitAverages()
        self.checkpoints = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def enable_gradient_checkpointing(self) -> None:
        self.checkpoints = True

    def forward(self, pixels: Tensor) -> Tensor:
        if self.checkpoints and torch.is_grad_enabled():
            return checkpoint_sequential(self.blocks, 2, pixels, use_reentrant=False)
        return self.blocks(pixels)


class LogitAverages(nn.Module):
    """Moving averages of the mean logits of real pictures and reconstructions, for LeCam (arXiv 2104.03310).

    A step uses averages over earlier steps only, so that the split of a batch over processes and micro-batches does
    not matter: the means of a step are collected, and enter the averages when the next step begins.
    """

    DECAY = 0.99
    sums: Tensor
    collected: Tensor
    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(3))  # decaying sums of both means, and of the weights
        self.register_buffer("collected", torch.zeros(3))  # sums of both means in the latest step, and their count
        self.register_buffer("step", torch.tensor(-1))  # the latest step

    @torch.no_grad()
    def forward(self, step: int, real: Tensor, reconstructed: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the averages (real, reconstructed) for `step`, and collects its logits. Collective."""
        own = torch.stack([real.mean(), reconstructed.mean(), torch.ones_like(real.mean())])
        own = torch.where(own.isfinite().all(), own, 0.0)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(own)
        new, collected = self.step != step, self.collected.clone()
        known = collected / collected[2].clamp(min=1)  # its last element is 1, or 0 if nothing was collected
        averaged = torch.where(known[2] > 0, self.DECAY * self.sums + (1 - self.DECAY) * known, self.sums)
        self.sums.copy_(torch.where(new, averaged, self.sums))
        self.collected.copy_(torch.where(new, own, collected + own))
        self.step.fill_(step)
        averages = self.sums[:2] / self.sums[2].clamp(min=1e-12)
        return averages[0], averages[1]
