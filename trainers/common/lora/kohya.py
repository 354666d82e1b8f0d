"""Kohya's LoRA format, which ComfyUI, Forge and AUTOMATIC1111 read: an alpha for each module, _ for dots in names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from trainers.common.lora.header import SETTINGS_KEY, peft_settings
from trainers.common.lora.kohya_names import is_known, module_names, original_sdxl_name
from trainers.common.lora.kohya_texts import family_of, kohya_texts
from trainers.common.lora.lora_file import LoraFile, check_modules
from trainers.common.lora.tensors import write_tensors

KOHYA = re.compile(r"lora_(unet|te|te1|te2)_(\w+)\.(lora_down\.weight|lora_up\.weight|alpha|dora_scale)")
SUFFIXES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


DORA = "of a DoRA, AUTOMATIC1111 makes another change, and kohya's tools and stable-diffusion.cpp an ordinary LoRA"


def write_kohya(path: Path, lora: LoraFile, title: str) -> Path:
    """Writes a file in kohya's format, which other programs show by its title."""
    return write_tensors(path, *to_kohya(lora, title))


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
    tensors: dict[str, Tensor] = {}
    ranks: Counter[int] = Counter()
    alphas: Counter[float] = Counter()
    for network, state in lora.tensors.items():
        scalings = lora.scalings(network)
        for module, rank in lora.ranks(network).items():
            if not is_known(module.replace(".", "_")):
                raise InputError(f"{shown(module)} is no module of Stable Diffusion's networks that is known here")
            original = original_sdxl_name(module) if family == "sdxl" and network == "unet" else module
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
    kept = {key: value for key, value in lora.about.items() if key != SETTINGS_KEY}  # with it diffusers reads no alpha
    return tensors, kept | sizes | kohya_texts(lora.about, family, title)


def of_kohya(file: Path, state: dict[str, Tensor], about: dict[str, str]) -> LoraFile:
    """Converts kohya's format to diffusers'; ValueError for keys that belong to no LoRA of Stable Diffusion."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if KOHYA.fullmatch(key) is None:
            raise InputError(
                f"{file}: {shown(key)} is no tensor of a LoRA in kohya's format; nothing else is converted"
            )
        name, _, suffix = key.partition(".")
        modules.setdefault(name, {})[suffix] = value
    if not modules:
        raise InputError(f"{file}: holds no tensor")
    lora = LoraFile({}, {}, {key: value for key, value in about.items() if key != SETTINGS_KEY})
    alphas: dict[str, dict[str, float]] = {}
    for name, (network, module) in module_names(modules).items():
        parts = modules[name]
        if not {"lora_down.weight", "lora_up.weight"} <= parts.keys():
            raise InputError(f"{file}: {shown(name)} needs lora_down.weight and lora_up.weight")
        own = lora.tensors.setdefault(network, {})
        pair = {f"{module}.{new}": parts[old] for new, old in SUFFIXES.items()}
        check_modules(file, network, pair)
        own |= pair
        if "dora_scale" in parts:
            own[f"{module}.lora_magnitude_vector"] = _magnitude(f"{file}: {name}", parts)
        rank = len(parts["lora_down.weight"])
        alphas.setdefault(network, {})[module] = _alpha(f"{file}: {name}", parts.get("alpha", torch.tensor(rank)))
    for network, own in lora.tensors.items():
        doras = sum(key.endswith("magnitude_vector") for key in own)
        if doras not in (0, len(alphas[network])):
            raise InputError(f"{file}: {doras} of {len(alphas[network])} modules of {network} have a dora_scale")
        lora.settings[network] = peft_settings(lora.ranks(network), alphas[network], doras > 0, rslora=False)
    return lora


def _magnitude(name: str, parts: dict[str, Tensor]) -> Tensor:
    """Returns peft's magnitude vector, [out] or [1, out, 1, 1], of a scale [out, 1, ...] or [out]."""
    scale, up = parts["dora_scale"], parts["lora_up.weight"]
    if scale.dim() == 0 or scale.shape[0] != scale.numel() or len(scale) != len(up):
        raise InputError(f"{name}.dora_scale is {list(scale.shape)}; one number per output is wanted, {len(up)} in all")
    return scale.flatten() if up.dim() == 2 else scale.reshape(1, -1, 1, 1)


def _alpha(name: str, value: Tensor) -> float:
    if value.numel() != 1 or not value.item() > 0:
        found = shown(value.tolist()) if value.numel() <= 1 else list(value.shape)
        raise InputError(f"{name}.alpha is {found}; one positive number is wanted")
    return float(value)
