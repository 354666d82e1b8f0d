"""diffloop against the pip package denoising-diffusion-pytorch on digits: scripts/benchmarks/compare_peer.py OUTPUT

Both train the package's own network from the same initial weights on the same digits for the same number of steps, with
the same batch size, learning rates, clipping and label dropout; each with its own loss code, averaging and sampler.
Prints seconds, and by guidance scale what a support vector machine recognises. Needs the package and what it imports.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from peer_trainer import build_peer_unet

import datasets_lib
from train import train
from trainers.engine.config.config import RunConfig, check_config
from trainers.engine.optim.optimizer import learning_rate_schedule
from trainers.engine.validation.metrics import as_labels, describe, measure, nearest, pictures_of, train_classifier
from trainers.engine.validation.sampling import draw, evaluation_mode
from trainers.inference.saved_run import load_trainer, open_run

SCALES = [1.0, 1.5, 3.0, 6.0]  # 6 is the package's default
SAMPLING_STEPS = 25
BATCH_SIZE = 32


def options(output: Path, steps: int) -> RunConfig:
    base = {"output_dir": str(output / "diffloop"), "trainer_class": "peer_trainer:PeerTrainer", "dataset": "digits"}
    base |= {"resolution": 16, "channels": 1, "validation_split": 0.1, "max_train_steps": steps, "logger": "none"}
    base |= {"train_batch_size": BATCH_SIZE, "checkpointing_steps": steps}
    task = {"learning_rate": 1e-3, "lr_warmup_steps": 50, "ddpm_beta_schedule": "squaredcos_cap_v2"}
    task |= {"sampler": "ddim", "ddpm_num_inference_steps": SAMPLING_STEPS, "valid_batch_size": 10}
    return check_config({"base": base, "peer": task})


def train_package(run: RunConfig, images: Tensor, labels: Tensor) -> Any:
    """The averaged GaussianDiffusion after the package's own loss, with its Trainer's averaging; images in [0, 1]."""
    from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion
    from ema_pytorch import EMA

    config, total = run.config, run.base.max_train_steps
    torch.manual_seed(run.base.seed)  # as diffloop does before it builds its networks
    unet = build_peer_unet(config.dim, config.dim_mults, 10, run.base.channels, config.label_dropout)
    diffusion = GaussianDiffusion(unet, image_size=run.base.resolution, sampling_timesteps=SAMPLING_STEPS)
    averaged = EMA(diffusion, beta=0.995, update_every=10)
    optimizer = torch.optim.AdamW(diffusion.parameters(), lr=config.learning_rate)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_schedule(config, total))
    order = torch.cat([torch.randperm(len(images)) for _ in range(-(-total * BATCH_SIZE // len(images)))])
    for chosen in order[: total * BATCH_SIZE].split(BATCH_SIZE):
        diffusion(images[chosen], classes=labels[chosen]).backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), config.max_grad_norm)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        averaged.update()
    return averaged.ema_model.eval()


def draw_package(diffusion: Any, scale: float, labels: Tensor, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Its own sampler and defaults. It cannot draw at scale 1, where its network returns one value instead of two."""
    torch.manual_seed(seed)
    scale = 1.0 + 1e-6 if scale == 1.0 else scale
    return [(diffusion.sample(part, cond_scale=scale).clamp(0, 1), part) for part in labels.split(100)]


def draw_diffloop(run: RunConfig, scale: float, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    trainer = load_trainer(open_run(Path(run.base.output_dir)), [f"peer.guidance_scale={scale}"])
    requests = trainer.evaluation_requests(count)
    with evaluation_mode(trainer):
        batches = draw(trainer, requests, list(range(count)), seed, 100)["samples"]
    return [(batch, as_labels(requests[i * 100 : i * 100 + 100])) for i, batch in enumerate(batches)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--samples", type=int, default=1000, help="digits to draw, a multiple of 100")
    arguments = parser.parse_args()
    run, cpu = options(arguments.output, arguments.steps), torch.device("cpu")
    train_set, held_out_set = datasets_lib.build(run.base, "train"), datasets_lib.build(run.base, "validation")
    batches = list(pictures_of(train_set, list(range(len(train_set))), 1000))
    images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    real = describe([(images, labels)], cpu)
    held_out = describe(pictures_of(held_out_set, list(range(len(held_out_set))), 1000), cpu)
    recognise, own = train_classifier(real), nearest(held_out.vectors, real.vectors)[0]

    began = time.perf_counter()
    package = train_package(run, images, labels)
    seconds = {"package": time.perf_counter() - began}
    began = time.perf_counter()
    train(run)
    seconds["diffloop"] = time.perf_counter() - began
    result: dict[str, Any] = {"steps": arguments.steps, "training seconds": seconds, "by guidance scale": {}}
    asked = torch.arange(arguments.samples) % 10
    for scale in SCALES:
        drawn = {"package": draw_package(package, scale, asked, 0)}
        drawn["diffloop"] = draw_diffloop(run, scale, arguments.samples, 0)
        found = {side: measure(describe(pictures, cpu), real, own, recognise) for side, pictures in drawn.items()}
        result["by guidance scale"][scale] = found
        print(scale, json.dumps(found), flush=True)
    (arguments.output / "comparison.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
