"""The contract of data sets and of their examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from datasets_lib.errors import InputError

if TYPE_CHECKING:
    import torch

Example = dict[str, Any]


class DataSet(Protocol):
    """The members that every data set has; one of your own needs no others."""

    fingerprint: str  # changes with the content

    def __len__(self) -> int: ...

    def get(self, index: int, generator: torch.Generator | None) -> Example:
        """Returns an example; what is random in it draws from `generator`, and without one nothing is.

        {"image": float32 [C, H, W] in [-1, 1]}, or {"mean", "logvar"} of latents, float32 of one shape; if there are
        any, "label" (int), "caption" (str), "mask" (float32 [1, H, W] in [0, 1]), "original_size" and "crop_top_left"
        (int64 [2], vertical first); the same prefixed "class_" of a picture of the class. Other columns reach the task
        as they are: numbers and tensors are stacked, texts become lists.
        """
        ...


class ImageData(DataSet):
    """Further members that the loop may use; the defaults suit a data set that has no answer."""

    random: bool = True  # whether get() uses its generator
    label_names: list[str] | None = None
    highest_label: int | None = None  # if it is known
    no_labels: str | None = None  # why it has none, where that may surprise
    caption_problem: str | None = None  # what looks like captions and is not read, for tasks that read them
    encoded_by: str | None = None  # digest of the network that made the latents
    notes: Sequence[str] = ()  # lines for the start of a run
    picture_columns: tuple[str, ...] = ()  # columns whose pictures image() knows, for caches

    @property
    def caption_note(self) -> str | None:
        """The line to show if there are no captions, for tasks that read them."""
        return None

    # one by one
    def name(self, index: int) -> str:
        """Returns the file, or the row, from which an example comes."""
        return f"example {index}"

    def first_example(self) -> Example:
        """Returns an example without randomness."""
        return self.get(0, None)

    def bucket_of(self, index: int) -> int:
        """Returns a number that examples of one size share."""
        raise InputError("base.buckets = true: the data set has no bucket_of(index); set it to false")

    # in batches
    @property
    def in_memory(self) -> bool:
        """Whether get_batch and finish can be used."""
        return False

    def get_batch(self, indices: Sequence[int], generators: Sequence[torch.Generator | None]) -> Example:
        """Returns a batch on the host, a dict of lists and tensors [B, ...], for finish()."""
        raise _lacks(self, "get")

    def finish(self, batch: Example) -> Example:
        """Returns, on the batch's device, what get() returns for each, stacked."""
        raise _lacks(self, "finish")

    # for caches of what encoders make of pictures and texts
    def captions(self, column: str = "caption") -> Iterable[str] | None:
        """Returns every text that get() may return; None if they are not known."""
        return None

    def image_count(self, column: str = "image") -> int:
        """Returns how many pictures the column draws from."""
        return len(self)

    def image_keys(self, index: int, column: str = "image") -> tuple[str, ...]:
        """Returns hex digits that identify the content of image(): plain and, if get() may mirror it, mirrored."""
        raise _lacks(self, "captions")

    def image(self, index: int, flipped: bool, column: str = "image") -> torch.Tensor:
        """Returns the centre of a picture, plain or mirrored: float32 [C, H, W] in [-1, 1]."""
        raise _lacks(self, "image")

    def without_image(self, index: int, generator: torch.Generator | None) -> Example:
        """Returns the example that get() would, with "flipped" (bool) instead of "image", which is not decoded."""
        raise _lacks(self, "without_image")

    def uncached(self) -> ImageData:
        """Returns the data set with its pictures."""
        return self

    # around a run
    def only(self, indices: Sequence[int]) -> ImageData:
        """Returns the data set with these examples alone; itself if it cannot be divided."""
        return self

    def prepare(self, show_progress: bool) -> None:
        """Decodes ahead what fits `image_cache_mb`; called once, before loader workers start."""
        return None

    def limit_labels(self, num_classes: int | None) -> None:
        """Makes a label that is none of this many classes an error, if labels are seen only when they are read."""
        return None

    @property
    def bad_count(self) -> int:
        """How many images were found broken so far and replaced, in all worker processes."""
        return 0

    def losses(self) -> tuple[int, int] | None:
        """Returns how many shards and pictures of a stream could not be read by this process; None for no stream."""
        return None


class ExampleReader(Protocol):
    """Reads the examples of one part of a stream."""

    def next(self, generator: torch.Generator | None) -> Example: ...

    def position(self) -> dict[str, Any]: ...  # from which open_reader continues


class StreamData(ImageData, ABC):
    """A training set without length or order, whose examples this process's readers read in turn."""

    origin: str
    readers: tuple[dict[str, Any] | None, ...] = (None,)  # position after the last example trained on; None: start
    turn = 0  # the reader whose batch is next
    skipped_before: tuple[int, int] = (0, 0)  # shards and pictures skipped by readers that no longer exist

    @abstractmethod
    def shard_for_rank(self, process_index: int, num_processes: int, workers: int) -> StreamData:
        """Returns the stream with the readers of one process: as many as `workers`, but at least one."""

    @abstractmethod
    def open_reader(self, number: int, position: dict[str, Any] | None) -> ExampleReader:
        """Returns a reader of this process at a position; None: the start."""

    @abstractmethod
    def go_on(self, saved: list[dict[str, Any]], process_index: int) -> list[str]:
        """Continues at the saved positions of all processes; returns lines that say what is skipped or read again.

        With another number of processes or workers the readers get other shards: then all start the next epoch.
        """

    @abstractmethod
    def left_out(self, saved: list[dict[str, Any]]) -> str:
        """Says what is not read if all readers start the next epoch."""

    @abstractmethod
    def held(self, count: float) -> ImageData:
        """Returns at most this many of the first examples, in memory."""


def _lacks(dataset: object, method: str) -> NotImplementedError:
    return NotImplementedError(
        f"a {type(dataset).__name__} has no {method}(); `in_memory` and `picture_columns` say so"
    )
