"""Slots and steps: each example once per epoch however a batch is split, epochs that end where they should."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from accelerate import Accelerator

from datasets_lib.checks import one_of
from datasets_lib.errors import UserError
from datasets_lib.example import ImageData
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.data.batches import EpochOrder, SlotBatches, examples_once, training_batches
from trainers.engine.run.clock import Clock
from trainers.engine.run.signals import StopSignals

STOPPING = StopSignals(1800.0)


class Numbers(ImageData):
    """A data set whose examples are their index and a number drawn from the loader's generator."""

    fingerprint = "numbers"
    random = True

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def get(self, index, generator):
        drawn = torch.rand(1, generator=generator) if generator is not None else torch.zeros(1)
        return {"index": index, "drawn": drawn}


def clock_of(examples, size, accumulation, processes, epochs):
    return Clock(examples, size, accumulation, processes, num_epochs=epochs)


def keys_of_run(clock, seed=0):
    """(slot, index) in the order of the slots, from all processes."""
    order = EpochOrder(clock.num_examples, seed)
    ranks = [list(SlotBatches(order, clock, rank, 0)) for rank in range(clock.num_processes)]
    return sorted(key for batches in ranks for batch in batches for key in batch)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(("examples", "size", "accumulation"), [(24, 2, 2), (13, 4, 1), (5, 4, 2), (1, 3, 1)])
def test_every_index_once_per_epoch(examples, size, accumulation, processes):
    clock = clock_of(examples, size, accumulation, processes, epochs=3)
    keys = keys_of_run(clock)
    assert [slot for slot, _ in keys] == list(range(clock.total_steps * clock.global_batch_size))
    assert clock.total_steps == math.ceil(3 * examples / clock.global_batch_size)
    for epoch in range(3):
        indices = [index for _, index in keys[epoch * examples : (epoch + 1) * examples]]
        assert sorted(indices) == list(range(examples))


def test_any_split_of_the_global_batch_sees_the_same_stream():
    splits = [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 8, 1)]
    streams = [keys_of_run(clock_of(27, *split, epochs=2)) for split in splits]
    assert all(stream == streams[0] for stream in streams)


def test_epochs_are_shuffled_differently_and_by_seed():
    orders = [[EpochOrder(50, seed).index(slot) for slot in range(100)] for seed in (0, 1)]
    assert orders[0][:50] != orders[0][50:]
    assert orders[0] != orders[1]
    assert orders[0] != list(range(50)) * 2


def test_order_does_not_depend_on_where_it_begins():
    order = EpochOrder(10, 0)
    late = [order.index(slot) for slot in (35, 7, 36, 8)]
    assert late == [EpochOrder(10, 0).index(slot) for slot in (35, 7, 36, 8)]


def test_cadences():
    clock = clock_of(10, 4, 1, 1, epochs=6)  # epochs end after steps 3, 5, 8, 10, 13, 15
    due = [step for step in range(1, 16) if clock.due(step, None, 1)]
    assert due == [clock.steps_in(epoch) for epoch in range(1, 7)] == [3, 5, 8, 10, 13, 15]
    assert [step for step in range(1, 16) if clock.due(step, None, 4)] == [10, 15]
    assert [step for step in range(1, 16) if clock.due(step, 6)] == [6, 12, 15]
    assert [step for step in range(1, 16) if clock.due(step, None)] == [15]
    assert clock.epochs(5) == {"epoch": 2.0}


def test_a_changed_global_batch_goes_on_from_the_slot():
    before = clock_of(10, 4, 1, 1, epochs=4)
    after = clock_of(10, 2, 1, 1, epochs=4).resumed_at(3, before.slot_at(3))
    assert after.slot_at(3) == 12
    assert after.total_steps == 3 + (40 - 12) // 2
    first = next(iter(SlotBatches(EpochOrder(10, 0), after, 0, after.origin_step)))
    assert [slot for slot, _ in first] == [12, 13]
    assert clock_of(10, 4, 1, 1, epochs=4).resumed_at(3, 12).total_steps == before.total_steps


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_draws_by_slot(workers):
    base = BaseConfig(num_epochs=1, dataset="numbers", dataloader_num_workers=workers, seed=3)
    state = torch.get_rng_state()
    clock = clock_of(10, 2, 1, 1, epochs=2)
    batches = list(training_batches(Numbers(10), clock, base, 0, torch.device("cpu"), STOPPING))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(batches) == 10
    halves = [
        list(training_batches(Numbers(10), clock_of(10, 1, 1, 2, epochs=2), base, r, torch.device("cpu"), STOPPING))
        for r in (0, 1)
    ]
    for batch, one, two in zip(batches, *halves, strict=True):
        assert torch.equal(batch["index"], torch.cat([one["index"], two["index"]]))
        assert torch.equal(batch["drawn"], torch.cat([one["drawn"], two["drawn"]]))
    drawn = torch.cat([batch["drawn"] for batch in batches])
    assert len(set(drawn.flatten().tolist())) == 20


def test_the_hundred_thousandth_batch_costs_no_decoding():
    class Undecodable(Numbers):
        decoded = 0

        def get(self, index, generator):
            self.decoded += 1
            return super().get(index, generator)

    examples = Undecodable(1_000_000)
    clock = Clock(1_000_000, 64, 1, 1, max_train_steps=200_000).resumed_at(100_000, 6_400_000)
    began = time.perf_counter()
    batch = next(training_batches(examples, clock, BaseConfig(), 0, torch.device("cpu"), STOPPING))
    assert batch["slot"].tolist() == list(range(6_400_000, 6_400_064))
    assert examples.decoded == 64
    assert time.perf_counter() - began < 1  # seconds; decoding 6.4 million examples would take minutes


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("examples", [1, 7, 12])
def test_validation_batches_count_every_example_once_on_any_number_of_processes(processes, examples):
    base = BaseConfig(train_batch_size=4)
    shares = [
        list(examples_once(Numbers(examples), range(examples), base, rank, processes, torch.device("cpu"), STOPPING))
        for rank in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    counted = [batch["index"].tolist() for share in shares for batch, weight in share if weight]
    assert sorted(itertools.chain(*counted)) == list(range(examples))
    assert all(not batch["drawn"].any() for share in shares for batch, _ in share)


@pytest.mark.parametrize("workers", [0, 1])
def test_messages_about_the_data_reach_the_loop_unwrapped(workers):
    class Broken(Numbers):
        def get(self, index, generator):
            one_of("cat.jpg", "broken", ["whole"])

    base, clock = BaseConfig(dataloader_num_workers=workers), clock_of(3, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="^cat.jpg is 'broken'; it must be one of: whole"):
        next(training_batches(Broken(3), clock, base, 0, torch.device("cpu"), STOPPING))


@pytest.mark.parametrize("workers", [0, 1])
def test_bugs_in_a_data_set_keep_their_traceback(workers):
    class Broken(Numbers):
        def get(self, index, generator):
            return int("not a number")

    base, clock = BaseConfig(dataloader_num_workers=workers), clock_of(3, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="not a number") as caught:
        next(training_batches(Broken(3), clock, base, 0, torch.device("cpu"), STOPPING))
    assert not isinstance(caught.value, UserError)
    assert workers == 0 or "Traceback" in str(caught.value)


def test_an_error_of_the_data_that_speaks_of_time_is_not_the_loaders():
    """torch's iterator has gone on by then: to wait for the next batch would lose one."""

    class Slow(Numbers):
        def get(self, index, generator):
            raise RuntimeError("connection to storage timed out")

    base, clock = BaseConfig(dataloader_num_workers=1), clock_of(3, 1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="connection to storage timed out"):
        next(training_batches(Slow(3), clock, base, 0, torch.device("cpu"), STOPPING))


def test_no_examples():
    with pytest.raises(ValueError, match="the training set has 0 examples"):
        Clock.of_run(BaseConfig(), 0, Accelerator(cpu=True))
