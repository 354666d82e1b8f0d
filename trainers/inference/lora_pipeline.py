"""Stable Diffusion pipelines with weighted LoRAs, for scripts that draw with a pipeline or change it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainers.common.lora.files import LoraFile, find_lora, read_lora


def parse_loras(texts: list[str] | None) -> list[tuple[Path, float]]:
    """Finds the files of FILE[:WEIGHT] texts, and reads them so that errors come before a base is loaded."""
    loras = [parse_lora(text) for text in texts or []]
    for path, _ in loras:
        read_lora(path)
    return [(find_lora(path), weight) for path, weight in loras]


def parse_lora(text: str) -> tuple[Path, float]:
    """Parses FILE[:WEIGHT]; what follows the last colon belongs to the path unless it is a number."""
    path, colon, number = text.rpartition(":")
    if Path(text).exists() or not colon:
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        if Path(path).exists():
            raise ValueError(f"--lora {text}: {number} is no weight; give a number, such as {path}:0.8") from None
        return Path(text), 1.0
    if not math.isfinite(weight):
        raise ValueError(f"--lora {text}: the weight must be finite")
    return Path(path), weight


def load_pipeline(base: str, dtype: torch.dtype | dict[str, torch.dtype] = torch.float32) -> Any:
    """Loads a pipeline from a folder or the hub, without a safety checker, safetensors only.

    `dtype` may differ by component: {"default": torch.bfloat16, "vae": torch.float32}.
    Raises ValueError for a pipeline that takes no LoRA, FileNotFoundError if none can be read.
    """
    from diffusers import DiffusionPipeline

    options = {"safety_checker": None, "requires_safety_checker": False, "use_safetensors": True}
    try:
        pipeline = DiffusionPipeline.from_pretrained(base, torch_dtype=dtype, **options)
    except OSError as error:
        advice = "give a pipeline's local folder, or a hub name that can be reached"
        raise FileNotFoundError(f"{base}: no pipeline could be read; {advice} ({str(error).splitlines()[0]})") from None
    if not hasattr(pipeline, "fuse_lora"):
        raise ValueError(f"{base}: is a {type(pipeline).__name__}; give Stable Diffusion or SDXL")
    return pipeline


def add_loras(pipeline: Any, loras: list[tuple[Path, float]]) -> dict[str, float]:
    """Loads LoRA files as adapters lora_0, lora_1, ..., and returns their weights by name; ValueError for a misfit."""
    weights = {f"lora_{number}": weight for number, (_, weight) in enumerate(loras)}
    for name, (path, _) in zip(weights, loras, strict=True):
        file, lora = find_lora(path), read_lora(path)
        check_fit(file, lora, pipeline)
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
        for network in lora.tensors:
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
        raise ValueError(f"--negative-prompt: has no effect with guidance {guidance:g}; give --guidance above 1")


def check_finite(images: Tensor) -> None:
    """Raises ValueError for pixels that are not finite, which diffusers' postprocessing would hide."""
    if not images.isfinite().all():
        raise ValueError("the pictures are not finite; the LoRAs' weights are too large, or the precision is too low")


def check_strength(strength: float, steps: int) -> None:
    """Raises ValueError for a fraction of the sampling steps that is out of range or leaves no step."""
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"--strength {strength:g}: must be above 0 and at most 1, a fraction of the steps")
    if int(steps * strength) < 1:
        raise ValueError(f"--strength {strength:g}: leaves none of {steps} steps; raise it or --steps")


def check_fit(file: Path, lora: LoraFile, pipeline: Any) -> None:
    """Raises ValueError if the pipeline lacks modules that the LoRA changes; diffusers would only warn."""
    advice = "take the base that it was trained on"
    for network, state in lora.tensors.items():
        owner = getattr(pipeline, network, None)
        if owner is None:
            raise ValueError(f"{file}: changes {network}, and the base has none; {advice}")
        layers = dict(owner.named_modules())
        for module in lora.ranks(network):
            layer = layers.get(module, layers.get(module.removeprefix("text_model.")))
            layer = getattr(layer, "base_layer", layer)  # under an adapter
            shape = [len(state[f"{module}.lora_B.weight"]), *state[f"{module}.lora_A.weight"].shape[1:]]
            weight = getattr(layer, "weight", None)
            found = "missing" if weight is None else list(weight.shape)
            if found != shape:
                raise ValueError(f"{file}: changes {network}.{module} {shape}, which in the base is {found}; {advice}")
