"""Stable Diffusion's networks at full size on the meta device, with the names that their layers have in other programs.

A layer is named by its network and diffusers' name of it, `("unet", "conv_in")`; text encoders' names begin with
`text_model.` as in the hub's files. `original` is the name in the network of CompVis or Stability, from which the UNets
of ComfyUI, AUTOMATIC1111, stable-diffusion.cpp and kohya's SDXL come; the text encoders there are OpenCLIP's.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import torch
from torch import nn

Layer = tuple[str, str]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
NETWORKS = ("unet", "text_encoder", "text_encoder_2")

_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_SD2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CONFIGS = {  # of the hub's files, as far as they differ from diffusers' and transformers' defaults
    "sd1": {"unet": {"cross_attention_dim": 768}, "text_encoder": _CLIP_L},
    "sd2": {"unet": _SD2, "text_encoder": _CLIP_H},
    "sdxl": {"unet": _SDXL, "text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G | {"projection_dim": 1280}},
}
_WITH_ATTENTION = {"sd1": (True, True, True, False), "sd2": (True, True, True, False), "sdxl": (False, True, True)}
_RESNET = {  # diffusers' names of what an original residual block has
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


class Family(NamedTuple):
    name: str
    shapes: dict[Layer, tuple[int, ...]]  # of the weights of all linear layers and convolutions
    original: dict[Layer, str]  # of the UNet's

    def layers(self, network: str, targets: str = "all") -> list[str]:
        """Names of a network's layers: "all" but the projection behind the text, or those of "attention"."""
        named = [name for owner, name in self.shapes if owner == network and name != "text_projection"]
        return [name for name in named if targets == "all" or name.endswith(ATTENTION)]


def networks(name):
    """New networks of a family on the meta device, without memory for their weights."""
    import diffusers
    import transformers

    found = {}
    for network, config in CONFIGS[name].items():
        with torch.device("meta"):
            if network == "unet":
                found[network] = diffusers.UNet2DConditionModel(**config)
            else:
                kind = "CLIPTextModelWithProjection" if network == "text_encoder_2" else "CLIPTextModel"
                found[network] = getattr(transformers, kind)(transformers.CLIPTextConfig(**config))
    return found


@functools.cache
def family(name):
    shapes = {}
    for network, module in networks(name).items():
        for key, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                bare = network == "unet" or key.startswith("text_")
                shapes[network, key if bare else f"text_model.{key}"] = tuple(layer.weight.shape)
    blocks = dict(_blocks(_WITH_ATTENTION[name]))
    return Family(name, shapes, {key: _original(key[1], blocks) for key in shapes if key[0] == "unet"})


def _blocks(with_attention):
    """Pairs of diffusers' and the original prefix, in the order in which the original constructor counts its blocks."""
    yield "conv_in", "input_blocks.0.0"
    yield "conv_out", "out.2"
    for number in (1, 2):
        yield f"time_embedding.linear_{number}", f"time_embed.{2 * number - 2}"
        yield f"add_embedding.linear_{number}", f"label_emb.0.{2 * number - 2}"
    levels, index = len(with_attention), 0
    for level, attends in enumerate(with_attention):
        for layer in range(2):
            index += 1
            yield f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{index}.0"
            if attends:
                yield f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{index}.1"
        if level < levels - 1:
            index += 1
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{index}.0.op"
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    index = 0
    for level, attends in enumerate(reversed(with_attention)):
        for layer in range(3):
            yield f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{index}.0"
            if attends:
                yield f"up_blocks.{level}.attentions.{layer}", f"output_blocks.{index}.1"
            index += 1
        if level < levels - 1:
            yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{index - 1}.{1 + attends}.conv"


def _original(name, blocks):
    if name in blocks:
        return blocks[name]
    prefix, rest = re.fullmatch(r"((?:down_blocks\.\d|up_blocks\.\d|mid_block)\.\w+\.\d)\.(.+)", name).groups()
    return f"{blocks[prefix]}.{_RESNET.get(rest, rest) if 'resnets' in prefix else rest}"
