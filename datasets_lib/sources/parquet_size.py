"""How much memory a parquet file would take: a few kB may name one text of 60 MB a million times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets_lib.errors import InputError

UNPACKED_BYTES = 1 << 30  # of a row group at most, unless the file has so many that it is no trick
UNPACKED_RATIO = 64  # of a row group to its bytes in the file, then
COUNTED_ROWS = 32  # at once


def unpacked_limit(chunks: list[Any]) -> int:
    """Returns how many bytes some columns of a row group may take."""
    return max(UNPACKED_BYTES, UNPACKED_RATIO * sum(chunk.total_compressed_size for chunk in chunks))


def unpacked_bytes(chunks: list[Any]) -> int:
    """Returns how many bytes some columns of a row group take at least, according to the file."""
    return sum(max(chunk.total_uncompressed_size, 8 * chunk.num_values) for chunk in chunks)


def check_unpacked(path: Path) -> None:
    """Raises ValueError for a file with a row group that would take far more memory than its bytes, or a broken one."""
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
        columns = [metadata.schema.column(number) for number in range(metadata.num_columns)]
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts, buffer_size=1 << 20) as file:
            for number in range(metadata.num_row_groups):
                _check_group(file, number, texts)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"cannot be read as parquet ({error}); replace it") from None


def _check_group(file: Any, number: int, texts: list[str]) -> None:
    group = file.metadata.row_group(number)
    chunks = [group.column(place) for place in range(group.num_columns)]
    limit, size = unpacked_limit(chunks), unpacked_bytes(chunks)
    if size <= limit:
        size += sum(_bytes_of(file, number, name, group.num_rows, limit) for name in texts)
    if size > limit:
        raise InputError(
            f"row group {number} would take {size:,} bytes of memory, and may take {limit:,}; make the file again with "
            "fewer rows in a group"
        )


def _bytes_of(file: Any, group: int, column: str, rows: int, limit: int) -> int:
    """How many bytes the texts of a column take, each as often as it is named; 0 if that is surely in the limit."""
    import pyarrow.compute as compute

    total = 0
    for count in (1, COUNTED_ROWS):
        for batch in file.iter_batches(count, row_groups=[group], columns=[column], use_threads=False):
            values = _leaf(batch.column(0))
            lengths = compute.binary_length(values.dictionary)  # of the first row it has all that may be repeated
            if count == 1:
                if rows * (compute.max(lengths).as_py() or 0) <= limit:
                    return 0
                break
            total += compute.sum(lengths.take(values.indices)).as_py() or 0
    return total


def _leaf(array: Any) -> Any:
    """The dictionary of texts inside structs and lists."""
    import pyarrow

    while not isinstance(array, pyarrow.DictionaryArray):
        if isinstance(array, pyarrow.ExtensionArray):
            array = array.storage
            continue
        array = array.field(0) if isinstance(array, pyarrow.StructArray) else array.values
    return array
