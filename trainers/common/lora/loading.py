"""Loads LoRA files into adapters that are trained, and into diffusers' pipelines."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from trainers.common.diffusion.sampling import adapted_sampler
from trainers.common.lora.files import ADAPTER, read_lora, transformers_keys
from trainers.common.lora.header import scheduler_changes
from trainers.common.lora.lora_file import LoraFile, file_name


def load_into_pipeline(pipeline: Any, file: Path, lora: LoraFile, adapter: str) -> None:
    """Loads a file's content as an adapter of a pipeline's networks; ValueError if it does not fit them.

    Not by `load_lora_weights`, which would read the file again, and hand its header to peft as it is.
    """
    check_fit(file, lora, pipeline)
    with warnings.catch_warnings():  # several adapters of a network are what is asked for
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute in the model", UserWarning)
        _add_adapter(pipeline, lora, adapter)


def adapt_sampler(pipeline: Any, loras: Mapping[Path, LoraFile]) -> None:
    """Gives a pipeline's scheduler the prediction type and noise that the LoRAs were trained with.

    Raises ValueError if two of them were trained with different ones, each other than its base's.
    """
    changes: dict[str, Any] = {}
    for file, lora in loras.items():
        for name, value in scheduler_changes(str(file), lora.about).items():
            if changes.setdefault(name, value) != value:
                found = f"was trained with {name}: {value}, and another LoRA with {changes[name]}"
                raise InputError(f"{file}: {found}; give one of them a weight of 0")
    if changes:
        pipeline.scheduler = adapted_sampler(pipeline.scheduler, changes)


def _add_adapter(pipeline: Any, lora: LoraFile, adapter: str) -> None:
    for network, state in lora.tensors.items():
        given = {f"{network}.{key}": value for key, value in transformers_keys(network, state).items()}
        settings = {f"{network}.{option}": value for option, value in lora.settings[network].items()}
        options = {"network_alphas": None, "metadata": settings, "adapter_name": adapter, "low_cpu_mem_usage": True}
        if network == "unet":
            pipeline.load_lora_into_unet(given, unet=pipeline.unet, _pipeline=pipeline, **options)
        else:
            options |= {"prefix": network, "lora_scale": pipeline.lora_scale, "_pipeline": pipeline}
            pipeline.load_lora_into_text_encoder(given, text_encoder=getattr(pipeline, network), **options)


def check_fit(file: Path, lora: LoraFile, pipeline: Any) -> None:
    """Raises ValueError if the pipeline lacks modules that the LoRA changes; diffusers would only warn."""
    advice = "take the base that it was trained on"
    for network, state in lora.tensors.items():
        owner = getattr(pipeline, network, None)
        if owner is None:
            raise InputError(f"{file}: changes {network}, and the base has none; {advice}")
        layers = dict(owner.named_modules())
        for module in lora.ranks(network):
            layer = layers.get(module, layers.get(module.removeprefix("text_model.")))
            layer = getattr(layer, "base_layer", layer)  # under an adapter
            shape = [len(state[f"{module}.lora_B.weight"]), *state[f"{module}.lora_A.weight"].shape[1:]]
            weight = getattr(layer, "weight", None)
            found = "missing" if weight is None else list(weight.shape)
            if found != shape:
                name = shown(f"{network}.{module}")
                raise InputError(f"{file}: changes {name} {shape}, which in the base is {found}; {advice}")


def load_lora(path: Path, networks: dict[str, nn.Module]) -> tuple[str, ...]:
    """Loads a file (or a folder's file) into the adapters "default" of networks, in the adapters' dtype.

    Raises FileNotFoundError if there is none, ValueError if networks, modules or shapes differ; another scale is
    multiplied into B, so that training starts from what the file does. Returns notes of what the file holds besides.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    lora = read_lora(path)
    if set(lora.tensors) != set(networks):
        found, wanted = ", ".join(lora.tensors), ", ".join(networks)
        raise InputError(f"{path}: holds a LoRA of {found}, and {wanted} has one here; the networks must be the same")
    own = {}
    for name, network in networks.items():
        wanted = get_peft_model_state_dict(network, adapter_name=ADAPTER, save_embedding_layers=False)
        keys = {file_name(name, key): key for key in wanted}
        _check_shapes(path, name, lora.tensors[name], {key: wanted[short] for key, short in keys.items()})
        own[name] = {keys[key]: value for key, value in _rescaled(lora, name, network).items()}
    for name, network in networks.items():
        set_peft_model_state_dict(network, own[name], ADAPTER)
    return lora.notes


def _check_shapes(path: Path, name: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    advice = "the LoRA's targets must be the same"
    for keys, what in ((wanted.keys() - found.keys(), "lacks"), (found.keys() - wanted.keys(), "has besides")):
        if keys:
            example = f"{len(keys)} tensors of {name}, such as {shown(min(keys))}"
            raise InputError(f"{path}: {what} {example}; {advice}")
    for key, value in found.items():
        shapes = f"{list(value.shape)}, and {list(wanted[key].shape)} is wanted"
        if value.shape != wanted[key].shape:
            raise InputError(f"{path}: {name}.{shown(key)} is {shapes}; rank and base model must be the same")


def _rescaled(lora: LoraFile, name: str, network: nn.Module) -> dict[str, Tensor]:
    """Returns tensors for a network's adapter, which is scaled by its own alpha / r, to act as the file's do."""
    modules = {file_name(name, key): module for key, module in network.named_modules()}
    tensors = dict(lora.tensors[name])
    for module, scaling in lora.scalings(name).items():
        key = f"{module}.lora_B.weight"
        tensors[key] = tensors[key].float() * (scaling / modules[module].scaling[ADAPTER])
    return tensors
