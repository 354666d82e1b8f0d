"""train() against a bare PyTorch loop over the same networks, in turns, and where the rest of a step's time goes.

Both sides do the same for the weights: loss, backward, clipping, fused AdamW and, where the config has it, averaging.
The bare one has a single batch that is on the device, torch's random numbers, and neither data nor log.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from scripts.benchmarks.bases import stable_diffusion
from scripts.benchmarks.runs import DEVICE, configured, examples_per_second, in_turns, quiet, synchronize
from trainers.base import RunInfo
from trainers.engine.checkpoint.saver import Saver
from trainers.engine.config.config import RunConfig
from trainers.engine.data import batches as feeding
from trainers.engine.data import prefetch, workers
from trainers.engine.optim import ema
from trainers.engine.optim import optimizer as optimization
from trainers.engine.run import randomness
from trainers.engine.tracking import meters, tracker

TASKS = ("ddpm", "conditional_ddpm", "vae", "lora", "text_to_image")
# the smallest have no dropout on their weights, no second network and cached frozen stages: as the bare side
CACHED = ["base.center_crop=true", "{task}.cache_latents=memory", "{task}.cache_text=memory"]
LORA = ["lora.train_text_encoder=false", "lora.learning_rate=1e-3", "lora.lora_dropout=0", "lora.snr_gamma=null"]
OPTIONS = {
    "lora": [*CACHED, *LORA, "lora.caption_dropout=0"],
    "text_to_image": [*CACHED, "text_to_image.caption_dropout=0", "text_to_image.noise_offset=0"],
    "vae": ["vae.perceptual_loss=null", "vae.perceptual_weight=1.0"],
}
TINY_VAE = ["vae.model_config=configs/tests/models/autoencoder.json", "base.resolution=16", "base.train_batch_size=4"]
SMALLEST = {task: (f"configs/tests/{task}.json", []) for task in TASKS} | {"vae": ("configs/vae_digits.yaml", TINY_VAE)}
REALISTIC = {
    "ddpm": ("configs/ddpm_digits.yaml", []),
    "conditional_ddpm": ("configs/digits.yaml", []),
    "vae": ("configs/vae_digits.yaml", []),
    "lora": ("configs/tests/lora.json", ["base.resolution=64", "lora.rank=16"]),
    "text_to_image": ("configs/tests/text_to_image.json", ["base.resolution=64"]),
}


def table(pairs: int, steps: int, tasks: Sequence[str] = TASKS) -> list[dict[str, Any]]:
    """A row for each task and size: the ratio of the sides by pairs, its median, and the parts of a step."""
    rows = []
    for task in tasks:
        for size in ("smallest", "realistic"):
            with tempfile.TemporaryDirectory() as folder:
                rows.append({"task": task, "network": size} | compared(task, size, folder, pairs, steps))
    return rows


def run_of(task: str, size: str, folder: str, steps: int, windows: int = 1) -> RunConfig:
    config, overrides = (REALISTIC if size == "realistic" else SMALLEST)[task]
    options = [option.format(task=task) for option in OPTIONS.get(task, [])]
    if task in ("lora", "text_to_image"):
        base = stable_diffusion({"smallest": "smallest", "realistic": "quarter"}[size])
        options.append(f"{task}.pretrained_model_name_or_path={base}")
    return configured(config, folder, steps, [*overrides, *options], windows)


def compared(task: str, size: str, folder: str, pairs: int, steps: int) -> dict[str, Any]:
    run = run_of(task, size, folder, steps, pairs)
    rates = in_turns(run, {"bare": bare_loop(run)})
    ratios = [a / b for a, b in zip(rates["diffloop"], rates["bare"], strict=True)]
    found = {"median_ratio": statistics.median(ratios), "ratios": ratios} | rates
    return found | {"ms_per_step": parts_of_a_step(run_of(task, size, f"{folder}/parts", steps))}


def bare_loop(run: RunConfig) -> Callable[[int], float]:
    """Trains so many steps more and returns the examples per second."""
    torch.manual_seed(0)
    with quiet():
        trainer = run.trainer_class(run.config, run.base)
        names = list("0123456789")
        trainer.run = RunInfo(device=DEVICE, weight_dtype=torch.float32, label_names=names, total_steps=1)
        trainer.setup()
        [network] = trainer.init_modules().values()
    network.train().to(DEVICE)
    if DEVICE.type == "cuda":  # as train() does there
        network.to(memory_format=torch.channels_last)
    weights = [p for p in network.parameters() if p.requires_grad]
    averages = [p.detach().clone() for p in weights]
    optimizer, loss = torch.optim.AdamW(weights, lr=1e-4, fused=True), LOSSES[run.task](trainer, network, run, DEVICE)

    def train_steps(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            loss().backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if run.config.use_ema:
                with torch.no_grad():
                    torch._foreach_lerp_(averages, weights, 0.01)
        synchronize()
        return steps * run.base.train_batch_size / (time.perf_counter() - began)

    return train_steps


def ddpm_loss(trainer: Any, network: nn.Module, run: RunConfig, device: torch.device) -> Callable[[], Tensor]:
    size, scheduler, base = run.base.train_batch_size, trainer.scheduler, run.base
    images = torch.rand(size, base.channels, base.resolution, base.resolution, device=device) * 2 - 1
    classes = trainer.num_classes if run.task == "conditional_ddpm" else None
    labels = torch.arange(size, device=device) % classes if classes else None
    velocity = run.config.prediction_type == "v_prediction"

    def loss() -> Tensor:
        noise = torch.randn_like(images)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (size,), device=device)
        asked = {}
        if classes:
            hidden = torch.rand(size, device=device) < run.config.label_dropout
            asked["class_labels"] = torch.where(hidden, classes, labels)
        predicted = network(scheduler.add_noise(images, noise, timesteps), timesteps, **asked).sample
        target = scheduler.get_velocity(images, noise, timesteps) if velocity else noise
        return nn.functional.mse_loss(predicted, target)

    return loss


def vae_loss(trainer: Any, network: nn.Module, run: RunConfig, device: torch.device) -> Callable[[], Tensor]:
    base = run.base
    images = torch.rand(base.train_batch_size, base.channels, base.resolution, base.resolution, device=device) * 2 - 1

    def loss() -> Tensor:
        posterior = network.encode(images).latent_dist
        reconstruction = network.decode(posterior.sample()).sample
        return nn.functional.l1_loss(reconstruction, images) + run.config.kl_weight * posterior.kl().mean()

    return loss


def latent_loss(trainer: Any, network: nn.Module, run: RunConfig, device: torch.device) -> Callable[[], Tensor]:
    size, settings, scheduler = run.base.train_batch_size, network.config, trainer.base_model.training_scheduler()
    side = run.base.resolution // 4  # the autoencoder's factor
    mean, deviation = torch.randn(2, size, settings.in_channels, side, side, device=device)
    text = torch.randn(size, 16, settings.cross_attention_dim, device=device)

    def loss() -> Tensor:
        latents = mean + deviation * torch.randn_like(mean)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (size,), device=device)
        predicted = network(scheduler.add_noise(latents, noise, timesteps), timesteps, text).sample
        return nn.functional.mse_loss(predicted, noise)

    return loss


LOSSES = {
    "ddpm": ddpm_loss, "conditional_ddpm": ddpm_loss, "vae": vae_loss, "lora": latent_loss,
    "text_to_image": latent_loss,
}  # fmt: skip


def parts_of_a_step(run: RunConfig) -> dict[str, float]:
    """Milliseconds of each part in a run of its own, means without the warm-up; `other` is what no part covers."""
    seconds: dict[str, list[float]] = {}
    found: dict[str, float] = {}

    def keep_second_window(saving: Saver, steps_done: int) -> None:
        if steps_done == run.base.logging_steps:
            seconds.clear()
        if steps_done == 2 * run.base.logging_steps:  # after the steps a task may look at its data once more
            found.update({name: 1000 * sum(times) / run.base.logging_steps for name, times in seconds.items()})

    with ExitStack() as patches:
        for name, owner, method in (
            ("forward", run.trainer_class, "compute_loss"),
            ("backward", Accelerator, "backward"),
            ("optimizer", optimization, "optimizer_step"),
            ("averaging", ema.EMA, "update"),
            ("randomness", randomness.SlotRandom, "normal"),
            ("randomness", randomness.SlotRandom, "integers"),
            ("reseeding", randomness, "seed_network"),
            ("metering", meters.Meter, "add"),
            ("logging", tracker.Tracker, "log_steps"),
            ("logging", meters.Meter, "means"),
            ("transfer", prefetch, "_moved"),
            ("transfer", workers.SlotExamples, "finish"),
        ):
            patches.enter_context(patch.object(owner, method, timed(getattr(owner, method), name, seconds)))
        patches.enter_context(patch.object(feeding, "training_batches", _timed_batches(seconds)))
        patches.enter_context(patch.object(Saver, "after_step", keep_second_window))
        [rate] = examples_per_second(run)
    found["forward"] -= found.get("randomness", 0.0)  # which is a part of it
    found["data"] -= found["transfer"]
    total = 1000 * run.base.train_batch_size / rate
    return {name: round(ms, 3) for name, ms in (found | {"other": total - sum(found.values()), "all": total}).items()}


def timed(function: Callable, name: str, seconds: dict[str, list[float]]) -> Callable:
    def call(*arguments: Any, **options: Any) -> Any:
        synchronize()  # parts of a step are then one after the other on a GPU too
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            synchronize()
            seconds.setdefault(name, []).append(time.perf_counter() - began)

    return call


def _timed_batches(seconds: dict[str, list[float]]) -> Callable:
    original = feeding.training_batches

    def batches(*arguments: Any) -> Iterator[Any]:
        found = original(*arguments)
        step = timed(lambda: next(found, None), "data", seconds)
        try:
            while (batch := step()) is not None:
                yield batch
        finally:
            found.close()

    return batches
