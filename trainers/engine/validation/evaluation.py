"""Metrics of many drawn pictures, in the loop: every process draws and describes its share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from trainers.base import Trainer
from trainers.engine.distributed.collectives import run_on_main
from trainers.engine.validation.feature_networks import load_classifier, load_features
from trainers.engine.validation.metrics import (
    LEAST_PICTURES,
    Described,
    as_labels,
    describe,
    measure,
    measure_reconstructions,
    nearest,
    pictures_of,
    recognised,
    spread,
    train_classifier,
)
from trainers.engine.validation.sampling import draw, evaluation_requests, gather, own_share

REAL_PICTURES = 50_000  # at most, of each set, evenly spread, with which drawn ones are compared


class Evaluation:
    """Compares pictures of a trainer with the training set's; the real ones are described at the first call.

    Every call is collective. Raises ValueError where the task draws no pictures or a network cannot be had.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        trainer: Trainer,
        train_set: Any,
        validation_set: Any | None,
        watched: Callable[[str], Callable[[Iterable], Iterable]],
    ) -> None:
        base, device = trainer.base, accelerator.device
        self.accelerator, self.trainer, self.sets = accelerator, trainer, (train_set, validation_set)
        self.watched = watched  # watched("what")(batches) shows a bar and ends with the run
        self.requests = evaluation_requests(trainer, base.eval_num_samples, validation_set)
        if not self.requests:
            without = " without base.validation_split" if trainer.draws_held_out and validation_set is None else ""
            raise ValueError(
                f"base.eval_steps = {base.eval_steps}: this task draws no pictures{without}; set it to null"
            )
        self.reconstructs = "example" in self.requests[0]
        self._check(train_set)
        with accelerator.main_process_first():  # it downloads, the others find the file
            self.features = load_features(base.eval_features, device)
        self.classifier = load_classifier(base.eval_classifier, device) if base.eval_classifier else None
        self.real: Described | None = None
        self.fixed: dict[str, float] = {}  # what the classifier gets on held-out pictures
        self.recognise: Callable[[Tensor], Tensor] | None = None
        self.held_out_distances: Tensor | None = None

    def _check(self, train_set: Any) -> None:
        """Raises ValueError at the start for what would fail, or measure nothing, when the metrics are due."""
        base = self.trainer.base
        option = f"base.eval_steps = {base.eval_steps}"
        if "image" not in train_set.get(0, None):
            raise ValueError(f"{option}: the data set holds latents, and metrics compare pictures; set it to null")
        if self.reconstructs and base.eval_features == "none":
            raise ValueError(f"{option}: base.eval_features = none measures nothing of reconstructions; name a network")
        if self.reconstructs and len(self.requests) < LEAST_PICTURES:
            found = f"base.eval_num_samples and the validation set give {len(self.requests)} pictures"
            raise ValueError(f"{option}: {found}, and metrics need {LEAST_PICTURES}; set it to null")

    def metrics(self) -> dict[str, float]:
        """The metrics of `eval_num_samples` pictures, the same on every rank."""
        if self.reconstructs:
            return self._reconstruction_metrics()
        if self.real is None:
            real, held_out = [self._describe_real(dataset) for dataset in self.sets]
            run_on_main(self.accelerator, lambda: self._prepare(real, held_out))
            self.real = real
        drawn = self._describe(self._drawn(), len(self.requests))
        compare = lambda: measure(drawn, self.real, self.held_out_distances, self.recognise) | self.fixed  # noqa: E731
        return run_on_main(self.accelerator, compare)

    def _reconstruction_metrics(self) -> dict[str, float]:
        """Those of held-out pictures' reconstructions, compared with these pictures."""
        if self.real is None:
            self.real = self._describe_real(self.sets[1], [request["example"] for request in self.requests])
        drawn = self._describe(self._drawn(), len(self.requests))
        return run_on_main(self.accelerator, lambda: measure_reconstructions(drawn, self.real))

    def _prepare(self, real: Described, held_out: Described | None) -> None:
        """Once: the classifier, where none is given, and what real held-out pictures would get."""
        whole = len(real.thumbnails) == len(self.sets[0])  # else a copied picture may not be among them
        if held_out is not None and whole:
            self.held_out_distances = nearest(held_out.vectors, real.vectors)[0]
        if "label" not in self.requests[0]:
            return
        if self.classifier is None and real.labels is not None and len(real.labels.unique()) > 1:
            self.recognise = train_classifier(real)
        known = self.classifier is not None or self.recognise is not None
        if known and held_out is not None and held_out.labels is not None:
            right = recognised(held_out, self.recognise) == held_out.labels
            self.fixed["class_accuracy_held_out"] = right.double().mean().item()

    def _drawn(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This process's share of the pictures in batches, with the classes that were asked for."""
        base, numbers = self.trainer.base, own_share(len(self.requests), self.accelerator)
        for first in range(0, len(numbers), base.train_batch_size):
            chosen = numbers[first : first + base.train_batch_size]
            drawn = draw(self.trainer, self.requests, chosen, base.seed, len(chosen), self.sets[1])
            [images] = drawn.get("samples") or next(iter(drawn.values()))
            yield images, as_labels([self.requests[number] for number in chosen])

    def _describe_real(self, dataset: Any | None, chosen: list[int] | None = None) -> Described | None:
        if dataset is None:
            return None
        chosen = chosen or spread(len(dataset), REAL_PICTURES)
        mine = [chosen[number] for number in own_share(len(chosen), self.accelerator)]
        batches = pictures_of(dataset, mine, self.trainer.base.train_batch_size)
        return self._describe(self.watched("describing real pictures")(batches), len(chosen))

    def _describe(self, batches: Iterable[tuple[Tensor, Tensor | None]], count: int) -> Described:
        own = describe(batches, self.accelerator.device, self.features, self.classifier)
        return Described(*(None if rows is None else gather(self.accelerator, rows, count) for rows in own))
