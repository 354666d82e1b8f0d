"""Measures many drawn pictures during training; every process draws and describes its share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from accelerate import Accelerator
from torch import Tensor

from datasets_lib.errors import InputError
from datasets_lib.example import ImageData
from trainers.base import Trainer
from trainers.engine.distributed.collectives import run_on_main
from trainers.engine.run.context import DataSets
from trainers.engine.validation import metrics
from trainers.engine.validation.feature_networks import load_classifier, load_features
from trainers.engine.validation.metrics import Batch, Described, spread
from trainers.engine.validation.sampling import draw, evaluation_requests, gather, own_share

REAL_PICTURES = 50_000  # of each data set at most, evenly spread
Watched = Callable[[str, Iterable[Batch]], Iterable[Batch]]  # shows a bar, and ends if the run is stopped


class Evaluation:
    """Compares drawn pictures with those of the training set, described at the first call. All calls are collective."""

    def __init__(self, accelerator: Accelerator, trainer: Trainer, data: DataSets, watched: Watched) -> None:
        base, device = trainer.base, accelerator.device
        self.accelerator, self.trainer, self.data, self.watched = accelerator, trainer, data, watched
        self.requests = evaluation_requests(trainer, base.eval_num_samples, data.validation)
        self.reconstructs = any("example" in request for request in self.requests)
        self._check()
        with accelerator.main_process_first():  # which downloads; the others then find the file
            self.features = load_features(base.eval_features, device)
        self.classifier = load_classifier(base.eval_classifier, device) if base.eval_classifier else None
        self.real: Described | None = None
        self.fixed: dict[str, float] = {}  # metrics that never change: the accuracy on real pictures
        self.recognise: Callable[[Tensor], Tensor] | None = None
        self.held_out_distances: Tensor | None = None

    def _check(self) -> None:
        """Raises ValueError at the start if an evaluation would fail or measure nothing later."""
        base, validation_set = self.trainer.base, self.data.validation
        option = f"base.eval_steps = {base.eval_steps}"
        if not self.requests:
            without = " without base.validation_split" if self.trainer.draws_held_out and validation_set is None else ""
            raise InputError(f"{option}: this task draws no pictures{without}; set it to null")
        if "image" not in self.data.train.get(0, None):
            raise InputError(f"{option}: the data set holds latents, and metrics compare pictures; set it to null")
        if self.reconstructs and base.eval_features == "none":
            raise InputError(f"{option}: base.eval_features = none measures nothing of reconstructions; name a network")
        if self.reconstructs and len(self.requests) < metrics.LEAST_PICTURES:
            found = f"base.eval_num_samples and the validation set give {len(self.requests)} pictures"
            raise InputError(f"{option}: {found}, and metrics need {metrics.LEAST_PICTURES}; set it to null")

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of `eval_num_samples` pictures, the same on every rank."""
        real = self.real = self.real or self._describe_all_real()
        drawn = self._describe(self._drawn(), len(self.requests))
        if self.reconstructs:
            return run_on_main(self.accelerator, lambda: metrics.measure_reconstructions(drawn, real))
        distances, recognise = self.held_out_distances, self.recognise
        return run_on_main(self.accelerator, lambda: metrics.measure(drawn, real, distances, recognise) | self.fixed)

    def _describe_all_real(self) -> Described:
        """Describes the pictures to compare with: the training set, or the originals of reconstructions."""
        train_set, validation_set = self.data
        if self.reconstructs and validation_set is not None:
            return self._describe_real(validation_set, [request["example"] for request in self.requests])
        real = self._describe_real(train_set, spread(len(train_set), REAL_PICTURES))
        held_out = None
        if validation_set is not None:
            held_out = self._describe_real(validation_set, spread(len(validation_set), REAL_PICTURES))
        run_on_main(self.accelerator, lambda: self._prepare(real, held_out))
        return real

    def _prepare(self, real: Described, held_out: Described | None) -> None:
        """Trains a classifier if none is given, and measures real held-out pictures as a reference."""
        whole = len(real.thumbnails) == len(self.data.train)  # otherwise a copied picture may be missing
        if held_out is not None and whole:
            self.held_out_distances = metrics.nearest(held_out.vectors, real.vectors)[0]
        if "label" not in self.requests[0]:
            return
        if self.classifier is None and real.labels is not None and len(real.labels.unique()) > 1:
            self.recognise = metrics.train_classifier(real)
        if held_out is not None and held_out.labels is not None:
            seen = metrics.recognised(held_out, self.recognise)
            if seen is not None:
                self.fixed["class_accuracy_held_out"] = (seen == held_out.labels).double().mean().item()

    def _drawn(self) -> Iterator[Batch]:
        """Draws this process's share of the pictures in batches, with the requested classes."""
        base, numbers = self.trainer.base, own_share(len(self.requests), self.accelerator)
        for first in range(0, len(numbers), base.train_batch_size):
            chosen = numbers[first : first + base.train_batch_size]
            drawn = draw(self.trainer, self.requests, chosen, base.seed, len(chosen), self.data.validation)
            [images] = drawn.get("samples") or next(iter(drawn.values()))
            yield images, metrics.as_labels([self.requests[number] for number in chosen])

    def _describe_real(self, dataset: ImageData, chosen: list[int]) -> Described:
        mine = [chosen[number] for number in own_share(len(chosen), self.accelerator)]
        batches = metrics.pictures_of(dataset, mine, self.trainer.base.train_batch_size)
        return self._describe(self.watched("eval: real pictures", batches), len(chosen))

    def _describe(self, batches: Iterable[Batch], count: int) -> Described:
        own = metrics.describe(batches, self.accelerator.device, self.features, self.classifier)
        return own.each(lambda rows: gather(self.accelerator, rows, count))
