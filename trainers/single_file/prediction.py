"""Finds out whether a single file's UNet predicts noise or velocity, which the file says, or one beside it."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from datasets_lib.foreign import read_bytes, shown
from trainers.single_file.families import SD2, V_OF_SD2
from trainers.single_file.recognition import SingleFile

EPSILON, VELOCITY = "epsilon", "v_prediction"  # diffusers' words
WORDS = {"epsilon": EPSILON, "eps": EPSILON, "v": VELOCITY, "v_prediction": VELOCITY, "v-prediction": VELOCITY}
MARKS = "v_pred", "ztsnr"  # empty tensors that programs look for: velocity, and noise without any signal at its end
YAML_BYTES = 1 << 20  # at most


def prediction_type(single: SingleFile) -> str:
    """Returns diffusers' prediction_type; ValueError for a Stable Diffusion 2 that does not say it."""
    found = said_prediction(single)
    if found is None and single.family is SD2 and not single.is_inpainting:
        raise single.error(
            "is a Stable Diffusion 2, and does not say whether it predicts velocity (of 768 pixels) or noise (the base "
            f"of 512): give its config as {_yaml(single).name} beside it, as AUTOMATIC1111 reads it, or a file of that "
            "name with the one line model: {params: {parameterization: v}} (or eps)"
        )
    return found or EPSILON


def said_prediction(single: SingleFile) -> str | None:
    """Returns what the file, or the config beside it, says; None if neither does."""
    return _marked(single) or _beside(single)


def pixels(single: SingleFile) -> int:
    """Returns the side of the pictures that the model was trained on, by its header or as usual in its family."""
    if said := re.fullmatch(r"(\d{2,4})x\1", single.header.about.get("modelspec.resolution", "")):
        return int(said[1])
    is_larger = single.family is SD2 and said_prediction(single) == VELOCITY
    return V_OF_SD2[0] if is_larger else single.family.pixels


def has_zero_snr(single: SingleFile) -> bool:
    """Whether the last timestep is pure noise, arXiv 2305.08891."""
    return MARKS[1] in single.header.shapes


def _marked(single: SingleFile) -> str | None:
    """Returns what the file itself says, by an empty tensor or in its header; ValueError for another prediction."""
    if MARKS[0] in single.header.shapes:
        return VELOCITY
    about = single.header.about
    said = about.get("modelspec.prediction_type") or ""
    if said and said.lower() not in WORDS:
        raise single.error(f"its header says modelspec.prediction_type = {shown(said)}; known are epsilon and v")
    architecture = {"stable-diffusion-v2-512": EPSILON, "stable-diffusion-v2-768-v": VELOCITY}
    return WORDS.get(said.lower()) or architecture.get(about.get("modelspec.architecture", ""))


def _yaml(single: SingleFile) -> Path:
    return single.path.with_suffix(".yaml")


def _beside(single: SingleFile) -> str | None:
    """Returns what a config of the original code beside the file says, in which nothing stands for noise."""
    path = _yaml(single)
    if not path.is_file():
        return None
    try:
        said = yaml.safe_load(read_bytes(path, YAML_BYTES))["model"]["params"].get("parameterization", "eps")
        return WORDS[said]
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        wanted = "must hold model: {params: {parameterization: v}} or eps, as configs of the original code do"
        raise single.error(f"the config beside it, {shown(path.name)}, {wanted}") from None
