"""Texts in the header of a run's LoRA file: what it was trained on, and how; no path of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from datasets_lib.errors import InputError
from datasets_lib.foreign import read_bytes, shown
from trainers.base import BaseConfig
from trainers.common.lora.kohya_texts import FAMILIES, LAYERS, VERSIONS
from trainers.common.lora.options import AdapterConfig
from trainers.common.text_to_image.base_model import BaseModel
from trainers.model_configs import read_config
from trainers.pretrained import hub_name
from trainers.version import VERSION

CONFIG, CONFIG_BYTES = "config.yaml", 1 << 20  # of a run


def config_texts(config: AdapterConfig, base: BaseConfig, adapter: dict[str, Any], targets: object) -> dict[str, str]:
    """Returns what follows from a run's configuration; `rank` and `alpha` are what was asked for."""
    return {
        "base_model": published_name(config.pretrained_model_name_or_path or ""),
        "base_revision": config.revision or "",
        "base_variant": config.variant or "",
        "rank": str(adapter["r"]),
        "alpha": f"{adapter['lora_alpha']:g}",
        **({"use_rslora": "True"} if config.use_rslora else {}),
        "target_modules": str(targets),
        "trigger_word": ", ".join(base.trigger_words),
        "resolution": str(base.resolution),
        **{name: str(value) for name, value in config.texts.unusual().items()},
        "diffloop_version": VERSION,
    }


def published_name(source: str) -> str:
    """Returns a hub name as it is, and of a path its last part."""
    return hub_name(source) or Path(source).expanduser().resolve().name


def family_texts(base_model: BaseModel) -> dict[str, str]:
    """Returns kohya's name of a base's family, except for networks of other sizes, and unusual layers of the UNet."""
    unet = read_config(base_model.folder / "unet" / "config.json")
    width, layers = unet.get("cross_attention_dim"), unet.get("layers_per_block", 2)
    family = "sdxl" if base_model.is_xl else FAMILIES.get(width, "") if isinstance(width, int) else ""
    named = {"ss_base_model_version": VERSIONS[family]} if family in VERSIONS else {}
    return named | ({} if layers == 2 else {LAYERS: str(layers)})


def base_of(folder: Path, about: dict[str, str]) -> dict[str, Any]:
    """Returns source, revision and variant of a LoRA's base: as the run's configuration beside it says, or the header.

    Raises ValueError if neither does.
    """
    names = {"pretrained_model_name_or_path": "base_model", "revision": "base_revision", "variant": "base_variant"}
    found: dict[str, Any] = {name: about.get(text) or None for name, text in names.items()}
    if (folder / CONFIG).is_file():
        try:
            document = yaml.safe_load(read_bytes(folder / CONFIG, CONFIG_BYTES))
            [section] = [section for name, section in document.items() if name != "base"]
            found = {name: section.get(name) for name in names}
        except (yaml.YAMLError, ValueError, AttributeError) as error:
            raise InputError(f"{folder / CONFIG}: is no configuration of a run ({shown(error)})") from None
    if not isinstance(found["pretrained_model_name_or_path"], str):
        raise InputError(
            f"{folder}: neither a {CONFIG} nor the LoRA's header names its base model; give a run's folder"
        )
    return found
