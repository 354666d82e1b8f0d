"""LoRA files as diffusers' `load_lora_weights` reads them, with settings and texts in the header."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from trainers.common.lora.header import Settings, header_number, header_options, of_module, peft_settings
from trainers.common.lora.kohya import of_kohya
from trainers.common.lora.lora_file import NETWORKS, LoraFile, check_modules, file_name
from trainers.common.lora.tensors import FILE_NAME, find_lora, read_about, read_tensors, write_tensors

if TYPE_CHECKING:
    from diffusers.loaders import PeftAdapterMixin

ADAPTER = "default"  # peft's name for it
TENSOR = re.compile(rf"({'|'.join(NETWORKS)})\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")


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
    return write_tensors(path, load_file(path), lora.about | read_about(path))


def read_lora(path: Path) -> LoraFile:
    """Reads a file (or a folder's file) in diffusers' format, including older spellings.

    The settings are what peft needs for these tensors, and follow from them and from the header's checked options.
    Raises FileNotFoundError if there is none, ValueError if it holds anything else, or numbers that are not finite.
    """
    file = find_lora(path)
    about = read_about(file)
    state = read_tensors(file)
    if any(key.startswith("lora_") for key in state):
        return of_kohya(file, state, about)
    state = _peft_keys(state)
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = TENSOR.fullmatch(key)
        if match is None:
            raise InputError(f"{file}: {shown(key)} is no tensor of a LoRA of {', '.join(NETWORKS)}")
        tensors.setdefault(match[1], {})[file_name(match[1], f"{match[2]}.{match[3]}")] = value
    if not tensors:
        raise InputError(f"{file}: holds no tensor")
    for name, state in tensors.items():
        check_modules(file, name, state)
    options = header_options(str(file), about)
    lora = LoraFile(tensors, {}, about)
    for name in tensors:
        lora.settings[name] = _settings_for(f"{file}: {name}", options.get(name, {}), lora, name)
    return lora


def _settings_for(place: str, options: Settings, lora: LoraFile, network: str) -> Settings:
    """Returns peft's settings of a network's tensors; ValueError if the header's options are for others."""
    ranks = {module.removeprefix("text_model."): rank for module, rank in lora.ranks(network).items()}
    doras = sum(key.endswith("magnitude_vector") for key in lora.tensors[network])
    if doras not in (0, len(ranks)):
        raise InputError(f"{place}: {doras} of {len(ranks)} modules have a lora_magnitude_vector; all or none must")
    if options.get("use_dora", doras > 0) != (doras > 0):
        raise InputError(f"{place}: use_dora = {options['use_dora']} in its header, and {doras} modules are DoRAs")
    own_rank, own_alpha = (of_module(options.get(f"{name}_pattern", {})) for name in ("rank", "alpha"))
    rslora, alphas = options.get("use_rslora", False), {}
    for module, rank in ranks.items():
        said = own_rank(module) or options.get("r", rank)
        if said != rank:
            found = f"is of rank {rank}, and the header says {shown(said)}"
            raise InputError(f"{place}.{shown(module)}: {found}; the file is not as its program wrote it")
        alphas[module] = own_alpha(module) or options.get("lora_alpha", rank**0.5 if rslora else rank)
    return peft_settings(ranks, alphas, doras > 0, rslora)


def ddim_timesteps(path: Path) -> int | None:
    """Reads from a file's header for how many DDIM timesteps an LCM's LoRA was made; None if it does not say."""
    return header_number(str(find_lora(path)), read_about(path), "num_ddim_timesteps")


def transformers_keys(network: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts text encoders to the spelling that works for all modules; peft's does only for plain attention."""
    from diffusers.utils.state_dict_utils import convert_state_dict

    mapping = {"lora_A": "lora_linear_layer.down", "lora_B": "lora_linear_layer.up"}
    mapping["magnitude_vector"] = "magnitude_vector.weight"
    return state if network == "unet" else convert_state_dict(state, mapping)


def _peft_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts diffusers' three spellings to peft's."""
    from diffusers.utils import state_dict_utils as spellings

    text = {key: value for key, value in state.items() if key.startswith("text_encoder")}
    others = {key: value for key, value in state.items() if key not in text}
    mapping = spellings.DIFFUSERS_OLD_TO_PEFT | spellings.DIFFUSERS_TO_PEFT
    text = spellings.convert_state_dict(text, mapping | {"magnitude_vector.weight": "magnitude_vector"})
    return text | spellings.convert_unet_state_dict_to_peft(others)
