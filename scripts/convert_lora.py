"""Converts a LoRA file to another format: scripts/convert_lora.py INPUT OUTPUT --to kohya|diffusers

diffusers: what load_lora_weights of diffusers reads, with alpha in the header. kohya: what ComfyUI and AUTOMATIC1111
read, with an alpha for each module, which includes rsLoRA's scaling; the UNet's blocks have diffusers' names, which
both read for SDXL, too. From kohya, the block names of the original SDXL network are also read.

With DoRA, ComfyUI divides by the norm of the base's weight instead of the changed one's, so its pictures differ a
little; diffusers reads DoRA in its own format only.
"""

from __future__ import annotations

import argparse
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from trainers.common.lora.files import (
    LoraFile,
    check_modules,
    find_lora,
    read_about,
    read_lora,
    read_tensors,
    write_lora,
    write_tensors,
)
from trainers.common.lora.header import SETTINGS_KEY, peft_settings, text_settings
from trainers.common.text_to_image.prompts import TextSettings
from trainers.engine.run.files import make_folder
from trainers.inference.command import command, path_argument

KOHYA = re.compile(r"lora_(unet|te|te1|te2)_(\w+)\.(lora_down\.weight|lora_up\.weight|alpha|dora_scale)")
STARTS = {"kohya": ("lora_",), "diffusers": ("unet.", "text_encoder.", "text_encoder_2.")}
NETWORKS = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
SUFFIXES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}

# kohya's names replace the dots of modules by _; the _ in these parts stays
PARTS = (
    "down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out proj_in proj_out time_emb_proj "
    "conv_shortcut conv_in conv_out time_embedding add_embedding linear_1 linear_2 text_model self_attn q_proj k_proj "
    "v_proj out_proj text_projection attentions resnets downsamplers upsamplers attn1 attn2 ff net proj conv conv1 "
    r"conv2 encoder layers mlp fc1 fc2 \d+"
)
PART = re.compile(rf"({PARTS.replace(' ', '|')})(?=_|$)")
BASES = {  # by the width of the captions' embeddings
    768: {"ss_base_model_version": "sd_v1"},
    1024: {"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    2048: {"ss_base_model_version": "sdxl_base_v1-0"},
}


def convert(source: Path, output: Path, wanted: str) -> None:
    """Writes `source`, a file or folder, in the `wanted` format; ValueError if it is no LoRA in the other one."""
    if output.suffix != ".safetensors" or output.exists():
        raise InputError(f"{output}: must be a new file with the ending .safetensors")
    file = find_lora(source)
    about = read_about(file)
    state = read_tensors(file)
    if any(key.startswith(STARTS[wanted]) for key in state):
        raise InputError(f"{file}: is in the {wanted} format already")
    staging = output.with_name(f".tmp-{secrets.token_hex(4)}-{output.name}")
    try:
        if wanted == "kohya":
            write_tensors(staging, *to_kohya(read_lora(file)))
        else:
            about.pop(SETTINGS_KEY, None)
            write_lora(staging, to_diffusers(file, state, about))
        staging.rename(output)
    finally:
        staging.unlink(missing_ok=True)


def to_kohya(lora: LoraFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns tensors and header in kohya's format; the header keeps its texts, except for peft's settings."""
    unet = lora.tensors.get("unet", {})
    widths = {value.shape[1] for key, value in unet.items() if key.endswith("attn2.to_k.lora_A.weight")}
    base = BASES.get(widths.pop(), {}) if len(widths) == 1 else {}
    sdxl = "text_encoder_2" in lora.tensors or base == BASES[2048]
    tags = {"unet": "unet", "text_encoder": "te1" if sdxl else "te", "text_encoder_2": "te2"}
    tensors: dict[str, Tensor] = {}
    ranks: Counter[int] = Counter()
    alphas: Counter[float] = Counter()
    for network, state in lora.tensors.items():
        scalings = lora.scalings(network)
        for module, rank in lora.ranks(network).items():
            words, alpha = module.replace(".", "_"), scalings[module] * rank
            if not _is_known(words):
                raise InputError(f"{shown(module)} is no module of Stable Diffusion's networks that is known here")
            name = f"lora_{tags[network]}_{words}"
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
    usual = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    kept = {key: value for key, value in lora.about.items() if key != SETTINGS_KEY}  # with it diffusers reads no alpha
    return tensors, usual | base | _of_texts(lora.about, sdxl) | kept


def _of_texts(about: Mapping[str, str], sdxl: bool) -> dict[str, str]:
    """Returns kohya's spelling of how texts were embedded; its clip skip counts from 1, and is none of SDXL's."""
    settings = text_settings("INPUT", about) or TextSettings()
    skipped = {} if sdxl or settings.clip_skip is None else {"ss_clip_skip": str(settings.clip_skip + 1)}
    return skipped | ({"ss_max_token_length": str(settings.max_caption_tokens)} if settings.chunks > 1 else {})


def to_diffusers(file: Path, state: dict[str, Tensor], about: dict[str, str]) -> LoraFile:
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
    lora = LoraFile({}, {}, about)
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


def module_names(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Returns network and module by kohya's name; ValueError for one that is no module's, or two of the same module."""
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    originals = {name: name for name in names}
    # SD and SDXL have two layers per block; of a file with both kinds of names diffusers keeps one
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(originals), SimpleNamespace(layers_per_block=2))
    if len(mapped) != len(originals):
        raise InputError("names of the original SDXL network and of diffusers' are mixed: no such file is converted")
    found = {}
    for name, original in mapped.items():
        _, tag, rest = name.split("_", 2)
        if tag == "unet" and not _is_known(rest):
            rest = _from_original(name)
        if not _is_known(rest):
            raise InputError(f"{shown(original)} is no module of Stable Diffusion's networks that is known here")
        found[original] = NETWORKS[tag], ".".join(PART.findall(rest))
    if len(set(found.values())) != len(found):
        raise InputError("two names mean the same module")
    return found


def _from_original(name: str) -> str:
    """Converts a name with the original network's words to kohya's name with diffusers' words."""
    from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    key = _convert_unet_lora_key(f"{name}.lora_down.weight")
    return next(iter(convert_unet_state_dict_to_peft({key: None}))).removesuffix(".lora_A.weight").replace(".", "_")


def _is_known(name: str) -> bool:
    """Whether kohya's name is made of the words of Stable Diffusion's networks."""
    return "_".join(PART.findall(name)) == name


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=path_argument, help="a LoRA as .safetensors, or a folder with one")
    parser.add_argument("output", type=path_argument, help="a new .safetensors file")
    parser.add_argument("--to", choices=("kohya", "diffusers"), required=True)
    options = parser.parse_args()
    make_folder(options.output.parent)
    convert(options.input, options.output, options.to)
    print(f"{options.to} format: {options.output}")


if __name__ == "__main__":
    main()
