"""LoRA files as diffusers' `load_lora_weights` reads them, with settings and texts in the header."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.foreign import shown
from trainers.common.lora.header import Settings, header_options, of_module, peft_settings

if TYPE_CHECKING:
    from diffusers.loaders import PeftAdapterMixin
    from peft import LoraConfig

FILE_NAME = "pytorch_lora_weights.safetensors"
ADAPTER = "default"  # peft's name for it
HEADER_BYTES = 32 << 20  # at most: tools write how often each tag occurred in training
NETWORKS = ("unet", "text_encoder", "text_encoder_2")
TENSOR = re.compile(rf"({'|'.join(NETWORKS)})\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")

# options that are always written; others only if not default, because an older peft refuses unknown ones
WRITTEN = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora", "use_rslora")


class LoraFile(NamedTuple):
    """A file's content; tensors have peft's names, and those of text encoders start with `text_model.`."""

    tensors: dict[str, dict[str, Tensor]]  # by network: {"conv_in.lora_A.weight": [rank, 4, 3, 3], ...}
    settings: dict[str, Settings]  # by network: options of peft's LoraConfig
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
        settings, scalings = self.settings[network], {}
        for module, rank in self.ranks(network).items():
            alpha = settings["alpha_pattern"].get(module.removeprefix("text_model."), settings["lora_alpha"])
            scalings[module] = alpha / (rank**0.5 if settings["use_rslora"] else rank)
        return scalings


def save_lora(folder: Path, networks: Mapping[str, PeftAdapterMixin], about: dict[str, str]) -> Path:
    """Writes a file with the adapters of networks by name, in their dtype, and the texts `about`; returns its path."""
    from peft import get_peft_model_state_dict

    tensors, settings = {}, {}
    for name, network in networks.items():
        # without the option peft asks the hub for the base's config
        state = get_peft_model_state_dict(network, adapter_name=ADAPTER, save_embedding_layers=False)
        tensors[name] = {file_name(name, key): value.detach().cpu().contiguous() for key, value in state.items()}
        modules = {key.rpartition(".lora_")[0].removeprefix("text_model.") for key in tensors[name]}
        settings[name] = _written_settings(network.peft_config[ADAPTER], sorted(modules))
    return write_lora(folder / FILE_NAME, LoraFile(tensors, settings, about))


def write_lora(path: Path, lora: LoraFile) -> Path:
    """Writes a file in diffusers' format, with the texts `about` in its header."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    layers = {f"{name}_lora_layers": transformers_keys(name, state) for name, state in lora.tensors.items()}
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


def read_lora(path: Path) -> LoraFile:
    """Reads a file (or a folder's file) in diffusers' format, including older spellings.

    The settings are what peft needs for these tensors, and follow from them and from the header's checked options.
    Raises FileNotFoundError if there is none, ValueError if it holds anything else, or numbers that are not finite.
    """
    file = find_lora(path)
    about = read_about(file)
    state = _peft_keys(read_tensors(file))
    if any(key.startswith("lora_") for key in state):
        raise InputError(f"{file}: is in the kohya format; convert it with scripts/convert_lora.py --to diffusers")
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


def check_modules(file: Path, name: str, state: dict[str, Tensor]) -> None:
    """Raises ValueError unless a network's tensors, by peft's names, are pairs of one rank that fit each other."""
    for module in {re.sub(r"\.lora_(A\.weight|B\.weight|magnitude_vector)$", "", key) for key in state}:
        down, up = (state.get(f"{module}.lora_{letter}.weight") for letter in "AB")
        place = f"{file}: {name}.{shown(module)}"
        if down is None or up is None or down.dim() < 2 or down.dim() != up.dim() or up.shape[1] != down.shape[0]:
            raise InputError(f"{place} needs lora_A and lora_B of one rank")
        if down.shape[0] < 1 or set(up.shape[2:]) - {1}:
            raise InputError(f"{place}: lora_A {list(down.shape)} and lora_B {list(up.shape)} are none of a LoRA")
        magnitude = state.get(f"{module}.lora_magnitude_vector")
        if magnitude is not None and magnitude.numel() != len(up):
            found = f"has {magnitude.numel()} numbers, and lora_B {len(up)} outputs"
            raise InputError(f"{place}: lora_magnitude_vector {found}; they must be as many")


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


def find_lora(path: Path) -> Path:
    """Returns the file itself, or a folder's pytorch_lora_weights.safetensors.

    Raises FileNotFoundError if there is none, ValueError for another extension.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise MissingFileError(f"no file {file}; give a LoRA as .safetensors, or a folder with {FILE_NAME}")
    if file.suffix != ".safetensors":  # diffusers would unpickle it
        raise InputError(f"{file}: the name of a LoRA must end in .safetensors; other formats are not read")
    return file


def read_about(path: Path) -> dict[str, str]:
    """Reads the texts of a file's header; ValueError if it is not a safetensors file."""
    file = find_lora(path)
    with _reading(file), safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def ddim_timesteps(path: Path) -> int | None:
    """Reads from a file's header for how many DDIM timesteps an LCM's LoRA was made; None if it does not say."""
    text = read_about(path).get("num_ddim_timesteps")
    if text is None:
        return None
    if re.fullmatch("[1-9][0-9]{0,3}", text) is None:
        found = f"num_ddim_timesteps = {shown(text)} in its header"
        raise InputError(f"{find_lora(path)}: {found} must be an integer from 1 to 9999")
    return int(text)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Reads a safetensors file's tensors; ValueError unless they are finite, and of floating point but for alphas."""
    with _reading(file):
        tensors = load_file(file)
    for key, value in tensors.items():
        if not (value.is_floating_point() or key.endswith(".alpha")):
            kind = str(value.dtype).removeprefix("torch.")
            raise InputError(f"{file}: {shown(key)} holds numbers of type {kind}; those of a LoRA are floating-point")
        if not value.float().isfinite().all():
            raise InputError(f"{file}: {shown(key)} holds numbers that are not finite; take a LoRA that is not broken")
    return tensors


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Checks the header's length, and turns errors of safetensors into messages."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if HEADER_BYTES < length <= file.stat().st_size:  # a longer one is none
        raise InputError(f"{file}: its header has {length:,} bytes, and at most {HEADER_BYTES:,} are read")
    try:
        yield
    except SafetensorError as error:
        text = f"cannot be read as safetensors ({shown(error)}); other formats are not read"
        raise InputError(f"{file}: {text}") from None


def _written_settings(config: LoraConfig, modules: list[str]) -> Settings:
    """Converts a LoraConfig to JSON values, with sorted sets, and the names of `modules` for regular expressions.

    It leaves out the base model's local path, and dropout, which diffusers would apply in sampling.
    """
    unwanted = ("base_model_name_or_path", "lora_dropout", "exclude_modules")
    usual = type(config)().to_dict()
    options = {key: value for key, value in config.to_dict().items() if key not in unwanted}
    if isinstance(config.target_modules, str) or config.exclude_modules:
        options["target_modules"] = modules
    kept = {key: value for key, value in options.items() if key in WRITTEN or value != usual[key]}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in kept.items()}


def file_name(network: str, key: str) -> str:
    """Returns the name of a module or tensor in files, which have `text_model.` even if transformers 5 dropped it."""
    bare = network == "unet" or key.startswith(("text_model.", "text_projection"))
    return key if bare else f"text_model.{key}"


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
