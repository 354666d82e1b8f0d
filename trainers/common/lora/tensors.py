"""Reads and writes safetensors files with the texts of their headers; the files may come from others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.foreign import shown

FILE_NAME = "pytorch_lora_weights.safetensors"
HEADER_BYTES = 32 << 20  # at most: tools write how often each tag occurred in training


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
