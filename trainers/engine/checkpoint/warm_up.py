"""One discarded backward pass before a checkpoint is loaded, as DDP orders its gradient buckets by the first one."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.optim import Optimizer

from trainers.base import Trainer
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.data.batches import first_batch
from trainers.engine.encoders.stages import FrozenEncoders
from trainers.engine.run.clock import Clock
from trainers.engine.run.randomness import SlotRandom


def warm_up(
    accelerator: Accelerator,
    trainer: Trainer,
    stages: FrozenEncoders,
    optimizer: Optimizer,
    train_set: Any,
    clock: Clock,
    base: BaseConfig,
) -> None:
    """One discarded backward before a checkpoint is loaded.

    DDP puts its gradient buckets in another order after the first one, so without it a resumed run on three or more
    processes would sum in another order than the uninterrupted one.
    """
    if accelerator.num_processes == 1 or accelerator.distributed_type == DistributedType.DEEPSPEED:
        return
    # the step before: only networks that took part in it have had a backward in the uninterrupted run
    step = max(clock.origin_step - 1, 0)
    batch = stages.encode(first_batch(train_set, clock, base, accelerator.process_index, accelerator.device))
    loss, _ = trainer.compute_loss(batch, SlotRandom(base.seed, batch["slot"]), step)
    accelerator.backward(loss)
    optimizer.zero_grad()
    accelerator.step = 0
