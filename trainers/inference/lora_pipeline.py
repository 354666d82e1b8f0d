"""Stable Diffusion pipelines with weighted LoRAs, for scripts that draw with a pipeline or change it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets_lib.errors import InputError
from trainers.common.lora.files import read_lora
from trainers.common.lora.loading import adapt_sampler, load_into_pipeline
from trainers.common.lora.lora_file import LoraFile
from trainers.common.lora.tensors import find_lora
from trainers.common.text_to_image.base_model import check_tokenizer
from trainers.pretrained import read_model


def parse_loras(texts: list[str] | None) -> list[tuple[Path, float]]:
    """Parses FILE[:WEIGHT] texts; reads the files, so that errors come before a base is loaded, and prints notes."""
    loras = [parse_lora(text) for text in texts or []]
    for path, _ in loras:
        print_notes(read_lora(path))
    return loras


def print_notes(lora: LoraFile) -> None:
    """Prints what of a file is left out."""
    for note in lora.notes:
        print(f"NOTE: {note}")


def parse_lora(text: str) -> tuple[Path, float]:
    """Parses FILE[:WEIGHT]; what follows the last colon belongs to the path unless it is a number."""
    path, colon, number = text.rpartition(":")
    if Path(text).exists() or not colon:
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        if Path(path).exists():
            raise InputError(f"--lora {text}: {number} is no weight; give a number, such as {path}:0.8") from None
        return Path(text), 1.0
    if not math.isfinite(weight):
        raise InputError(f"--lora {text}: the weight must be finite")
    return Path(path), weight


def load_pipeline(base: str, dtype: torch.dtype | dict[str, torch.dtype] = torch.float32) -> Any:
    """Loads a pipeline from a folder or the hub, without a safety checker, safetensors only.

    `dtype` may differ by component: {"default": torch.bfloat16, "vae": torch.float32}.
    Raises ValueError for a pipeline that takes no LoRA, FileNotFoundError if none can be read.
    """
    from diffusers import DiffusionPipeline, __version__

    options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    options["dtype" if tuple(map(int, __version__.split(".")[:2])) >= (0, 40) else "torch_dtype"] = dtype
    pipeline = read_model(DiffusionPipeline, base, **options)
    if not hasattr(pipeline, "fuse_lora"):
        raise InputError(f"{base}: is a {type(pipeline).__name__}; give Stable Diffusion or SDXL")
    for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        if getattr(pipeline, tokenizer, None) is not None and getattr(pipeline, encoder, None) is not None:
            check_tokenizer(f"{base}, {encoder}", getattr(pipeline, tokenizer), getattr(pipeline, encoder).config)
    return pipeline


def add_loras(pipeline: Any, loras: list[tuple[Path, float]]) -> dict[str, float]:
    """Loads LoRA files as adapters lora_0, lora_1, ..., with the scheduler that they need; returns weights by name.

    Raises ValueError for a LoRA that does not fit the base, or the others.
    """
    weights = {f"lora_{number}": weight for number, (_, weight) in enumerate(loras)}
    read = {path: read_lora(path) for path, _ in loras}
    adapt_sampler(pipeline, {find_lora(path): read[path] for path, weight in loras if weight != 0})
    for name, (path, _) in zip(weights, loras, strict=True):
        load_into_pipeline(pipeline, find_lora(path), read[path], name)
        for network in read[path].tensors:
            getattr(pipeline, network).eval()  # no dropout in sampling
    weigh_loras(pipeline, weights)
    return weights


def weigh_loras(pipeline: Any, weights: dict[str, float]) -> None:
    """Sets the weights of adapters by name.

    Weight 0 deactivates an adapter, because a DoRA would still act; with none active the base is exactly unchanged.
    """
    acting = {name: weight for name, weight in weights.items() if weight != 0.0}
    if acting:
        pipeline.enable_lora()
        pipeline.set_adapters(list(acting), list(acting.values()))
    elif weights:
        pipeline.disable_lora()


def check_negative_prompt(text: str | None, guidance: float) -> None:
    if text is not None and guidance <= 1:
        raise InputError(f"--negative-prompt: has no effect with guidance {guidance:g}; give --guidance above 1")


def check_finite(images: Tensor) -> None:
    """Raises ValueError for pixels that are not finite, which diffusers' postprocessing would hide."""
    if not images.isfinite().all():
        raise InputError("the pictures are not finite; the LoRAs' weights are too large, or the precision is too low")


def check_weights(pipeline: Any) -> None:
    """Raises ValueError for a network with weights that are not finite."""
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    for network, owner in networks.items():
        for key, weights in owner.state_dict().items():
            check_values(f"{network}.{key}", weights)


def check_values(name: str, weights: Tensor) -> None:
    if weights.is_floating_point() and not weights.isfinite().all():
        found = f"{name} holds numbers that are not finite"
        raise InputError(f"{found}; lower the LoRAs' weights, take --dtype float32, or check the base")


def check_strength(strength: float, steps: int) -> None:
    """Raises ValueError for a fraction of the sampling steps that is out of range or leaves no step."""
    if not 0.0 < strength <= 1.0:
        raise InputError(f"--strength {strength:g}: must be above 0 and at most 1, a fraction of the steps")
    if int(steps * strength) < 1:
        raise InputError(f"--strength {strength:g}: leaves none of {steps} steps; raise it or --steps")
