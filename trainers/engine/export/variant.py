"""Writes weights in half precision beside those in full, as diffusers' variants."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from datasets_lib.errors import InputError
from trainers.weight_files import rewrite_weights, weight_files

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def write_variant(folder: Path, variant: str) -> list[str]:
    """Writes the weights of every network in a finished pipeline once more, unless that variant is there already.

    Returns warnings of networks whose numbers it cannot hold; for these diffusers takes the full precision.
    """
    dtype, warnings = DTYPES[variant], []

    def cast(key: str, value: Tensor) -> Tensor:
        half = value.to(dtype) if value.is_floating_point() else value
        if value.is_floating_point() and not half.isfinite().all():
            raise InputError(f"{key} has numbers beyond the range of {variant}")
        return half

    for each in [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]:
        files = list(weight_files(each))
        plain = [file for file in files if file.variant is None]
        if any(file.variant == variant for file in files):
            continue
        try:
            rewrite_weights(plain, each, cast, variant)
        except InputError as error:
            for file in list(weight_files(each)):
                if file.variant == variant:
                    file.path.unlink()
            network = "" if each == folder else f" of {each.relative_to(folder)}"
            warnings.append(f"no {variant} weights{network}: {error}; bf16 has the range of full precision")
    return warnings
