"""Kohya's LoRA format, which ComfyUI, Forge and AUTOMATIC1111 read: an alpha for each module, _ for dots in names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from datasets_lib.errors import InputError, UserError
from datasets_lib.foreign import shown
from trainers.common.lora.header import SETTINGS_KEY
from trainers.common.lora.kohya_names import is_known
from trainers.common.lora.kohya_texts import LAYERS, family_of, kohya_texts
from trainers.common.lora.lora_file import LoraFile
from trainers.common.lora.original_names import original_sdxl_name
from trainers.common.lora.tensors import FILE_NAME, read_about
from trainers.weight_files import write_tensors

SUFFIXES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
OTHER_FILE = "other_file"  # entry of a run's file for diffusers: the name of the one in kohya's format beside it
TITLE_BYTES = 200  # at most: file systems allow 255, endings and the names of files that are being written included
DORA = "of a DoRA, AUTOMATIC1111 makes another change, and kohya's tools and stable-diffusion.cpp an ordinary LoRA"


def write_kohya(path: Path, lora: LoraFile, title: str) -> Path:
    """Writes a file in kohya's format, which other programs show by its title."""
    tensors, about = to_kohya(lora, title)
    write_tensors(tensors, path, about | {"format": "pt"})
    return path


def remove_earlier(folder: Path, kept: str) -> None:
    """Removes the file that an earlier export of a run wrote by another name: it would hold an older LoRA."""
    with suppress(UserError):  # of a damaged file
        name = read_about(folder).get(OTHER_FILE, "")
        if name not in (kept, FILE_NAME) and name.endswith(".safetensors") and Path(name).name == name:
            (folder / name).unlink(missing_ok=True)


def name_problem(title: str) -> str | None:
    """Returns why a file in kohya's format cannot be called after a title in the folder of one for diffusers."""
    if f"{title}.safetensors".casefold() == FILE_NAME:  # some disks do not tell capitals apart
        return f"{FILE_NAME} is the name of diffusers' file; scripts/convert_lora.py writes one of another name"
    if len(os.fsencode(title)) > TITLE_BYTES:
        return f"the name of base.output_dir has more than {TITLE_BYTES} bytes; scripts/convert_lora.py writes one"
    return None


def unnamed_module(networks: Mapping[str, nn.Module]) -> str | None:
    """Returns the first module with an adapter for which kohya's format has no name."""
    for name, network in networks.items():
        for key, module in network.named_modules():
            if isinstance(module, LoraLayer) and not is_known(key.replace(".", "_")):
                return f"{name}.{key}"
    return None


def to_kohya(lora: LoraFile, title: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns tensors and header in kohya's format; the header keeps its texts, except for peft's settings."""
    family = family_of(lora)
    tags = {"unet": "unet", "text_encoder": "te1" if family == "sdxl" else "te", "text_encoder_2": "te2"}
    renamed = family == "sdxl" and LAYERS not in lora.about
    tensors: dict[str, Tensor] = {}
    ranks: Counter[int] = Counter()
    alphas: Counter[float] = Counter()
    for network, state in lora.tensors.items():
        scalings = lora.scalings(network)
        for module, rank in lora.ranks(network).items():
            if not is_known(module.replace(".", "_")):
                raise InputError(f"{shown(module)} is no module of Stable Diffusion's networks that is known here")
            original = original_sdxl_name(module) if renamed and network == "unet" else module
            name, alpha = f"lora_{tags[network]}_{original.replace('.', '_')}", scalings[module] * rank
            tensors |= {f"{name}.{new}": state[f"{module}.{old}"] for old, new in SUFFIXES.items()}
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
            if not tensors[f"{name}.alpha"].isfinite():
                raise InputError(f"{network}.{module}: its alpha, {alpha:g}, is too large for the kohya format")
            if f"{module}.lora_magnitude_vector" in state:
                ones = [1] * (state[f"{module}.lora_A.weight"].dim() - 1)
                tensors[f"{name}.dora_scale"] = state[f"{module}.lora_magnitude_vector"].reshape(-1, *ones)
            ranks[rank] += 1
            alphas[alpha] += 1
    [(rank, _)], [(alpha, _)] = ranks.most_common(1), alphas.most_common(1)
    sizes = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    left_out = (OTHER_FILE, SETTINGS_KEY)  # with settings diffusers reads no alpha
    kept = {key: value for key, value in lora.about.items() if key not in left_out}
    return tensors, kept | sizes | kohya_texts(lora.about, family, title)
