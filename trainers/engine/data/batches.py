"""From slots to batches on the device: the epoch's order and the loader, neither of which needs to be saved."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from datasets_lib.errors import InputError
from datasets_lib.example import ImageData, StreamData
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.data.prefetch import to_device
from trainers.engine.data.stream_batches import first_of_stream, stream_batches
from trainers.engine.data.workers import Batch, Keys, SlotExamples, load_ahead
from trainers.engine.run.clock import Clock
from trainers.engine.run.randomness import key_of
from trainers.engine.run.signals import StopSignals


class EpochOrder:
    """Maps slots to examples: a permutation of (seed, epoch), every index once per epoch."""

    def __init__(self, num_examples: int, seed: int) -> None:
        self.epoch_slots = num_examples
        self.seed = seed
        self._epoch = functools.lru_cache(maxsize=2)(self._indices)  # a step may hold slots of two

    def index(self, slot: int) -> int:
        epoch, position = divmod(slot, self.epoch_slots)
        return int(self._epoch(epoch)[position])

    def _indices(self, epoch: int) -> torch.Tensor:
        """Returns the indices of an epoch's slots, [epoch_slots]."""
        return self._shuffle(self.epoch_slots, "order", epoch)

    def _shuffle(self, count: int, *names: str | int) -> torch.Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(key_of(self.seed, *names)))


class BucketOrder(EpochOrder):
    """An order in which all slots of a step are of one bucket.

    Each bucket is shuffled and cut into groups, the last group filled from further shuffles; then groups are shuffled.
    """

    def __init__(self, members: dict[int, list[int]], group_size: int, seed: int) -> None:
        self.members = members  # of each bucket
        self.group_size = group_size
        super().__init__(sum(self._slots(len(each)) for each in members.values()), seed)

    def _slots(self, count: int) -> int:
        return -(-count // self.group_size) * self.group_size

    def _indices(self, epoch: int) -> torch.Tensor:
        groups = torch.cat([self._groups(bucket, epoch) for bucket in self.members])
        return groups[self._shuffle(len(groups), "groups", epoch)].flatten()

    def _groups(self, bucket: int, epoch: int) -> torch.Tensor:
        """Returns the indices of a bucket, [groups, group_size]."""
        members = torch.tensor(self.members[bucket])
        slots = self._slots(len(members))
        rounds = range(-(-slots // len(members)))
        shuffles = [self._shuffle(len(members), "order", epoch, bucket, number) for number in rounds]
        return members[torch.cat(shuffles)[:slots]].view(-1, self.group_size)


def by_bucket(indices: Iterable[int], bucket_of: Callable[[int], int]) -> dict[int, list[int]]:
    members: dict[int, list[int]] = {}
    for index in indices:
        members.setdefault(bucket_of(index), []).append(index)
    return members


def order_of(train_set: ImageData, global_batch_size: int, base: BaseConfig) -> EpochOrder:
    if not base.buckets:
        return EpochOrder(len(train_set), base.seed)
    return BucketOrder(by_bucket(range(len(train_set)), train_set.bucket_of), global_batch_size, base.seed)


def shard_for_rank(accelerator: Accelerator, base: BaseConfig, train_set: ImageData) -> tuple[Clock, ImageData]:
    """Makes the clock, and takes this process's part of the training set if that is a stream. Collective."""
    if not isinstance(train_set, StreamData):
        return Clock.of_run(base, len(train_set), accelerator, train_set.bucket_of), train_set
    workers = base.dataloader_num_workers
    if len(seen := set(gather_object([train_set.fingerprint]))) > 1:
        raise InputError(
            f"the processes see {len(seen)} different lists of shards of {train_set.origin}; give each the same files, "
            "such as those of a folder that all nodes have"
        )
    part = train_set.shard_for_rank(accelerator.process_index, accelerator.num_processes, workers)
    return Clock.of_run(base, None, accelerator), part


class SlotBatches:
    """Yields the keys of each remaining micro-batch of this process."""

    def __init__(self, order: EpochOrder, clock: Clock, process_index: int, start_step: int) -> None:
        self.order = order
        self.clock = clock
        self.process_index = process_index
        self.start_step = start_step

    def __iter__(self) -> Iterator[Keys]:
        for step in range(self.start_step, self.clock.total_steps):
            for micro_step in range(self.clock.accumulation_steps):
                slots = self.clock.micro_batch_slots(step, micro_step, self.process_index)
                yield [(slot, self.order.index(slot)) for slot in slots]


def training_batches(
    train_set: ImageData, clock: Clock, base: BaseConfig, process_index: int, device: torch.device, stop: StopSignals
) -> Generator[Batch]:
    """Yields this process's remaining micro-batches of the run, on the device; closing it ends the workers."""
    if isinstance(train_set, StreamData):
        return stream_batches(train_set, clock, base, process_index, device, stop)
    batches = SlotBatches(order_of(train_set, clock.global_batch_size, base), clock, process_index, clock.origin_step)
    examples = SlotExamples(train_set, base.seed, augment=True)
    return to_device(load_ahead(examples, batches, base, device, stop), examples.finish, device)


def examples_once(
    dataset: ImageData,
    indices: Sequence[int],
    base: BaseConfig,
    process_index: int,
    num_processes: int,
    device: torch.device,
    stop: StopSignals,
) -> Iterator[tuple[Batch, float]]:
    """Yields (batch, weight) for this process's share of some examples: batch j goes to process j mod P.

    Every process gets equally many batches, because a network's forward may be collective: the first batch with weight
    0 fills the gap. Nothing is random; slots are indices of the data set. Each batch is of one bucket.
    """
    size = base.train_batch_size
    members: Mapping[int, Sequence[int]] = by_bucket(indices, dataset.bucket_of) if base.buckets else {0: indices}
    batches = [each[start : start + size] for each in members.values() for start in range(0, len(each), size)]
    mine = range(process_index, -(-len(batches) // num_processes) * num_processes, num_processes)
    weights = [float(number < len(batches)) for number in mine]
    keys = [[(i, i) for i in batches[number if number < len(batches) else 0]] for number in mine]
    examples = SlotExamples(dataset, base.seed, augment=False)
    loaded = load_ahead(examples, keys, base, device, stop)
    return zip(to_device(loaded, examples.finish, device), weights, strict=True)


def first_batch(
    train_set: ImageData, clock: Clock, base: BaseConfig, process_index: int, device: torch.device
) -> Batch:
    """Reads the first micro-batch of training_batches, in this process."""
    if isinstance(train_set, StreamData):
        return first_of_stream(train_set, clock, base, process_index, device)
    examples = SlotExamples(train_set, base.seed, augment=True)
    order = order_of(train_set, clock.global_batch_size, base)
    keys = itertools.islice(SlotBatches(order, clock, process_index, clock.origin_step), 1)
    return next(to_device((examples.batch(each) for each in keys), examples.finish, device))


def skipped(train_set: ImageData) -> dict[str, int]:
    """Counts a stream's unreadable shards and images of all processes; empty for other data sets. Collective."""
    if (own := train_set.losses()) is None:
        return {}
    shards, images = map(sum, zip(*gather_object([own]), strict=True))
    return {"stream/skipped_shards": shards, "stream/skipped_images": images}
