"""Writes what a pipeline's folder has besides weights: configs, scheduler and tokenizers of a single file."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets_lib.errors import UserError
from trainers.model_configs import INDEX
from trainers.single_file.configs import network_config
from trainers.single_file.families import KINDS, SD1, SD2
from trainers.single_file.prediction import has_zero_snr, prediction_type
from trainers.single_file.recognition import SingleFile, open_single_file
from trainers.single_file.vocabulary import find_vocabulary, write_tokenizer

NOISE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def write_skeleton(folder: Path, single: SingleFile) -> None:
    """Fills a folder; its networks are read from the file itself. ValueError for what the file does not say."""
    scheduler = scheduler_config(single)
    _write(folder / "scheduler" / "scheduler_config.json", scheduler)
    for network in single.family.networks:
        if single.names(network):  # some have no autoencoder
            _write(folder / network / "config.json", network_config(single, network))
    tokenizers = ("tokenizer", "tokenizer_2")[: len(single.family.pads)]
    for tokenizer, pad in zip(tokenizers, single.family.pads, strict=True):
        write_tokenizer(folder / tokenizer, pad)
    _write(folder / INDEX, _index(single, scheduler["_class_name"], tokenizers))


def single_file_problems(path: Path, parts: Collection[str]) -> Iterator[str]:
    """Yields why a file cannot be a base model that needs `parts`, by its header and without heavy libraries."""
    try:
        single = open_single_file(path, "")
        for network in single.family.networks:
            if single.names(network) or network in parts:
                network_config(single, network)
        prediction_type(single)
        find_vocabulary()
    except UserError as error:
        yield str(error).removeprefix(": ")  # the place is said by others


def scheduler_config(single: SingleFile) -> dict[str, Any]:
    """Makes the config of the family's published scheduler."""
    zero_snr = has_zero_snr(single)
    family = SD2 if zero_snr and single.family is SD1 else single.family  # whose own knows no noise without signal
    config = {**family.scheduler, **NOISE, "steps_offset": 1, "prediction_type": prediction_type(single)}
    return config | ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {})


def _index(single: SingleFile, scheduler: str, tokenizers: tuple[str, ...]) -> dict[str, Any]:
    is_xl = single.family.is_xl
    kind = f"StableDiffusion{'XL' if is_xl else ''}{'Inpaint' if single.is_inpainting else ''}Pipeline"
    index: dict[str, Any] = {
        "_class_name": kind,
        "_diffusers_version": version("diffusers"),
        "scheduler": ["diffusers", scheduler],
    }
    index |= {network: list(KINDS[network]) for network in single.family.networks}
    index |= {tokenizer: ["transformers", "CLIPTokenizer"] for tokenizer in tokenizers}
    unused = {"feature_extractor": [None, None], "image_encoder": [None, None]}
    checker = {"safety_checker": [None, None], "requires_safety_checker": False}
    return index | unused | ({"force_zeros_for_empty_prompt": True} if is_xl else checker)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
