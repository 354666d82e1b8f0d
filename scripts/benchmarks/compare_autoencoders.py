"""Trains one autoencoder four ways and measures it: scripts/benchmarks/compare_autoencoders.py CONFIG OUTPUT

`bare`: a loop of its own with L1 and KL. `plain`: diffloop with the same loss. `full`: diffloop with a perceptual
distance (VGG16's features) and the config's adversarial term. `research`: the bare loop with the loss of diffusers'
research script and that distance. Same network, initial weights, pictures, optimizer, learning rates, number of steps.

Prints PSNR, SSIM and ST-LPIPS (arXiv 2207.13686) of held-out reconstructions, and writes a grid: originals, then a row
for each side. Needs the package stlpips_pytorch, whose wheel holds trained weights: VGG16's layers serve in training,
so judge by its other network, AlexNet.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import vgg16
from torchvision.utils import save_image
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from research_loss import research_loss

import datasets_lib
from train import train
from trainers.common.autoencoder.discriminator import PatchDiscriminator
from trainers.common.autoencoder.loss import AutoencoderLoss, quality
from trainers.common.autoencoder.options import build_autoencoder, latent_grid
from trainers.common.model_files import Grid
from trainers.engine.config.config import RunConfig, load_config
from trainers.engine.optim.optimizer import learning_rate_schedule
from trainers.engine.run.randomness import example_generator
from trainers.inference.saved_run import load_trainer, open_run
from trainers.vae import VAEConfig

SIDES = ("bare", "plain", "full", "research")
SHOWN = 8  # pictures in the grid


def bare_training(run: RunConfig, train_set: Any, objective: Callable[..., Tensor | None]) -> nn.Module:
    """A loop without anything but a loss, AdamW, clipping and the config's learning rate; returns the network."""
    base, config = run.base, run.config
    torch.manual_seed(base.seed)
    vae = build_autoencoder(config.model_config, Grid.of(base))
    rates = config.learning_rate
    rate = rates["vae"] if isinstance(rates, dict) else rates
    optimizer = torch.optim.AdamW(
        vae.parameters(), rate, (config.adam_beta1, config.adam_beta2), config.adam_epsilon, config.adam_weight_decay
    )
    factor = learning_rate_schedule(config, base.max_train_steps)
    grid = latent_grid(vae.config, base.resolution)
    order: list[int] = []
    for step in tqdm(range(base.max_train_steps)):
        order = order or torch.randperm(len(train_set)).tolist()
        chosen, order = order[: base.train_batch_size], order[base.train_batch_size :]
        images = torch.stack([train_set.get(i, example_generator(step, i))["image"] for i in chosen])
        noise = torch.randn(len(images), grid.channels, grid.resolution, grid.resolution)
        optimizer.param_groups[0]["lr"] = rate * factor(step)
        loss = objective(vae, images, noise, step)
        if loss is None:
            continue
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return vae


def l1_and_kl(run: RunConfig) -> Callable[..., Tensor]:
    def objective(vae: nn.Module, images: Tensor, noise: Tensor, step: int) -> Tensor:
        reconstruction, moments = vae(images, noise)
        mean, logvar = moments.chunk(2, dim=1)
        kl = (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)) / 2
        return (reconstruction - images).abs().mean() + run.config.kl_weight * kl.mean()

    return objective


def research(run: RunConfig) -> Callable[..., Tensor | None]:
    """With the config's perceptual network; its weights per pixel are those of the script, times all pixels here."""
    config, base = run.config, run.base
    distance = AutoencoderLoss(config, base.resolution, torch.device("cpu")).perceptual
    discriminator = PatchDiscriminator(base.channels, config.discriminator_layers, config.discriminator_channels)
    return lambda vae, images, noise, step: research_loss(
        vae, discriminator, distance, images, noise, step, config.adversarial_start_step
    )


def without_terms(config: VAEConfig) -> list[str]:
    """Overrides that take the perceptual and the adversarial term away."""
    fields, rate = VAEConfig.__dataclass_fields__, config.learning_rate
    rates = f"vae.learning_rate={rate['vae'] if isinstance(rate, dict) else rate}"
    return [rates, *(f"vae.{name}={json.dumps(fields[name].default)}" for name in VAEConfig.training_only)]


def judges() -> dict[str, nn.Module]:
    """The package's networks, for pictures in [-1, 1]."""
    from stlpips_pytorch import stlpips

    return {f"st_lpips_{net}": stlpips.LPIPS(net=net, variant="shift_tolerant").eval() for net in ("alex", "vgg")}


def write_vgg16(network: nn.Module, path: Path) -> None:
    """The convolutions of the package's VGG16 under torchvision's names, without the blurs between them."""
    convolutions = [module for module in network.net.modules() if isinstance(module, nn.Conv2d)]
    names = [name for name, module in vgg16().features.named_children() if isinstance(module, nn.Conv2d)]
    weights = {}
    for name, convolution in zip(names, convolutions, strict=True):
        weights |= {f"features.{name}.{key}": value.detach() for key, value in convolution.named_parameters()}
    save_file(weights, path)


@torch.no_grad()
def measure(vae: nn.Module, held_out: Any, networks: dict[str, nn.Module]) -> tuple[dict[str, float], Tensor]:
    """Means over the held-out pictures, and some reconstructions in [0, 1]."""
    sums, shown = {}, []
    for start in range(0, len(held_out), 32):
        images = torch.stack([held_out.get(i, None)["image"] for i in range(start, min(start + 32, len(held_out)))])
        reconstruction = vae.eval()(images)[0].clamp(-1, 1)
        found = quality(images, reconstruction)
        found |= {name: network(reconstruction, images).flatten() for name, network in networks.items()}
        sums = {name: sums.get(name, 0.0) + rows.double().sum().item() for name, rows in found.items()}
        shown.append(reconstruction / 2 + 0.5)
    means = {name: total / len(held_out) for name, total in sums.items()}
    return means, torch.cat(shown)[chosen_pictures(held_out)]


def chosen_pictures(held_out: Any) -> list[int]:
    """The numbers of the pictures in the grid, evenly spread."""
    return torch.linspace(0, len(held_out) - 1, SHOWN).long().tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("output", type=Path, help="folder for the runs and the report")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--sides", default=",".join(SIDES))
    arguments = parser.parse_intermixed_args()
    for side in arguments.sides.split(","):
        if side not in SIDES:
            sys.exit(f"error: --sides {arguments.sides}: must be of {', '.join(SIDES)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    report, rows, networks, weights = {}, [], judges(), arguments.output / "vgg16.safetensors"
    write_vgg16(networks["st_lpips_vgg"], weights)
    for side in arguments.sides.split(","):
        began, folder = time.perf_counter(), arguments.output / side
        options = [*arguments.overrides, f"base.output_dir={folder}", f"vae.perceptual_loss=vgg16:{weights}"]
        run = load_config(arguments.config, options)
        if side == "plain":
            run = load_config(arguments.config, [*options, *without_terms(run.config)])
        train_set, held_out = [datasets_lib.build(run.base, split) for split in ("train", "validation")]
        if side in ("plain", "full"):
            train(run)
            vae = load_trainer(open_run(folder), weights="raw", device="cpu").raw("vae")
        else:
            vae = bare_training(run, train_set, (l1_and_kl if side == "bare" else research)(run))
            vae.save_pretrained(folder)
        seconds = time.perf_counter() - began
        metrics, pictures = measure(vae, held_out, networks)
        report[side] = metrics | {"seconds": round(seconds, 1)}
        rows = rows or [torch.stack([held_out.get(i, None)["image"] for i in chosen_pictures(held_out)]) / 2 + 0.5]
        rows.append(pictures)
        print(json.dumps({side: report[side]}), flush=True)
        (arguments.output / "report.json").write_text(json.dumps(report, indent=1))
        save_image(torch.cat(rows), arguments.output / f"{'-'.join(report)}.png", nrow=SHOWN)


if __name__ == "__main__":
    main()
