"""Trains a LoRA on a single picture, for scripts/morph.py."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import datasets_lib
from datasets_lib.errors import InputError
from train import train
from trainers.common.lora.options import AdapterConfig
from trainers.common.text_to_image.base_model import BaseModel
from trainers.engine.config.config import check_config
from trainers.engine.config.files import read_config_file
from trainers.engine.run.files import make_folder, new_file
from trainers.inference.fitting import Fitted

CONFIG = Path(__file__).parents[2] / "configs" / "lora_single_image.yaml"
PRECISIONS = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}  # of training
PARTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")  # of a base model
OWN = (  # options that the script sets itself
    "base.caption", "base.resolution", "base.mixed_precision", "base.seed", "base.output_dir", "base.train_data_dir",
    "base.resume_from_checkpoint", "lora.pretrained_model_name_or_path",
)  # fmt: skip


def single_picture_lora(
    picture: Fitted, name: str, prompt: str, base_model: BaseModel, arguments: argparse.Namespace
) -> Path:
    """Trains a LoRA on one picture, resumes an interrupted one, or returns a finished one.

    Its folder is named by a hash of picture, prompt, settings and base, so an existing one can be used as it is. Raises
    ValueError for overrides that the script sets itself, or that do not fit.
    """
    for override in arguments.overrides:
        if override.split("=")[0] in OWN:
            raise InputError(f"{override}: scripts/morph.py sets it from its own options; leave it out")
    document = read_config_file(arguments.config or CONFIG)
    base = {"caption": prompt, "resolution": picture.square.width, "mixed_precision": PRECISIONS[arguments.dtype]}
    base |= {"seed": arguments.seed or 0, "resume_from_checkpoint": "latest"}
    document["base"] = (document.get("base") or {}) | base
    document["lora"] = (document.get("lora") or {}) | {"pretrained_model_name_or_path": arguments.base}
    content = base_model.digest(*(part for part in PARTS if (base_model.folder / part).is_dir()))
    settings = json.dumps([document, arguments.overrides, content], sort_keys=True).encode()
    digest = hashlib.sha256(picture.square.tobytes() + settings).hexdigest()[:8]
    folder = arguments.output_dir.absolute().parent / f"lora-{name}-{digest}"
    document["base"] |= {"output_dir": str(folder), "train_data_dir": str(folder / "picture")}
    run = check_config(document, arguments.overrides, datasets_lib.problems)
    if isinstance(run.config, AdapterConfig) and run.config.use_dora:
        raise InputError("lora.use_dora: the weights of a DoRA are no sum that can be mixed; leave it out")
    make_folder(folder / "picture")
    with new_file(folder / "picture" / f"{name}.png") as file:
        picture.square.save(file, "PNG")
    return train(run)
