"""Names of modules in kohya's LoRA files: lora_unet_mid_block_attentions_0_proj_in, with _ for the dots."""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import SimpleNamespace

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown

TAGS = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}

# kohya's names replace the dots of modules by _; the _ in these parts stays
PARTS = (
    "down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out proj_in proj_out time_emb_proj "
    "conv_shortcut conv_in conv_out time_embedding add_embedding linear_1 linear_2 text_model self_attn q_proj k_proj "
    "v_proj out_proj text_projection attentions resnets downsamplers upsamplers attn1 attn2 ff net proj conv conv1 "
    r"conv2 encoder layers mlp fc1 fc2 \d+"
)
PART = re.compile(rf"({PARTS.replace(' ', '|')})(?=_|$)")


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
        if tag == "unet" and not is_known(rest):
            rest = _from_original(name)
        if not is_known(rest):
            raise InputError(f"{shown(original)} is no module of Stable Diffusion's networks that is known here")
        found[original] = TAGS[tag], ".".join(PART.findall(rest))
    if len(set(found.values())) != len(found):
        raise InputError("two names mean the same module")
    return found


def _from_original(name: str) -> str:
    """Converts a name with the original network's words to kohya's name with diffusers' words."""
    from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    key = _convert_unet_lora_key(f"{name}.lora_down.weight")
    return next(iter(convert_unet_state_dict_to_peft({key: None}))).removesuffix(".lora_A.weight").replace(".", "_")


def is_known(name: str) -> bool:
    """Whether kohya's name is made of the words of Stable Diffusion's networks."""
    return "_".join(PART.findall(name)) == name
