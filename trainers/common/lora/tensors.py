"""Reads and writes safetensors files with the texts of their headers; the files may come from others."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.foreign import entries, shown
from trainers.common.lora.lora_file import NETWORKS

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_NAME, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
WANTED = f"{FILE_NAME}, or peft's {PEFT_NAME}"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HEADER_BYTES = 32 << 20  # at most: tools write how often each tag occurred in training


def lora_parts(path: Path) -> list[Path]:
    """Returns the files of a LoRA's tensors: the file itself or a folder's, of which peft writes one per network.

    Raises FileNotFoundError if there is none, ValueError for another extension.
    """
    if not path.is_dir():
        return [_checked(path)]
    folders = (path, *(path / network for network in NETWORKS))
    if not (path / FILE_NAME).is_file() and (found := [f / PEFT_NAME for f in folders if (f / PEFT_NAME).is_file()]):
        return found
    if not (path / FILE_NAME).is_file():
        if (path / "state.json").is_file() or any(path.glob("checkpoint-*/state.json")):
            command = f"python scripts/convert_lora.py {shlex.quote(shown(path))} FILE.safetensors"
            raise MissingFileError(f"no file {path / FILE_NAME}; {command} makes it of a checkpoint")
        others = [file.name for file in entries(path) if file.suffix in (".safetensors", *PICKLES)]
        advice = f"it has {', '.join(map(shown, others[:5]))}: give a file" if others else f"or a folder with {WANTED}"
        raise MissingFileError(f"no file {path / FILE_NAME}; give a LoRA as .safetensors, {advice}")
    return [path / FILE_NAME]


def _checked(file: Path) -> Path:
    if not file.is_file():
        raise MissingFileError(f"no file {file}; give a LoRA as .safetensors, or a folder with {WANTED}")
    if file.suffix in PICKLES:  # diffusers would unpickle it
        why = "this one is a pickle, which can run code when it is read"
        raise InputError(f"{file}: the name of a LoRA must end in .safetensors; {why}: save it anew as safetensors")
    if file.suffix != ".safetensors":
        raise InputError(f"{file}: the name of a LoRA must end in .safetensors; other formats are not read")
    return file


def find_lora(path: Path) -> Path:
    """Returns the file with the header of a LoRA, the first of lora_parts; raises as that."""
    return lora_parts(path)[0]


def lora_files(path: Path) -> list[Path]:
    """Returns all files that a LoRA's meaning depends on: its tensors, and peft's settings."""
    parts = lora_parts(path)
    configs = (part.with_name(PEFT_CONFIG) for part in parts)
    return parts + [config for config in configs if config.is_file()]


def read_about(path: Path) -> dict[str, str]:
    """Reads the texts of a file's header; ValueError if it is not a safetensors file."""
    file = find_lora(path)
    with _reading(file), safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def read_names(file: Path) -> list[str]:
    """Reads the names of a safetensors file's tensors, without the tensors."""
    with _reading(file), safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Reads a safetensors file's tensors, those in 8 bits as float32, which holds their values.

    Raises ValueError unless they are finite, and of floating point but for alphas.
    """
    with _reading(file):
        tensors = load_file(file)
    for key, value in tensors.items():
        kind = str(value.dtype).removeprefix("torch.")
        if kind.startswith("float8"):
            tensors[key] = value = value.float()
        if value.dtype not in NUMBERS and not (key.endswith(".alpha") and value.dtype in WHOLE):
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
