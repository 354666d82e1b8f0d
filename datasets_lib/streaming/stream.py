"""`base.streaming`: examples out of shards, read one after the other by as many readers as there are workers."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from datasets_lib.errors import InputError
from datasets_lib.example import ImageData, StreamData
from datasets_lib.images.captions import Captions
from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.source import Source, changed, digest
from datasets_lib.streaming import resume
from datasets_lib.streaming.columns import ShardColumns, check_latents, find_features, posterior
from datasets_lib.streaming.example_reader import ExampleReader, ShuffleBuffer
from datasets_lib.streaming.index import INDEX
from datasets_lib.streaming.order import ShardOrder
from datasets_lib.streaming.raw_row import RawRow
from datasets_lib.streaming.reader import StreamReader
from datasets_lib.streaming.shards import ShardList, find_shards


class Stream(StreamData):
    """Examples with the columns of ImageDataset, or those of latents; a reader is one data worker of one process."""

    first_reader, reader_count = 0, 1  # of this process, of all

    def __init__(self, found: ShardList, args: Any) -> None:
        self.shards, self.origin, about, notes = found
        self.skips_images = args.bad_images == "skip"
        # each row becomes a data set, of which every picture is wanted
        self.args = changed(args, max_train_samples=None, validation_split=None, bad_images="error", image_cache_mb=0)
        self.order = ShardOrder(self.shards, args.seed)
        features = find_features(self.shards, self.origin, "dataset_name" if args.dataset_name else "train_data_dir")
        self.columns = ShardColumns(features, args, self.origin, about.get("label_names"))
        self.caption_problem = None if self.columns.caption else self._no_captions().problem
        self.records = {record["file"]: record for record in about.get("shards", ())}  # of shards of our own, by name
        known = [self.records.get(shard.name) for shard in self.shards]
        self.label_names = self.columns.label_names
        self.highest_label = None if None in known else about.get("highest_label")
        self.encoded_by = about.get("encoded_by")
        names = [shard.name for shard in self.shards]
        sizes = [shard.size for shard in self.shards]
        self.fingerprint = digest(names, sizes, sorted(features), self.label_names)
        count = "" if None in known else f", {sum(record['examples'] for record in known if record):,} examples"
        self.notes = [f"a stream of {len(self.shards):,} shards{count}; its epochs are not counted", *notes]
        if self.records and None in known:
            self.notes.append(
                f"{known.count(None):,} of them are not in {INDEX}, and are read too: name a sub-folder to hold out in "
                "base.validation_split"
            )
        if self.columns.latents:
            check_latents(args, self.origin, about)

    def __len__(self) -> int:
        raise InputError(self._without("are not counted, and this needs their number"))

    def get(self, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Raise ValueError: a stream is read in its own order."""
        raise InputError(self._without("have no numbers, and this asks for one of them"))

    def _without(self, what: str) -> str:
        return f"base.streaming = true: the examples of {self.origin} {what}; set it to false"

    @property
    def caption_note(self) -> str | None:
        return None if self.columns.caption else self._no_captions().note

    def _no_captions(self) -> Captions:
        return Captions(Source([], self.origin, "", unread=self.columns.unread), self.args)

    def example(self, row: RawRow, generator: torch.Generator | None) -> dict[str, Any]:
        """Return the example of a row, as ImageDataset.get does; raise ImageError for a picture that is broken."""
        source = self.columns.source(row)
        if not self.columns.latents:
            return ImageDataset(source, self.args, "train").get(0, generator)
        example = {**posterior(row), "caption": Captions(source, self.args).draw(0, generator)}
        return example if source.labels is None else {**example, "label": source.labels[0]}

    def first_example(self) -> dict[str, Any]:
        return self._examples(0, 1, {}).next(None)

    def shard_for_rank(self, process_index: int, num_processes: int, workers: int) -> Stream:
        """Return the stream with the readers of one process; raise InputError if there are more readers than shards."""
        own = max(workers, 1)
        count = own * num_processes
        if count > len(self.shards):
            raise InputError(
                f"{self.origin} has {len(self.shards)} shards, and {num_processes} processes with {own} readers each "
                f"(base.dataloader_num_workers = {workers}) need {count}, one each; lower "
                "base.dataloader_num_workers, start fewer processes, or make more shards: scripts/shard.py --shard-size"
            )
        part = copy.copy(self)
        part.readers, part.first_reader, part.reader_count = (None,) * own, process_index * own, count
        return part

    def open_reader(self, number: int, position: dict[str, Any] | None) -> ExampleReader:
        return self._examples(self.first_reader + number, self.reader_count, position or {})

    def _examples(self, number: int, count: int, position: dict[str, Any]) -> ExampleReader:
        reader, buffer = self._rows(number, count, position), None
        if self.args.shuffle_buffer_size:
            state = position.get("buffer", {})
            buffer = ShuffleBuffer(reader, self.args.shuffle_buffer_size, self.args.seed, state.get("drawn", 0))
            if state and self._replays:
                buffer.refill(state)
        return ExampleReader(reader, buffer, self.example, self.skips_images, position.get("bad_images", 0))

    def _rows(self, number: int, count: int, position: dict[str, Any]) -> StreamReader:
        names, retries = self.columns.names, self.args.shard_retries
        return StreamReader(self.order, names, retries, self.origin, number, count, position)

    @property
    def _replays(self) -> bool:
        """Whether the rows in shuffle buffers are read again on resume."""
        return bool(self.args.shuffle_buffer_size) and self.args.shuffle_buffer_resume == "replay"

    def go_on(self, saved: list[dict[str, Any]], process_index: int) -> list[str]:
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
        return resume.left_out(self.order, self.records, resume.saved_readers(saved))

    def limit_labels(self, num_classes: int | None) -> None:
        self.columns.num_classes = num_classes or self.columns.num_classes

    def losses(self) -> tuple[int, int]:
        shards, images = resume.skipped([reader for reader in self.readers if reader])
        return self.skipped_before[0] + shards, self.skipped_before[1] + images

    def held(self, count: float = math.inf) -> HeldExamples:
        """Return at most `count` of the first examples; raise InputError if all are wanted and a shard is broken."""
        reader = self._rows(0, 1, {})
        rows: list[RawRow] = []
        for place, row in reader:
            if place.epoch > 0 or len(rows) >= count:
                break
            rows.append(row)
        if reader.lost_shards and count == math.inf:  # every process must have the same ones
            raise InputError(f"{self.origin}: these shards are read as a whole; mend or remove {reader.last_error}")
        return HeldExamples(self, rows)


class HeldExamples(ImageData):
    """The first examples of a stream by number: rows in memory, whose pictures are encoded."""

    random = False

    def __init__(self, stream: Stream, rows: list[RawRow]) -> None:
        self.make_example, self.rows = stream.example, rows
        self.fingerprint, self.notes = stream.fingerprint, stream.notes
        self.label_names, self.encoded_by = stream.label_names, stream.encoded_by
        self.highest_label = max(map(stream.columns.label_of, rows), default=None) if stream.columns.label else None

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        return self.make_example(self.rows[index], generator)

    def name(self, index: int) -> str:
        return self.rows[index].name


def build(args: Any, split: str) -> Stream | HeldExamples:
    """Build the stream of `args.train_data_dir` or `args.dataset_name`; the validation split is read into memory."""
    stream = Stream(find_shards(args, split), args)
    return stream.held() if split == "validation" else stream
