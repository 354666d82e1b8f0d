"""CLIP's vocabulary, from the package open-clip-torch: single files hold none, and the hub is not needed."""

from __future__ import annotations

import gzip
import json
from importlib.util import find_spec
from pathlib import Path

from datasets_lib.errors import FileError, MissingFileError

PACKAGE, FILE = "open_clip", "bpe_simple_vocab_16e6.txt.gz"
ADVICE = "pip install 'diffloop[single-file]', or pip install open-clip-torch"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 49408
MERGES = TOKENS - 2 * 256 - 2  # all tokens but letters, letters that end a word, and the two marks
LENGTH = 77  # of a row of tokens


def find_vocabulary() -> Path:
    """Finds the vocabulary without importing the package; raises MissingFileError if it is not installed."""
    spec = find_spec(PACKAGE)
    path = Path(spec.origin).with_name(FILE) if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise MissingFileError(f"a single file holds no vocabulary of its text encoder; a package has it: {ADVICE}")
    return path


def write_tokenizer(folder: Path, pad: str) -> None:
    """Writes CLIP's tokenizer as the hub's folders of Stable Diffusion have it; `pad` is the padding token."""
    path = find_vocabulary()
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            merges = [line.rstrip("\n") for _, line in zip(range(MERGES + 1), file, strict=False)][1:]
        vocabulary = [*_letters(), *(f"{letter}</w>" for letter in _letters())]
        vocabulary += [left + right for left, right in map(str.split, merges)] + [BEGIN, END]
    except (OSError, EOFError, ValueError):
        vocabulary = []
    if len(set(vocabulary)) != TOKENS:
        raise FileError(f"{path}: is not CLIP's vocabulary of {TOKENS:,} tokens; install it again: {ADVICE}")
    folder.mkdir()
    numbers = {token: number for number, token in enumerate(vocabulary)}
    _write(folder / "vocab.json", numbers)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": pad, "unk_token": END}
    _write(folder / "special_tokens_map.json", special)
    settings = {"add_prefix_space": False, "do_lower_case": True, "model_max_length": LENGTH}
    _write(folder / "tokenizer_config.json", special | settings | {"tokenizer_class": "CLIPTokenizer"})


def _letters() -> list[str]:
    """Returns a visible letter for each byte, those that are visible themselves first."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, visible), *(chr(256 + number) for number in range(256 - len(visible)))]


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=None if path.stem == "vocab" else 2), "utf-8")
