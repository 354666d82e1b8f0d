"""Classifier-free guidance, arXiv 2207.12598, of a network that knows classes and the class "none"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # (noisy [B, ...], timesteps, labels [B]) -> prediction [B, ...]


@dataclass
class Guidance:
    """How strongly, and at which noise levels, a prediction is pushed away from that without a class.

    `scale` 1 is the conditional prediction and 0 the unconditional one; neither needs a second half of the batch.
    `rescale` in [0, 1] is phi of arXiv 2305.08891, section 3.4. Outside of `interval` (low, high) of the noise level
    sigma = sqrt((1 - alpha_bar) / alpha_bar) the prediction is the conditional one, arXiv 2404.07724.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

    def predict(
        self, network: Network, noisy: Tensor, timestep: Tensor, labels: Tensor, no_class: int, sigma: float
    ) -> Tensor:
        """One forward, of twice the batch where guidance acts."""
        scale = self.scale if self.interval is None or self.interval[0] < sigma <= self.interval[1] else 1.0
        if scale == 1.0:
            return network(noisy, timestep, labels)
        none = torch.full_like(labels, no_class)
        if scale == 0.0:
            return network(noisy, timestep, none)
        both = network(torch.cat([noisy, noisy]), timestep, torch.cat([labels, none])).float()
        conditional, unconditional = both.chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        if self.rescale == 0.0:
            return guided
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

        return rescale_noise_cfg(guided, conditional, guidance_rescale=self.rescale)


def noise_level(alphas_cumprod: Tensor, timestep: Tensor | int) -> float:
    """sigma of a timestep: sqrt((1 - alpha_bar) / alpha_bar)."""
    alpha_bar = float(alphas_cumprod[int(timestep)])
    return ((1 - alpha_bar) / alpha_bar) ** 0.5 if alpha_bar > 0 else float("inf")
