"""DiTTransformer2DModels: from a folder, a JSON file, a name in configs/models, or a default that fits the grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from trainers.common.model_files import (
    Grid,
    Settings,
    channel_misfits,
    load_pretrained,
    read_settings,
    settings_problems,
)

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

SHAPE = ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim")
PATCHES = 16  # at most, along a side, by default


def default_dit(grid: Grid) -> Settings:
    """DiT-S of arXiv 2212.09748, table 1, with the smallest patches that give at most 16 along a side."""
    sizes = range(1, grid.resolution + 1)
    patch_size = next(size for size in sizes if grid.resolution % size == 0 and grid.resolution // size <= PATCHES)
    return dict(zip(SHAPE, (patch_size, 12, 6, 64), strict=True))


def dit_problems(model_config: str | None, grid: Grid) -> Iterator[str]:
    """Yields why the network cannot work on the grid, without importing heavy libraries."""
    read = partial(read_settings, model_config, default_dit, grid)
    return settings_problems("a DiTTransformer2DModel", read, partial(dit_misfits, grid=grid))


def dit_misfits(settings: Mapping[str, Any], grid: Grid) -> Iterator[str]:
    """Yields how a config does not fit the grid."""
    missing = [name for name in SHAPE if name not in settings]
    if missing:  # diffusers' defaults are those of DiT-XL
        yield f"is no config of a DiTTransformer2DModel: it does not say {', '.join(missing)}"
        return
    inputs = settings["in_channels"]
    outputs = settings.get("out_channels") or inputs
    if outputs == 2 * inputs:
        yield f"has out_channels = {outputs}, half of them a variance, which is not trained here; it must be {inputs}"
        outputs = inputs
    yield from channel_misfits({"in_channels": inputs, "out_channels": outputs}, grid)
    patch_size, width = settings["patch_size"], settings["num_attention_heads"] * settings["attention_head_dim"]
    if patch_size < 1 or grid.resolution % patch_size:
        yield f"has patch_size = {patch_size}, which must divide {grid.source[1]} = {grid.resolution}"
    if settings["sample_size"] != grid.resolution:
        found = f"has positions for sample_size = {settings['sample_size']}, {grid.source[1]} is {grid.resolution}"
        yield f"{found}; make them equal"
    if width < 1 or width % 4:
        product = "num_attention_heads x attention_head_dim"
        yield f"has {product} = {width}, which must be a multiple of 4: sine and cosine of two coordinates"


def build_dit(model_config: str | None, pretrained: str | None, grid: Grid, num_classes: int) -> DiTTransformer2DModel:
    """Builds the network in float32, with random weights or those of a folder (or its sub-folder `transformer`).

    It has an embedding per class and a last one for "no class". Raises ValueError if pretrained weights do not fit
    the classes or the grid.
    """
    from diffusers import DiTTransformer2DModel

    settings = {"num_embeds_ada_norm": num_classes, "norm_type": "ada_norm_zero"}
    if pretrained is None:
        transformer = DiTTransformer2DModel.from_config(read_settings(model_config, default_dit, grid) | settings)
        initialize(transformer)
    else:
        place, misfits = ("pretrained_model_name_or_path", pretrained), partial(dit_misfits, grid=grid)
        transformer = load_pretrained(DiTTransformer2DModel, place, "transformer", misfits, settings)
    for block in transformer.transformer_blocks:
        # the task drops labels; diffusers would, too, and needs a dropout above 0 to make the "no class" row
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return transformer


def initialize(transformer: DiTTransformer2DModel) -> None:
    """Initialises the weights as arXiv 2212.09748 does, which diffusers leaves out.

    adaLN-Zero, section 3.2: the layers that make scales, shifts and gates start at 0, so that each block is the
    identity; so does the last layer.
    """
    from torch import nn

    for module in transformer.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.flatten(1))  # a patch embedding is a linear layer
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in transformer.transformer_blocks:
        embedding = block.norm1.emb
        times = embedding.timestep_embedder
        for layer in (times.linear_1, times.linear_2, embedding.class_embedder.embedding_table):
            nn.init.normal_(layer.weight, std=0.02)
    modulations = [block.norm1.linear for block in transformer.transformer_blocks]
    for layer in (*modulations, transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
