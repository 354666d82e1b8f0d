"""Names of modules in the UNet of Stable Diffusion's original code, as in single files and ComfyUI."""

from __future__ import annotations

import re

LAYERS = 3  # of a level: two and a sampler on the way down, three on the way up
ENDS = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
RESNET = {
    "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
FROM_ENDS, FROM_RESNET = ({there: here for here, there in names.items()} for names in (ENDS, RESNET))
LAYER = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
BLOCK = re.compile(r"(input_blocks|output_blocks)\.([0-9]{1,3})\.([0-2])\.(.+)|middle_block\.([0-2])\.(.+)")
MIDDLE = ("resnets.0", "attentions.0", "resnets.1")


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
        return f"input_blocks.{LAYERS * block + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{LAYERS * block + 2}.2.conv"
    number = LAYERS * block + layer
    place = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
    return f"{place}.{1 if kind == 'attentions' else 0}.{rest}"


def in_diffusers(name: str) -> str:
    """Converts the original network's name of a module to diffusers', and leaves a name of any other kind as it is.

    One rule holds for Stable Diffusion 1, 2 and XL, because all of them have two layers in a level.
    """
    match = BLOCK.fullmatch(name)
    if match is None:
        return FROM_ENDS.get(name, name)
    if match[5]:
        return f"mid_block.{MIDDLE[int(match[5])]}.{FROM_RESNET.get(match[6], match[6])}"
    side, number, kind, rest = match[1], int(match[2]), ("resnets", "attentions")[min(int(match[3]), 1)], match[4]
    if side == "input_blocks":
        block, layer = divmod(number - 1, LAYERS)
        place, sampler = f"down_blocks.{block}", "downsamplers" if rest == "op" else None
    else:
        block, layer = divmod(number, LAYERS)
        place, sampler = f"up_blocks.{block}", "upsamplers" if rest == "conv" else None
    return f"{place}.{sampler}.0.conv" if sampler else f"{place}.{kind}.{layer}.{FROM_RESNET.get(rest, rest)}"
