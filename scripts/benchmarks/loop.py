"""train() against a bare PyTorch loop over the same networks, in turns, and where the rest of a step's time goes.

Both sides do the same for the weights: loss, backward, clipping, fused AdamW and, if the config has it, averaging. The
bare loop has one batch, on the device, and torch's random numbers; it loads no data and logs nothing.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from scripts.benchmarks.bases import stable_diffusion
from scripts.benchmarks.runs import DEVICE, beside, configured, examples_per_second, median_ratio, synchronize
from trainers.base import Trainer
from trainers.common.model_files import Grid
from trainers.engine.config.config import RunConfig
from trainers.engine.data import batches, prefetch, workers
from trainers.engine.optim import ema, optimizer
from trainers.engine.run import randomness
from trainers.engine.tracking import meters, tracker
from trainers.engine.validation.validation import Validation

TASKS = ("ddpm", "conditional_ddpm", "vae", "lora", "text_to_image")
# as on the bare side: frozen encoders are cached, adapters have no dropout, and one network is trained
CACHED = ["base.center_crop=true", "{task}.cache_latents=memory", "{task}.cache_text=memory"]
LORA = ["lora.train_text_encoder=false", "lora.learning_rate=1e-3", "lora.lora_dropout=0", "lora.snr_gamma=null"]
OPTIONS = {
    "lora": [*CACHED, *LORA, "lora.caption_dropout=0"],
    "text_to_image": [*CACHED, "text_to_image.caption_dropout=0", "text_to_image.noise_offset=0"],
    "vae": ["vae.perceptual_loss=null", "vae.perceptual_weight=1.0"],
}
TINY_VAE = ["vae.model_config=configs/tests/models/autoencoder.json", "base.resolution=16", "base.train_batch_size=4"]
SMALLEST: dict[str, tuple[str, list[str]]] = {task: (f"configs/tests/{task}.json", []) for task in TASKS}
SMALLEST |= {"vae": ("configs/vae_digits.yaml", TINY_VAE)}
REALISTIC = {
    "ddpm": ("configs/ddpm_digits.yaml", []),
    "conditional_ddpm": ("configs/digits.yaml", []),
    "vae": ("configs/vae_digits.yaml", []),
    "dit": ("configs/dit_digits.yaml", []),
    "lora": ("configs/tests/lora.json", ["base.resolution=64", "lora.rank=16"]),
    "text_to_image": ("configs/tests/text_to_image.json", ["base.resolution=64"]),
}


def rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each task and size: the ratio of the sides by pairs, its median, and the parts of a step."""
    found = []
    for task in TASKS:
        for size in ("smallest", "realistic"):
            with tempfile.TemporaryDirectory() as folder:
                found.append({"task": task, "network": size} | compared(task, size, folder, asked.pairs, asked.steps))
    return found


def run_of(task: str, size: str, folder: str, steps: int, windows: int = 1, options: Sequence[str] = ()) -> RunConfig:
    config, overrides = (REALISTIC if size == "realistic" else SMALLEST)[task]
    fixed = [option.format(task=task) for option in OPTIONS.get(task, [])]
    if task in ("lora", "text_to_image"):
        base = stable_diffusion({"smallest": "smallest", "realistic": "quarter"}[size])
        fixed.append(f"{task}.pretrained_model_name_or_path={base}")
    return configured(config, folder, steps, [*overrides, *fixed, *options], windows)


def compared(task: str, size: str, folder: str, pairs: int, steps: int) -> dict[str, Any]:
    run = run_of(task, size, folder, steps, pairs)
    rates = beside(run, {"bare": partial(bare_step, run)})
    ratios = [a / b for a, b in zip(rates["diffloop"], rates["bare"], strict=True)]
    found = {"median_ratio": median_ratio(rates["diffloop"], rates["bare"]), "ratios": ratios} | rates
    return found | {"ms_per_step": parts_of_a_step(run_of(task, size, f"{folder}/parts", steps))}


def bare_step(run: RunConfig, trainer: Trainer) -> Callable[[], None]:
    """A step of the bare loop over a copy of the trainer's network."""
    [network] = copy.deepcopy(list(trainer.unwrapped.values()))
    for name in ("forward", "_original_forward"):  # accelerate's in bf16: here autocast is around the loss, too
        vars(network).pop(name, None)
    if run.base.compile:
        getattr(network, "compile_repeated_blocks" if run.base.compile_repeated_blocks else "compile")()
    weights = [p for p in network.parameters() if p.requires_grad]
    averages = [p.detach().clone() for p in weights] if run.config.use_ema else []
    adamw = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    loss = (vae_loss if run.task == "vae" else denoising_loss)(trainer, network)
    in_bf16 = torch.autocast(DEVICE.type, torch.bfloat16, enabled=run.base.mixed_precision == "bf16")

    def step() -> None:
        with in_bf16:
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adamw.step()
        adamw.zero_grad()
        if run.config.use_ema:
            with torch.no_grad():
                torch._foreach_lerp_(averages, [*weights], 0.01)

    return step


def denoising_loss(trainer: Any, network: Any) -> Callable[[], Tensor]:
    """The squared error of the prediction on pictures, or on latents that are drawn in each step."""
    size, settings = trainer.base.train_batch_size, network.config
    text_width, wide = settings.get("cross_attention_dim"), trainer.run.weight_dtype
    grid = trainer.latents.grid if text_width else Grid(settings.in_channels, trainer.base.resolution)
    mean, deviation = torch.rand(2, size, *grid.shape, device=DEVICE) * 2 - 1
    scheduler = trainer.learned.scheduler if text_width else trainer.scheduler
    velocity = trainer.config.prediction_type == "v_prediction"
    classes = trainer.num_classes
    given: dict[str, Any] = {}
    if text_width:
        tokens = trainer.prompts.tokenizers[0].model_max_length
        given["encoder_hidden_states"] = torch.randn(size, tokens, text_width, device=DEVICE, dtype=wide)
    if settings.get("addition_embed_type") == "text_time":
        pooled = settings.projection_class_embeddings_input_dim - 6 * settings.addition_time_embed_dim
        sizes = torch.full((size, 6), 512.0, device=DEVICE)
        given["added_cond_kwargs"] = {
            "text_embeds": torch.randn(size, pooled, device=DEVICE, dtype=wide),
            "time_ids": sizes,
        }

    def loss() -> Tensor:
        clean = mean + deviation * torch.randn_like(mean) if text_width else mean
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (size,), device=DEVICE)
        asked = dict(given)
        if classes:
            hidden = torch.rand(size, device=DEVICE) < trainer.config.label_dropout
            asked["class_labels"] = torch.where(hidden, classes, torch.arange(size, device=DEVICE) % classes)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        predicted = network(noisy.to(wide) if text_width else noisy, timesteps, **asked).sample
        target = scheduler.get_velocity(clean, noise, timesteps) if velocity else noise
        return nn.functional.mse_loss(predicted.float(), target)

    return loss


def vae_loss(trainer: Any, network: Any) -> Callable[[], Tensor]:
    base = trainer.base
    images = torch.rand(base.train_batch_size, base.channels, base.resolution, base.resolution, device=DEVICE) * 2 - 1

    def loss() -> Tensor:
        posterior = network.encode(images).latent_dist
        reconstruction = network.decode(posterior.sample()).sample
        return nn.functional.l1_loss(reconstruction, images) + trainer.config.kl_weight * posterior.kl().mean()

    return loss


def parts_of_a_step(run: RunConfig) -> dict[str, float]:
    """Milliseconds of each part in a separate run, means after the warm-up; `other` is what no part covers."""
    seconds: dict[str, list[float]] = {}
    found: dict[str, float] = {}

    def keep_second_window(validation: Validation, steps_done: int) -> None:
        if steps_done == run.base.logging_steps:
            seconds.clear()
        if steps_done == 2 * run.base.logging_steps:  # after the steps a task may look at its data once more
            found.update({name: 1000 * sum(times) / run.base.logging_steps for name, times in seconds.items()})

    with ExitStack() as patches:
        for name, owner, method in (
            ("forward", run.trainer_class, "compute_loss"),
            ("backward", Accelerator, "backward"),
            ("optimizer", optimizer, "optimizer_step"),
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
        timed_data = partial(timed_batches, batches.training_batches, seconds)
        patches.enter_context(patch.object(batches, "training_batches", timed_data))
        [rate] = examples_per_second(run, keep_second_window)
    found["forward"] -= found.get("randomness", 0.0)  # which is a part of it
    found["data"] -= found["transfer"]
    total = 1000 * run.base.train_batch_size / rate
    return {name: round(ms, 3) for name, ms in (found | {"other": total - sum(found.values()), "all": total}).items()}


def timed(function: Callable, name: str, seconds: dict[str, list[float]]) -> Callable:
    def call(*arguments: Any, **options: Any) -> Any:
        synchronize()  # so that parts of a step follow each other on a GPU too
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            synchronize()
            seconds.setdefault(name, []).append(time.perf_counter() - began)

    return call


def timed_batches(original: Callable, seconds: dict[str, list[float]], *arguments: Any) -> Iterator[Any]:
    with closing(original(*arguments)) as found:
        yield from iter(timed(lambda: next(found, None), "data", seconds), None)
