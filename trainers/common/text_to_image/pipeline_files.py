"""Writes the files of a finished pipeline: what was trained is saved, the rest is copied from the base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.common.autoencoder.latents import LatentSpace
from trainers.common.text_to_image.base_model import BaseModel
from trainers.model_configs import INDEX
from trainers.single_file.families import KINDS
from trainers.single_file.part_files import write_part
from trainers.weight_files import copy_part

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from transformers import CLIPTokenizer

CLASSES = {name: list(kind) for name, kind in KINDS.items()}
CLASSES |= {name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")}
VOCABULARY = ("vocab.json", "merges.txt")


def write_pipeline(
    folder: Path,
    base: BaseModel,
    networks: Mapping[str, Any],
    scheduler: SchedulerMixin,
    latents: LatentSpace,
    kept: str | None = None,
) -> None:
    """Writes a pipeline of trained networks; the variant `kept` of the other ones' weights is copied if there is one.

    Nothing that is copied is read as a network: that would take its memory, and lose its files' names and precision.
    """
    for name, network in networks.items():
        network.save_pretrained(folder / name)
    tokenizers = ("tokenizer", "tokenizer_2")[: len(base.text_encoder_names)]
    for name in (*base.text_encoder_names, *tokenizers):
        if name not in networks and base.single is not None and name in base.text_encoder_names:
            write_part(folder / name, base.single, name)
        elif name not in networks:
            copy_part(base.folder / name, folder / name, base.variant, kept)
    for number, name in enumerate(tokenizers):
        if lacks_vocabulary(folder / name):
            write_vocabulary(folder / name, base.tokenizers()[number])
    latents.copy_to(folder / "vae", kept)
    if (base.folder / "scheduler").is_dir() and _public(scheduler) == _public(base.sampler):
        copy_part(base.folder / "scheduler", folder / "scheduler")
    else:
        scheduler.save_pretrained(folder / "scheduler")
    parts = {name: CLASSES[name] for name in (*networks, *base.text_encoder_names, *tokenizers, "vae")}
    index = _index(base, parts | {"scheduler": ["diffusers", type(scheduler).__name__]})
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def lacks_vocabulary(tokenizer: Path) -> bool:
    """Whether a tokenizer's folder has only what transformers 5 reads: its version 4, and others, need two files."""
    return not all((tokenizer / name).is_file() for name in VOCABULARY)


def write_vocabulary(folder: Path, tokenizer: CLIPTokenizer) -> None:
    tokenizer.backend_tokenizer.model.save(str(folder))


def _public(scheduler: SchedulerMixin) -> tuple[str, dict[str, Any]]:
    settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return type(scheduler).__name__, settings


def _index(base: BaseModel, parts: dict[str, list[str]]) -> dict[str, Any]:
    """Returns what diffusers' pipeline of these parts writes; those of a safety checker are left out."""
    import diffusers

    about: dict[str, Any] = {"_diffusers_version": diffusers.__version__}
    none = [None, None]
    if base.is_xl:
        about |= {"_class_name": "StableDiffusionXLPipeline", "feature_extractor": none, "image_encoder": none}
        return about | parts | {"force_zeros_for_empty_prompt": base.zeros_for_empty}
    about |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    return about | parts | dict.fromkeys(("feature_extractor", "image_encoder", "safety_checker"), none)
