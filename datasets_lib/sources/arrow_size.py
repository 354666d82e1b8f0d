"""Whether an arrow file takes more memory than its bytes: packed ones can, and those that name one text often."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets_lib.errors import InputError

REPEATING = ("dictionary", "run_end_encoded", "binary_view", "string_view", "list_view", "large_list_view")


def check_plain(path: Path) -> None:
    """Raises ValueError for an arrow file that is packed or broken, or has repeating types; nothing is unpacked."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            if source.read(8)[:6] != b"ARROW1":  # that of a file, which is a stream with a table of contents
                source.seek(0)
            messages = pyarrow.ipc.MessageReader.open_stream(source)
            schema = pyarrow.ipc.read_schema(messages.read_next_message())
            if any(_repeats(field.type) for field in schema):
                raise InputError("has columns that repeat their values; save it with plain ones")
            if any(map(_is_packed, _batches(messages))):
                raise InputError("is packed (compressed); save it as it is")
    except (OSError, StopIteration, pyarrow.ArrowException, struct.error) as error:
        raise InputError(f"cannot be read as arrow ({str(error) or 'it is empty'}); replace it") from None


def _repeats(kind: Any) -> bool:
    """Whether a type, or one inside it, can name a value more often than it is there."""
    import pyarrow

    names = (name for name in REPEATING if hasattr(pyarrow.types, f"is_{name}"))
    if any(getattr(pyarrow.types, f"is_{name}")(kind) for name in names):
        return True
    inner = getattr(kind, "storage_type", None)  # of a type of another library
    if inner is not None:
        return _repeats(inner)
    return any(_repeats(kind.field(number).type) for number in range(kind.num_fields))


def _batches(messages: Any) -> Iterator[bytes]:
    """The descriptions of the record batches."""
    while True:
        try:
            message = messages.read_next_message()
        except StopIteration:
            return
        if message.type == "record batch":
            yield message.metadata.to_pybytes()


def _is_packed(description: bytes) -> bool:
    """Whether the field `compression`, the fourth of a RecordBatch, is set in a flatbuffers Message."""
    message = struct.unpack_from("<I", description, 0)[0]
    header = message + _offset(description, message, 2)
    batch = header + struct.unpack_from("<I", description, header)[0]
    return _offset(description, batch, 3) != 0


def _offset(description: bytes, table: int, field: int) -> int:
    """Where a field of a flatbuffers table is, from the table on; 0 if it is not set."""
    names = table - struct.unpack_from("<i", description, table)[0]
    size, place = struct.unpack_from("<H", description, names)[0], 4 + 2 * field
    return struct.unpack_from("<H", description, names + place)[0] if place < size else 0
