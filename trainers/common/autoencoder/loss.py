"""The non-adversarial loss of an autoencoder, and quality metrics of its reconstructions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from trainers.common.autoencoder.options import SSIM_WINDOW, VAEConfig
from trainers.common.autoencoder.perceptual import load_perceptual


class AutoencoderLoss:
    """Reconstruction loss, perceptual distance and KL per example."""

    def __init__(self, config: VAEConfig, resolution: int, device: torch.device) -> None:
        self.config = config
        huber = partial(functional.huber_loss, delta=config.huber_delta)
        losses: dict[str, Callable[..., Tensor]] = {"l1": functional.l1_loss, "l2": functional.mse_loss, "huber": huber}
        self.errors = losses[config.reconstruction_loss]
        self.perceptual = None
        if config.perceptual_loss is not None:
            self.perceptual = load_perceptual(config.perceptual_loss, resolution).to(device)

    def distances(self, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Distances [B] of reconstructions [B, C, H, W] from their pictures: of pixels and, if set, perceptual."""
        errors = self.errors(reconstruction, images, reduction="none")
        distances = {"reconstruction": errors.mean((1, 2, 3))}
        if self.perceptual is not None:
            distances["perceptual"] = self.perceptual(reconstruction, images)
        return distances

    def weighted(self, distances: dict[str, Tensor]) -> Tensor:
        return distances["reconstruction"] + self.config.perceptual_weight * distances.get("perceptual", 0.0)

    def kl(self, moments: Tensor) -> Tensor:
        """KL divergence [B] of posteriors from the standard normal, in nats, summed over the latents."""
        return DiagonalGaussianDistribution(moments).kl()

    def kl_weight(self, step: int) -> float:
        """The KL's weight at a step, with linear warm-up; 0 if the encoder is frozen."""
        if self.config.decoder_only:
            return 0.0
        warmup = self.config.kl_warmup_steps
        return self.config.kl_weight * (min(1.0, step / warmup) if warmup else 1.0)


def quality(images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
    """PSNR (dB) and SSIM of pictures [B, C, H, W] in [-1, 1], each [B]; without SSIM if its window does not fit.

    Pixels are clamped as in 8-bit files, but not rounded.
    """
    ours, wanted = ((pixels / 2 + 0.5).clamp(0, 1) for pixels in (reconstruction, images))
    metrics = {"psnr": peak_signal_noise_ratio(ours, wanted, data_range=1.0, reduction="none", dim=(1, 2, 3))}
    if images.shape[-1] > SSIM_WINDOW:
        found = structural_similarity_index_measure(ours, wanted, data_range=1.0, reduction="none")
        assert isinstance(found, Tensor)  # a tuple only with return_full_image or return_contrast_sensitivity
        metrics["ssim"] = found.reshape(len(images))
    return metrics
