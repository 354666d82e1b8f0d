"""What other programs find in a single file of Stable Diffusion: their rules in our own words.

Each reader takes names and shapes of a file's tensors, and says which family and prediction it finds, what its networks
miss, and what it does not use. No line of diffloop is used here. Compared with ComfyUI 0.19 itself, whose UNets and
autoencoder are those of original_networks.py tensor by tensor and whose text encoders miss the same, with kohya's
conversions, which take 686, 248, 196 and 372, 1,680 and 517 tensors in both directions, and with OpenCLIP's class.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from original_networks import DESIGNS, Design, Shapes, Tensors, clip_l, open_clip, unet, vae

UNET, VAE = "model.diffusion_model.", "first_stage_model."
FIRST = f"{UNET}input_blocks.0.0.weight"
IN_SD1, IN_SD2 = "cond_stage_model.transformer.", "cond_stage_model.model."
IN_XL = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
OLD_TEXT = re.compile(rf"{re.escape(IN_SD1)}(?=(embeddings|encoder|final_layer_norm)\.)")  # without text_model.
POSITIONS = "text_model.embeddings.position_ids"
EPSILON, VELOCITY, MEASURED, TOLD = "epsilon", "v_prediction", "by a trial of the UNet", "by the user"


class Reading(NamedTuple):
    family: str  # "" if it knows none, "... inpainting" with 9 channels
    prediction: str
    missing: set[str]  # names that its networks want, and the file has not, or in another shape
    unused: set[str]
    refused: bool = False  # of what is missing or not used


def _reading(family: str, prediction: str, found: Shapes, wanted: Shapes) -> Reading:
    missing = {name for name, shape in wanted.items() if found.get(name) != shape}
    return Reading(family, prediction, missing, found.keys() - wanted.keys())


def _under(prefix: str, tensors: Tensors) -> Shapes:
    return {f"{prefix}{name}": shape for name, shape in tensors}


def _renamed(shapes: Shapes) -> Shapes:
    """Text encoders of early merges get the level that they lack; all three programs do this."""
    return {OLD_TEXT.sub(f"{IN_SD1}text_model.", name): shape for name, shape in shapes.items()}


# ComfyUI: builds the UNet that the shapes show, and takes the family whose numbers it has ------------------------------


def comfyui(shapes: Shapes, spread: float = 0.0) -> Reading:
    """`spread` is the standard deviation of the bias that decides what a Stable Diffusion 2 predicts."""
    design = _seen(shapes)
    kinds = [name for name, known in DESIGNS.items() if design._replace(inputs=4) == known]
    if not kinds:
        return Reading("", "", set(), set(shapes), refused=True)
    [kind] = kinds
    wanted = _under(UNET, unet(design)) | _under(VAE, vae())
    if kind == "SD1":
        shapes, prediction = _renamed(shapes), EPSILON  # always
        wanted |= _under(IN_SD1, clip_l())
        wanted |= {"cond_stage_model.logit_scale": (), f"{IN_SD1}text_projection.weight": (768, 768)}
    elif kind == "SD2":
        prediction = VELOCITY if design.inputs == 4 and spread > 0.09 else EPSILON
        wanted |= _under(IN_SD2, open_clip(1024, 24))
    else:
        prediction = VELOCITY if "v_pred" in shapes else EPSILON
        wanted |= _under(IN_XL[0], clip_l()) | _under(IN_XL[1], open_clip(1280, 32))
        wanted |= {mark: (0,) for mark in ("v_pred", "ztsnr") if mark in shapes}
    return _reading(kind + (" inpainting" if design.inputs > 4 else ""), prediction, shapes, wanted)


def _seen(shapes: Shapes) -> Design:
    """The design of a UNet by its shapes, two residual blocks in each level."""
    base, inputs = shapes[FIRST][:2]
    depths, widths, depth, width = [], [], 0, 0
    blocks = len({name.split(".")[3] for name in shapes if name.startswith(f"{UNET}input_blocks.")})
    for number in range(1, blocks):
        place = f"{UNET}input_blocks.{number}"
        if f"{place}.0.op.weight" in shapes:
            depths, widths = [*depths, depth], [*widths, width]
        else:
            depth = _depth(shapes, place)
            width = shapes[f"{place}.0.out_layers.3.weight"][0] // base
    middle = f"{UNET}middle_block"
    return Design(
        (*depths, depth),
        _depth(shapes, middle),
        shapes[f"{middle}.1.transformer_blocks.0.attn2.to_k.weight"][1],
        len(shapes[f"{middle}.1.proj_in.weight"]) == 2,
        shapes.get(f"{UNET}label_emb.0.0.weight", (0, None))[1],
        (*widths, width),
        base,
        inputs,
    )


def _depth(shapes: Shapes, place: str) -> int:
    pattern = re.compile(rf"{re.escape(place)}\.1\.transformer_blocks\.(\d+)\.")
    return len({match[1] for name in shapes if (match := pattern.match(name))})


# AUTOMATIC1111: one tensor decides which of its configs the networks are built by; what does not fit is passed over ----


def a1111(shapes: Shapes, config: str | None = None) -> Reading:
    """`config` is the family of a yaml file beside it, which comes before all else."""
    shapes = _renamed(shapes)
    kind = config or _guessed(shapes)
    inputs = shapes[FIRST][1]
    design = DESIGNS.get(kind)
    if design is None:
        return Reading(kind, "", set(), set(shapes), refused=True)
    wanted = _under(UNET, unet(design._replace(inputs=inputs))) | _under(VAE, vae())
    prediction = VELOCITY if "v_pred" in shapes else EPSILON
    if kind == "SD1":
        prediction = EPSILON
        wanted |= _under(IN_SD1, clip_l()) | {f"{IN_SD1}{POSITIONS}": (1, 77)}
    elif kind == "SD2":
        prediction = MEASURED if inputs == 4 else EPSILON
        wanted |= _under(IN_SD2, open_clip(1024, 24))
    else:
        wanted |= _under(IN_XL[0], clip_l()) | _under(IN_XL[1], open_clip(1280, 32))
        wanted |= {f"{IN_XL[0]}{POSITIONS}": (1, 77), "denoiser.sigmas": (1000,)}
        wanted |= {mark: (0,) for mark in ("v_pred", "ztsnr") if mark in shapes}
    if kind != "SDXL":
        wanted |= dict.fromkeys(("betas", "alphas_cumprod", "alphas_cumprod_prev"), (1000,))  # it computes them
    return _reading(kind + (" inpainting" if inputs == 9 else ""), prediction, shapes, wanted)


def _guessed(shapes: Shapes) -> str:
    if f"{IN_XL[1]}ln_final.weight" in shapes:
        return "SDXL"
    if "conditioner.embedders.0.model.ln_final.weight" in shapes:
        return "refiner of SDXL"
    if shapes.get(f"{IN_SD2}transformer.resblocks.0.attn.in_proj_weight", (0, 0))[1] == 1024:
        return "SD2"
    return "SD1"


# kohya's sd-scripts: the family is an argument, and its networks take all tensors under their prefixes, or none --------


UNREAD_BY_KOHYA = re.compile(
    rf".*{POSITIONS}$|{re.escape(IN_SD2)}(transformer\.resblocks\.23\.|text_projection$)|.*logit_scale$"
)


def kohya(shapes: Shapes, family: str) -> Reading:
    shapes = _renamed(shapes)
    wanted = _under(UNET, unet(DESIGNS[family])) | _under(VAE, vae())
    if family == "SD1":
        wanted |= _under(IN_SD1, clip_l())
    elif family == "SD2":
        wanted |= _under(IN_SD2, open_clip(1024, 23))
    else:
        wanted |= _under(IN_XL[0], clip_l()) | _under(IN_XL[1], open_clip(1280, 32))
    wanted = {name: shape for name, shape in wanted.items() if not UNREAD_BY_KOHYA.match(name)}
    reading = _reading(family, TOLD, shapes, wanted)
    strict = (UNET, IN_SD1, IN_SD2, *IN_XL)
    surplus = [name for name in reading.unused if name.startswith(strict) and not UNREAD_BY_KOHYA.match(name)]
    return reading._replace(refused=bool(reading.missing or surplus))
