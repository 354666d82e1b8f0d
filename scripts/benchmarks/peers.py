"""diffloop beside the pip package denoising-diffusion-pytorch and a plain script, all with the package's own network.

Same digits, batch, precision and averaging, in turns. The package's loop is that of its documentation; the plain script
is one in the style of diffusers' examples: accelerate, EMAModel, a loss that is read in every step. Settings b are what
diffloop has beside float32. Needs the package.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from scripts.benchmarks.peer import CONFIG, Package, PeerConfig, build_unet, digits_of
from scripts.benchmarks.runs import DEVICE, beside, configured, median_ratio
from trainers.engine.config.config import RunConfig

OPTIONS = ["base.resolution=32", "base.train_batch_size=16", "peer.dim_mults=[1,2,4,4]", "peer.ema_max_decay=0.995"]
PACKAGE = "denoising-diffusion-pytorch"
BEST = {  # one more at a time; the package has fp16, on CUDA alone
    "b: bf16": "base.mixed_precision=bf16",
    "b: and channels_last": "base.channels_last=true",
    "b: and compile": "base.compile=true",
}


def tables(asked: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """A row for each side: the median of its rates, and of their ratios to the package's, window by window."""
    with tempfile.TemporaryDirectory() as folder:
        run = configured(CONFIG, f"{folder}/a", asked.steps, OPTIONS, asked.pairs)
        rows, options = _rows("a", run, {"plain script": plain_step}), list(OPTIONS)
        for number, (setting, added) in enumerate(BEST.items()):
            options.append(added)
            rows += _rows(setting, configured(CONFIG, f"{folder}/b{number}", asked.steps, options, asked.pairs), {})
    return {"peers": rows}


def _rows(setting: str, run: RunConfig, others: dict[str, Callable]) -> list[dict[str, Any]]:
    images, labels = (each.to(DEVICE) for each in digits_of(run))

    def chosen(step: Callable[[Tensor, Tensor], None]) -> Callable[[], None]:
        """The step over shuffled batches of the digits, held in memory."""

        def call() -> None:
            numbers = torch.randint(0, len(images), (run.base.train_batch_size,), device=DEVICE)
            step(images[numbers], labels[numbers])

        return call

    fp16 = setting != "a" and DEVICE.type == "cuda"
    sides: dict[str, Any] = {PACKAGE: lambda trainer: chosen(Package(run, update_every=1, fp16=fp16).step)}
    sides |= {name: lambda trainer, make=make: chosen(make(run)) for name, make in others.items()}
    rates = beside(run, sides)
    return [
        {
            "setting": setting,
            "side": name,
            "examples_per_second": statistics.median(found),
            "over_the_package": median_ratio(found, rates[PACKAGE]),
            "runs": found,
        }
        for name, found in rates.items()
    ]


def plain_step(run: RunConfig) -> Callable[[Tensor, Tensor], None]:
    accelerator, config = Accelerator(), cast(PeerConfig, run.config)  # its state is that of train()
    torch.manual_seed(run.base.seed)
    unet = build_unet(config, config.label_dropout).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    averaged = EMAModel(unet.parameters(), decay=0.995)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    averaged.to(accelerator.device)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")

    def step(images: Tensor, labels: Tensor) -> None:
        noise = torch.randn_like(images)
        timesteps = torch.randint(0, 1000, (len(images),), device=DEVICE)
        with accelerator.accumulate(unet):
            predicted = unet(scheduler.add_noise(2 * images - 1, noise, timesteps), timesteps, labels)
            loss = torch.nn.functional.mse_loss(predicted, noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        averaged.step(unet.parameters())
        loss.detach().item()  # which these scripts show on their bars

    return step
