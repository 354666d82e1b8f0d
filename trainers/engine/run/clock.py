"""Time is the optimizer step: the slots that it consumes, the ends of epochs, what is due."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from accelerate import Accelerator

from datasets_lib.errors import InputError
from trainers.engine.config.base_options import BaseConfig


class Clock(NamedTuple):
    """A run's fixed quantities. Step s (from 0) consumes the slots [slot_at(s), slot_at(s + 1))."""

    num_examples: int | None  # N, of the training set; None: a stream, whose length is unknown
    micro_batch_size: int  # examples per process and micro-batch
    accumulation_steps: int  # micro-batches per process and optimizer step
    num_processes: int
    num_epochs: int | None = None
    max_train_steps: int | None = None
    origin_step: int = 0  # at which a resumed run continues, perhaps with another global batch size
    origin_slot: int = 0  # of that step
    bucket_counts: tuple[int, ...] = ()  # examples of each bucket, which is drawn in whole steps; (): no buckets

    @classmethod
    def of_run(
        cls,
        base: BaseConfig,
        num_examples: int | None,
        accelerator: Accelerator,
        bucket_of: Callable[[int], int] | None = None,
    ) -> Clock:
        """Makes the clock; with `base.buckets`, `bucket_of(index)` numbers the bucket of an example."""
        if num_examples == 0:
            raise InputError("the training set has 0 examples; check the data options of section base")
        steps, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
        clock = cls(num_examples, base.train_batch_size, steps, processes, base.num_epochs, base.max_train_steps)
        if not base.buckets:
            return clock
        if bucket_of is None:
            raise InputError("base.buckets = true: the data set has no bucket_of(index); set it to false")
        return clock._replace(bucket_counts=tuple(Counter(map(bucket_of, range(num_examples or 0))).values()))

    def resumed_at(self, step: int, slot: int) -> Clock:
        return self._replace(origin_step=step, origin_slot=slot)

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.accumulation_steps * self.num_processes

    @property
    def epoch_slots(self) -> int:
        """The examples drawn in an epoch: N, or whole steps of each bucket; 0 for a stream, which has no epochs."""
        size = self.global_batch_size
        return sum(-(-count // size) * size for count in self.bucket_counts) or self.num_examples or 0

    @property
    def total_steps(self) -> int:
        return self.max_train_steps or self.steps_in(self.num_epochs or 0)

    def steps_in(self, epochs: int) -> int:
        """The step at which this many epochs end: ceil(epochs * epoch_slots / G) if G never changed."""
        missing = epochs * self.epoch_slots - self.origin_slot
        return max(self.origin_step + -(-missing // self.global_batch_size), 0)

    def slot_at(self, step: int) -> int:
        return self.origin_slot + (step - self.origin_step) * self.global_batch_size

    def epochs(self, steps_done: int) -> dict[str, float]:
        """The metric "epoch", the number of epochs done; none for a stream."""
        return {} if self.num_examples is None else {"epoch": self.slot_at(steps_done) / self.epoch_slots}

    def due(self, steps_done: int, every_steps: int | None, every_epochs: int | None = None) -> bool:
        """Whether something is due after a step: by its cadence, or because the step is the run's last."""
        if steps_done == self.total_steps:
            return True
        if every_steps is not None:
            return steps_done % every_steps == 0
        if every_epochs is not None:
            period = every_epochs * self.epoch_slots
            return self.slot_at(steps_done) // period > self.slot_at(steps_done - 1) // period
        return False

    def micro_batch(self, micro_step: int, process_index: int) -> int:
        """Numbers the micro-batches of a step over processes first, then over accumulation."""
        return micro_step * self.num_processes + process_index

    def micro_batch_slots(self, step: int, micro_step: int, process_index: int) -> range:
        first = self.slot_at(step) + self.micro_batch(micro_step, process_index) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)
