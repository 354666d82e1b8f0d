"""Validates on all ranks: metrics of held-out examples, pictures from fixed noise, and metrics of many pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from datasets_lib.errors import InputError
from datasets_lib.example import ImageData, StreamData
from trainers.base import MeasuresData, Trainer
from trainers.engine.checkpoint.saver import Saver
from trainers.engine.data.batches import examples_once
from trainers.engine.distributed.collectives import run_on_main
from trainers.engine.encoders.stages import FrozenEncoders
from trainers.engine.optim.ema import EMA
from trainers.engine.run.context import DataSets, RunContext
from trainers.engine.run.progress import passing_bar
from trainers.engine.run.signals import Abandoned
from trainers.engine.tracking.tracker import Tracker
from trainers.engine.validation.evaluation import Evaluation
from trainers.engine.validation.grids import grid_of
from trainers.engine.validation.means import OfExamples, mean_over
from trainers.engine.validation.metrics import spread
from trainers.engine.validation.sampling import draw_samples, evaluation_mode, with_examples

STREAMED = 2000  # examples of a stream at most, which are held in memory to be measured
Item = TypeVar("Item")


@dataclass
class Validation:
    """Runs what is due, collectively; what a stop interrupts logs nothing and runs again on resume."""

    ctx: RunContext
    trainer: Trainer
    ema: EMA | None
    encoders: FrozenEncoders
    data: DataSets
    saver: Saver
    tracker: Tracker

    def __post_init__(self) -> None:
        self.accelerator, self.stop, self.base = self.ctx.accelerator, self.ctx.stop, self.trainer.base
        if self.base.eval_steps is not None:
            self.evaluation = Evaluation(self.accelerator, self.trainer, self.data.uncached(), self._watched)

    def make_up(self, steps_done: int) -> None:
        """Runs what was due at the step of the checkpoint that the run resumes from, and was interrupted."""
        self.after_step(steps_done)

    def after_step(self, steps_done: int) -> None:
        due, base = self.ctx.clock.due, self.base
        if due(steps_done, base.valid_steps, base.valid_epochs):
            self._unless_stopped("valid", steps_done, self.validate)
        if base.eval_steps is not None and due(steps_done, base.eval_steps):
            self._unless_stopped("eval", steps_done, self.evaluate)

    def _unless_stopped(self, phase: str, steps_done: int, action: Callable[[int], dict[str, float]]) -> None:
        if steps_done <= self.tracker.logged_at.get(f"{phase}/seconds", 0):
            return  # it was finished before the run was resumed
        try:
            if self.stop.agreed(wait=True):
                raise Abandoned
            progress = partial(self._watched, f"{phase}: sampling")
            with evaluation_mode(self.trainer, progress), self.tracker.phase(phase, steps_done) as found:
                found.update(action(steps_done))
        except Abandoned:
            name = {"valid": "Validation", "eval": "Evaluation"}[phase]
            self.accelerator.print(f"{name} at step {steps_done} interrupted; it runs again on resume")

    def _watched(self, what: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yields items, equally many on every rank: with a bar, ended by a stop; a written checkpoint is sealed."""
        for item in self.stop.watch(passing_bar(self.accelerator, what, items), what):
            yield item
            self.saver.seal_written()

    def validate(self, steps_done: int) -> dict[str, float]:
        """Returns metrics ("valid/loss", "valid_ema/loss"); logs grids of pictures, by raw weights and by averages."""
        weights: dict[str, AbstractContextManager] = {"valid": nullcontext()}
        weights |= {"valid_ema": self._averaged_weights()} if self.ema is not None else {}
        metrics: dict[str, float] = {}
        pictures: list[dict[str, Tensor]] = []
        requests = self.trainer.sample_requests(self.data.validation)
        for prefix, applied in weights.items():
            with applied:
                found, drawn = self._measure(requests)
            metrics |= {f"{prefix}/{name}": value for name, value in found.items()}
            pictures.append(drawn)
        texts = [request["prompt"] for request in requests] if requests and "prompt" in requests[0] else None
        columns = self.trainer.grid_columns
        grids = {name: grid_of([images[name] for images in pictures], columns, texts) for name in pictures[0]}
        self.tracker.log_grids(grids, steps_done)
        if requests:
            self.tracker.log_table([self._readable(request) for request in requests], pictures, steps_done)
        return metrics

    def _measure(self, requests: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Returns metrics of held-out examples and of pictures, and the pictures, of the weights in the networks."""
        trainer, held_out, metrics = self.trainer, self.data.validation, self.held_out_metrics()
        if not requests:
            return metrics, {}
        pictures = draw_samples(self.accelerator, trainer, requests, self.base.seed, held_out)
        asked = with_examples(requests, held_out) if self.accelerator.is_main_process else []
        found = run_on_main(self.accelerator, lambda: trainer.sample_metrics(asked, pictures))
        if both := found.keys() & metrics.keys():
            which = f"validation_metrics and sample_metrics both return {min(both)}"
            raise InputError(f"{type(trainer).__name__}: {which}; rename one")
        return metrics | found, pictures

    def _readable(self, request: dict[str, Any]) -> dict[str, Any]:
        """Replaces a request's label by the name of its class."""
        names = self.trainer.run.label_names
        return request | ({"label": names[request["label"]]} if names and "label" in request else {})

    def held_out_metrics(self) -> dict[str, float]:
        """Returns the task's metrics of the validation set; none without one."""
        if self.data.validation is None:
            return {}
        share = self._share(self.data.validation, range(len(self.data.validation)))
        means = self._mean_over(self._watched("valid: examples", share), self.trainer.validation_metrics)
        return self.trainer.validation_summary(means)

    def training_statistics(self) -> dict[str, float]:
        """Means of the task's data_statistics with the weights of the pipeline; a stop raises Abandoned."""
        trainer = self.trainer
        if not isinstance(trainer, MeasuresData) or trainer.statistics_samples == 0:
            return {}
        wanted, train_set = trainer.statistics_samples, self.data.train
        if isinstance(train_set, StreamData):
            train_set = train_set.held(min(wanted, STREAMED))
        share = self._share(train_set, spread(len(train_set), wanted))
        with self._averaged_weights(), evaluation_mode(self.trainer):
            return self._mean_over(self._watched("export: measuring", share), trainer.data_statistics)

    def _mean_over(self, batches: Iterable[tuple[dict, float]], measure: OfExamples) -> dict[str, float]:
        add_up = partial(self.accelerator.reduce, reduction="sum")
        return mean_over(self.encoders, batches, self.base.seed, measure, add_up)

    def _share(self, dataset: ImageData, indices: Sequence[int]) -> Iterable[tuple[dict, float]]:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return examples_once(dataset, indices, self.base, rank, world, self.accelerator.device, self.stop)

    def _averaged_weights(self) -> AbstractContextManager:
        return self.ema.applied() if self.ema is not None else nullcontext()

    def evaluate(self, steps_done: int) -> dict[str, float]:
        """Returns metrics of `eval_num_samples` pictures ("eval/fid"), drawn with the weights of the pipeline."""
        with self._averaged_weights():
            return {f"eval/{name}": value for name, value in self.evaluation.metrics().items()}
