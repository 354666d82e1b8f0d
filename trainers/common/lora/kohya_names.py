"""Names of modules in kohya's LoRA files, with _ for the dots: lora_unet_mid_block_attentions_0_proj_in.

Those of SDXL's UNet are the original network's: lora_unet_middle_block_1_proj_in.
"""

from __future__ import annotations

import re

# kohya's names replace the dots of modules by _; the _ in these parts stays
PARTS = (
    "down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out proj_in proj_out time_emb_proj "
    "conv_shortcut conv_in conv_out time_embedding add_embedding linear_1 linear_2 text_model self_attn q_proj k_proj "
    "v_proj out_proj text_projection attentions resnets downsamplers upsamplers attn1 attn2 ff net proj conv conv1 "
    "conv2 encoder layers mlp fc1 fc2 input_blocks output_blocks middle_block in_layers out_layers emb_layers "
    r"skip_connection time_embed label_emb op out \d+"
)
PART = re.compile(rf"({PARTS.replace(' ', '|')})(?=_|$)", re.ASCII)


def with_dots(name: str) -> str:
    """Returns a module's own name for kohya's, with diffusers' or the original network's words; "" if it is none."""
    parts = PART.findall(name)
    return ".".join(parts) if "_".join(parts) == name else ""


def is_known(name: str) -> bool:
    """Whether kohya's name is made of the words of Stable Diffusion's networks."""
    return bool(with_dots(name))
