"""One discarded backward pass before a checkpoint is loaded, as DDP orders its gradient buckets by the first one."""

from __future__ import annotations

from trainers.base import Trainer
from trainers.engine.checkpoint.train_state import TrainState
from trainers.engine.data.batches import first_batch
from trainers.engine.distributed import deepspeed
from trainers.engine.encoders.stages import FrozenEncoders
from trainers.engine.run.context import RunContext
from trainers.engine.run.randomness import SlotRandom


def warm_up(ctx: RunContext, trainer: Trainer, encoders: FrozenEncoders, state: TrainState) -> None:
    """Runs one backward pass before a checkpoint is loaded, and discards it.

    DDP puts its gradient buckets in another order after the first one, so without it a resumed run on three or more
    processes would sum in another order than the uninterrupted one.
    """
    accelerator, clock, base = ctx.accelerator, ctx.clock, ctx.run.base
    if accelerator.num_processes == 1 or deepspeed.in_use(accelerator):
        return
    # the step before: only networks that took part in it have had a backward in the uninterrupted run
    step = max(clock.origin_step - 1, 0)
    batch = encoders.encode(first_batch(state.train_set, clock, base, accelerator.process_index, accelerator.device))
    loss, _ = trainer.compute_loss(batch, SlotRandom(base.seed, batch["slot"]), step)
    accelerator.backward(loss)
    state.optimizer.zero_grad()
    accelerator.step = 0
