"""The rules of other programs, which judge diffloop's files, give the numbers of the programs themselves.

Measured with their own code on the files of October 2026, whose SDXL files had diffusers' names of blocks (FIELD numbers).
"""

from __future__ import annotations

import pytest
from full_size import CONFIGS, NETWORKS, family
from lora_readers import READERS, underlined


def before(columns):
    """Names in a file of before: "kohya" with diffusers' names of blocks, "diffusers" with two spellings."""
    name, targets, form = columns
    shapes, found = family(name), []
    tags = {"unet": "unet", "text_encoder": "te1" if name == "sdxl" else "te", "text_encoder_2": "te2"}
    for network in NETWORKS:
        for layer in shapes.layers(network, targets):
            if form == "kohya":
                prefix, parts = (
                    f"lora_{tags[network]}_{underlined(layer)}",
                    ("lora_down.weight", "lora_up.weight", "alpha"),
                )
            elif network == "unet":
                prefix, parts = f"unet.{layer}", ("lora_A.weight", "lora_B.weight")
            else:
                prefix, parts = f"{network}.{layer}", ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")
            found += [f"{prefix}.{part}" for part in parts]
    return found


COLUMNS = {
    ("sd1", "attention", "kohya"): 528,
    ("sd2", "attention", "kohya"): 660,
    ("sdxl", "attention", "kohya"): 2208,
    ("sd1", "all", "kohya"): 1062,
    ("sdxl", "all", "kohya"): 3174,
    ("sd1", "attention", "diffusers"): 352,
    ("sdxl", "attention", "diffusers"): 1472,
}
UNUSED = {  # tensors, by column
    "ComfyUI": (0, 0, 0, 0, 0, 256, 1120),
    "Forge": (0, 0, 0, 0, 0, 256, 1120),
    "AUTOMATIC1111": (0, 0, 0, 0, 9, 352, 1472),
    "kohya": (0, 0, 0, 12, 18, 352, 1472),
    "kohya's merge": (0, 0, 3 * 560, 3 * 4, 3 * 794, 352, 1472),
    "LyCORIS": (0, 0, 3 * 560, 0, 3 * 794, 352, 1472),  # the same network, without renaming
    "stable-diffusion.cpp": (0, 0, 0, 12, 18, 96, 352),
    "OneTrainer": (0, 0, 0, 0, 0, 96, 352),
}


def test_sizes_of_files():
    assert {column: len(before(column)) for column in COLUMNS} == COLUMNS


@pytest.mark.parametrize("reader", READERS)
def test_the_rules_give_the_programs_own_numbers(reader):
    readings = [READERS[reader](before(column), family(column[0])) for column in COLUMNS]
    assert tuple(len(reading.unused) for reading in readings) == UNUSED[reader]
    refused = {"Forge": [5, 6], "OneTrainer": [5, 6]}.get(reader, [])
    assert [number for number, reading in enumerate(readings) if reading.refused] == refused


@pytest.mark.parametrize("name", CONFIGS)
def test_original_names_are_those_that_diffusers_converts(name):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    shapes = family(name)
    names = {
        f"{original}.{part}": f"{key[1]}.{part}"
        for key, original in shapes.original.items()
        for part in ("weight", "bias")
    }
    config = {"layers_per_block": 2, "addition_embed_type": "text_time" if name == "sdxl" else None}
    found = convert_ldm_unet_checkpoint({f"model.diffusion_model.{key}": value for key, value in names.items()}, config)
    assert len(shapes.original) == (794 if name == "sdxl" else 282)
    assert found == {value: value for value in names.values()}
