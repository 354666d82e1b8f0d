"""The rows of a tar shard in WebDataset's layout; nothing is extracted."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from typing import IO, Any

from datasets_lib.foreign import shown
from datasets_lib.images.files import PICTURE_BYTES, TEXT_BYTES
from datasets_lib.images.formats import ENCODED_EXTENSIONS
from datasets_lib.streaming.raw_row import LATENTS, MASK, RawRow
from datasets_lib.streaming.shards import Shard

TEXTS = {"txt": "text", "text": "text", "caption": "caption"}  # ends of names -> columns
LABEL = "cls"
OTHERS = {**TEXTS, LABEL: "label", LATENTS: LATENTS, "json": "json"}  # ends of other files' names -> columns
LABEL_DIGITS = 19  # with fewer it is an int64
HEADER_BYTES = 16 << 10  # of a tar member's further headers: Python before 3.11.10 takes minutes for a large one
HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class _Header(tarfile.TarInfo):
    """A member's header, whose further headers must be short."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        found = super().frombuf(buf, encoding, errors)
        if found.type in HEADERS and found.size > HEADER_BYTES:
            raise tarfile.ReadError(f"a header has {found.size:,} bytes, and may have {HEADER_BYTES:,}")
        return found


def tar_rows(file: IO[bytes], shard: Shard, place: int) -> Iterator[RawRow]:
    """Yield the rows from a place on: the members whose names are equal up to the first dot."""
    file.seek(place)
    key, begins = None, place
    parts: dict[str, bytes | None] = {}
    # mode "r|": members are read or skipped in one pass; names in other encodings are escaped
    with tarfile.open(fileobj=file, mode="r|", errors="backslashreplace", tarinfo=_Header) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # typeshed has no members; it would keep them all
            folder, slash, name = member.name.rpartition("/")
            stem, _, end = name.partition(".")
            if member.isdir() or not stem or not end:
                continue
            if key is not None and folder + slash + stem != key:
                begins = place + member.offset
                if parts:
                    yield RawRow(_columns(parts), shown(f"{key} of {shard.name}"), begins)
                parts = {}
            key = folder + slash + stem
            _add_part(parts, end.lower(), archive, member)
        ended = place + archive.offset
    file.seek(ended)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a broken header for the end
        raise tarfile.ReadError("it ends without an end-of-archive mark, or is broken there")
    if parts:
        yield RawRow(_columns(parts), shown(f"{key} of {shard.name}"), ended)


def _add_part(parts: dict[str, bytes | None], end: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """Reads a member into the parts of its example."""
    column = _column_of(end)
    if column is None or not member.isreg():
        if (
            f".{end.rpartition('.')[2]}" in ENCODED_EXTENSIONS
        ):  # a link, or a.b.jpg: its example lacks a picture, and says so
            parts.setdefault("image", None)
        return
    if parts.get(column) is not None:
        raise tarfile.ReadError(f"its member {shown(member.name)} is the second {column} of its example")
    limit = PICTURE_BYTES if column in ("image", MASK, LATENTS) else TEXT_BYTES
    if member.size > limit:  # which a sparse member need not have
        raise tarfile.ReadError(f"its member {shown(member.name)} has {member.size:,} bytes, more than {limit:,}")
    file = archive.extractfile(member)
    assert file is not None  # it is a regular file
    parts[column] = file.read()


def _column_of(end: str) -> str | None:
    """The column that a member holds, "json" for several; None if it is not read, such as one that could hold code."""
    if end in OTHERS:
        return OTHERS[end]
    if f".{end.removeprefix(f'{MASK}.')}" in ENCODED_EXTENSIONS:
        return MASK if end.startswith(f"{MASK}.") else "image"
    return None


def _columns(parts: dict[str, bytes | None]) -> dict[str, Any]:
    """The columns of an example; an unreadable value becomes an error when the example is made."""
    found: dict[str, Any] = {}
    for column, data in sorted(parts.items(), key=lambda part: part[0] == "json"):  # other members come before its own
        if data is None:
            found[column] = None
        elif column == "json":
            found = _object(data) | found
        elif column in TEXTS.values():
            found[column] = _text(data)
        elif column == "label":
            text = data.decode("ascii", errors="replace").strip()
            found[column] = int(text) if text.isdecimal() and len(text) < LABEL_DIGITS else text
        else:
            found[column] = data
    return found


def _text(data: bytes) -> str | bytes:
    """A text; bytes that are none stay as they are, and its example says so."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return data


def _object(data: bytes) -> dict[str, Any]:
    """The members of a JSON object; a text that is none for what is no JSON object, so that its example says so."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return {"text": None}
    return {key: value for key, value in found.items() if key not in ("image", MASK, LATENTS)}
