"""Times a LoRA step on a network of Stable Diffusion 1.5's shape.

scripts/benchmarks/measure_lora.py FOLDER [--precision no|bf16]

Makes a base model with random weights (3.7 GB in FOLDER), then trains adapters of rank 16 on 512 x 512 pictures, batch
1, each way in a process of its own: without caches, with caches on disk, and the UNet's forward and backward alone.
Prints a Markdown table of seconds per step (median) and peak memory, and the sizes on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

WAYS = {"without caches": [], "caches on disk": ["lora.cache_latents=disk", "lora.cache_text=disk"]}
GIB = 2**30


def make_base(folder: Path, dtype: torch.dtype) -> None:
    """Random weights in the shapes of Stable Diffusion 1.5; its tokenizer's place takes one of letters."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from scripts.data.make_base import write_tokenizer

    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **levels)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **text))
    tokenizer = write_tokenizer(folder / "letters", ["a photo of a cat"], 77)
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    parts = {"vae": vae, "text_encoder": text_encoder, "unet": unet, "tokenizer": tokenizer}
    parts["scheduler"] = DDIMScheduler(**noise, clip_sample=False, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.to(dtype).save_pretrained(folder)


def make_pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(4):
        pixels = np.random.default_rng(number).integers(256, size=(64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((512, 512), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a photo of a cat")


def train_one_way(folder: Path, name: str, rank: int, steps: int, precision: str, options: list[str]) -> None:
    """In a process of its own: prints {"seconds", "bytes"} as JSON."""
    from train import train
    from trainers.engine.config.config import check_config

    base = {"output_dir": str(folder / name), "train_data_dir": str(folder / "pictures"), "resolution": 512}
    base |= {"center_crop": True, "max_train_steps": steps, "train_batch_size": 1, "logging_steps": 1, "logger": "none"}
    base |= {"mixed_precision": precision}
    lora = {"pretrained_model_name_or_path": str(folder / "base"), "rank": rank, "lr_scheduler": "constant"}
    run = train(check_config({"base": base, "lora": lora | {"validation_prompts": []}}, options))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [1 / line["examples_per_second"] for line in lines if "loss" in line][1:]  # the first one warms up
    print(json.dumps({"seconds": statistics.median(seconds), "bytes": _peak_bytes()}))


def unet_alone(folder: Path, steps: int, precision: str) -> None:
    """Forward and backward of the frozen UNet with its input's gradient, in the same precision."""
    from diffusers import UNet2DConditionModel

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    unet = UNet2DConditionModel.from_pretrained(folder / "base" / "unet", torch_dtype=dtype).requires_grad_(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet.to(device).train()
    noisy = torch.randn(1, 4, 64, 64, device=device, dtype=dtype, requires_grad=True)
    text, timestep, seconds = torch.randn(1, 77, 768, device=device, dtype=dtype), torch.tensor([500]).to(device), []
    for _ in range(steps):
        began = time.perf_counter()
        unet(noisy, timestep, text).sample.float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "bytes": _peak_bytes()}))


def _peak_bytes() -> int:
    """Of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder, or that of an earlier call")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--steps", type=int, default=6, help="the first one is not counted")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way == "unet":
        return unet_alone(options.folder, options.steps, options.precision)
    if options.way is not None:
        name = f"{options.way.replace(' ', '-')}-{options.precision}-{os.getpid()}"
        changes = [*WAYS[options.way], "lora.use_ema=false"]
        return train_one_way(options.folder, name, options.rank, options.steps, options.precision, changes)
    if not (options.folder / "base").is_dir():
        make_base(options.folder / "base", torch.float32)
        make_pictures(options.folder / "pictures")
    print(f"| {options.precision}, {torch.get_num_threads()} threads | seconds per step | peak memory |\n|---|---|---|")
    for way in ("unet", *WAYS):
        done = subprocess.run([sys.executable, *sys.argv, "--way", way], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"error: {way}: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        what = "UNet forward and backward alone" if way == "unet" else f"LoRA step, {way}"
        print(f"| {what} | {found['seconds']:.2f} | {found['bytes'] / GIB:.2f} GiB |", flush=True)
    run = max(options.folder.glob("caches-on-disk-*"), key=lambda path: path.stat().st_mtime)
    sizes = {"LoRA file": run / "pytorch_lora_weights.safetensors", "checkpoint": run / f"checkpoint-{options.steps}"}
    for name, path in sizes.items():
        print(f"{name}: {(path.stat().st_size if path.is_file() else size_of(path)) / 1e6:.2f} MB")
    pictures = len(list((options.folder / "pictures").glob("*.png")))
    for path in sorted((options.folder / "encoder-cache").iterdir()):
        print(f"cache {path.name.partition('-')[0]} ({pictures} pictures): {size_of(path) / 1e6:.2f} MB")
    return None


if __name__ == "__main__":
    main()
