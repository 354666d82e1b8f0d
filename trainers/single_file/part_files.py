"""Writes a network of a single file into a pipeline's folder, by the hub's names and in the file's precision."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from trainers.single_file.configs import network_config
from trainers.single_file.families import KINDS
from trainers.single_file.reading import network_tensors
from trainers.single_file.recognition import SingleFile
from trainers.weight_files import write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHTS = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
PREFIX = "text_model."  # of a text encoder's tensors in files, which transformers 5 drops in memory
NONE: Mapping[str, Any] = MappingProxyType({})


def write_part(
    folder: Path,
    single: SingleFile,
    network: str,
    dtype: torch.dtype | None = None,
    changed: Mapping[str, Tensor] = NONE,
    settings: Mapping[str, Any] = NONE,
) -> None:
    """Writes config and weights into a folder; `changed` are other values of tensors, `settings` of the config.

    Raises ValueError for numbers that are not finite.
    """
    import diffusers
    import transformers

    library, name = KINDS[network]
    kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    found = {}
    for key, value in network_tensors(single, network, kind):
        found[key] = changed.get(key, value).to(dtype or value.dtype).contiguous()
        if not found[key].isfinite().all():
            raise single.error(f"{network}.{key} holds numbers that are not finite; take --dtype float32")
    if library == "transformers":
        found = {key if key.startswith((PREFIX, "text_projection")) else PREFIX + key: found[key] for key in found}
    config = network_config(single, network) | dict(settings)
    config |= {"torch_dtype": "float32"} if library == "transformers" else {}  # in which diffusers reads the others
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tensors(found, folder / WEIGHTS[library])
