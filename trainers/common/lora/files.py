"""LoRA files as diffusers' `load_lora_weights` reads them, with settings and texts in the header."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor

from datasets_lib.errors import InputError
from trainers.common.lora.header import header_number, peft_settings
from trainers.common.lora.lora_file import LoraFile, file_name
from trainers.common.lora.reading import read_file
from trainers.common.lora.tensors import FILE_NAME, find_lora, lora_parts, read_about
from trainers.weight_files import write_tensors

if TYPE_CHECKING:
    from diffusers.loaders import PeftAdapterMixin

ADAPTER = "default"  # peft's name for it


def lora_of(networks: Mapping[str, PeftAdapterMixin], about: dict[str, str]) -> LoraFile:
    """Collects the adapters of networks by name, on the CPU and in their dtype, with the texts `about`."""
    from peft import get_peft_model_state_dict

    lora = LoraFile({}, {}, about)
    for name, network in networks.items():
        # without the option peft asks the hub for the base's config
        state = get_peft_model_state_dict(network, adapter_name=ADAPTER, save_embedding_layers=False)
        lora.tensors[name] = {file_name(name, key): value.detach().cpu().contiguous() for key, value in state.items()}
        scalings = {file_name(name, key): getattr(module, "scaling", {}) for key, module in network.named_modules()}
        ranks, config = lora.ranks(name), network.peft_config[ADAPTER]
        alphas = {module: rank * scalings[module][ADAPTER] for module, rank in ranks.items()}
        lora.settings[name] = peft_settings(ranks, alphas, config.use_dora, rslora=False)
        if not (isinstance(config.target_modules, str) or config.exclude_modules):
            lora.settings[name]["target_modules"] = sorted(config.target_modules)  # shorter than the modules' names
    return lora


def save_lora(folder: Path, networks: Mapping[str, PeftAdapterMixin], about: dict[str, str]) -> Path:
    """Writes a folder's file in diffusers' format from the adapters of networks; returns its path."""
    return write_lora(folder / FILE_NAME, lora_of(networks, about))


def write_lora(path: Path, lora: LoraFile) -> Path:
    """Writes a file in diffusers' format, folded, with its texts in the header."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    lora = lora.folded()
    layers = {f"{name}_lora_layers": transformers_keys(name, state) for name, state in lora.tensors.items()}
    settings = {f"{name}_lora_adapter_metadata": dict(value) for name, value in lora.settings.items()}
    writer = StableDiffusionXLLoraLoaderMixin  # its format for Stable Diffusion is the same
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.save_lora_weights(path.parent, weight_name=path.name, **layers, **settings)
    tensors, about = load_file(path), lora.about | read_about(path) | {"format": "pt"}
    path.unlink()  # it can be read by its owner alone
    write_tensors(tensors, path, about)
    return path


def read_lora(path: Path) -> LoraFile:
    """Reads a LoRA of any program that is known here, from a file or a folder.

    The settings are what peft needs for these tensors, and follow from them and from checked options.
    Raises FileNotFoundError if there is none, ValueError if it holds anything else, or numbers that are not finite.
    """
    first, *others = map(read_file, lora_parts(path))
    for other in others:  # peft has a folder for each network
        if twice := first.tensors.keys() & other.tensors.keys():
            raise InputError(f"{path}: two of its folders hold a LoRA of {', '.join(sorted(twice))}; one must")
        merged = first.tensors | other.tensors, first.settings | other.settings, first.about | other.about
        first = LoraFile(*merged, first.notes + other.notes)
    return first


def ddim_timesteps(path: Path) -> int | None:
    """Reads from a file's header for how many DDIM timesteps an LCM's LoRA was made; None if it does not say."""
    return header_number(str(find_lora(path)), read_about(path), "num_ddim_timesteps")


def transformers_keys(network: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts text encoders to the spelling that works for all modules; peft's does only for plain attention."""
    from diffusers.utils.state_dict_utils import convert_state_dict

    mapping = {"lora_A": "lora_linear_layer.down", "lora_B": "lora_linear_layer.up"}
    mapping["magnitude_vector"] = "magnitude_vector.weight"
    return state if network == "unet" else convert_state_dict(state, mapping)
