"""Writes a pipeline with changed networks: by the base's names of files and tensors; all else is copied from it."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainers.common.text_to_image.pipeline_files import lacks_vocabulary, write_vocabulary
from trainers.inference.lora_pipeline import check_values
from trainers.model_configs import INDEX, read_config
from trainers.single_file.header import is_single_file
from trainers.single_file.part_files import PREFIX, write_part
from trainers.single_file.recognition import SingleFile, open_single_file
from trainers.single_file.skeleton import write_skeleton
from trainers.weight_files import copy_part, copy_texts, forget_places, rewrite_weights, weight_files


def write_merged(pipeline: Any, changed: Set[str], folder: Path, dtype: torch.dtype | None) -> None:
    """Writes a pipeline that was read from a folder, and whose parts `changed` are others than in its files.

    With a dtype all networks are cast to it; otherwise every tensor keeps its file's. Raises ValueError for weights
    that are not finite.
    """
    base = Path(pipeline.config._name_or_path)
    if is_single_file(base):
        return _write_of_single_file(pipeline, changed, folder, dtype, open_single_file(base, str(base)))
    parts = {name: part for name, part in pipeline.components.items() if part is not None}
    for name, part in parts.items():
        if isinstance(part, nn.Module) and (name in changed or dtype is not None):
            copy_texts(base / name, folder / name)
            _write_network(name, base / name, folder / name, part, dtype)
        elif name in changed:
            part.save_pretrained(folder / name)
        else:
            copy_part(base / name, folder / name)
        if name.startswith("tokenizer") and lacks_vocabulary(folder / name):
            write_vocabulary(folder / name, part)
    index = _index(read_config(base / INDEX), pipeline.components)
    index |= {name: ["diffusers", type(parts[name]).__name__] for name in changed & {"scheduler"}}
    forget_places(folder)
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_of_single_file(
    pipeline: Any, changed: Set[str], folder: Path, dtype: torch.dtype | None, single: SingleFile
) -> None:
    folder.mkdir(parents=True)
    write_skeleton(folder, single)
    for network in single.family.networks:
        values = getattr(pipeline, network).state_dict() if network in changed else {}
        write_part(folder / network, single, network, dtype, values)
    if "scheduler" in changed:
        pipeline.scheduler.save_pretrained(folder / "scheduler")
        index = read_config(folder / INDEX) | {"scheduler": ["diffusers", type(pipeline.scheduler).__name__]}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _index(of_base: dict[str, Any], components: dict[str, Any]) -> dict[str, Any]:
    """Returns the base's index with the parts that are here; a safety checker, for one, is left out."""
    index = {name: value for name, value in of_base.items() if name != "_name_or_path"}
    for name, value in of_base.items():
        if isinstance(value, list) and components.get(name) is None:
            index[name] = [None, None]
    return index | ({"requires_safety_checker": False} if "safety_checker" in components else {})


def _write_network(name: str, source: Path, target: Path, network: nn.Module, dtype: torch.dtype | None) -> None:
    """Writes a network's files again with its values in memory; those that it does not have are cast at most."""
    state = {key.removeprefix(PREFIX): value for key, value in network.state_dict().items()}

    def change(key: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        found = state.get(key.removeprefix(PREFIX), value).to(dtype or value.dtype)
        check_values(f"{name}.{key}", found)
        return found

    rewrite_weights([file for file in weight_files(source) if file.variant is None], target, change)
