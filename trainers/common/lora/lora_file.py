"""A LoRA's content, whatever format it was read from: tensors by network and module, and what scales them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from trainers.common.lora.header import Settings

NETWORKS = ("unet", "text_encoder", "text_encoder_2")


class LoraFile(NamedTuple):
    """A file's content; tensors have peft's names, and those of text encoders start with `text_model.`."""

    tensors: dict[str, dict[str, Tensor]]  # by network: {"conv_in.lora_A.weight": [rank, 4, 3, 3], ...}
    settings: dict[str, Settings]  # by network: options of peft's LoraConfig
    about: dict[str, str]  # the whole header
    notes: tuple[str, ...] = ()  # what of the file is left out

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

    def folded(self) -> LoraFile:
        """Returns the same LoRA with alpha = rank: B is multiplied by the scale, for readers that know no alpha.

        B keeps its dtype if the product is exact in it, and is float32 otherwise.
        """
        tensors, settings = {}, {}
        for network, state in self.tensors.items():
            tensors[network] = dict(state)
            for module, scaling in self.scalings(network).items():
                up = tensors[network][f"{module}.lora_B.weight"] = scaled(state[f"{module}.lora_B.weight"], scaling)
                if not up.isfinite().all():
                    found = f"times its scale alpha / rank, {scaling:g}, its B is not finite"
                    raise InputError(f"{shown(f'{network}.{module}')}: {found}; lower its alpha")
            own = self.settings[network]
            equal = {"lora_alpha": own["r"], "alpha_pattern": dict(own["rank_pattern"]), "use_rslora": False}
            settings[network] = own | equal
        return LoraFile(tensors, settings, self.about)


def scaled(up: Tensor, scaling: float) -> Tensor:
    """Multiplies a matrix in float32, and returns it in its own dtype if that holds the same numbers."""
    product = up.float() * scaling
    narrow = product.to(up.dtype)
    return narrow if torch.equal(narrow.float(), product) else product


def check_modules(file: Path, name: str, state: dict[str, Tensor]) -> None:
    """Raises ValueError unless a network's tensors, by peft's names, are pairs of one rank that fit each other."""
    for module in {re.sub(r"\.lora_(A\.weight|B\.weight|magnitude_vector)$", "", key) for key in state}:
        place, down, up = f"{file}: {name}.{shown(module)}", *(state.get(f"{module}.lora_{x}.weight") for x in "AB")
        _, up = check_pair(place, down, up)
        magnitude = state.get(f"{module}.lora_magnitude_vector")
        if magnitude is not None and magnitude.numel() != len(up):
            found = f"has {magnitude.numel()} numbers, and lora_B {len(up)} outputs"
            raise InputError(f"{place}: lora_magnitude_vector {found}; they must be as many")


def check_pair(place: str, down: Tensor | None, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns A and B; ValueError unless both are there, and of one rank."""
    if down is None or up is None or down.dim() < 2 or down.dim() != up.dim() or up.shape[1] != down.shape[0]:
        raise InputError(f"{place} needs lora_A and lora_B (lora_down and lora_up) of one rank")
    if down.shape[0] < 1 or set(up.shape[2:]) - {1}:
        raise InputError(f"{place}: lora_A {list(down.shape)} and lora_B {list(up.shape)} are none of a LoRA")
    return down, up


def file_name(network: str, key: str) -> str:
    """Returns the name of a module or tensor in files, which have `text_model.` even if transformers 5 dropped it."""
    bare = network == "unet" or key.startswith(("text_model.", "text_projection"))
    return key if bare else f"text_model.{key}"
