"""diffloop, the pip package denoising-diffusion-pytorch and a plain script, all with the package's network.

Same digits, batch, precision and averaging, in turns. The package's loop is that of its documentation; the plain script
is written like diffusers' examples: EMAModel, AdamW that is not fused, a loss that is read in every step. Settings b
add what else diffloop offers. Needs the package.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from scripts.benchmarks.peer import CONFIG, Package, PeerConfig, build_unet, digits_of
from scripts.benchmarks.plain import plain_step
from scripts.benchmarks.runs import DEVICE, beside, configured, median_ratio
from trainers.engine.config.config import RunConfig

OPTIONS = ["base.resolution=32", "base.train_batch_size=16", "peer.dim_mults=[1,2,4,4]", "peer.ema_max_decay=0.995"]
PACKAGE = "denoising-diffusion-pytorch"
SETTINGS = {  # one option more at a time; the package has fp16, on CUDA alone
    "a": [],
    "b: bf16": ["base.mixed_precision=bf16"],
    "b: and channels_last": ["base.channels_last=true"],
    "b: and compile": ["base.compile=true"],
}


def rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each side: the median of its rates, and of their ratios to the package's, window by window."""
    found, options = [], list(OPTIONS)
    for setting, added in SETTINGS.items():
        options += added
        with tempfile.TemporaryDirectory() as folder:
            rates = rates_of(setting, configured(CONFIG, folder, asked.steps, options, asked.pairs))
        found += [
            {
                "setting": setting,
                "side": name,
                "examples_per_second": statistics.median(runs),
                "over_the_package": median_ratio(runs, rates[PACKAGE]),
                "runs": runs,
            }
            for name, runs in rates.items()
        ]
    return found


def rates_of(setting: str, run: RunConfig) -> dict[str, list[float]]:
    """Examples per second of each side; the plain script has no settings b."""
    batches = random_batches(run)
    package = Package(run, update_every=1, fp16=setting != "a" and DEVICE.type == "cuda")
    others: dict[str, Any] = {PACKAGE: lambda trainer: lambda: package.step(*next(batches))}
    if setting == "a":
        others["plain script"] = lambda trainer: plain_side(run, batches)
    return beside(run, others)


def random_batches(run: RunConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Random digits with their labels, held in memory."""
    images, labels = (each.to(DEVICE) for each in digits_of(run))
    while True:
        numbers = torch.randint(0, len(images), (run.base.train_batch_size,), device=DEVICE)
        yield images[numbers], labels[numbers]


def plain_side(run: RunConfig, batches: Iterator[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    config, scheduler = cast(PeerConfig, run.config), DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    torch.manual_seed(run.base.seed)
    unet = build_unet(config, config.label_dropout).to(DEVICE).train()

    def loss() -> Tensor:
        images, labels = next(batches)
        noise = torch.randn_like(images)
        timesteps = torch.randint(0, 1000, (len(images),), device=DEVICE)
        predicted = unet(scheduler.add_noise(2 * images - 1, noise, timesteps), timesteps, labels)
        return torch.nn.functional.mse_loss(predicted, noise)

    return plain_step(unet, loss)
