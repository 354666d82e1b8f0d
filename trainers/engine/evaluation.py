"""Metrics of many drawn pictures, in the loop: every process draws and describes its share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from trainers.base import Trainer
from trainers.engine.agreement import on_main
from trainers.engine.drawing import draw, gather, own_share
from trainers.engine.judges import load_classifier, load_features
from trainers.engine.picture_metrics import (
    Described,
    as_labels,
    describe,
    measure,
    pictures_of,
    spread,
    train_classifier,
)

REAL_PICTURES = 10_000  # of the training set, evenly spread, with which drawn ones are compared


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
        self.requests = trainer.evaluation_requests(base.eval_num_samples)
        if not self.requests:
            raise ValueError(f"base.eval_steps = {base.eval_steps}: this task draws no pictures; set it to null")
        with accelerator.main_process_first():  # it downloads, the others find the file
            self.features = load_features(base.eval_features, device)
        self.classifier = load_classifier(base.eval_classifier, device) if base.eval_classifier else None
        self.real: list[Described | None] = []
        self.recognise = None

    def metrics(self) -> dict[str, float]:
        """The metrics of `eval_num_samples` pictures, the same on every rank."""
        if not self.real:
            self.real = [self._describe_real(dataset) for dataset in self.sets]
        base = self.trainer.base
        numbers = own_share(len(self.requests), self.accelerator)
        drawn = draw(self.trainer, self.requests, numbers, base.seed, base.train_batch_size)
        pictures = drawn.get("samples") or next(iter(drawn.values()))
        starts = range(0, len(numbers), base.train_batch_size)
        labels = [as_labels([self.requests[n] for n in numbers[i : i + base.train_batch_size]]) for i in starts]
        described = self._describe(zip(pictures, labels, strict=True), len(self.requests))
        return on_main(self.accelerator, lambda: self._compare(described))

    def _compare(self, drawn: Described) -> dict[str, float]:
        real, held_out = self.real
        if self.recognise is None and drawn.predicted is None and drawn.labels is not None and real.labels is not None:
            self.recognise = train_classifier(real)
        return measure(drawn, real, held_out, self.recognise)

    def _describe_real(self, dataset: Any | None) -> Described | None:
        if dataset is None:
            return None
        chosen = spread(len(dataset), REAL_PICTURES)
        mine = [chosen[number] for number in own_share(len(chosen), self.accelerator)]
        batches = pictures_of(dataset, mine, self.trainer.base.train_batch_size)
        return self._describe(self.watched("describing real pictures")(batches), len(chosen))

    def _describe(self, batches: Iterable[tuple[Tensor, Tensor | None]], count: int) -> Described:
        own = describe(batches, self.accelerator.device, self.features, self.classifier)
        return Described(*(None if rows is None else gather(self.accelerator, rows, count) for rows in own))
