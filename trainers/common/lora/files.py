"""LoRA files as diffusers' `load_lora_weights` reads them, with settings and texts in the header."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.loaders import PeftAdapterMixin
    from peft import LoraConfig

FILE_NAME = "pytorch_lora_weights.safetensors"
ADAPTER = "default"  # peft's name for it
SETTINGS_KEY = "lora_adapter_metadata"  # diffusers' entry of the header: JSON of "network.option"
NETWORKS = ("unet", "text_encoder", "text_encoder_2")
TENSOR = re.compile(rf"({'|'.join(NETWORKS)})\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")

# options that are always written; others only if not default, because an older peft refuses unknown ones
WRITTEN = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora", "use_rslora")

Settings = dict[str, Any]  # options of peft's LoraConfig


class LoraFile(NamedTuple):
    """A file's content; tensors have peft's names, and those of text encoders start with `text_model.`."""

    tensors: dict[str, dict[str, Tensor]]  # by network: {"conv_in.lora_A.weight": [rank, 4, 3, 3], ...}
    settings: dict[str, Settings]  # by network; empty if the header has none
    about: dict[str, str]  # the whole header

    @property
    def is_dora(self) -> bool:
        return any(key.endswith("magnitude_vector") for state in self.tensors.values() for key in state)

    def ranks(self, network: str) -> dict[str, int]:
        """Returns the rank of each module that has a LoRA."""
        factors = self.tensors[network].items()
        return {key.removesuffix(".lora_A.weight"): len(value) for key, value in factors if key.endswith("A.weight")}

    def scalings(self, network: str) -> dict[str, float]:
        """Returns the factor of B @ A by module: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        from peft.utils.other import get_pattern_key

        settings, scalings = self.settings[network], {}
        patterns, usual = settings.get("alpha_pattern") or {}, settings.get("lora_alpha")
        for module, rank in self.ranks(network).items():
            alpha = patterns.get(get_pattern_key(list(patterns), module), usual)
            divisor = rank**0.5 if settings.get("use_rslora") else rank
            scalings[module] = 1.0 if alpha is None else alpha / divisor
        return scalings


def save_lora(folder: Path, networks: Mapping[str, PeftAdapterMixin], about: dict[str, str]) -> Path:
    """Writes a file with the adapters of networks by name, in their dtype, and the texts `about`; returns its path."""
    from peft import get_peft_model_state_dict

    tensors, settings = {}, {}
    for name, network in networks.items():
        # without the option peft asks the hub for the base's config
        state = get_peft_model_state_dict(network, adapter_name=ADAPTER, save_embedding_layers=False)
        tensors[name] = {_file_name(name, key): value.detach().cpu().contiguous() for key, value in state.items()}
        settings[name] = _written_settings(network.peft_config[ADAPTER])
    return write_lora(folder / FILE_NAME, LoraFile(tensors, settings, about))


def write_lora(path: Path, lora: LoraFile) -> Path:
    """Writes a file in diffusers' format, with the texts `about` in its header."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    layers = {f"{name}_lora_layers": _transformers_keys(name, state) for name, state in lora.tensors.items()}
    settings = {f"{name}_lora_adapter_metadata": dict(value) for name, value in lora.settings.items()}
    writer = StableDiffusionXLLoraLoaderMixin  # its format for Stable Diffusion is the same
    writer.save_lora_weights(path.parent, weight_name=path.name, **layers, **settings)
    return write_tensors(path, load_file(path), lora.about | read_about(path))


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> Path:
    """Writes a file from tensors and the texts of its header."""
    save_file(tensors, path, metadata=about | {"format": "pt"})
    make_readable(path)
    return path


def make_readable(path: Path) -> None:
    """Gives a file the default mode, because safetensors makes files that only their owner can read."""
    other = path.with_name(f".{path.name}-mode")  # os.umask() reads by setting, for all threads
    other.touch()
    path.chmod(other.stat().st_mode & 0o777)
    other.unlink()


def load_lora(path: Path, networks: dict[str, nn.Module]) -> None:
    """Loads a file (or a folder's file) into the adapters "default" of networks, in the adapters' dtype.

    Raises FileNotFoundError if there is none, ValueError if networks, modules, shapes or scalings differ.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    lora = read_lora(path)
    if set(lora.tensors) != set(networks):
        found, wanted = ", ".join(lora.tensors), ", ".join(networks)
        raise ValueError(f"{path}: holds a LoRA of {found}, and {wanted} has one here; the networks must be the same")
    own = {}
    for name, network in networks.items():
        wanted = get_peft_model_state_dict(network, adapter_name=ADAPTER, save_embedding_layers=False)
        keys = {_file_name(name, key): key for key in wanted}
        _check_shapes(path, name, lora.tensors[name], {key: wanted[short] for key, short in keys.items()})
        _check_scalings(path, name, lora.scalings(name), network)
        own[name] = {keys[key]: value for key, value in lora.tensors[name].items()}
    for name, network in networks.items():
        set_peft_model_state_dict(network, own[name], ADAPTER)


def _check_shapes(path: Path, name: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    advice = "the LoRA's targets must be the same"
    for keys, what in ((wanted.keys() - found.keys(), "lacks"), (found.keys() - wanted.keys(), "has besides")):
        if keys:
            example = f"{len(keys)} tensors of {name}, such as {min(keys)}"
            raise ValueError(f"{path}: {what} {example}; {advice}")
    for key, value in found.items():
        shapes = f"{list(value.shape)}, and {list(wanted[key].shape)} is wanted"
        if value.shape != wanted[key].shape:
            raise ValueError(f"{path}: {name}.{key} is {shapes}; rank and base model must be the same")


def _check_scalings(path: Path, name: str, found: dict[str, float], network: nn.Module) -> None:
    modules = {_file_name(name, key): module for key, module in network.named_modules()}
    for key, scaling in found.items():
        wanted = modules[key].scaling[ADAPTER]
        if abs(scaling - wanted) > 1e-6 * abs(wanted):
            scalings = f"scaled by {scaling:g}, and by {wanted:g} here"
            raise ValueError(f"{path}: {name}.{key} is {scalings}; rank, alpha and rsLoRA must be the same")


def read_lora(path: Path) -> LoraFile:
    """Reads a file (or a folder's file) in diffusers' format, including older spellings.

    Raises FileNotFoundError if there is none, ValueError if it holds anything else.
    """
    file = find_lora(path)
    about = read_about(file)
    state = _peft_keys(load_file(file))
    if any(key.startswith("lora_") for key in state):
        raise ValueError(f"{file}: is in the kohya format; convert it with scripts/convert_lora.py --to diffusers")
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = TENSOR.fullmatch(key)
        if match is None:
            raise ValueError(f"{file}: {key} is no tensor of a LoRA of {', '.join(NETWORKS)}")
        tensors.setdefault(match[1], {})[_file_name(match[1], f"{match[2]}.{match[3]}")] = value
    if not tensors:
        raise ValueError(f"{file}: holds no tensor")
    for name, state in tensors.items():
        _check_pairs(file, name, state)
    settings: dict[str, Settings] = {name: {} for name in tensors}
    for key, value in json.loads(about.get(SETTINGS_KEY, "{}")).items():
        name, _, option = key.partition(".")
        settings.setdefault(name, {})[option] = value
    return LoraFile(tensors, settings, about)


def _check_pairs(file: Path, name: str, state: dict[str, Tensor]) -> None:
    for module in {re.sub(r"\.lora_(A\.weight|B\.weight|magnitude_vector)$", "", key) for key in state}:
        down, up = (state.get(f"{module}.lora_{letter}.weight") for letter in "AB")
        if down is None or up is None or up.shape[1] != down.shape[0]:
            raise ValueError(f"{file}: {name}.{module} needs lora_A and lora_B of one rank")


def find_lora(path: Path) -> Path:
    """Returns the file itself, or a folder's pytorch_lora_weights.safetensors.

    Raises FileNotFoundError if there is none, ValueError for another extension.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; give a LoRA as .safetensors, or a folder with {FILE_NAME}")
    if file.suffix != ".safetensors":  # diffusers would unpickle it
        raise ValueError(f"{file}: the name of a LoRA must end in .safetensors; other formats are not read")
    return file


def read_about(path: Path) -> dict[str, str]:
    """Reads the texts of a file's header; ValueError if it is not a safetensors file."""
    file = find_lora(path)
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file}: cannot be read as safetensors ({error}); other formats are not read") from None


def _written_settings(config: LoraConfig) -> Settings:
    """Converts a LoraConfig to JSON values, with sorted sets.

    It leaves out the base model's local path, and dropout, which diffusers would apply in sampling.
    """
    unwanted = ("base_model_name_or_path", "lora_dropout")
    usual = type(config)().to_dict()
    options = {key: value for key, value in config.to_dict().items() if key not in unwanted}
    kept = {key: value for key, value in options.items() if key in WRITTEN or value != usual[key]}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in kept.items()}


def _file_name(network: str, key: str) -> str:
    """Returns the name of a module or tensor in files, which have `text_model.` even if transformers 5 dropped it."""
    bare = network == "unet" or key.startswith(("text_model.", "text_projection"))
    return key if bare else f"text_model.{key}"


def _transformers_keys(network: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
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
