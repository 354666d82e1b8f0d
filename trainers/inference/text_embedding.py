"""Embeds prompts for diffusers' pipelines as a run or a LoRA was trained: longer captions, clip skip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets_lib.errors import InputError
from trainers.common.lora.header import text_settings
from trainers.common.lora.tensors import read_about
from trainers.common.text_to_image.base_model import TEXT_ENCODERS
from trainers.common.text_to_image.prompts import TextSettings, clip_skip_problem, embed_texts


def settings_of_loras(files: list[Path], clip_skip: int | None = None) -> TextSettings | None:
    """Returns how to embed prompts for LoRAs, by their headers; None if none says anything.

    `clip_skip` overrides theirs, 0 meaning none. Raises ValueError if they differ in it: a text is embedded once.
    """
    said = {file: text_settings(str(file), read_about(file)) for file in files}
    found = {file: settings for file, settings in said.items() if settings is not None}
    if not found:
        return None
    skips = {settings.clip_skip: file for file, settings in found.items()}
    if clip_skip is None and len(skips) > 1:
        texts = ", ".join(f"{'null' if skip is None else skip} ({file})" for skip, file in skips.items())
        raise InputError(f"the LoRAs were trained with different clip_skip: {texts}; give sample.py one by --clip-skip")
    chosen = next(iter(skips)) if clip_skip is None else clip_skip or None
    return TextSettings(max(settings.max_caption_tokens for settings in found.values()), chosen)


@torch.no_grad()
def embed_prompts(pipeline: Any, prompts: list[str], settings: TextSettings) -> dict[str, Tensor]:
    """Embeds prompts with a pipeline's text encoders: arguments of its call. ValueError for too large a clip_skip."""
    names = [name for name in TEXT_ENCODERS if getattr(pipeline, name, None) is not None]
    encoders = [getattr(pipeline, name) for name in names]
    tokenizers = [getattr(pipeline, name.replace("text_encoder", "tokenizer")) for name in names]
    if problem := clip_skip_problem(settings.clip_skip, [encoder.config.num_hidden_layers for encoder in encoders]):
        raise InputError(f"clip_skip = {settings.clip_skip}, which a LoRA was trained with: {problem}")
    return embed_texts(tokenizers, encoders, prompts, settings, pipeline.device)


def prompt_arguments(
    pipeline: Any, prompts: list[str], negative: str | None, guided: bool, settings: TextSettings | None
) -> dict[str, Any]:
    """Returns the arguments of a pipeline's call for prompts: texts, or embeddings if `settings` say how to embed.

    Negative prompts are embedded in the same way, because so is the hidden caption in training.
    """
    count = len(prompts)
    if settings is None:
        return {"prompt": prompts, "negative_prompt": None if negative is None else [negative] * count}
    found: dict[str, Any] = embed_prompts(pipeline, prompts, settings)
    if not guided:
        return found
    others = embed_prompts(pipeline, [negative or ""] * count, settings)
    if negative is None and pipeline.config.get("force_zeros_for_empty_prompt"):
        others = {name: torch.zeros_like(rows) for name, rows in others.items()}
    return found | {f"negative_{name}": rows for name, rows in others.items()}
