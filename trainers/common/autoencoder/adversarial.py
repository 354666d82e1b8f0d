"""Adversarial losses of an autoencoder and a discriminator, as one sum for a single backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainers.common.autoencoder.discriminator import LogitAverages
from trainers.common.autoencoder.options import VAEConfig

LARGEST_WEIGHT = 1e4  # upper limit of the adaptive weight
SCALE = 2.0**10  # of losses whose gradients are compared, against underflow in fp16


@dataclass(frozen=True)
class Reconstruction:
    """Images, their reconstructions, and the inputs of the adaptive weight."""

    images: Tensor
    pictures: Tensor
    loss: Tensor  # reconstruction loss
    last_layer: Tensor  # the decoder's last weight


def adversarial_losses(
    config: VAEConfig, discriminator: nn.Module, averages: LogitAverages, reconstruction: Reconstruction, step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the sum of the autoencoder's and the discriminator's adversarial losses, and its terms to log.

    Neither loss gives the other network a gradient, so that one backward of the sum equals one of each.
    """
    kind = config.adversarial_loss
    values: dict[str, Tensor] = {}
    with frozen(discriminator):
        adversarial = generator_loss(kind, discriminator(reconstruction.pictures))
    weight: float | Tensor = config.adversarial_weight
    if config.adaptive_weight:
        values["adaptive_weight"] = adaptive_weight(reconstruction.loss, adversarial, reconstruction.last_layer)
        weight = weight * values["adaptive_weight"]

    real = reconstruction.images.detach().requires_grad_(config.r1_weight > 0)
    logits_real, logits_reconstructed = discriminator(real), discriminator(reconstruction.pictures.detach())
    discriminating = discriminator_loss(kind, logits_real, logits_reconstructed)
    values |= {"adversarial": adversarial, "discriminator": discriminating}
    values |= {"logits_real": logits_real.mean(), "logits_reconstructed": logits_reconstructed.mean()}
    if config.r1_weight:
        values["r1"] = gradient_penalty(logits_real, real)
        discriminating = discriminating + config.r1_weight / 2 * values["r1"]
    if config.lecam_weight:
        means = averages(step, logits_real, logits_reconstructed)
        values["lecam"] = lecam(logits_real, logits_reconstructed, means)
        discriminating = discriminating + config.lecam_weight * values["lecam"]
    return weight * adversarial + discriminating, values


def discriminator_loss(kind: str | None, real: Tensor, reconstructed: Tensor) -> Tensor:
    """The loss on raw logits: hinge (arXiv 1705.02894) or vanilla (cross-entropy, arXiv 1406.2661), halved."""
    if kind == "hinge":
        return (functional.relu(1 - real).mean() + functional.relu(1 + reconstructed).mean()) / 2
    return (functional.softplus(-real).mean() + functional.softplus(reconstructed).mean()) / 2


def generator_loss(kind: str | None, reconstructed: Tensor) -> Tensor:
    """The autoencoder's loss: minus the mean logit with hinge, the non-saturating loss with vanilla."""
    return -reconstructed.mean() if kind == "hinge" else functional.softplus(-reconstructed).mean()


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """The ratio of the two gradient norms at the decoder's last layer (arXiv 2012.09841, eq. 7), in [0, 1e4]."""
    norms = [
        torch.autograd.grad(SCALE * loss, last_layer, retain_graph=True)[0].norm() / SCALE
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, LARGEST_WEIGHT).detach()


def gradient_penalty(logits: Tensor, real: Tensor) -> Tensor:
    """R1 (arXiv 1801.04406, eq. 9) without its factor: the squared gradient of the mean logit w.r.t. the pixels.

    Averaged over the batch; `real` must require a gradient before the logits are computed.
    """
    total = logits.mean((1, 2, 3)).sum()
    [gradient] = torch.autograd.grad(total, real, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def lecam(real: Tensor, reconstructed: Tensor, averages: tuple[Tensor, Tensor]) -> Tensor:
    """LeCam regularisation (arXiv 2104.03310): pulls each kind of logits towards the average of the other kind."""
    average_real, average_reconstructed = averages
    return (real - average_reconstructed).square().mean() + (reconstructed - average_real).square().mean()


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Inside, a forward gives the network's parameters no gradient, but its input one."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
