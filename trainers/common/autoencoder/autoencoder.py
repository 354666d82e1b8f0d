"""A variational autoencoder that encodes, samples and decodes in one forward, which DDP and FSDP hook."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor


class AutoencoderKL(diffusers.AutoencoderKL):
    """diffusers' AutoencoderKL with a forward for training; it has the same name, which goes into config.json.

    diffusers' forward hides the posterior, and calls of `encode` and `decode` would bypass the hooks that average
    gradients.
    """

    def forward(
        self,
        pixels: Tensor | None = None,
        noise: Tensor | None = None,
        latents: Tensor | None = None,
        decode: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns decoded pixels [B, C, H, W] in [-1, 1], and the posterior's moments [B, 2 * latent channels, h, w].

        The moments are mean and log-variance. With `noise` [B, latent channels, h, w] a sample of the posterior is
        decoded, otherwise its mode. If `latents` are given, only these are decoded, and there are no moments.
        """
        moments = None
        if latents is None:
            moments = self.encode(pixels).latent_dist.parameters.float()
            posterior = DiagonalGaussianDistribution(moments)
            latents = posterior.mode() if noise is None else posterior.mean + posterior.std * noise
        return self.decode(latents).sample if decode else None, moments


def latent_moments(moments: Tensor) -> dict[str, Tensor]:
    """Mean and mean square over positions of samples of a posterior, {name/channel: [B]}.

    The mean square includes the posterior's variance.
    """
    posterior = DiagonalGaussianDistribution(moments)
    means = posterior.mean.mean((2, 3))
    squares = (posterior.mean.square() + posterior.var).mean((2, 3))
    named = {"latent_mean": means, "latent_square": squares}
    return {f"{name}/{channel}": row for name, rows in named.items() for channel, row in enumerate(rows.T)}


class LatentStatistics:
    """Mean and standard deviation of the latents, per channel and overall, from averaged `latent_moments`."""

    def __init__(self, means: dict[str, float]) -> None:
        channels = range(sum(name.startswith("latent_mean/") for name in means))
        self.mean = torch.tensor([means[f"latent_mean/{channel}"] for channel in channels], dtype=torch.float64)
        self.square = torch.tensor([means[f"latent_square/{channel}"] for channel in channels], dtype=torch.float64)
        self.std = (self.square - self.mean.square()).clamp(min=0).sqrt()

    @property
    def total_mean(self) -> float:
        return self.mean.mean().item()

    @property
    def total_std(self) -> float:
        return (self.square.mean() - self.mean.mean().square()).clamp(min=0).sqrt().item()

    def as_metrics(self) -> dict[str, float]:
        by_channel = {f"latent_std/{channel}": value for channel, value in enumerate(self.std.tolist())}
        return {"latent_mean": self.total_mean, "latent_std": self.total_std} | by_channel
