"""`base.streaming`: examples out of shards, read one after the other by as many readers as there are workers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch

from datasets_lib.example import ImageData
from datasets_lib.images.captions import Captions
from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.source import Source, digest
from datasets_lib.streaming import resume
from datasets_lib.streaming.columns import ShardColumns, check_latents, find_features, posterior
from datasets_lib.streaming.example_reader import ExampleReader
from datasets_lib.streaming.held_out import HeldExamples
from datasets_lib.streaming.order import ShardOrder
from datasets_lib.streaming.reader import StreamReader
from datasets_lib.streaming.rows import RawRow
from datasets_lib.streaming.shards import INDEX, ShardList, find_shards, sizes
from datasets_lib.streaming.shuffle_buffer import ShuffleBuffer


class Stream(ImageData):
    """A training set without length or order. Its examples have the columns of ImageDataset, or those of latents.

    A reader is one data worker of one process. `shard_for_rank` gives a process its readers, and `readers` has the
    position after the last example that was trained on, for each of them; None at the start.
    """

    random = True
    picture_columns = ()  # no encoder's cache can hold them
    readers: tuple[dict[str, Any] | None, ...] = (None,)
    first_reader, reader_count = 0, 1  # of this process, of all
    turn = 0  # the one of this process whose batch is next
    skipped_before = (0, 0)  # shards and pictures, by readers that are no more

    def __init__(self, found: ShardList, args: Any) -> None:
        self.shards, self.origin, about = found
        self.skips_images = args.bad_images == "skip"
        self.args = copy.copy(args)
        # one example at a time is a data set of its own, whose pictures are all there is
        vars(self.args).update(max_train_samples=None, validation_split=None, bad_images="error", image_cache_mb=0)
        self.order = ShardOrder(self.shards, args.seed)
        features = find_features(self.shards, self.origin, "dataset_name" if args.dataset_name else "train_data_dir")
        self.columns = ShardColumns(features, args, self.origin, about.get("label_names"))
        self.records = {record["file"]: record for record in about.get("shards", ())}  # of shards of our own, by name
        known = [self.records.get(shard.name) for shard in self.shards]
        self.label_names = self.columns.label_names
        self.highest_label = None if None in known else about.get("highest_label")
        self.encoded_by = about.get("encoded_by")
        names = [shard.name for shard in self.shards]
        self.fingerprint = digest(names, list(sizes(self.shards)), sorted(features), self.label_names)
        count = "" if None in known else f", {sum(record['examples'] for record in known if record):,} examples"
        self.notes = [f"a stream of {len(self.shards):,} shards{count}; its epochs are not counted"]
        if self.records and None in known:
            self.notes.append(
                f"{known.count(None):,} of them are not in {INDEX}, and are read too: name a sub-folder to hold out in "
                "base.validation_split"
            )
        if self.columns.latents:
            check_latents(args, self.origin, about)

    def __len__(self) -> int:
        raise ValueError(self._without("are not counted, and this needs their number"))

    def get(self, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Raise ValueError: a stream is read in its own order."""
        raise ValueError(self._without("have no numbers, and this asks for one of them"))

    def _without(self, what: str) -> str:
        return f"base.streaming = true: the examples of {self.origin} {what}; set it to false"

    @property
    def caption_note(self) -> str | None:
        """The line that a task which reads captions shows where there are none."""
        captions: list[str | list[str]] | None = None if self.columns.caption is None else []
        return Captions(Source([], self.origin, "", captions=captions), self.args).note

    def example(self, row: RawRow, generator: torch.Generator | None) -> dict[str, Any]:
        """Return the example of a row, as ImageDataset.get does; raise ImageError for a picture that is broken."""
        source = self.columns.source(row)
        if not self.columns.latents:
            return ImageDataset(source, self.args, "train").get(0, generator)
        example = {**posterior(row), "caption": Captions(source, self.args).draw(0, generator)}
        return example if source.labels is None else {**example, "label": source.labels[0]}

    def first_example(self) -> dict[str, Any]:
        """Return an example, nothing of it random."""
        return self._examples(0, 1, {}).next(None)

    def shard_for_rank(self, process_index: int, num_processes: int, workers: int) -> Stream:
        """Return the stream with the readers of one process: as many as workers, which may be 0, and at least one.

        Raises ValueError where there are more readers than shards.
        """
        own = max(workers, 1)
        count = own * num_processes
        if count > len(self.shards):
            raise ValueError(
                f"{self.origin} has {len(self.shards)} shards, and {num_processes} processes with {own} readers each "
                f"(base.dataloader_num_workers = {workers}) need {count}, one each; lower "
                "base.dataloader_num_workers, start fewer processes, or make more shards: scripts/shard.py --shard-size"
            )
        part = copy.copy(self)
        part.readers, part.first_reader, part.reader_count = (None,) * own, process_index * own, count
        return part

    def open_reader(self, number: int, position: dict[str, Any] | None) -> ExampleReader:
        """Return a reader of this process at a position, None for the start."""
        return self._examples(self.first_reader + number, self.reader_count, position or {})

    def _examples(self, number: int, count: int, position: dict[str, Any]) -> ExampleReader:
        """The examples of reader `number` of `count`."""
        reader = self._rows(number, count, position)
        buffer = self._shuffled(reader, position.get("buffer")) if self.args.shuffle_buffer_size else None
        return ExampleReader(reader, buffer, self.example, self.skips_images, position.get("bad_images", 0))

    def _rows(self, number: int, count: int, position: dict[str, Any]) -> StreamReader:
        names, retries = self.columns.names, self.args.shard_retries
        return StreamReader(self.order, names, retries, self.origin, number, count, position)

    def _shuffled(self, reader: StreamReader, state: dict[str, Any] | None) -> ShuffleBuffer:
        drawn = state["drawn"] if state else 0
        buffer = ShuffleBuffer(reader, self.args.shuffle_buffer_size, self.args.seed, reader.number, drawn)
        if state and self._replays:
            resume.replay(reader, buffer, state)
        return buffer

    @property
    def _replays(self) -> bool:
        """Whether what was in shuffle buffers is read again."""
        return bool(self.args.shuffle_buffer_size) and self.args.shuffle_buffer_resume == "replay"

    def go_on(self, saved: list[dict[str, Any]], process_index: int) -> list[str]:
        """Take up the positions that all processes had; return the lines that say what is left out or read again.

        Other processes or workers than these have other shards: then every reader begins the next epoch.
        """
        readers = resume.saved_readers(saved)
        before = [part.get("skipped_before", (0, 0)) for part in saved]
        if [len(part["readers"]) for part in saved] == [len(self.readers)] * (self.reader_count // len(self.readers)):
            self.readers, self.turn = tuple(saved[process_index]["readers"]), saved[process_index]["turn"]
            self.skipped_before = tuple(before[process_index])
            return list(resume.buffer_notes(self._replays, readers))
        epoch = resume.next_epoch(readers)
        self.readers = ({"place": (epoch, 0, 0)},) * len(self.readers)
        if process_index == 0:
            shards, images = map(sum, zip(resume.skipped(readers), *before, strict=True))
            self.skipped_before = shards, images
        return [f"stream: all readers begin epoch {epoch}: {self.left_out(saved)} are not read"]

    def left_out(self, saved: list[dict[str, Any]]) -> str:
        """Say what of the epochs that were begun is not read where the next one is begun."""
        return resume.left_out(self.order, self.records, resume.saved_readers(saved))

    def limit_labels(self, num_classes: int | None) -> None:
        """Make a label that is none of so many classes an error."""
        self.columns.num_classes = num_classes or self.columns.num_classes

    def losses(self) -> tuple[int, int]:
        """Return how often a shard was skipped, and how many pictures were, by this process's readers."""
        shards, images = resume.skipped([reader for reader in self.readers if reader])
        return self.skipped_before[0] + shards, self.skipped_before[1] + images

    def held(self, count: float = math.inf) -> HeldExamples:
        """Return at most so many of the first examples, in memory as they are encoded.

        Raises ValueError where all are wanted and a shard cannot be read.
        """
        reader = self._rows(0, 1, {})
        rows = list(_first(reader, count))
        if reader.lost_shards and count == math.inf:  # every process must have the same ones
            raise ValueError(f"{self.origin}: these shards are read as a whole; mend or remove {reader.last_error}")
        return HeldExamples(
            rows=rows,
            make_example=self.example,
            fingerprint=self.fingerprint,
            label_names=self.label_names,
            highest_label=max(map(self.columns.label_of, rows), default=None) if self.columns.label else None,
            encoded_by=self.encoded_by,
            notes=self.notes,
        )


def build(args: Any, split: str) -> Stream | HeldExamples:
    """Build the stream of `args.train_data_dir` or `args.dataset_name`; the validation split is read into memory."""
    stream = Stream(find_shards(args, split), args)
    return stream.held() if split == "validation" else stream


def _first(reader: StreamReader, count: float) -> Iterator[RawRow]:
    """The rows of the first epoch, at most so many."""
    for number, (place, row) in enumerate(reader):
        if place.epoch > 0 or number >= count:
            return
        yield row
