"""Reads a LoRA file of any program: each tensor's name says what it is, and nothing is passed over in silence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from trainers.common.lora.foreign_kinds import check_kind
from trainers.common.lora.header import SETTINGS_KEY, Settings, header_options, of_module, peft_settings
from trainers.common.lora.lora_file import NETWORKS, LoraFile, check_pair, file_name
from trainers.common.lora.peft_folder import PREFIX, peft_options
from trainers.common.lora.spellings import KOHYAS, READ, spelled
from trainers.common.lora.tensors import read_about, read_names, read_tensors

EMBEDDING = "bundle_emb."  # of OneTrainer, beside a LoRA that was trained with it

Parts = dict[str, Tensor]  # of a module, by the names of spellings.PART


def read_file(file: Path) -> LoraFile:
    """Reads a file's tensors and settings; ValueError if it holds anything else than a LoRA of Stable Diffusion."""
    about, names = read_about(file), read_names(file)
    check_kind(file, [name for name in names if not name.startswith(EMBEDDING)])
    state = read_tensors(file)
    notes = _without_embeddings(file, state)
    modules = _modules(file, state)
    if any(key.startswith(KOHYAS) for key in state):  # every reader takes their alphas, and none the header's
        about.pop(SETTINGS_KEY, None)
    alone = next(iter(modules)) if len(modules) == 1 else ""
    options, place = header_options(str(file), about, alone), "its header"
    if any(key.startswith(PREFIX) for key in state):
        options, place = {network: peft_options(file, network) for network in modules}, "its adapter_config.json"
    lora = LoraFile({}, {}, about, notes)
    for network, own in modules.items():
        alphas = {}
        tensors = lora.tensors[network] = {}
        for module, parts in own.items():
            name = file_name(network, module)
            here = f"{file}: {network}.{shown(name)}"
            tensors |= {f"{name}.{part}": value for part, value in _factors(here, parts).items()}
            if "alpha" in parts:
                alphas[name] = _alpha(here, parts["alpha"])
        where = f"{file}: {network}"
        lora.settings[network] = _settings_for(where, place, options.get(network, {}), lora, network, alphas)
    return lora


def _without_embeddings(file: Path, state: dict[str, Tensor]) -> tuple[str, ...]:
    """Removes the tensors of embeddings, and returns notes that say so."""
    found = [key for key in state if key.startswith(EMBEDDING)]
    for key in found:
        del state[key]
    words = dict.fromkeys(key.removeprefix(EMBEDDING).rpartition(".")[0] for key in found)
    if not words:
        return ()
    what = f"{len(words)} embedding{'s' if len(words) > 1 else ''} ({shown(', '.join(words))})"
    return (f"{file}: only its LoRA is read; left out: {what}, trained with it for words of prompts",)


def _modules(file: Path, state: Mapping[str, Tensor]) -> dict[str, dict[str, Parts]]:
    """Sorts tensors by network and module; ValueError for a name that is unknown, and for two of one meaning."""
    encoder = file.parent.name if file.parent.name in NETWORKS[1:] else NETWORKS[1]  # as peft's folders are called
    modules: dict[str, dict[str, Parts]] = {}
    names: dict[tuple[str, ...], str] = {}
    for key, value in state.items():
        meaning = spelled(key, encoder)
        if meaning is None:
            known = f"is no tensor of a LoRA of {', '.join(NETWORKS)} that is known here"
            raise InputError(f"{file}: {shown(key)} {known}; read are files of {READ}")
        if (other := names.setdefault(meaning, key)) != key:
            raise InputError(f"{file}: {shown(other)} and {shown(key)} mean the same tensor; remove one of them")
        modules.setdefault(meaning.network, {}).setdefault(meaning.module, {})[meaning.part] = value
    if not modules:
        raise InputError(f"{file}: holds no tensor of a LoRA")
    return modules


def _factors(place: str, parts: Parts) -> dict[str, Tensor]:
    """Returns a module's tensors by peft's names; ValueError unless they are a pair of one rank that fits."""
    down, up = check_pair(place, parts.get("down"), parts.get("up"))
    if "mid" in parts:
        down, up = _with_kernel(place, parts["mid"], down), up.float()
    found = {"lora_A.weight": down, "lora_B.weight": up}
    for part in {"magnitude", "dora_scale"} & parts.keys():
        found["lora_magnitude_vector"] = _magnitude(place, part, parts[part], up)
    return found


def _with_kernel(place: str, mid: Tensor, down: Tensor) -> Tensor:
    """Returns the convolution that is LyCORIS' lora_down, of kernel 1, and lora_mid after it ("Tucker"), in float32."""
    rank = len(down)
    if mid.dim() != down.dim() or tuple(mid.shape[:2]) != (rank, rank) or set(down.shape[2:]) != {1}:
        raise InputError(f"{place}: lora_mid {list(mid.shape)} does not fit lora_down {list(down.shape)}")
    return torch.einsum("ij...,jk->ik...", mid.float(), down.flatten(1).float()).contiguous()


def _magnitude(place: str, part: str, scale: Tensor, up: Tensor) -> Tensor:
    """Returns peft's magnitude vector, [out] or [1, out, 1, 1]."""
    is_per_output = part == "magnitude" or (scale.dim() > 0 and len(scale) == scale.numel())
    if scale.numel() != len(up) or not is_per_output:
        name = "lora_magnitude_vector" if part == "magnitude" else part
        found = f"{name} has the shape {list(scale.shape)}, and lora_B {len(up)} outputs"
        wanted = "one number for each output is wanted (OneTrainer and LyCORIS have an option for norms of inputs)"
        raise InputError(f"{place}: {found}; {wanted}")
    return scale.flatten() if up.dim() == 2 else scale.reshape(1, -1, *[1] * (up.dim() - 2))


def _alpha(place: str, value: Tensor) -> float:
    if value.numel() != 1 or not value.item() > 0:
        found = shown(value.tolist()) if value.numel() <= 1 else list(value.shape)
        raise InputError(f"{place}.alpha is {found}; one positive number is wanted")
    return float(value)


def _settings_for(
    where: str, place: str, options: Settings, lora: LoraFile, network: str, alphas: Mapping[str, float]
) -> Settings:
    """Returns peft's settings of a network's tensors, with `alphas` of tensors before those of the options.

    Raises ValueError if the options, which stand in a `place`, are for other tensors.
    """
    ranks = {module.removeprefix("text_model."): rank for module, rank in lora.ranks(network).items()}
    doras = sum(key.endswith("magnitude_vector") for key in lora.tensors[network])
    if doras not in (0, len(ranks)):
        what = f"{doras} of {len(ranks)} modules are DoRAs, with a lora_magnitude_vector or dora_scale"
        raise InputError(f"{where}: {what}; all or none must be")
    if options.get("use_dora", doras > 0) != (doras > 0):
        raise InputError(f"{where}: use_dora = {options['use_dora']} in {place}, and {doras} modules are DoRAs")
    own_rank, own_alpha = (of_module(options.get(f"{name}_pattern", {})) for name in ("rank", "alpha"))
    rslora = options.get("use_rslora", False)
    found = {}
    for module, rank in ranks.items():
        said = own_rank(module) or options.get("r", rank)
        if said != rank:
            problem = f"is of rank {rank}, and {place} says {shown(said)}"
            raise InputError(f"{where}.{shown(module)}: {problem}; the file is not as its program wrote it")
        found[module] = own_alpha(module) or options.get("lora_alpha", rank**0.5 if rslora else rank)
    if not alphas:
        return peft_settings(ranks, found, doras > 0, rslora)
    scaled = {module: alpha * ranks[module] ** 0.5 if rslora else alpha for module, alpha in found.items()}
    given = {module.removeprefix("text_model."): alpha for module, alpha in alphas.items()}
    return peft_settings(ranks, scaled | given, doras > 0, rslora=False)
