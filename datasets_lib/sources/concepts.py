"""`train_data_dir` as a list of tables: several folders in one run, each with its caption, trigger word and repeats."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, cast

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.source import Rows, Source, changed, digest, refuse_named_split
from datasets_lib.sources.classes import class_names, number_classes
from datasets_lib.sources.concept import Concept
from datasets_lib.sources.folder import read_folder


def build(args: Any, split: str) -> ImageDataset:
    """Build the data set of all folders to train on."""
    refuse_named_split(args, "base.train_data_dir, a list,")
    training = [concept for concept in _concepts(args) if not concept.regularization]
    return ImageDataset(_joined(training, args, split), changed(args, caption=None), split)


def regularization_images(args: Any) -> Source | None:
    """Return the images of the class, None if no folder is one; their text files come before the table's caption."""
    concepts = [concept for concept in _concepts(args) if concept.regularization]
    plain = changed(args, trigger_word=None, caption=None, mask_files=False, validation_split=None)
    return _joined(concepts, plain, "train") if concepts else None


def _concepts(args: Any) -> list[Concept]:
    return [Concept(**table) for table in args.train_data_dir] if isinstance(args.train_data_dir, list) else []


def _joined(concepts: list[Concept], args: Any, split: str) -> Source:
    """The rows of all folders, one after the other."""
    captions = [args.caption if concept.caption is None else concept.caption for concept in concepts]
    sources = [
        read_folder(changed(args, train_data_dir=concept.path, caption=None), split, caption)
        for concept, caption in zip(concepts, captions, strict=True)
    ]
    _check_masks(sources)
    _check_doubles(sources)
    counts = [len(source.images) for source in sources]
    texts, notes, unread = _captions(sources)
    classes = _classes(concepts, sources)
    label_names = class_names(classes)
    labels = number_classes(classes, label_names, Path(sources[0].origin))
    words = [concept.trigger_word or args.trigger_word for concept in concepts]
    repeats = [
        number * concept.repeats
        for concept, source, count in zip(concepts, sources, counts, strict=True)
        for number in source.repeats or [1] * count
    ]
    about = [dataclasses.astuple(dataclasses.replace(concept, path="")) for concept in concepts]
    return Source(
        images=[image for source in sources for image in _files(source.images)],
        origin=", ".join(source.origin for source in sources),
        fingerprint=digest(*(source.fingerprint for source in sources), *about),
        labels=labels,
        label_names=label_names,
        captions=texts,
        notes=[*_summaries(concepts, sources), *notes],
        masks=None if sources[0].masks is None else [mask for source in sources for mask in _files(source.masks)],
        repeats=repeats if set(repeats) != {1} else None,
        trigger_words=_by_row(words, counts) if any(concept.trigger_word for concept in concepts) else None,
        no_labels=next(filter(None, (source.no_labels for source in sources)), None) if labels is None else None,
        unread=unread,
    )


def _by_row(words: list[str | None], counts: list[int]) -> list[str | None]:
    return [word for word, count in zip(words, counts, strict=True) for _ in range(count)]


def _files(rows: Rows | None) -> list[Path]:
    """The rows of a folder, which are files."""
    return cast("list[Path]", rows or [])


def _captions(sources: list[Source]) -> tuple[list[str | list[str]] | None, list[str], list[str]]:
    """The captions by row, empty in folders without any; None if there are none at all. With notes on those."""
    without = [source for source in sources if source.captions is None]
    unread = [f"{each} ({shown(source.origin)})" for source in without for each in source.unread]
    if len(without) == len(sources):
        return None, [], unread
    notes = [f"no captions found in {shown(source.origin)}: its images have the empty text" for source in without]
    return [text for source in sources for text in source.captions or [""] * len(source.images)], notes, unread


def _classes(concepts: list[Concept], sources: list[Source]) -> list[str | int] | None:
    """The class of each row: the folder's, or else those that each folder has by itself."""
    if concepts[0].class_name is not None:
        pairs = zip(concepts, sources, strict=True)
        return [str(concept.class_name) for concept, source in pairs for _ in range(len(source.images))]
    found: list[list[str | int]] = []
    for source in sources:
        if source.labels is None:
            return None
        names = source.label_names
        found.append(list(source.labels) if names is None else [names[label] for label in source.labels])
    return list(chain(*found))


def _check_masks(sources: list[Source]) -> None:
    without = [source for source in sources if source.masks is None]
    if without and len(without) < len(sources):
        raise InputError(f"{shown(without[0].origin)} has no masks, and other folders of base.train_data_dir have some")


def _check_doubles(sources: list[Source]) -> None:
    seen: dict[Any, str] = {}
    for source in sources:
        for image in dict.fromkeys(_files(source.images)):  # a list may name one twice
            if image in seen:
                raise InputError(
                    f"base.train_data_dir has {shown(image)} in two of its folders, {shown(seen[image])} and "
                    f"{shown(source.origin)}; keep one, and set its repeats"
                )
            seen[image] = source.origin


def _summaries(concepts: list[Concept], sources: list[Source]) -> Iterator[str]:
    for concept, source in zip(concepts, sources, strict=True):
        more = f", each {concept.repeats:,} times an epoch" if concept.repeats > 1 else ""
        word = f", trigger word {concept.trigger_word!r}" if concept.trigger_word else ""
        yield f"{shown(source.origin)}: {len(source.images):,} images{more}{word}"
        yield from source.notes
