"""Texts of a LoRA's header in the words that kohya's tools, AUTOMATIC1111 and model sites show: ss_* and modelspec.*"""

from __future__ import annotations

import json
from collections.abc import Mapping

from trainers.common.lora.header import text_settings
from trainers.common.lora.lora_file import LoraFile
from trainers.common.text_to_image.prompts import TextSettings
from trainers.single_file.families import ORIGINAL_CODE, SD1, SD2, SDXL, architecture_of

LAYERS = "layers_per_block"  # of a UNet that has not two, as the original networks have
FAMILIES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # by the width of the captions' embeddings
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
ARCHITECTURES = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}


def family_of(lora: LoraFile) -> str | None:
    """Returns sd1, sd2 or sdxl: what the header says, or else what the tensors show; None if they do not."""
    for family, version in VERSIONS.items():
        if lora.about.get("ss_base_model_version", "").startswith(version):
            return family
    unet = lora.tensors.get("unet", {})
    widths = {value.shape[1] for key, value in unet.items() if key.endswith("attn2.to_k.lora_A.weight")}
    deep = any(".transformer_blocks.1." in key for key in unet)  # SDXL alone has several in a layer
    if "text_encoder_2" in lora.tensors or deep:
        return "sdxl"
    return FAMILIES.get(widths.pop()) if len(widths) == 1 else None


def kohya_texts(about: Mapping[str, str], family: str | None, title: str) -> dict[str, str]:
    """Returns kohya's and modelspec's fields for a file called `title`, from diffloop's own texts."""
    predicts_v = about.get("prediction_type") == "v_prediction"
    found = {"ss_output_name": title, "modelspec.sai_model_spec": "1.0.1", "modelspec.title": title}
    if family is not None:
        version = VERSIONS[family] + ("_v" if family == "sd2" and predicts_v else "")
        found |= {"ss_base_model_version": version, "ss_v2": str(family == "sd2")}
        found["modelspec.architecture"] = f"{architecture_of(ARCHITECTURES[family], predicts_v)}/lora"
        found["modelspec.implementation"] = ORIGINAL_CODE if family == "sdxl" else "diffusers"
    if base := about.get("base_model"):
        found["ss_sd_model_name"] = base
    if size := about.get("resolution"):
        found |= {"ss_resolution": f"({size}, {size})", "modelspec.resolution": f"{size}x{size}"}
    if about.get("prediction_type"):
        found["modelspec.prediction_type"] = "v" if predicts_v else "epsilon"
    if about.get("rescale_betas_zero_snr"):
        found["ss_zero_terminal_snr"] = "True"
    if trigger := about.get("trigger_word"):
        found |= {"modelspec.trigger_phrase": trigger, "modelspec.usage_hint": f"Write {trigger} in the prompt"}
        found["ss_tag_frequency"] = json.dumps({title: dict.fromkeys(trigger.split(", "), 1)})
    return found | _of_captions(about, family)


def _of_captions(about: Mapping[str, str], family: str | None) -> dict[str, str]:
    """Returns kohya's spelling of how texts were embedded; its clip skip counts from 1, and is none of SDXL's."""
    settings = text_settings("INPUT", about) or TextSettings()
    skipped = {} if family == "sdxl" or settings.clip_skip is None else {"ss_clip_skip": str(settings.clip_skip + 1)}
    return skipped | ({"ss_max_token_length": str(settings.max_caption_tokens)} if settings.chunks > 1 else {})
