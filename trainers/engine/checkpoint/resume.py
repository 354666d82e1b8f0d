"""Resumes from a checkpoint: it is compared with the run first, and loaded only if all of it fits."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from torch import Tensor

from datasets_lib.errors import InputError
from datasets_lib.example import ImageData, StreamData
from trainers.base import Trainer
from trainers.engine.checkpoint.config_diff import check_steps, find_changes, option_changes
from trainers.engine.checkpoint.load import compare_shape, put_weights, read_optimizer_state, read_tensors, read_weights
from trainers.engine.checkpoint.manifest import list_checkpoints
from trainers.engine.checkpoint.snapshot import TrainState
from trainers.engine.checkpoint.state_file import read_state_file
from trainers.engine.data.batches import first_batch
from trainers.engine.distributed import deepspeed
from trainers.engine.distributed.sharding import load_optimizer_state
from trainers.engine.encoders.stages import FrozenEncoders
from trainers.engine.run.context import RunContext
from trainers.engine.run.randomness import SlotRandom
from trainers.engine.run.run_folder import set_metrics_aside
from trainers.engine.tracking.external import RUN_ID_FILES


def _set_aside(output_dir: Path, logging_dir: str, resumed_from: Path, steps_done: int) -> None:
    """Renames the checkpoints that the resumed run abandons, so that `latest` does not return to them.

    These are the later ones, or all if the run resumes from another folder's checkpoint. A tracker that cannot delete
    logged steps, such as W&B, begins a new run.
    """
    own = resumed_from.resolve().parent == output_dir.resolve()
    others = [
        folder
        for step, folder in list_checkpoints(output_dir)
        if not own or (step >= steps_done and folder.resolve() != resumed_from.resolve())
    ]
    prefix = f"set-aside-{secrets.token_hex(2)}-"
    for folder in others:
        print(f"WARNING: {folder} is not of the run from {resumed_from}: renamed to {prefix}{folder.name}", flush=True)
        folder.rename(folder.with_name(prefix + folder.name))
    if others or not own:
        set_metrics_aside(output_dir, prefix, keep=own)
        for path in (output_dir / logging_dir).glob(RUN_ID_FILES):
            path.unlink()


def read_state(ctx: RunContext, folder: Path | None, train_set: ImageData) -> dict[str, Any]:
    """Returns the checkpoint's state.json and moves the clock to its step; empty for a run from step 0.

    Raises ValueError with every change that alters the training and is not in `base.allow_changes`, and for another
    global batch size with buckets.
    """
    if folder is None:
        return {}
    run, accelerator = ctx.run, ctx.accelerator
    state = read_state_file(folder)
    ctx.clock = clock = ctx.clock.resumed_at(state["step"], state["slot"])
    if clock.total_steps < clock.origin_step:
        option = f"max_train_steps = {run.base.max_train_steps}" if run.base.max_train_steps else "num_epochs"
        raise InputError(
            f"base.{option}: the run would end at step {clock.total_steps}, and {folder} is later; raise it, or resume "
            "from an earlier checkpoint"
        )
    check_steps(state, clock, folder)
    changes, harmless = find_changes(state, run, clock, train_set)
    refused = [change for change in changes if not set(change.names) & set(run.base.allow_changes)]
    if refused:
        names = ",".join(dict.fromkeys([*run.base.allow_changes, *(change.names[0] for change in refused)]))
        raise InputError(
            f"{folder}: the training would continue differently; undo these changes, or accept them with "
            f"base.allow_changes=[{names}]:\n" + "\n".join(f"  {change.text}" for change in refused)
        )
    for text in [*harmless, *(f"{change.text} (allowed)" for change in changes)]:
        accelerator.print(f"Changed since the checkpoint: {text}")
    if state.get("stream") and isinstance(train_set, StreamData):
        for text in train_set.go_on(state["stream"], accelerator.process_index):
            accelerator.print(text)
    return state


def load(
    ctx: RunContext, trainer: Trainer, encoders: FrozenEncoders, state: TrainState, folder: Path, saved: dict[str, Any]
) -> None:
    """Loads weights, averages, optimizer state and counters, after everything has been read and compared.

    `saved` is the checkpoint's state.json. A changed optimizer that `base.allow_changes` accepts starts without state.
    Raises ValueError if the checkpoint holds other networks or shapes than the run.
    """
    _warm_up(ctx, trainer, encoders, state)
    networks, ema, scaler = state.networks, state.ema, ctx.accelerator.scaler
    for name, network in networks.items():
        compare_shape(folder / name, network, ctx.run.base.allow_changes)
    weights = read_weights(folder, networks)
    averages: dict[str, Tensor] = {}
    for name in networks if ema is not None else ():
        if not (folder / f"{name}_ema").is_dir():
            raise InputError(f"{folder} has no {name}_ema: it was written with use_ema: false; set use_ema to false")
        averages |= {f"{name}.{key}": tensor for key, tensor in read_tensors(folder / f"{name}_ema").items()}
    changed = [key for key, _, _ in option_changes(saved["config"], ctx.run)]
    moments = {} if f"{ctx.run.task}.optimizer" in changed else read_optimizer_state(folder, networks)
    put_weights(weights, networks)
    if ema is not None:
        ema.load(averages)
    load_optimizer_state(networks, state.optimizer, moments)
    if scaler is not None and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    logging_dir, step = ctx.run.base.logging_dir, saved["step"]
    ctx.folders.on_mains(lambda: _set_aside(ctx.output_dir, logging_dir, folder, step))
    state.meter.load(saved["meter"])
    state.nonfinite.load(saved["divergence"])


def _warm_up(ctx: RunContext, trainer: Trainer, encoders: FrozenEncoders, state: TrainState) -> None:
    """Runs one backward pass and discards it, before the checkpoint is loaded.

    DDP reorders its gradient buckets after the first backward; without this, a resumed run on three or more processes
    would sum gradients in another order than the uninterrupted run.
    """
    accelerator, clock, base = ctx.accelerator, ctx.clock, ctx.run.base
    is_finished = clock.origin_step >= clock.total_steps  # no example is left to run it on
    if accelerator.num_processes == 1 or deepspeed.in_use(accelerator) or is_finished:
        return
    # the previous step, so that the same networks have had a backward as in the uninterrupted run
    step = max(clock.origin_step - 1, 0)
    batch = encoders.encode(first_batch(state.train_set, clock, base, accelerator.process_index, accelerator.device))
    loss, _ = trainer.compute_loss(batch, SlotRandom(base.seed, batch["slot"]), step)
    accelerator.backward(loss)
    state.optimizer.zero_grad()
    accelerator.step = 0
