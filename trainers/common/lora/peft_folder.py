"""Folders as peft's save_pretrained writes them: adapter_model.safetensors of one network, adapter_config.json."""

from __future__ import annotations

from pathlib import Path

from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.foreign import read_json, shown
from trainers.common.lora.header import Settings, checked_options
from trainers.common.lora.tensors import PEFT_CONFIG

PREFIX = "base_model.model."  # of names in such files, which do not say which network it is
CONFIG_BYTES = 1 << 20


def peft_options(file: Path, network: str) -> Settings:
    """Reads the options beside a file of a network's tensors; raises as header_options, or if they are not there."""
    config = file.with_name(PEFT_CONFIG)
    if not config.is_file():
        raise MissingFileError(f"no file {config}, which says alpha; peft writes it beside {file.name}: take both")
    options = read_json(config, CONFIG_BYTES)
    if not isinstance(options, dict):
        raise InputError(f"{config}: must be a JSON object, found {shown(options)}")
    if (kind := options.get("peft_type", "LORA")) != "LORA":
        raise InputError(f"{config}: peft_type = {shown(kind)}; only LORA is read, with or without DoRA and rsLoRA")
    named = {f"{network}.{option}": value for option, value in options.items()}
    return checked_options(str(config), named, "it").get(network, {})
