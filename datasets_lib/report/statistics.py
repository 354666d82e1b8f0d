"""Describes a data set's pictures, classes and captions as lines of a report."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from datasets_lib.foreign import shown
from datasets_lib.images.buckets import Size, kept_part
from datasets_lib.images.memory_cache import in_threads
from datasets_lib.images.pictures import Pictures

SHOWN = 5  # captions, duplicates
LABELS_SHOWN = 40

Line = tuple[str, str]  # title, text


class Found(NamedTuple):
    """The result of reading one picture; `fault` says why it cannot be used."""

    position: int
    size: Size | None = None
    content: str | None = None
    fault: str | None = None


def scan(pictures: Pictures, show_progress: bool) -> list[Found]:
    """Read every picture; none that is broken ends it."""

    def read(position: int) -> Found:
        try:
            _, size = pictures.decode(position)
            return Found(position, size, pictures.content(position))
        except ValueError as error:
            return Found(position, fault=str(error).partition("; repair or remove it")[0])

    results, count = in_threads(read, len(pictures)), len(pictures)
    return list(tqdm(results, "reading images", count, delay=3, unit="image", disable=not show_progress))


def picture_lines(found: list[Found], pictures: Pictures) -> Iterator[Line]:
    """Sizes, duplicates and every picture that cannot be used."""
    sizes = [item.size for item in found if item.size is not None]
    if sizes:
        for name, sides in (("heights", [size[0] for size in sizes]), ("widths", [size[1] for size in sizes])):
            yield name, f"{_spread(sides)} pixels"
        (height, width), count = Counter(sizes).most_common(1)[0]
        yield "most frequent", f"{width} x {height} (width x height), {count:,} of {len(sizes):,}"
        targets = [pictures.reader.target(size) for size in sizes]
        small = sum(size[0] < target[0] or size[1] < target[1] for size, target in zip(sizes, targets, strict=True))
        side = "their bucket's" if len(pictures.reader.sizes) > 1 else f"base.resolution = {targets[0][0]} pixels"
        yield "enlarged", f"{small:,} have a side of less than {side}"
        if len(pictures.reader.sizes) > 1:
            yield from bucket_lines(sizes, targets)
    groups = _groups((item.content, item.position) for item in found if item.content is not None)
    yield "same pictures", f"{len(groups):,} pictures are there more than once"
    for positions in groups[:SHOWN]:
        yield (
            "",
            " = ".join(shown(pictures.name(each)) for each in positions[:SHOWN])
            + (" = ..." if len(positions) > SHOWN else ""),
        )
    faults = [item.fault for item in found if item.fault]
    yield "unusable", f"{len(faults):,}"
    yield from (("", fault) for fault in faults)


def bucket_lines(sizes: list[Size], targets: list[Size]) -> Iterator[Line]:
    """How many pictures each bucket has, and how much of them is cropped away."""
    groups: dict[Size, list[float]] = {}
    for size, target in zip(sizes, targets, strict=True):
        groups.setdefault(target, []).append(1 - kept_part(size, target))
    lost = [part for parts in groups.values() for part in parts]
    yield "buckets", f"{len(groups):,} sizes (width x height), {_cropped(lost)}"
    for (height, width), parts in sorted(groups.items()):
        yield "", f"{width} x {height}: {len(parts):,} pictures, {_cropped(parts)}"


def _cropped(parts: list[float]) -> str:
    return f"{statistics.fmean(parts):.1%} cropped away in the mean"


def label_lines(labels: list[int], names: list[str] | None) -> Iterator[Line]:
    """How many examples each class has."""
    counts = sorted(Counter(labels).items())
    yield "labels", f"{len(counts):,} classes, examples of each: {_spread([count for _, count in counts])}"
    for label, count in counts[:LABELS_SHOWN]:
        yield "", f"{label if names is None else f'{label} {shown(names[label])}'}: {count:,}"
    if len(counts) > LABELS_SHOWN:
        yield "", f"... and {len(counts) - LABELS_SHOWN:,} more"


def caption_lines(dataset: Any, tokenizer: Any | None) -> Iterator[Line]:
    """How many captions there are, how long they are and what they look like."""
    texts = list(dataset.captions())
    if dataset.caption_note is not None:
        yield "captions", dataset.caption_problem or dataset.caption_note
    else:
        of_rows = [dataset.source.captions[row] for row in dataset.rows]
        several = sum(isinstance(text, list) and len(text) > 1 for text in of_rows)
        yield "captions", f"{len(texts):,} of {len(of_rows):,} examples; {several:,} examples have several"
        yield "words", _spread([len(text.split()) for text in texts])
    if tokenizer is not None:
        yield "tokens", _token_text(texts, tokenizer)
    if dataset.caption_note is None:
        yield from (("" if number else "first", shown(repr(text))) for number, text in enumerate(texts[:SHOWN]))
        repeated = [(text, count) for text, count in Counter(texts).most_common() if count > 1]
        yield "same captions", f"{len(repeated):,} captions are there more than once"
        yield from (("", f"{count:,} x {shown(repr(text))}") for text, count in repeated[:SHOWN])


def column_lines(example: dict[str, Any]) -> Iterator[Line]:
    """Lists an example's columns with type and shape."""
    for number, (name, value) in enumerate(example.items()):
        is_tensor = isinstance(value, torch.Tensor)
        kind = f"{str(value.dtype)[6:]} {list(value.shape)}" if is_tensor else type(value).__name__
        yield "" if number else "columns", f"{shown(name)}: {kind}"


def _token_text(texts: list[str], tokenizer: Any) -> str:
    counts = [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]
    limit = tokenizer.model_max_length
    if limit > 1_000_000:  # what transformers takes for "none is known"
        return f"{_spread(counts)}; the tokenizer has no limit"
    cut = sum(count > limit for count in counts)
    return f"{_spread(counts)}, start and end tokens included; {cut:,} are cut off at {limit}"


def _groups(pairs: Iterator[tuple[str, int]]) -> list[list[int]]:
    """The positions that share their key with others."""
    groups: dict[str, list[int]] = {}
    for key, position in pairs:
        groups.setdefault(key, []).append(position)
    return [positions for positions in groups.values() if len(positions) > 1]


def _spread(numbers: Sequence[int]) -> str:
    return f"{min(numbers):,} to {max(numbers):,}, median {statistics.median(numbers):,g}"
