"""Stable Diffusion pipelines with weighted LoRAs on them, for scripts that draw with, or change, a whole pipeline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from trainers.common.lora_files import LoraFile, find_lora, read_lora


def parse_lora(text: str) -> tuple[Path, float]:
    """File and weight of FILE[:WEIGHT]; what follows the last colon belongs to the path unless it is a number."""
    path, colon, number = text.rpartition(":")
    try:
        weight = float(number) if colon else None
    except ValueError:
        if Path(path).exists():
            raise ValueError(f"--lora {text}: {number} is no weight; give a number, such as {path}:0.8") from None
        weight = None
    if weight is None:
        return Path(text), 1.0
    if not math.isfinite(weight):
        raise ValueError(f"--lora {text}: the weight must be finite")
    return Path(path), weight


def load_pipeline(
    base: str, dtype: torch.dtype | dict[str, torch.dtype] = torch.float32, kind: Any = None, **components: Any
) -> Any:
    """A pipeline from a folder or the hub, without a safety checker, safetensors only.

    `kind` is a pipeline class of diffusers, by default the one that the base names; `components` replace the base's.
    `dtype` may differ by component: {"default": torch.bfloat16, "vae": torch.float32}.
    Raises ValueError for one that takes no LoRA, OSError where it cannot be read.
    """
    from diffusers import DiffusionPipeline

    options = {"safety_checker": None, "requires_safety_checker": False, "use_safetensors": True}
    pipeline = (kind or DiffusionPipeline).from_pretrained(base, torch_dtype=dtype, **options, **components)
    if not hasattr(pipeline, "fuse_lora"):
        raise ValueError(f"{base}: is a {type(pipeline).__name__}; give Stable Diffusion or SDXL")
    return pipeline


def add_loras(pipeline: Any, loras: list[tuple[Path, float]]) -> list[str]:
    """Loads LoRA files as adapters lora_0, lora_1, ... and makes all of them act with their weights; returns the names.

    Raises FileNotFoundError for a missing file, ValueError for one that does not fit the pipeline.
    """
    files = [(find_lora(path), read_lora(path)) for path, _ in loras]
    names = [f"lora_{number}" for number in range(len(files))]
    for name, (file, lora) in zip(names, files, strict=True):
        check_fit(file, lora, pipeline)
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    if names:
        pipeline.set_adapters(names, [weight for _, weight in loras])  # only the last one is active after loading
    return names


def check_fit(file: Path, lora: LoraFile, pipeline: Any) -> None:
    """ValueError where the pipeline has not what the LoRA changes, which diffusers only warns about."""
    for network, state in lora.tensors.items():
        owner = getattr(pipeline, network, None)
        if owner is None:
            raise ValueError(f"{file}: changes {network}, and the base has none; take the base that it was trained on")
        layers = dict(owner.named_modules())
        for module in lora.ranks(network):
            layer = layers.get(module, layers.get(module.removeprefix("text_model.")))
            layer = getattr(layer, "base_layer", layer)  # an adapter is there already
            shape = [len(state[f"{module}.lora_B.weight"]), *state[f"{module}.lora_A.weight"].shape[1:]]
            found = list(layer.weight.shape) if hasattr(layer, "weight") else "missing"
            if found != shape:
                advice = "take the base that it was trained on"
                raise ValueError(f"{file}: changes {network}.{module} {shape}, which in the base is {found}; {advice}")
