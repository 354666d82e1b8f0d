"""Configs of a single file's networks, as diffusers and transformers write them, read off the shapes of its tensors.

What no shape shows is fixed in the families: 8 heads in Stable Diffusion 1's UNet and heads of 64 elsewhere, groups of
32, activations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from datasets_lib.foreign import shown
from trainers.single_file.families import SD1, SD2, SDXL, Family
from trainers.single_file.names import OPEN_CLIP
from trainers.single_file.prediction import pixels
from trainers.single_file.recognition import SingleFile

Shapes = Mapping[str, tuple[int, ...]]
HEADS, HEAD_WIDTH = 8, 64
SD2_TEXT_LAYERS = 23  # of the 24 of its file: the last one is never read
BEGIN, END = 49406, 49407  # CLIP's tokens around a text


def network_config(single: SingleFile, network: str) -> dict[str, Any]:
    """Makes the config of a network; ValueError if the file lacks what it is read from."""
    shapes = single.shapes(network)
    try:
        if network == "unet":
            pooled = single.shapes("text_encoder_2")["text_projection"][1] if single.family.is_xl else 0
            return _unet(shapes, single.family, pooled) | {"sample_size": pixels(single) // 8}
        if network == "vae":
            return _vae(shapes, single.family) | {"sample_size": pixels(single)}
        return _text(shapes, single.family, network)
    except (KeyError, IndexError, TypeError) as error:  # ValueErrors are ours
        what = f"its {network} has no {shown(error.args[0])}" if shapes else f"has no {network}"
        raise single.error(f"{what}; take a whole model of this family") from None


def text_layers(single: SingleFile) -> list[int]:
    """Returns the numbers of layers of the text encoders."""
    names = [name for name in single.family.networks if name.startswith("text_encoder")]
    return [network_config(single, name)["num_hidden_layers"] for name in names]


def _numbers(pattern: str, shapes: Shapes) -> list[int]:
    return sorted({int(match[1]) for name in shapes if (match := re.match(pattern, name))})


def _unet(shapes: Shapes, family: Family, pooled: int) -> dict[str, Any]:
    blocks: list[list[tuple[int, int]]] = [[]]  # width and depth of the transformer of each layer
    for number in _numbers(r"input_blocks\.(\d+)\.", shapes)[1:]:
        place = f"input_blocks.{number}"
        if f"{place}.0.op.weight" in shapes:
            blocks.append([])
        else:
            depth = len(_numbers(rf"{re.escape(place)}\.1\.transformer_blocks\.(\d+)\.", shapes))
            blocks[-1].append((shapes[f"{place}.0.out_layers.3.weight"][0], depth))
    widths, depths = [block[0][0] for block in blocks], [block[0][1] for block in blocks]
    middle = len(_numbers(r"middle_block\.1\.transformer_blocks\.(\d+)\.", shapes))
    crossing = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    config = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": len(blocks[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": [max(depth, 1) for depth in depths[:-1]] + [middle],
        "attention_head_dim": HEADS if family is SD1 else [_heads(width) for width in widths],
        "cross_attention_dim": shapes[crossing][1],
        "use_linear_projection": len(shapes["middle_block.1.proj_in.weight"]) == 2,
    }
    if family is SD2:
        config["upcast_attention"] = True  # its products overflow in half precision
    if family.is_xl:
        inputs = shapes["label_emb.0.0.weight"][1]
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": (inputs - pooled) // 6}
        config["projection_class_embeddings_input_dim"] = inputs
    return config


def _heads(width: int) -> int:
    return max(1, width // HEAD_WIDTH)


def _vae(shapes: Shapes, family: Family) -> dict[str, Any]:
    blocks = _numbers(r"encoder\.down\.(\d+)\.", shapes)
    config = {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [shapes[f"encoder.down.{number}.block.0.conv1.weight"][0] for number in blocks],
        "layers_per_block": len(_numbers(r"encoder\.down\.0\.block\.(\d+)\.", shapes)),
        "down_block_types": ["DownEncoderBlock2D"] * len(blocks),
        "up_block_types": ["UpDecoderBlock2D"] * len(blocks),
        "scaling_factor": family.scaling_factor,
    }
    return config | ({"force_upcast": True} if family is SDXL else {})  # it overflows in half precision


def _text(shapes: Shapes, family: Family, network: str) -> dict[str, Any]:
    if family.networks[network].kind == OPEN_CLIP:
        tokens, positions = "token_embedding.weight", "positional_embedding"
        layer, first = "transformer.resblocks", "mlp.c_fc.weight"
    else:
        tokens, positions = (f"text_model.embeddings.{what}_embedding.weight" for what in ("token", "position"))
        layer, first = "text_model.encoder.layers", "mlp.fc1.weight"
    layers = len(_numbers(rf"{re.escape(layer)}\.(\d+)\.", shapes))
    vocabulary, width = shapes[tokens][0], shapes[tokens][1]
    projected = shapes["text_projection"][1] if network == "text_encoder_2" else width
    is_open = family.networks[network].kind == OPEN_CLIP
    return {
        "architectures": ["CLIPTextModelWithProjection" if network == "text_encoder_2" else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "max_position_embeddings": shapes[positions][0],
        "hidden_size": width,
        "intermediate_size": shapes[f"{layer}.0.{first}"][0],
        "num_hidden_layers": min(layers, SD2_TEXT_LAYERS) if family is SD2 else layers,
        "num_attention_heads": _heads(width),
        "hidden_act": "gelu" if is_open else "quick_gelu",
        "projection_dim": projected,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
    }
