"""The files of a stream: those of a folder, of a list of URLs and paths, or of a hub data set."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

from datasets_lib.checks import one_of
from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.foreign import check_regular, entries, shown
from datasets_lib.images.files import METADATA_BYTES, check_inside, is_inside, lines_of, open_text, resolved
from datasets_lib.images.source import refuse_named_split
from datasets_lib.sources.splits import TRAIN, split_of
from datasets_lib.sources.walk import walk
from datasets_lib.streaming.http_file import open_url
from datasets_lib.streaming.index import INDEX, SETTINGS, read_index

KINDS = (".parquet", ".tar")
SCHEMES = ("http", "https", "hf", "s3", "gs")
QUERY = r"(\w+://[^\s?'\"]*)\?[^\s'\"]*"  # of a URL in a text


class Shard(NamedTuple):
    """One file; messages show its name, which holds neither user, password nor query of a URL."""

    location: str  # a path or URL
    name: str

    @property
    def kind(self) -> str:
        return PurePosixPath(self.name).suffix.lower()

    @property
    def scheme(self) -> str:
        """That of a URL; empty for a local file."""
        return urlsplit(self.location).scheme if "://" in self.location else ""

    @property
    def size(self) -> int:
        """The bytes of a local file; 0 for a URL, as asking for thousands of them takes long."""
        return 0 if self.scheme else Path(self.location).stat().st_size

    def open(self) -> IO[bytes]:
        """Open the file for reading and seeking."""
        if self.scheme in ("http", "https"):
            return open_url(self.location)
        if not self.scheme:
            return check_regular(Path(self.location)).open("rb")
        import fsspec

        return fsspec.filesystem(self.scheme).open(self.location, "rb")

    def without_secrets(self, error: Exception) -> str:
        """Return an error's text, with the shard's name in place of its URL and of parts that may be secret.

        Queries are removed from all URLs: a server may redirect to a signed one.
        """
        text = re.sub(QUERY, r"\1", " ".join(str(error).split())) or type(error).__name__
        if self.scheme:
            parts = urlsplit(self.location)
            for secret in filter(None, (self.location, parts.query, parts.netloc.rpartition("@")[0])):
                text = text.replace(secret, self.name)
        return shown(text)


class ShardList(NamedTuple):
    """The shards of a split, in order; `about` is the index that scripts/shard.py wrote, {} without one."""

    shards: list[Shard]
    origin: str
    about: dict[str, Any]
    notes: tuple[str, ...] = ()


def find_shards(args: Any, split: str) -> ShardList:
    """Return the shards of a split; a named validation split is a sub-folder, or one of the hub data set's.

    Raises FileNotFoundError for a folder or file that is not there, ValueError for one without shards.
    """
    if args.dataset_name is not None:
        return _of_hub(args, split)
    top = resolved(args.train_data_dir)
    if top.is_file() and top.suffix == ".txt":
        return _of_list(top, args)
    if not top.is_dir():
        raise MissingFileError(
            f"base.train_data_dir: there is no folder {top}; with base.streaming give a folder of "
            f"{' or '.join(KINDS)} files, or a .txt file with a URL or path in each line"
        )
    return _of_folder(top, args, split)


def _of_folder(top: Path, args: Any, split: str) -> ShardList:
    held_out = args.validation_split
    folder, excluded = top, None
    files = _shards_below(top, None, top, args)
    splits = {path: split_of(path, top) for path in files}
    if held_out is not None:
        folders = [path.name for path in entries(top) if path.is_dir()]
        named = sorted({*folders, *filter(None, splits.values())})
        one_of(
            f"base.validation_split (a sub-folder of {top}, or a split that its shards' names tell)", held_out, named
        )
        if held_out in folders:
            folder, excluded = (top / held_out, None) if split == "validation" else (top, top / held_out)
            files = _shards_below(folder, excluded, top, args)
    if (folder / SETTINGS).is_file() and not (folder / INDEX).is_file():
        raise InputError(f"{folder}: scripts/shard.py has not finished it; run it again with the same options")
    found, notes = files, list[str]()
    if split == "train":
        found, notes = _of_training(files, splits, top, held_out)
    elif folder == top:
        found = [path for path in files if splits[path] == held_out]
    if not found:
        raise InputError(
            f"there are no {' or '.join(KINDS)} files in {folder}, and base.streaming: true reads such shards; check "
            "base.train_data_dir, or make some with scripts/shard.py"
        )
    shards = [Shard(str(path), path.relative_to(folder).as_posix()) for path in found]
    return ShardList(shards, str(folder), read_index(folder, args.allow_outside), tuple(notes))


def _shards_below(folder: Path, excluded: Path | None, top: Path, args: Any) -> list[Path]:
    """The shards; a table beside a tar of the same name tells of its members, as img2dataset writes it."""
    files = list(walk(folder, excluded, top, args.allow_outside))
    found = [check_regular(path) for path in files if path.suffix.lower() in KINDS]
    tars = {path.with_suffix("") for path in found if path.suffix.lower() == ".tar"}
    return [path for path in found if path.suffix.lower() == ".tar" or path.with_suffix("") not in tars]


def _of_training(
    files: list[Path], splits: dict[Path, str | None], top: Path, held_out: str | None
) -> tuple[list[Path], list[str]]:
    """The shards that are of no split to hold out, and a note on the others; InputError if there are none."""
    others = {path: name for path in files if (name := splits[path]) is not None and name.lower() not in TRAIN}
    rest, counts = [path for path in files if path not in others], Counter(others.values())
    if others and not rest:
        named = ", ".join(f"{shown(name)} ({count:,})" for name, count in counts.items())
        raise InputError(
            f"base.train_data_dir = {top} has shards of the splits {named} alone, which nobody trains on; give "
            "the folder of the training shards, or rename them"
        )
    left = [f"{count:,} shards of {shown(name)}" for name, count in counts.items() if name != held_out]
    return rest, [f"not read: {', '.join(left)}; name a split in base.validation_split"] if left else []


def _of_list(file: Path, args: Any) -> ShardList:
    refuse_named_split(args, f"base.train_data_dir={file}", "set it to null")
    with open_text(file, METADATA_BYTES) as opened:
        lines = [(number, line.strip()) for number, line in enumerate(lines_of(opened, file), 1) if line[0] != "#"]
        shards = [_listed(line, number, file, args.allow_outside) for number, line in lines if line]
    if not shards:
        raise InputError(f"{file} lists no shards; give a URL or a path in each line")
    for shard, count in Counter(shards).items():
        if count > 1:
            raise InputError(
                f"{file} lists {shown(shard.name)} {count} times; an epoch has each shard once: keep one line"
            )
    return ShardList(shards, str(file), read_index(file.parent, args.allow_outside))


def _listed(line: str, number: int, file: Path, outside: Sequence[str]) -> Shard:
    """The shard of a line; raises ValueError if it is none, or leads out of the list's folder."""
    shard = _url(line, number, file) if "://" in line else _path(line, file, outside)
    one_of(f"the end of the name {shown(shard.name)} in {file}", shard.kind, KINDS)
    if not shard.scheme:
        try:
            check_regular(Path(shard.location))
        except (FileNotFoundError, NotADirectoryError):
            found = shown(repr(line))
            raise MissingFileError(
                f"{file} lists {found}, and there is no such file; correct or remove the line"
            ) from None
    return shard


def _url(line: str, number: int, file: Path) -> Shard:
    try:
        parts = urlsplit(line)
    except ValueError:  # its text may show a user and password
        raise InputError(f"{file} has a URL in line {number} that cannot be read; correct the line") from None
    one_of(f"the scheme of a URL in {file}", parts.scheme, SCHEMES)
    return Shard(line, f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")


def _path(line: str, file: Path, outside: Sequence[str]) -> Shard:
    path, leaves = file.parent / line, PurePosixPath(line).is_absolute() or ".." in PurePosixPath(line).parts
    if leaves and not is_inside(path, outside):
        found = shown(repr(line))
        raise InputError(f"{file} lists {found}, which leads out of its folder; give a path below {file.parent}")
    check_inside(path, file.parent, outside)
    return Shard(str(path), line if leaves else path.relative_to(file.parent).as_posix())


def _of_hub(args: Any, split: str) -> ShardList:
    from datasets_lib.sources.hub_files import data_files

    files = data_files(args)
    wanted = args.validation_split if split == "validation" else "train"
    option = "base.validation_split" if split == "validation" else "the training split"
    locations = files[one_of(f"{option} of {args.dataset_name}", wanted, files)]
    others = [location for location in locations if PurePosixPath(location).suffix.lower() not in KINDS]
    if others:
        raise InputError(
            f"base.dataset_name={args.dataset_name} has files such as {shown(PurePosixPath(others[0]).name)}, and "
            f"base.streaming: true reads {' and '.join(KINDS)}; set it to false"
        )
    shards = [Shard(location, "/".join(PurePosixPath(location).parts[-2:])) for location in locations]
    return ShardList(shards, args.dataset_name, {})
