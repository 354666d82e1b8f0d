"""`class_data_dir`: a picture of the class with every training example, for prior preservation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.example import ImageData
from datasets_lib.foreign import is_folder, shown
from datasets_lib.images.files import resolved
from datasets_lib.images.image_dataset import ImageDataset
from datasets_lib.images.source import Source, changed, digest
from datasets_lib.images.transforms import draw
from datasets_lib.sources import concepts
from datasets_lib.sources.folder import as_source
from datasets_lib.sources.mask_files import split_masks
from datasets_lib.sources.metadata import Listed
from datasets_lib.sources.walk import list_files

PREFIX = "class_"


class PriorDataset(ImageData):
    """Examples that also have the columns of a picture of the class, prefixed: "class_image", "class_caption", ...

    Its own draws come after those of the example: which picture, then its crop and flip.
    """

    random = True
    caption_note: str | None = None
    picture_columns = ("image", "class_image")

    def __init__(self, instances: ImageData, prior: ImageDataset) -> None:
        self.instances, self.prior = instances, prior
        self.fingerprint = digest(instances.fingerprint, prior.fingerprint)
        first = next(iter(prior.captions()))
        self.notes = [*instances.notes, *prior.notes, f"{len(prior)} pictures of the class: {first!r}"]
        self.label_names, self.highest_label = instances.label_names, instances.highest_label
        self.encoded_by, self.caption_note = instances.encoded_by, instances.caption_note
        self.no_labels, self.caption_problem = instances.no_labels, instances.caption_problem

    def __len__(self) -> int:
        return len(self.instances)

    @property
    def bad_count(self) -> int:
        return self.instances.bad_count + self.prior.bad_count

    def name(self, index: int) -> str:
        return self.instances.name(index)

    def prepare(self, show_progress: bool = True) -> None:
        """Decode both ahead, each if it fits `args.image_cache_mb`."""
        for dataset in (self.instances, self.prior):
            dataset.prepare(show_progress)

    def only(self, indices: Sequence[int]) -> PriorDataset:
        """Return these examples alone, and as many pictures of the class."""
        prior = self.prior.only(range(min(len(indices), len(self.prior))))
        return PriorDataset(self.instances.only(indices), prior)

    def get(self, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Return the example and, prefixed, one of the class; without a generator the one at the same place."""
        example = self.instances.get(index, generator)
        return {**example, **_prefixed(self.prior.get(self._choose(index, generator), generator))}

    @property
    def in_memory(self) -> bool:
        return self.instances.in_memory and self.prior.in_memory

    def get_batch(self, indices: Sequence[int], generators: Sequence[torch.Generator | None]) -> dict[str, Any]:
        batch = self.instances.get_batch(indices, generators)
        chosen = [self._choose(index, own) for index, own in zip(indices, generators, strict=True)]
        return {**batch, **_prefixed(self.prior.get_batch(chosen, generators))}

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        instances = {key: value for key, value in batch.items() if not key.startswith(PREFIX)}
        prior = {key.removeprefix(PREFIX): value for key, value in batch.items() if key.startswith(PREFIX)}
        return {**self.instances.finish(instances), **_prefixed(self.prior.finish(prior))}

    def without_image(self, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Return the example without both pictures; "class_index" is the number of the one of the class."""
        example = self.instances.without_image(index, generator)
        chosen = self._choose(index, generator)
        return {**example, "class_index": chosen, **_prefixed(self.prior.without_image(chosen, generator))}

    def image(self, index: int, flipped: bool, column: str = "image") -> torch.Tensor:
        """Return the centre of a picture; "class_image" takes a "class_index"."""
        return self._of(column).image(index, flipped)

    def image_keys(self, index: int, column: str = "image") -> tuple[str, ...]:
        return self._of(column).image_keys(index)

    def image_count(self, column: str = "image") -> int:
        return len(self._of(column))

    def captions(self, column: str = "caption") -> Iterable[str] | None:
        return self._of(column).captions()

    def _of(self, column: str) -> ImageData:
        return self.prior if column.startswith(PREFIX) else self.instances

    def _choose(self, index: int, generator: torch.Generator | None) -> int:
        return index % len(self.prior) if generator is None else draw(len(self.prior), generator)


def _prefixed(example: dict[str, Any]) -> dict[str, Any]:
    return {f"{PREFIX}{key}": value for key, value in example.items()}


def with_prior(instances: ImageData, args: Any) -> PriorDataset:
    """Add the pictures of the class: those of `args.class_data_dir`, or of tables of the list with regularization.

    Raises MissingFileError for a folder that is not there, InputError for one whose pictures are examples already.
    """
    source = concepts.regularization_images(args)
    if source is not None:
        own: dict[str, Any] = {"caption": None}
        if source.captions is None or not all(source.captions):
            raise InputError(
                f"base.train_data_dir: images of the class in {source.origin} have no caption; give their table one, "
                "such as a photo of a dog"
            )
    else:
        source, own = _of_folder(args), {"caption": args.class_caption}
    known: Any = instances.source.images if isinstance(instances, ImageDataset) else ()
    if twice := set(cast("list[Path]", source.images)) & {image for image in known if isinstance(image, Path)}:
        raise InputError(
            f"{len(twice)} pictures of the class in {source.origin}, such as {shown(min(twice))}, are examples to "
            "train on, too; move them out of that folder"
        )
    own |= {"trigger_word": None, "shuffle_tags": False, "keep_tags": 0}
    prior_args = changed(args, **own, max_train_samples=None, validation_split=None)
    return PriorDataset(instances, ImageDataset(source, prior_args, "train"))


def _of_folder(args: Any) -> Source:
    """The pictures of `args.class_data_dir`; caption files next to them are not read."""
    folder = resolved(args.class_data_dir)
    if not is_folder(folder):
        raise MissingFileError(f"base.class_data_dir: there is no folder {folder}; give a folder of pictures")
    images, _ = list_files(folder, (), folder, args.allow_outside, "class_data_dir")
    return as_source(Listed(split_masks(images).images), folder, None, None, [])
