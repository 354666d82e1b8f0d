"""The objective of diffusers' research script for autoencoders, written anew from its behaviour, to compare with.

Only compare_autoencoders.py and the tests use it. What it does (train_autoencoderkl.py, read in November 2026):
sums over pixels, a perceptual distance that is added to every pixel but computed without gradient, a discriminator that
is never updated, and an autoencoder that is updated in every other step only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.nn import functional

Distance = Callable[[Tensor, Tensor], Tensor]
KL_SCALE, DISCRIMINATOR_SCALE = 1e-6, 1.0  # the script's defaults


def perceptual_term(distance: Distance, reconstruction: Tensor, images: Tensor) -> Tensor:
    """Its perceptual distance: a constant to the autoencoder."""
    with torch.no_grad():
        return distance(reconstruction, images)


def research_loss(
    vae: Any,
    discriminator: nn.Module,
    distance: Distance,
    images: Tensor,
    noise: Tensor,
    step: int,
    start_step: int,
) -> Tensor | None:
    """The autoencoder's loss in a step; None in the steps that leave it alone."""
    if step % 2 and step >= start_step:
        return None
    reconstruction, moments = vae(images, noise)
    perceptual = perceptual_term(distance, reconstruction, images).reshape(-1, 1, 1, 1)
    errors = functional.l1_loss(reconstruction, images, reduction="none") + perceptual
    summed = errors.sum() / len(images)
    loss = summed + KL_SCALE * DiagonalGaussianDistribution(moments).kl().mean()
    if step >= start_step:
        adversarial = -discriminator(reconstruction).mean()
        last_layer = vae.decoder.conv_out.weight
        norms = [torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm() for term in (summed, adversarial)]
        loss = loss + DISCRIMINATOR_SCALE * (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach() * adversarial
    return loss
