"""The examples that one reader of a stream gives, and the position to go on from after each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from datasets_lib.images.decode import ImageError
from datasets_lib.streaming.reader import StreamReader
from datasets_lib.streaming.rows import RawRow
from datasets_lib.streaming.shuffle_buffer import ShuffleBuffer

if TYPE_CHECKING:
    import torch

FEW_BAD = 10  # pictures that may be passed over before their part counts


class ExampleReader:
    """Makes examples of a reader's rows, in the order of its shuffle buffer where it has one.

    With `skips_images` a broken picture is passed over and counted; `bad_images` is how many were before.
    """

    def __init__(
        self,
        reader: StreamReader,
        buffer: ShuffleBuffer | None,
        make_example: Callable[[RawRow, torch.Generator | None], dict[str, Any]],
        skips_images: bool,
        bad_images: int,
    ) -> None:
        self.reader, self.buffer, self.make_example = reader, buffer, make_example
        self.skips_images, self.bad_images = skips_images, bad_images
        self.rows = (row for _, row in reader) if buffer is None else iter(buffer)

    def next(self, generator: torch.Generator | None) -> dict[str, Any]:
        """Return the next example, whose random decisions draw from the generator."""
        while True:
            row = next(self.rows)
            try:
                return self.make_example(row, generator)
            except ImageError as error:
                if not self.skips_images:
                    raise
                self._pass_over(error)

    def _pass_over(self, error: ImageError) -> None:
        self.bad_images += 1
        print(f"WARNING: {error}: passed over", flush=True)
        read = self.reader.rows_read
        if self.bad_images > max(FEW_BAD, read // 10):
            raise ValueError(
                f"{self.bad_images} of {read} images cannot be read, and base.bad_images=skip passes over 10 % at "
                f"most; the last: {error}"
            ) from error

    def position(self) -> dict[str, Any]:
        """Return what a reader needs to go on after the last example."""
        reader = self.reader
        found = {"place": reader.place, "lost_shards": reader.lost_shards, "bad_images": self.bad_images}
        found |= {"rows_read": reader.rows_read, "seconds": round(reader.seconds, 3)}
        return found if self.buffer is None else found | {"buffer": self.buffer.state(reader.place)}
