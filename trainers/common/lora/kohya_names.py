"""Names of modules in kohya's LoRA files, with _ for the dots: lora_unet_mid_block_attentions_0_proj_in.

Those of SDXL's UNet are the original network's: lora_unet_middle_block_1_proj_in.
"""

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


# Stable Diffusion XL's UNet in the words of its original network
RESNET = {
    "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
ENDS = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
LAYER = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def original_sdxl_name(module: str) -> str:
    """Converts diffusers' name of a module of SDXL's UNet to the original network's, which numbers all blocks' layers.

    A block has two layers, three on the way up, and a sampler.
    """
    match = LAYER.fullmatch(module)
    if match is None:
        return ENDS.get(module, module)
    side, kind, rest = match[1], match[3], match[5]
    block, layer = int(match[2] or 0), int(match[4])
    if kind == "resnets":
        rest = RESNET.get(rest, rest)
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * layer}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{3 * block + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * block + 2}.2.conv"
    number = f"input_blocks.{3 * block + layer + 1}" if side == "down" else f"output_blocks.{3 * block + layer}"
    return f"{number}.{1 if kind == 'attentions' else 0}.{rest}"


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
