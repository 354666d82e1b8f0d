"""Guidance towards a class by a classifier of noisy pictures, arXiv 2105.05233."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from datasets_lib.errors import InputError
from trainers.base import BaseConfig
from trainers.model_configs import read_config
from trainers.pretrained import read_model, read_part

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler
    from torch import Tensor


class ClassifierGuidance:
    """Moves predictions along the gradient of log p(class | noisy picture), equation 14 of arXiv 2105.05233.

    With a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar) the predicted noise moves by d = -scale s grad, hence the
    predicted picture by -d s / a and the velocity by d / a. In pure noise (a = 0) nothing moves.
    """

    def __init__(self, logits: Callable[[Tensor, Tensor], Tensor], scale: float, scheduler: DDPMScheduler) -> None:
        """`logits` maps noisy [B, ...] and a timestep to [B, classes]."""
        self.logits, self.scale, self.scheduler = logits, scale, scheduler
        self.alphas_cumprod = scheduler.alphas_cumprod.tolist()  # avoids a device synchronisation at every step

    @classmethod
    def load(
        cls, run: str, scale: float, scheduler: DDPMScheduler, num_classes: int, device: torch.device
    ) -> ClassifierGuidance:
        """Loads a finished noisy_classifier run; ValueError if its classes or its noise differ from the model's."""
        import torch
        from diffusers import DDPMScheduler, UNet2DModel

        place = f"classifier = {run}"
        trained_with = read_part(DDPMScheduler, Path(run) / "scheduler", place)
        if not torch.equal(trained_with.alphas_cumprod, scheduler.alphas_cumprod.cpu()):
            raise InputError(
                f"classifier = {run}: it was trained with another noise schedule; train it with this run's "
                "ddpm_num_steps, ddpm_beta_schedule and rescale_betas_zero_snr"
            )
        network = read_model(UNet2DModel, run, place, "classifier").to(device).requires_grad_(False)
        if network.config.out_channels != num_classes:
            raise InputError(f"classifier = {run}: knows {network.config.out_channels} classes, not {num_classes}")
        return cls(lambda noisy, timestep: network(noisy, timestep).sample.mean((2, 3)), scale, scheduler)

    def guide(self, prediction: Tensor, noisy: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        import torch

        alpha_bar = self.alphas_cumprod[int(timestep)]
        a, s = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if a == 0:
            return prediction
        with torch.enable_grad():
            noisy = noisy.detach().requires_grad_(True)
            log_p = self.logits(noisy, timestep).float().log_softmax(1)
            [gradient] = torch.autograd.grad(log_p.gather(1, labels[:, None]).sum(), noisy)
        noise_shift = -self.scale * s * gradient
        factor = {"epsilon": 1.0, "sample": -s / a, "v_prediction": 1 / a}
        return prediction + factor[self.scheduler.config.prediction_type] * noise_shift


def classifier_problems(run: str, base: BaseConfig) -> Iterator[str]:
    """Yields why a finished noisy_classifier run cannot guide on the run's pictures."""
    config = Path(run) / "classifier" / "config.json"
    for path in (config, Path(run) / "scheduler" / "scheduler_config.json"):
        if not path.is_file():
            yield f"must be a finished noisy_classifier run; there is no {path}"
            return
    try:
        channels = read_config(config).get("in_channels")
    except (OSError, ValueError) as error:
        yield str(error)
        return
    if channels != base.channels:
        yield f"sees pictures with {channels} channels, base.channels is {base.channels}; train one for these"
