"""Names of modules in the UNet of Stable Diffusion's original code, as in single files and ComfyUI."""

from __future__ import annotations

import re

from trainers.single_file.names import UNET_ENDS, UNET_RESNET, unet_name

LAYERS = 3  # of a level: two and a sampler on the way down, three on the way up
FROM_ENDS, FROM_RESNET = ({there: here for here, there in names.items()} for names in (UNET_ENDS, UNET_RESNET))
BLOCK = re.compile(r"(input_blocks|output_blocks)\.([0-9]{1,3})\.([0-2])\.(.+)|middle_block\.([0-2])\.(.+)")
MIDDLE = ("resnets.0", "attentions.0", "resnets.1")


def original_sdxl_name(module: str) -> str:
    """Converts diffusers' name of a module of SDXL's UNet to the original network's."""
    return unet_name(f"{module}.weight", LAYERS, attended=(0, 1)).removesuffix(".weight")


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
