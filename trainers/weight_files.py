"""Files of networks' weights, by their names: copies byte for byte, and copies with other values or another precision.

diffusers and transformers call them `model.safetensors`, in a variant `model.fp16.safetensors`, in shards
`model.fp16-00001-of-00002.safetensors`, listed in `model.safetensors.index.fp16.json`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from datasets_lib.errors import FileError, MissingFileError
from datasets_lib.foreign import check_regular, read_json, shown
from trainers.model_configs import TEXT_BYTES

if TYPE_CHECKING:
    from torch import Tensor

STEM = r"(?P<stem>diffusion_pytorch_model|model)"
WEIGHTS = re.compile(rf"{STEM}(?:\.(?P<variant>\w+))?(?P<shard>-\d+-of-\d+)?(?:\.(?P<older>\w+))?\.safetensors")
INDEX = re.compile(rf"{STEM}\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")
HALF = re.compile(r'("(?:torch_)?dtype"\s*:\s*)"b?float16"')
# where somebody's config was read from, in a folder of their machine
PLACE = re.compile(
    r'("(?:_?name_or_path|tokenizer_file|special_tokens_map_file)"\s*:\s*)"(?:\\?/|~|\w:|\\\\)(?:[^"\\]|\\.)*"'
)
VOCABULARY = ("vocab.json", "merges.txt", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")


class WeightFile(NamedTuple):
    """A safetensors file, or the index of shards; `plain` is its name without a variant."""

    path: Path
    plain: str
    variant: str | None

    @property
    def is_index(self) -> bool:
        return self.path.suffix == ".json"

    def named(self, variant: str | None) -> str:
        return variant_name(self.plain, variant)


def variant_name(plain: str, variant: str | None) -> str:
    """Returns the name of a file of weights in a variant."""
    if variant is None:
        return plain
    if plain.endswith(".json"):
        return f"{plain.removesuffix('.json')}.{variant}.json"
    return re.sub(r"(-\d+-of-\d+)?\.safetensors$", rf".{variant}\g<0>", plain)


def weight_files(folder: Path) -> Iterator[WeightFile]:
    """Yields a network's files of weights, in all variants."""
    for path in sorted(folder.iterdir()):
        if found := WEIGHTS.fullmatch(path.name):
            plain = f"{found['stem']}{found['shard'] or ''}.safetensors"
            yield WeightFile(path, plain, found["variant"] or found["older"])
        elif found := INDEX.fullmatch(path.name):
            yield WeightFile(path, f"{found['stem']}.safetensors.index.json", found["variant"])


def copy_part(source: Path, target: Path, variant: str | None = None, kept: str | None = None) -> None:
    """Copies a part of a pipeline: configs, vocabularies and weights byte for byte, nothing else.

    The weights of `variant` get names without one; the variant `kept` is copied, too, if it is there. A config that
    asks transformers for half precision asks for float32, in which diffusers reads the other parts unless it is told.
    """
    copy_texts(source, target)
    files = list(weight_files(source))
    for file in files:
        if file.variant == variant:
            _copy_weights(file, target, None)
        elif file.variant is not None and file.variant == kept:
            _copy_weights(file, target, kept)
    is_network = (target / "config.json").is_file() and not (target / "tokenizer_config.json").is_file()
    if is_network and not any(file.variant is None for file in weight_files(target)):
        wanted = variant_name("*.safetensors", variant)
        raise MissingFileError(f"{shown(source)}: there is no {wanted} any more; put the base model's files back")


def copy_texts(source: Path, target: Path) -> None:
    """Copies a network's config, or the files of a tokenizer or scheduler; see copy_part."""
    target.mkdir(parents=True)
    is_network = any(weight_files(source))
    for path in sorted(source.iterdir()):
        is_text = path.name in VOCABULARY or path.name.endswith("_config.json")
        if path.name == "config.json" or (is_text and not is_network):  # a finished run's folder holds other files, too
            shutil.copyfile(check_regular(path), target / path.name)
    if (target / "config.json").is_file():
        _replace(HALF, r'\1"float32"', target / "config.json")


def forget_places(folder: Path) -> None:
    """Clears from the configs of a pipeline the folders of somebody's machine: it may be published."""
    for config in folder.rglob("*config.json"):
        _replace(PLACE, r'\1""', config)


def _replace(form: re.Pattern[str], by: str, config: Path) -> None:
    text = config.read_text(encoding="utf-8")
    if (changed := form.sub(by, text)) != text:
        config.write_text(changed, encoding="utf-8")


def _copy_weights(file: WeightFile, target: Path, variant: str | None) -> None:
    if file.is_index:
        _write_index(file, target, variant)
    else:
        shutil.copyfile(check_regular(file.path), target / file.named(variant))


def _write_index(file: WeightFile, target: Path, variant: str | None, size: int | None = None) -> None:
    """Copies an index of shards byte for byte, unless the shards' names change, or their size in all."""
    content = read_json(file.path, TEXT_BYTES)
    about = content.get("metadata") or {}
    sized = about | {"total_size": size} if size is not None and "total_size" in about else about
    plain = {each.path.name: each.named(variant) for each in weight_files(file.path.parent)}
    renamed = {key: plain.get(name, name) for key, name in content["weight_map"].items()}
    if (renamed, sized) == (content["weight_map"], about):
        shutil.copyfile(file.path, target / file.named(variant))
    else:
        text = json.dumps(content | {"metadata": sized, "weight_map": renamed}, indent=2) + "\n"
        (target / file.named(variant)).write_text(text, encoding="utf-8")


def rewrite_weights(
    files: Iterable[WeightFile], target: Path, change: Callable[[str, Tensor], Tensor], variant: str | None = None
) -> None:
    """Writes files again with the same tensors by the same names, in the same shards, each value of them changed."""
    from safetensors import safe_open

    files, size = list(files), 0
    for file in files:
        if file.is_index:
            continue
        with safe_open(file.path, "pt") as opened:
            values = {key: change(key, opened.get_tensor(key)).contiguous() for key in opened.keys()}  # noqa: SIM118
            about = opened.metadata()
        size += sum(value.nbytes for value in values.values())
        write_tensors(values, target / file.named(variant), about)
    for file in files:
        if file.is_index:
            _write_index(file, target, variant, size)


def write_tensors(values: dict[str, Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with the usual permissions; the library's own can be read by the owner only.

    Raises FileError if it cannot be written, such as for lack of space.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        path.touch()
        mode = path.stat().st_mode & 0o777  # asking os.umask() would change it for all threads
        save_file(values, path, metadata=about or {"format": "pt"})
        path.chmod(mode)
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"{shown(path)}: cannot be written ({shown(error)}); free some space, or take another place"
        ) from None


def make_readable(folder: Path) -> None:
    """Gives the safetensors files below a folder the usual permissions, too, which libraries do not."""
    probe = folder / ".mode"
    probe.touch()
    for path in folder.rglob("*.safetensors"):
        path.chmod(probe.stat().st_mode & 0o777)
    probe.unlink()
