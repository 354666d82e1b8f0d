"""Stable Diffusion's networks as CompVis, Stability and OpenCLIP build them: names and shapes of all tensors.

Nothing of diffloop or of a library is used: these are what programs make before they look into a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

Shapes = dict[str, tuple[int, ...]]
Tensors = Iterator[tuple[str, tuple[int, ...]]]
TOKENS, LENGTH = 49408, 77


class Design(NamedTuple):
    """What differs between UNets."""

    depths: tuple[int, ...]  # transformer blocks behind each residual block, by level; 0: no attention
    middle: int  # transformer blocks in the middle
    context: int  # width of the text
    linear: bool  # whether the transformers' projections are linear, and not convolutions
    sizes: int | None  # width of the embedding of sizes
    widths: tuple[int, ...] = (1, 2, 4, 4)  # in units of `base`
    base: int = 320
    inputs: int = 4


DESIGNS = {
    "SD1": Design((1, 1, 1, 0), 1, 768, False, None),
    "SD2": Design((1, 1, 1, 0), 1, 1024, True, None),
    "SDXL": Design((0, 2, 10), 10, 2048, True, 2816, widths=(1, 2, 4)),
}


def _layer(name: str, *shape: int, bias: bool = True) -> Tensors:
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def unet(design: Design) -> Tensors:
    base, time = design.base, 4 * design.base
    yield from _two_layers("time_embed", time, base)
    if design.sizes:
        yield from _two_layers("label_emb.0", time, design.sizes)
    yield from _layer("input_blocks.0.0", base, design.inputs, 3, 3)
    width, number, skipped = base, 0, [base]
    for level, (factor, depth) in enumerate(zip(design.widths, design.depths, strict=True)):
        for _ in range(2):
            number += 1
            yield from _block(f"input_blocks.{number}", width, base * factor, depth, design)
            width = base * factor
            skipped.append(width)
        if level < len(design.widths) - 1:
            number += 1
            yield from _layer(f"input_blocks.{number}.0.op", width, width, 3, 3)
            skipped.append(width)
    yield from _resnet("middle_block.0", width, width, time)
    yield from _transformer("middle_block.1", width, design.middle, design)
    yield from _resnet("middle_block.2", width, width, time)
    number = 0
    for level in reversed(range(len(design.widths))):
        after, depth = base * design.widths[level], design.depths[level]
        for layer in range(3):
            yield from _block(f"output_blocks.{number}", width + skipped.pop(), after, depth, design)
            width = after
            if level and layer == 2:
                yield from _layer(f"output_blocks.{number}.{2 if depth else 1}.conv", width, width, 3, 3)
            number += 1
    yield from _layer("out.0", width)
    yield from _layer("out.2", 4, width, 3, 3)


def _two_layers(name: str, width: int, inputs: int) -> Tensors:
    yield from _layer(f"{name}.0", width, inputs)
    yield from _layer(f"{name}.2", width, width)


def _block(name: str, before: int, after: int, depth: int, design: Design) -> Tensors:
    yield from _resnet(f"{name}.0", before, after, 4 * design.base)
    if depth:
        yield from _transformer(f"{name}.1", after, depth, design)


def _resnet(name: str, before: int, after: int, time: int) -> Tensors:
    yield from _layer(f"{name}.in_layers.0", before)
    yield from _layer(f"{name}.in_layers.2", after, before, 3, 3)
    yield from _layer(f"{name}.emb_layers.1", after, time)
    yield from _layer(f"{name}.out_layers.0", after)
    yield from _layer(f"{name}.out_layers.3", after, after, 3, 3)
    if before != after:
        yield from _layer(f"{name}.skip_connection", after, before, 1, 1)


def _transformer(name: str, width: int, depth: int, design: Design) -> Tensors:
    square = (width, width) if design.linear else (width, width, 1, 1)
    yield from _layer(f"{name}.norm", width)
    yield from _layer(f"{name}.proj_in", *square)
    yield from _layer(f"{name}.proj_out", *square)
    for number in range(depth):
        block = f"{name}.transformer_blocks.{number}"
        for norm in (1, 2, 3):
            yield from _layer(f"{block}.norm{norm}", width)
        for attention, source in (("attn1", width), ("attn2", design.context)):
            yield from _layer(f"{block}.{attention}.to_q", width, width, bias=False)
            yield from _layer(f"{block}.{attention}.to_k", width, source, bias=False)
            yield from _layer(f"{block}.{attention}.to_v", width, source, bias=False)
            yield from _layer(f"{block}.{attention}.to_out.0", width, width)
        yield from _layer(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from _layer(f"{block}.ff.net.2", width, 4 * width)


def vae() -> Tensors:
    """The autoencoder that all three have: 4 channels, and 8 pixels to a side."""
    widths = (128, 256, 512, 512)
    yield from _layer("encoder.conv_in", widths[0], 3, 3, 3)
    for level, width in enumerate(widths):
        before = widths[max(level - 1, 0)]
        for layer in range(2):
            yield from _vae_resnet(f"encoder.down.{level}.block.{layer}", width if layer else before, width)
        if level < 3:
            yield from _layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    yield from _vae_middle("encoder", 512, 8)
    yield from _layer("quant_conv", 8, 8, 1, 1)
    yield from _layer("post_quant_conv", 4, 4, 1, 1)
    yield from _layer("decoder.conv_in", 512, 4, 3, 3)
    for level, width in enumerate(widths):  # counted from the picture, so the last one comes first
        before = widths[min(level + 1, 3)]
        for layer in range(3):
            yield from _vae_resnet(f"decoder.up.{level}.block.{layer}", width if layer else before, width)
        if level:
            yield from _layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    yield from _vae_middle("decoder", 128, 3)


def _vae_middle(side: str, width: int, outputs: int) -> Tensors:
    for number in (1, 2):
        yield from _vae_resnet(f"{side}.mid.block_{number}", 512, 512)
    yield from _layer(f"{side}.mid.attn_1.norm", 512)
    for name in ("q", "k", "v", "proj_out"):
        yield from _layer(f"{side}.mid.attn_1.{name}", 512, 512, 1, 1)
    yield from _layer(f"{side}.norm_out", width)
    yield from _layer(f"{side}.conv_out", outputs, width, 3, 3)


def _vae_resnet(name: str, before: int, after: int) -> Tensors:
    yield from _layer(f"{name}.norm1", before)
    yield from _layer(f"{name}.conv1", after, before, 3, 3)
    yield from _layer(f"{name}.norm2", after)
    yield from _layer(f"{name}.conv2", after, after, 3, 3)
    if before != after:
        yield from _layer(f"{name}.nin_shortcut", after, before, 1, 1)


def clip_l() -> Tensors:
    """The text encoder of OpenAI's CLIP, in the names that transformers 4 has."""
    yield "text_model.embeddings.token_embedding.weight", (TOKENS, 768)
    yield "text_model.embeddings.position_embedding.weight", (LENGTH, 768)
    for number in range(12):
        layer = f"text_model.encoder.layers.{number}"
        for name in ("q", "k", "v", "out"):
            yield from _layer(f"{layer}.self_attn.{name}_proj", 768, 768)
        yield from _layer(f"{layer}.mlp.fc1", 4 * 768, 768)
        yield from _layer(f"{layer}.mlp.fc2", 768, 4 * 768)
        for norm in (1, 2):
            yield from _layer(f"{layer}.layer_norm{norm}", 768)
    yield from _layer("text_model.final_layer_norm", 768)


def open_clip(width: int, layers: int) -> Tensors:
    """OpenCLIP's text encoder, which has query, key and value in one matrix."""
    yield "token_embedding.weight", (TOKENS, width)
    yield "positional_embedding", (LENGTH, width)
    yield "text_projection", (width, width)
    yield "logit_scale", ()
    for number in range(layers):
        layer = f"transformer.resblocks.{number}"
        yield f"{layer}.attn.in_proj_weight", (3 * width, width)
        yield f"{layer}.attn.in_proj_bias", (3 * width,)
        yield from _layer(f"{layer}.attn.out_proj", width, width)
        yield from _layer(f"{layer}.mlp.c_fc", 4 * width, width)
        yield from _layer(f"{layer}.mlp.c_proj", width, 4 * width)
        for norm in (1, 2):
            yield from _layer(f"{layer}.ln_{norm}", width)
    yield from _layer("ln_final", width)
