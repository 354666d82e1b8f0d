"""`base.streaming`: examples out of shards, read one after the other by as many readers as there are workers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch

from datasets_lib.captions import Captions
from datasets_lib.choices import one_of
from datasets_lib.dataset import ImageDataset
from datasets_lib.hub import image_column, mask_column
from datasets_lib.shard_rows import LATENTS, RawRow, features_of
from datasets_lib.shards import Shard, ShardList, find_shards, sizes
from datasets_lib.source import CAPTION_COLUMNS, Source, check_caption, digest
from datasets_lib.stream_reader import StreamReader

TRIED_SHARDS = 8  # until one tells which columns there are


class Stream:
    """A training set without length or order. Its examples have the columns of ImageDataset, or those of latents.

    A reader is one data worker of one process. `dealt` gives a process its readers, and `readers` has the position
    after the last example that was trained on, for each of them; None at the start.
    """

    random = True
    picture_columns = ()  # no encoder's cache can hold them
    readers: tuple[dict[str, Any] | None, ...] = (None,)
    first_reader, reader_count = 0, 1
    turn = 0  # the one of this process whose batch is next

    def __init__(self, found: ShardList, args: Any) -> None:
        self.shards, self.origin, self.about = found.shards, found.origin, found.about
        self.skips_images = args.bad_images == "skip"
        self.args = copy.copy(args)
        # one example at a time is a data set of its own, whose pictures are all there is
        vars(self.args).update(max_train_samples=None, validation_split=None, bad_images="error", image_cache_mb=0)
        self.features = self._features()
        self.latents = LATENTS in self.features
        self._find_columns()
        self.fingerprint = digest(
            [shard.name for shard in self.shards], list(sizes(self.shards)), sorted(self.features), self.label_names
        )
        self.encoded_by = self.about.get("encoded_by")
        self.highest_label = self.about.get("highest_label")
        self._check_latents()

    def __len__(self) -> int:
        raise ValueError(
            f"base.streaming = true: the examples of {self.origin} are not counted, and this needs their number; set "
            "it to false"
        )

    def get(self, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Raise ValueError: a stream is read in its own order."""
        raise ValueError(
            f"base.streaming = true: the examples of {self.origin} have no numbers, and this needs one of them; set it "
            "to false"
        )

    # --- what the columns are

    def _features(self) -> dict[str, Any]:
        """The columns of the first shard that can be read."""
        last: Exception | None = None
        for shard in self.shards[:TRIED_SHARDS]:
            try:
                return features_of(shard)
            except Exception as error:  # every format and file system has its own
                last = OSError(f"{shard.name}: {shard.without_secrets(error)}")
        raise ValueError(
            f"none of the first {min(len(self.shards), TRIED_SHARDS)} shards of {self.origin} can be read; the last: "
            f"{last}; check base.{'dataset_name' if self.args.dataset_name else 'train_data_dir'}"
        )

    def _find_columns(self) -> None:
        from datasets import ClassLabel

        features, args = self.features, self.args
        self.mask_column = mask_column(features, args.mask_column)
        pictures = {name: kind for name, kind in features.items() if name != self.mask_column}
        self.image_column = None if self.latents else image_column(pictures, args.image_column)
        if args.caption_column is not None:
            one_of("base.caption_column", args.caption_column, features)
        found = (name for name in CAPTION_COLUMNS if name in features)
        self.caption_column = args.caption_column or next(found, None)
        classes = [name for name, kind in features.items() if isinstance(kind, ClassLabel)] or ["label"]
        if args.label_column is not None:
            one_of("base.label_column", args.label_column, features)
        self.label_column = args.label_column or (classes[0] if len(classes) == 1 and classes[0] in features else None)
        names = getattr(features.get(self.label_column), "names", None)
        self.label_names = self.about.get("label_names") or names
        self.captioned, self.caption = self.caption_column is not None, args.caption

    def _check_latents(self) -> None:
        """Raises ValueError for latents of other pictures than the run's, and for what cannot be had of latents."""
        if not self.latents:
            return
        for option in ("resolution", "channels"):
            asked, found = getattr(self.args, option), self.about.get(option, getattr(self.args, option))
            if asked != found:
                raise ValueError(
                    f"{self.origin}: latents of pictures with {option} {found}, and base.{option} is {asked}; make "
                    "them equal, or make the shards again"
                )
        if self.args.random_flip:
            raise ValueError("base.random_flip = true: latents cannot be mirrored; set it to false")

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        wanted = (self.image_column, self.mask_column, self.caption_column, self.label_column)
        return [*(name for name in wanted if name), *([LATENTS] if self.latents else [])]

    @property
    def caption_note(self) -> str | None:
        """The line that a task which reads captions shows where there are none."""
        return Captions(Source([], self.origin, "", captions=[] if self.captioned else None), self.args).note

    @property
    def notes(self) -> list[str]:
        """The lines for the start of the run."""
        count = f", {self.about['examples']:,} examples" if "examples" in self.about else ""
        return [f"a stream of {len(self.shards):,} shards{count}; the epochs of its readers end one by one"]

    # --- examples

    def example(self, row: RawRow, generator: torch.Generator | None) -> dict[str, Any]:
        """Return the example of a row, as ImageDataset.get does; raise ImageError for a picture that is broken."""
        source = self._source(row)
        if not self.latents:
            return ImageDataset(source, self.args, "train").get(0, generator)
        example = {**_posterior(row), "caption": Captions(source, self.args).draw(0, generator)}
        return example if source.labels is None else {**example, "label": source.labels[0]}

    def _source(self, row: RawRow) -> Source:
        """The row as a data set of one."""
        captions = labels = masks = None
        if self.caption_column is not None:
            place = f"{row.name}, column {self.caption_column!r} (base.caption_column),"
            captions = [check_caption(row.columns.get(self.caption_column), place)]
        if self.label_column is not None:
            labels = [self._label(row)]
        if self.mask_column is not None:
            masks = [_encoded(row.columns.get(self.mask_column), row)]
        images = [b"" if self.latents else _encoded(row.columns.get(self.image_column), row)]
        names = [row.name]
        return Source(images, self.origin, "", labels, self.label_names, captions, masks=masks, names=names)

    def _label(self, row: RawRow) -> int:
        label = row.columns.get(self.label_column)
        if isinstance(label, str) and self.label_names:
            return self.label_names.index(one_of(f"the class of {row.name}", label, self.label_names))
        if type(label) is not int or label < 0:
            raise ValueError(
                f"{row.name} has the label {label!r} in column {self.label_column!r}; labels are integers of at least "
                "0: name another column in base.label_column, or make the shards with scripts/shard.py"
            )
        return label

    def first_example(self) -> dict[str, Any]:
        """Return an example, nothing of it random."""
        return StreamReader(self, 0, 1).next(None)

    # --- readers

    def dealt(self, process_index: int, num_processes: int, workers: int) -> Stream:
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

    def order(self, epoch: int) -> list[Shard]:
        """Return the shards in the order of an epoch, which its readers are dealt one by one."""
        key = int(digest(self.args.seed, "shards", epoch), 16) >> 1
        order = torch.randperm(len(self.shards), generator=torch.Generator().manual_seed(key)).tolist()
        return [self.shards[number] for number in order]

    def go_on(self, saved: list[dict[str, Any]], process_index: int) -> list[str]:
        """Take up the positions that all processes had; return the lines that say what is left out or read again.

        Other processes or workers than these have other shards: then every reader begins the next epoch.
        """
        readers = [reader for part in saved for reader in part["readers"] if reader]
        counts = [len(part["readers"]) for part in saved]
        if counts != [len(self.readers)] * (self.reader_count // len(self.readers)):
            epoch = 1 + max((reader["place"][0] for reader in readers), default=-1)
            self.readers = ({"place": (epoch, 0, 0)},) * len(self.readers)
            return [f"stream: all readers begin epoch {epoch}: what was left of the epoch before is not read"]
        self.readers, self.turn = tuple(saved[process_index]["readers"]), saved[process_index]["turn"]
        return self._buffer_note([reader for reader in readers if reader.get("buffer")])

    def _buffer_note(self, readers: list[dict[str, Any]]) -> list[str]:
        if not readers:
            return []
        if self.args.shuffle_buffer_size and self.args.shuffle_buffer_resume == "replay":
            rows = sum(reader["buffer"]["rows"] for reader in readers)
            seconds = max(each["buffer"]["rows"] * each["seconds"] / max(each["rows_read"], 1) for each in readers)
            return [f"stream: {rows:,} examples are read again for the shuffle buffers, about {seconds:.1f} s"]
        waiting = sum(len(reader["buffer"]["kept"]) for reader in readers)
        return [
            f"stream: the shuffle buffers begin empty: {waiting:,} examples that were read and not trained on are left "
            "out of this epoch, and none comes twice"
        ]

    def losses(self) -> tuple[int, int]:
        """Return how often a shard was skipped, and how many pictures were, by this process's readers."""
        found = [reader for reader in self.readers if reader]
        return sum(each.get("lost_shards", 0) for each in found), sum(each.get("bad_images", 0) for each in found)

    def open_reader(self, number: int, position: dict[str, Any] | None) -> StreamReader:
        """Return a reader of this process at a position, None for the start."""
        return StreamReader(self, self.first_reader + number, self.reader_count, position)

    def held(self, count: float = math.inf) -> HeldExamples:
        """Return at most so many of the first examples, in memory as they are encoded."""
        return HeldExamples(self, list(_first(StreamReader(self, 0, 1), count)))


class HeldExamples:
    """Examples of a stream by number, such as those to validate on: rows in memory, whose pictures are encoded."""

    random = False
    picture_columns = ()

    def __init__(self, stream: Stream, rows: list[RawRow]) -> None:
        self.stream, self.rows = stream, rows
        self.fingerprint = stream.fingerprint
        self.label_names, self.captioned, self.caption = stream.label_names, stream.captioned, stream.caption
        self.encoded_by = stream.encoded_by
        labels = [] if stream.label_column is None else [stream._label(row) for row in rows]
        self.highest_label = max(labels, default=None)

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Return an example; without a generator centre crop, no flip, first caption."""
        return self.stream.example(self.rows[index], generator)

    def name(self, index: int) -> str:
        """Return the row, and its shard, from which an example comes."""
        return self.rows[index].name


def build(args: Any, split: str) -> Stream | HeldExamples:
    """Build the stream of `args.train_data_dir` or `args.dataset_name`; the validation split is read into memory."""
    stream = Stream(find_shards(args, split), args)
    return stream.held() if split == "validation" else stream


def _first(reader: StreamReader, count: float) -> Iterator[RawRow]:
    """The rows of the first epoch, at most so many."""
    for number, (place, row) in enumerate(reader.rows()):
        if place.epoch > 0 or number >= count:
            return
        yield row


def _encoded(value: Any, row: RawRow) -> bytes:
    """The bytes of a picture's column; a missing one reads as an empty file. Raises ValueError for a path."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path"):
        raise ValueError(
            f"{row.name} names the file {value['path']!r} and does not hold it; make shards that hold files"
        )
    if not isinstance(data, bytes | None):
        raise ValueError(f"{row.name} has no picture but {type(data).__name__}; name its column in base.image_column")
    return data or b""


def _posterior(row: RawRow) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(row.columns.get(LATENTS) or b"")
        return {name: tensors[name].float() for name in ("mean", "logvar")}
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{row.name}: its latents cannot be read ({error}); make the shards again") from None
