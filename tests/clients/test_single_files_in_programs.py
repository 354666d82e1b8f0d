"""Exported single files at full size: what other programs find in them."""

from __future__ import annotations

import re

import diffusers
import pytest
import torch
from checkpoint_readers import EPSILON, IN_XL, MEASURED, TOLD, VELOCITY, a1111, comfyui, kohya
from full_size import networks

from trainers.single_file.families import SD1, SD2, SDXL
from trainers.single_file.names import original_names
from trainers.single_file.prediction import MARKS
from trainers.single_file.tensors import as_original

FAMILIES = {"SD1": SD1, "SD2": SD2, "SDXL": SDXL}
TENSORS = {"SD1": 686 + 248 + 196, "SD2": 686 + 248 + 280, "SDXL": 1680 + 248 + 196 + 389}
TABLES = {"betas", "alphas_cumprod", "alphas_cumprod_prev"}  # of noise; who misses them computes them
# of Stable Diffusion 2's text encoder nobody reads the last of 24 layers, nor these
UNREAD = {f"cond_stage_model.model.{name}" for name in ("text_projection", "logit_scale")}
LAST_LAYER = re.compile(r"cond_stage_model\.model\.transformer\.resblocks\.23\.")


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request):
    """(family, names and shapes of the file that is exported of a pipeline of full size which predicts velocity)."""
    found = networks(request.param.lower())
    with torch.device("meta"):
        found["vae"] = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    shapes = {}
    for network, (kind, prefix) in FAMILIES[request.param].networks.items():
        state = found[network].state_dict()
        for name, keys in original_names(kind, state).items():
            shapes[prefix + name] = tuple(as_original(name, [state[key] for key in keys]).shape)
    assert len(shapes) == TENSORS[request.param]
    return request.param, shapes | dict.fromkeys(MARKS, (0,))


def without_last_layer(names):
    kept = {name for name in names if not LAST_LAYER.match(name)}
    assert len(names - kept) in (0, 12)
    return kept


def test_comfyui_uses_every_tensor(exported):
    name, shapes = exported
    reading = comfyui(shapes, spread=0.1)
    assert (reading.family, reading.prediction) == (name, EPSILON if name == "SD1" else VELOCITY)
    assert reading.unused == (set() if name == "SDXL" else set(MARKS))  # which decide for SDXL alone
    assert (
        without_last_layer(reading.missing)
        == {
            "SD1": {"cond_stage_model.logit_scale", "cond_stage_model.transformer.text_projection.weight"},
            "SD2": UNREAD,
            "SDXL": {f"{IN_XL[1]}logit_scale"},
        }[name]
    )
    assert comfyui({key: shape for key, shape in shapes.items() if key not in MARKS}).prediction == EPSILON


def test_automatic1111_uses_every_tensor(exported):
    name, shapes = exported
    reading = a1111(shapes)
    assert (reading.family, reading.prediction) == (name, {"SD1": EPSILON, "SD2": MEASURED, "SDXL": VELOCITY}[name])
    assert reading.unused == (set() if name == "SDXL" else set(MARKS))
    positions = "transformer.text_model.embeddings.position_ids"
    assert (
        without_last_layer(reading.missing)
        == {
            "SD1": TABLES | {f"cond_stage_model.{positions}"},
            "SD2": TABLES | UNREAD,
            "SDXL": {f"{IN_XL[1]}logit_scale", f"conditioner.embedders.0.{positions}", "denoiser.sigmas"},
        }[name]
    )
    missing = a1111(shapes, config="SD1").missing - reading.missing  # of a yaml beside the file
    assert bool(missing) == (name != "SD1")


def test_kohya_takes_the_file_strictly(exported):
    name, shapes = exported
    reading = kohya(shapes, name)
    assert (reading.family, reading.prediction, reading.refused) == (name, TOLD, False)
    assert (reading.missing, reading.unused) == (set(), set(MARKS))
    for other in FAMILIES.keys() - {name}:
        assert kohya(shapes, other).refused


READERS = {"ComfyUI": comfyui, "AUTOMATIC1111": a1111}


@pytest.mark.parametrize("reader", READERS)
def test_inpainting_models_are_told_by_nine_channels(exported, reader):
    name, shapes = exported
    first = "model.diffusion_model.input_blocks.0.0.weight"
    reading = READERS[reader](shapes | {first: (320, 9, 3, 3)})
    assert reading.family == f"{name} inpainting"
    assert first not in reading.missing


def test_rules_see_names_that_programs_do_not_know(exported):
    """As of pipelines whose text encoders were saved by transformers 5, if their keys were taken as they are."""
    name, shapes = exported
    bare = {re.sub(r"(transformer\.)text_model\.", r"\1", key): shape for key, shape in shapes.items()}
    lost = {reader: len(read(bare).missing - read(shapes).missing) for reader, read in READERS.items()}
    lost["kohya"] = len(kohya(bare, name).missing)
    assert set(lost.values()) == {196 if name == "SDXL" else 0}  # mended in files of Stable Diffusion 1 alone


def test_without_a_network_it_is_missed(exported):
    name, shapes = exported
    for prefix, count in (("model.diffusion_model.out.", 4), ("first_stage_model.", 248)):
        rest = {key: shape for key, shape in shapes.items() if not key.startswith(prefix)}
        for found in (comfyui(rest), a1111(rest), kohya(rest, name)):
            assert len([key for key in found.missing if key.startswith(prefix)]) == count
