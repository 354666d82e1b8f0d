"""diffloop beside the pip package denoising-diffusion-pytorch and a plain script, all with the package's own network.

Same digits, batch, precision and averaging, in turns. The package's loop is the one of its documentation around
its GaussianDiffusion; the plain script is one in the style of diffusers' examples: accelerate, EMAModel, a loss that is
read in every step. Settings b are what diffloop has beside float32. Needs the package.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import datasets_lib
from scripts.benchmarks.runs import DEVICE, configured, in_turns, synchronize
from trainers.engine.config.config import RunConfig

CONFIG = {
    "base": {
        "trainer_class": "peer_trainer:PeerTrainer",
        "dataset": "digits",
        "resolution": 32,
        "channels": 1,
        "max_train_steps": 1,
    },
    "peer": {"dim": 32, "dim_mults": [1, 2, 4, 4], "ema_max_decay": 0.995, "ddpm_beta_schedule": "squaredcos_cap_v2"},
}
BATCH_SIZE = 16
PACKAGE = "denoising-diffusion-pytorch"
BEST = {  # one more at a time; the package has fp16, on CUDA alone
    "b: bf16": ["base.mixed_precision=bf16"],
    "b: and channels_last": ["base.channels_last=true"],
    "b: and compile": ["base.compile=true"],
}


def table(pairs: int, steps: int) -> list[dict[str, Any]]:
    """A row for each side: the median of its rates, and of their ratios to the package's, window by window."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(f"{folder}/a", steps, pairs)
        same = in_turns(run, {PACKAGE: package(run), "plain script": plain(run)})
        rows, options = _rows("a", same), []
        for number, (setting, added) in enumerate(BEST.items()):
            options += added
            run = run_of(f"{folder}/b{number}", steps, pairs, options)
            rows += _rows(setting, in_turns(run, {PACKAGE: package(run, fp16=DEVICE.type == "cuda")}))
    return rows


def _rows(setting: str, rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    ratios = {name: [a / b for a, b in zip(found, rates[PACKAGE], strict=True)] for name, found in rates.items()}
    return [
        {
            "setting": setting,
            "side": name,
            "examples_per_second": statistics.median(found),
            "over_the_package": statistics.median(ratios[name]),
            "ratios": ratios[name],
        }
        for name, found in rates.items()
    ]


def run_of(folder: str, steps: int, windows: int, overrides: list[str] = ()) -> RunConfig:
    Path(folder).mkdir()
    config = Path(folder, "config.json")
    config.write_text(json.dumps(CONFIG), encoding="utf-8")
    return configured(str(config), folder, steps, [f"base.train_batch_size={BATCH_SIZE}", *overrides], windows)


def package(run: RunConfig, fp16: bool = False) -> Callable[[int], float]:
    from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion
    from ema_pytorch import EMA

    diffusion = GaussianDiffusion(network(run), image_size=run.base.resolution).to(DEVICE)
    scaler = torch.amp.GradScaler("cuda", enabled=fp16)
    averaged = EMA(diffusion, beta=0.995, update_every=1)
    optimizer = torch.optim.AdamW(diffusion.parameters(), lr=run.config.learning_rate)

    def step(images: Tensor, labels: Tensor) -> None:
        with torch.autocast("cuda", torch.float16, enabled=fp16):
            loss = diffusion(images / 2 + 0.5, classes=labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        averaged.update()

    return timed(step, run)


def plain(run: RunConfig) -> Callable[[int], float]:
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    accelerator, unet = Accelerator(), network(run)  # its state is the one that train() will find
    optimizer = torch.optim.AdamW(unet.parameters(), lr=run.config.learning_rate)
    averaged = EMAModel(unet.parameters(), decay=0.995)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")

    def step(images: Tensor, labels: Tensor) -> None:
        noise = torch.randn_like(images)
        timesteps = torch.randint(0, 1000, (len(images),), device=DEVICE)
        with accelerator.accumulate(unet):
            predicted = unet(scheduler.add_noise(images, noise, timesteps), timesteps, labels)
            loss = torch.nn.functional.mse_loss(predicted, noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        averaged.step(unet.parameters())
        loss.detach().item()  # which these scripts show on their bars

    return timed(step, run)


def network(run: RunConfig) -> torch.nn.Module:
    from peer_trainer import build_peer_unet

    torch.manual_seed(0)
    config = run.config
    return build_peer_unet(config.dim, config.dim_mults, 10, run.base.channels, config.label_dropout).train()


def timed(step: Callable[[Tensor, Tensor], None], run: RunConfig) -> Callable[[int], float]:
    """Examples per second of so many steps more over shuffled batches of the same digits, held in memory."""
    examples = [datasets_lib.build(run.base, "train").get(n, None) for n in range(1000)]
    images = torch.stack([example["image"] for example in examples]).to(DEVICE)
    labels = torch.tensor([example["label"] for example in examples], device=DEVICE)

    def train_steps(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            chosen = torch.randint(0, len(images), (BATCH_SIZE,), device=DEVICE)
            step(images[chosen], labels[chosen])
        synchronize()
        return steps * BATCH_SIZE / (time.perf_counter() - began)

    return train_steps
