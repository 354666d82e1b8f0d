"""Reads the header of a safetensors file: names, types and shapes of its tensors, and texts about it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from datasets_lib.errors import InputError
from datasets_lib.foreign import regular_size, shown

MOST_BYTES = 32 << 20  # of a header; that of Stable Diffusion XL has 0.4 MB
ENDING = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OTHERS = (*PICKLES, ".gguf")


class Header(NamedTuple):
    """The names, shapes and types of a file's tensors, and its texts, without the tensors."""

    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]  # such as F16, in safetensors' words
    about: dict[str, str]


def is_single_file(source: str | Path) -> bool:
    """Whether a source is one file, there or not, and neither a folder nor a hub name."""
    path = Path(source)
    return path.is_file() or (path.suffix.lower() in (ENDING, *OTHERS) and not path.is_dir())


def read_header(path: Path) -> Header:
    """Reads and checks a header, without torch; ValueError for a file of another format."""
    size = regular_size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if MOST_BYTES < length <= size:  # a longer one is none
        raise InputError(f"{shown(path)}: its header has {length:,} bytes, and at most {MOST_BYTES:,} are read")
    try:
        with safe_open(path, "np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 is no mapping
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            types = {name: str(part.get_dtype()) for name, part in slices.items()}
            return Header(shapes, types, dict(opened.metadata() or {}))
    except SafetensorError as error:
        found = f"cannot be read as safetensors ({shown(error)})"
        raise InputError(f"{shown(path)}: {found}; is its download complete?") from None
