"""Guidance towards a class: without a classifier (arXiv 2207.12598) and with one (arXiv 2105.05233)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

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


@dataclass
class ClassifierGuidance:
    """Moves predictions along the gradient of log p(class | noisy picture), equation 14 of arXiv 2105.05233.

    With a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar) the predicted noise moves by d = -scale s grad, hence the
    predicted picture by -d s / a and the velocity by d / a. Nothing moves where the picture is pure noise (a = 0).
    """

    logits: Callable[[Tensor, Tensor], Tensor]  # (noisy [B, ...], timestep) -> [B, classes]
    scale: float
    scheduler: DDPMScheduler

    @classmethod
    def load(cls, run: str, scale: float, scheduler: DDPMScheduler, device: torch.device) -> ClassifierGuidance:
        """From a finished noisy_classifier run; ValueError where it was trained with other noise."""
        from diffusers import DDPMScheduler, UNet2DModel

        trained_with = DDPMScheduler.from_pretrained(run, subfolder="scheduler")
        if not torch.equal(trained_with.alphas_cumprod, scheduler.alphas_cumprod):
            raise ValueError(
                f"classifier = {run}: it was trained with another noise schedule; train it with this run's "
                "ddpm_num_steps, ddpm_beta_schedule and rescale_betas_zero_snr"
            )
        network = UNet2DModel.from_pretrained(run, subfolder="classifier").to(device).requires_grad_(False)
        return cls(lambda noisy, timestep: network(noisy, timestep).sample.mean((2, 3)), scale, scheduler)

    def guide(self, prediction: Tensor, noisy: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        alpha_bar = float(self.scheduler.alphas_cumprod[int(timestep)])
        a, s = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if a == 0:
            return prediction
        noise_shift = -self.scale * s * self._gradient(noisy, timestep, labels)
        factor = {"epsilon": 1.0, "sample": -s / a, "v_prediction": 1 / a}
        return prediction + factor[self.scheduler.config.prediction_type] * noise_shift

    def _gradient(self, noisy: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """Of log p(label | noisy) with respect to noisy, per example."""
        with torch.enable_grad():
            noisy = noisy.detach().requires_grad_(True)
            log_p = self.logits(noisy, timestep).float().log_softmax(1)
            return torch.autograd.grad(log_p.gather(1, labels[:, None]).sum(), noisy)[0]


def noise_level(alphas_cumprod: Tensor, timestep: Tensor | int) -> float:
    """sigma of a timestep: sqrt((1 - alpha_bar) / alpha_bar)."""
    alpha_bar = float(alphas_cumprod[int(timestep)])
    return ((1 - alpha_bar) / alpha_bar) ** 0.5 if alpha_bar > 0 else float("inf")
