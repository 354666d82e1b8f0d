"""Trains one autoencoder four ways and measures it: scripts/benchmarks/compare_autoencoders.py CONFIG OUTPUT

`bare`: a minimal loop with L1 and KL. `plain`: diffloop with the same loss. `full`: diffloop with a perceptual distance
(VGG16's features) and the config's adversarial term. `research`: the bare loop with the loss of diffusers' research
script and that distance. Same network, initial weights, pictures, optimizer, learning rates, number of steps.

Prints PSNR, SSIM and ST-LPIPS (arXiv 2207.13686) of held-out reconstructions, and writes a grid: originals, then a row
for each side. Needs the package stlpips_pytorch, whose wheel holds trained weights. Training uses its VGG16, so judge
by its other network, AlexNet.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import vgg16
from torchvision.utils import save_image
from tqdm.auto import trange

import datasets_lib
from train import train
from trainers.common.autoencoder.adversarial import adaptive_weight
from trainers.common.autoencoder.discriminator import PatchDiscriminator
from trainers.common.autoencoder.loss import quality
from trainers.common.autoencoder.options import build_autoencoder, latent_grid
from trainers.common.autoencoder.perceptual import load_perceptual
from trainers.common.model_files import Grid
from trainers.engine.config.config import RunConfig, load_config
from trainers.engine.optim.optimizer import learning_rate_schedule
from trainers.engine.run.randomness import example_generator
from trainers.engine.validation.grids import grid_of
from trainers.engine.validation.metrics import spread
from trainers.inference.saved_run import load_trainer, open_run
from trainers.vae import VAEConfig

KL_SCALE, DISCRIMINATOR_SCALE = 1e-6, 1.0  # the defaults of diffusers' script
SIDES = ("bare", "plain", "full", "research")
SHOWN = 8  # pictures in the grid
Objective = Callable[[nn.Module, Tensor, Tensor, int], Tensor | None]  # of network, images, noise, step


def trained(side: str, arguments: argparse.Namespace, vgg: Path) -> tuple[RunConfig, nn.Module]:
    """The run of a side, and its network."""
    folder = arguments.output / side
    options = [*arguments.overrides, f"base.output_dir={folder}", f"vae.perceptual_loss=vgg16:{vgg}"]
    run = load_config(arguments.config, options)
    if side in ("bare", "research"):
        return run, bare_training(run, l1_and_kl(run) if side == "bare" else research(run))
    if side == "plain":
        run = load_config(arguments.config, [*options, *without_terms(cast(VAEConfig, run.config))])
    train(run)
    return run, load_trainer(open_run(folder), weights="raw", device="cpu").raw("vae")


def bare_training(run: RunConfig, objective: Objective) -> nn.Module:
    """Trains with nothing but a loss, AdamW, clipping and the config's learning rate; returns the network."""
    base, config, steps = run.base, cast(VAEConfig, run.config), cast(int, run.base.max_train_steps)
    torch.manual_seed(base.seed)
    vae = build_autoencoder(config.model_config, Grid.of(base))
    train_set: Any = datasets_lib.build(base, "train")
    grid = latent_grid(vae.config, base.resolution)
    rate, factor = vae_rate(config), learning_rate_schedule(config, steps)
    betas, decay = (config.adam_beta1, config.adam_beta2), config.adam_weight_decay
    optimizer = torch.optim.AdamW(vae.parameters(), rate, betas, config.adam_epsilon, decay)
    order: list[int] = []
    for step in trange(steps):
        order = order or torch.randperm(len(train_set)).tolist()
        chosen, order = order[: base.train_batch_size], order[base.train_batch_size :]
        images = torch.stack([train_set.get(i, example_generator(step, i))["image"] for i in chosen])
        noise = torch.randn(len(images), grid.channels, grid.resolution, grid.resolution)
        optimizer.param_groups[0]["lr"] = rate * factor(step)
        loss = objective(vae, images, noise, step)
        if loss is None:
            continue
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), config.max_grad_norm or torch.inf)
        optimizer.step()
        optimizer.zero_grad()
    vae.save_pretrained(base.output_dir)
    return vae


def vae_rate(config: VAEConfig) -> float:
    rates = config.learning_rate
    return rates["vae"] if isinstance(rates, dict) else rates


def l1_and_kl(run: RunConfig) -> Objective:
    weight = cast(VAEConfig, run.config).kl_weight

    def objective(vae: nn.Module, images: Tensor, noise: Tensor, step: int) -> Tensor:
        reconstruction, moments = vae(images, noise)
        return (reconstruction - images).abs().mean() + weight * DiagonalGaussianDistribution(moments).kl().mean()

    return objective


def research_loss(
    vae: Any, discriminator: nn.Module, distance: Any, images: Tensor, noise: Tensor, step: int, start_step: int
) -> Tensor | None:
    """The loss of diffusers' train_autoencoderkl.py, reimplemented from what it did in November 2026.

    It sums over pixels, adds a perceptual distance without gradient to every pixel, and never updates the
    discriminator. From `start_step` on the autoencoder is updated in every other step; in the others this is None.
    """
    if step % 2 and step >= start_step:
        return None
    reconstruction, moments = vae(images, noise)
    with torch.no_grad():  # so it is a constant to the autoencoder
        perceptual = distance(reconstruction, images).reshape(-1, 1, 1, 1)
    errors = functional.l1_loss(reconstruction, images, reduction="none") + perceptual
    summed = errors.sum() / len(images)
    loss = summed + KL_SCALE * DiagonalGaussianDistribution(moments).kl().mean()
    if step >= start_step:
        adversarial = -discriminator(reconstruction).mean()
        weight = adaptive_weight(summed, adversarial, vae.decoder.conv_out.weight)
        loss = loss + DISCRIMINATOR_SCALE * weight * adversarial
    return loss


def research(run: RunConfig) -> Objective:
    """With the config's perceptual network; its weights per pixel are those of the script, times all pixels here."""
    config, base = cast(VAEConfig, run.config), run.base
    distance = load_perceptual(cast(str, config.perceptual_loss), base.resolution)
    discriminator = PatchDiscriminator(base.channels, config.discriminator_layers, config.discriminator_channels)
    return lambda vae, images, noise, step: research_loss(
        vae, discriminator, distance, images, noise, step, config.adversarial_start_step
    )


def without_terms(config: VAEConfig) -> list[str]:
    """Overrides that remove the perceptual and adversarial terms."""
    fields = VAEConfig.__dataclass_fields__
    removed = [f"vae.{name}={json.dumps(fields[name].default)}" for name in VAEConfig.training_only]
    return [f"vae.learning_rate={vae_rate(config)}", *removed]


def judges() -> dict[str, nn.Module]:
    """The package's networks, for pictures in [-1, 1]."""
    from stlpips_pytorch import stlpips

    return {f"st_lpips_{net}": stlpips.LPIPS(net=net, variant="shift_tolerant").eval() for net in ("alex", "vgg")}


def write_vgg16(network: Any, path: Path) -> Path:
    """The convolutions of the package's VGG16 under torchvision's names, without the blurs between them."""
    convolutions = [module for module in network.net.modules() if isinstance(module, nn.Conv2d)]
    names = [name for name, module in vgg16().features.named_children() if isinstance(module, nn.Conv2d)]
    weights: dict[str, Tensor] = {}
    for name, convolution in zip(names, convolutions, strict=True):
        weights |= {f"features.{name}.{key}": value.detach() for key, value in convolution.named_parameters()}
    save_file(weights, path)
    return path


@torch.no_grad()
def measure(vae: nn.Module, images: Tensor, networks: dict[str, nn.Module]) -> tuple[dict[str, float], Tensor]:
    """Means over pictures in [-1, 1], and their reconstructions."""
    reconstructions = torch.cat([vae.eval()(part)[0].clamp(-1, 1) for part in images.split(32)])
    found = quality(images, reconstructions)
    for name, network in networks.items():
        parts = zip(reconstructions.split(32), images.split(32), strict=True)
        found[name] = torch.cat([network(*pair).flatten() for pair in parts])
    return {name: rows.double().mean().item() for name, rows in found.items()}, reconstructions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("output", type=Path, help="folder for the runs, report.json and pictures.png")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    networks = judges()
    vgg = write_vgg16(networks["st_lpips_vgg"], arguments.output / "vgg16.safetensors")
    report: dict[str, Any] = {}
    rows: list[Tensor] = []
    for side in SIDES:
        began = time.perf_counter()
        run, vae = trained(side, arguments, vgg)
        seconds = time.perf_counter() - began
        held_out: Any = datasets_lib.build(run.base, "validation")
        images = torch.stack([held_out.get(number, None)["image"] for number in range(len(held_out))])
        metrics, reconstructions = measure(vae, images, networks)
        report[side] = metrics | {"seconds": round(seconds, 1)}
        rows = [*(rows or [images]), reconstructions]
        print(json.dumps({side: report[side]}), flush=True)
        (arguments.output / "report.json").write_text(json.dumps(report, indent=1))
        shown = spread(len(images), SHOWN)
        save_image(grid_of([row[shown] / 2 + 0.5 for row in rows], SHOWN), arguments.output / "pictures.png")


if __name__ == "__main__":
    main()
