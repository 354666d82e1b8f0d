"""Speed, measured in one process, comparisons interleaved: scripts/bench.py loop|data|checkpoint. Prints JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from scripts.benchmarks import data
from train import train
from trainers.engine import checkpoint, optimization
from trainers.engine.config import RunConfig, load_config
from trainers.engine.manifest import list_checkpoints

WARM_UP_STEPS = 20  # the first window of a run pays for allocations


def loop(config: str, pairs: int, steps: int) -> dict:
    """Examples per second of train() against a bare PyTorch loop on the same network, in alternation.

    Both sides are timed in float32 after a warm-up; of train() all steps count, with data, EMA and logging, but not its
    start, its validation and its saves, which the bare loop does not have.
    """
    ours, bare = [], []
    for pair in range(pairs):
        with tempfile.TemporaryDirectory() as folder:
            overrides = [f"base.output_dir={folder}/run", f"base.max_train_steps={WARM_UP_STEPS + steps}"]
            overrides += [
                f"base.logging_steps={WARM_UP_STEPS}",
                "ddpm.valid_batch_size=1",
                "base.resume_from_checkpoint=null",
            ]
            run = load_config(config, [*overrides, "ddpm.ddpm_num_inference_steps=1"])
            sides = [
                lambda run=run: ours.append(diffloop_speed(run)),
                lambda run=run: bare.append(bare_speed(run, steps)),
            ]
            for side in sides if pair % 2 == 0 else reversed(sides):
                side()
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    return {"median_ratio": statistics.median(ratios), "ratios": ratios, "diffloop": ours, "bare": bare}


def diffloop_speed(run: RunConfig) -> float:
    """Examples per second between the first log line and the last one."""
    folder = train(run)
    reset_accelerate()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [line["examples_per_second"] for line in lines if "loss" in line][1:]
    return statistics.harmonic_mean(rates)  # windows of equal numbers of examples


def bare_speed(run: RunConfig, steps: int) -> float:
    """The plain loop: noise, forward, backward, clip, AdamW; no EMA, no log, one batch that is on the device."""
    trainer = run.trainer_class(run.config, run.base)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where accelerate puts the other side
    network = trainer.init_modules()["unet"].train().to(device)
    scheduler, size = trainer.scheduler, run.base.train_batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    shape = (size, run.base.channels, run.base.resolution, run.base.resolution)
    images = torch.rand(shape, device=device) * 2 - 1
    for step in range(WARM_UP_STEPS + steps):
        if step == WARM_UP_STEPS:
            began = time.perf_counter()
        noise = torch.randn_like(images)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (size,), device=device)
        prediction = network(scheduler.add_noise(images, noise, timesteps), timesteps).sample
        torch.nn.functional.mse_loss(prediction, noise).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return steps * size / (time.perf_counter() - began)


def checkpoints(config: str, repetitions: int) -> dict:
    """Seconds that a save stalls the loop, and from `latest` to the first step, for two sizes of network."""
    large = {
        "sample_size": 32, "in_channels": 1, "out_channels": 1, "block_out_channels": [128, 256, 448, 576],
        "layers_per_block": 2, "down_block_types": ["DownBlock2D"] * 4, "up_block_types": ["UpBlock2D"] * 4,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "large.json").write_text(json.dumps(large))
        return {
            name: checkpoint_times(config, f"{folder}/{name}", overrides, repetitions)
            for name, overrides in (
                ("the config's network", []),
                ("large", [f"ddpm.model_config={folder}/large.json", "base.train_batch_size=1", "base.resolution=32"]),
            )
        }


def checkpoint_times(config: str, folder: str, overrides: list[str], repetitions: int) -> dict:
    stalls, starts = [], []
    original_save, original_step = checkpoint.save, optimization.set_learning_rates

    def timed_save(*arguments) -> None:
        began = time.perf_counter()
        original_save(*arguments)
        stalls.append(time.perf_counter() - began)

    def first_step(*arguments) -> dict:
        starts.append(time.perf_counter())
        return original_step(*arguments)

    checkpoint.save, optimization.set_learning_rates = timed_save, first_step
    options = [
        f"base.output_dir={folder}", "ddpm.lr_scheduler=constant", "ddpm.lr_warmup_steps=null", "base.valid_steps=null",
        "base.checkpointing_steps=1", "base.checkpoints_total_limit=1", "base.resume_from_checkpoint=latest",
        "ddpm.valid_batch_size=1", "ddpm.ddpm_num_inference_steps=1", *overrides,
    ]  # fmt: skip
    try:
        train(load_config(config, [*options, f"base.max_train_steps={repetitions}"]))
        reset_accelerate()
        starts.clear()
        began = time.perf_counter()
        train(load_config(config, [*options, f"base.max_train_steps={repetitions + 1}"]))
        reset_accelerate()
    finally:
        checkpoint.save, optimization.set_learning_rates = original_save, original_step
    sealed = list_checkpoints(Path(folder))[0][1]
    return {
        "parameters": sum(tensor.numel() for tensor in load_file(next(sealed.glob("unet/*.safetensors"))).values()),
        "checkpoint_mb": round(sum(path.stat().st_size for path in sealed.rglob("*") if path.is_file()) / 2**20, 1),
        "save_seconds": [round(seconds, 3) for seconds in stalls],
        "train_to_first_step_seconds": round(starts[0] - began, 3),
    }


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=("loop", "data", "checkpoint"))
    parser.add_argument("--config", default="configs/ddpm_digits.yaml")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a repetition of the table `data`")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tables = {
        "loop": lambda: loop(options.config, options.pairs, options.steps),
        "data": lambda: data.measure(options.pairs, options.seconds),
        "checkpoint": lambda: checkpoints(options.config, options.pairs),
    }
    load_before = os.getloadavg()[0]
    with contextlib.redirect_stdout(sys.stderr):  # what a run says is no JSON
        result = tables[options.table]()
    machine = {
        "command": f"scripts/bench.py {' '.join(sys.argv[1:])}",
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "pillow", "datasets", "accelerate")},
        "threads": options.threads,
        "load": [round(load_before, 2), round(os.getloadavg()[0], 2)],  # of a minute: before, and after
    }
    print(json.dumps(result | machine, indent=1))


if __name__ == "__main__":
    main()
