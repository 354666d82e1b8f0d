"""diffloop: `accelerate launch train.py CONFIG [section.key=value ...]`, one training loop for every task."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import datasets_lib
from datasets_lib.errors import FileError, UserError
from datasets_lib.foreign import shown_lines
from trainers.engine.config.config import RunConfig, load_config
from trainers.engine.config.describe import describe
from trainers.engine.config.errors import Interrupted
from trainers.engine.config.json_schema import schema_text
from trainers.engine.config.new_config import write_new_config
from trainers.engine.config.trust import add_trust_argument
from trainers.engine.run.output import lasting_output

if TYPE_CHECKING:
    from trainers.base import Trainer
    from trainers.engine.checkpoint.snapshot import TrainState
    from trainers.engine.dry_run.plan import DryRun
    from trainers.engine.run.context import DataSets, RunContext


def train(run: RunConfig, dry_run: DryRun | None = None) -> Path:
    """Trains one run from its config to its finished pipeline; returns the run's folder."""
    from trainers.engine.checkpoint import find, resume, saver  # not at the top: a config is checked in milliseconds
    from trainers.engine.data.batches import skipped, training_batches
    from trainers.engine.encoders import fill, stages
    from trainers.engine.export import model_card
    from trainers.engine.export.pipeline import export_pipeline
    from trainers.engine.optim import networks, optimizer, sanity_checks
    from trainers.engine.run import context, progress
    from trainers.engine.run.randomness import SlotRandom, seed_network
    from trainers.engine.tracking import console, meters, tracker
    from trainers.engine.validation.validation import Validation

    model_card.check_hub_login(run.base.push_to_hub)
    with context.start(run) as ctx:  # launched processes, signal handlers, the run folder and its lock
        base, accelerator = run.base, ctx.accelerator
        resume_from = find.find_checkpoint(ctx)

        # data first: the clock, which maps steps to examples, counts them; a checkpoint must match both
        loaded = load_data(ctx, dry_run)
        saved = resume.read_state(ctx, resume_from, loaded.train)
        clock = ctx.clock  # starts at the checkpoint's step, or at 0

        # frozen encoders fill their caches and leave the device before the network is built, which may need its memory
        trainer = networks.build_trainer(accelerator, run, clock, loaded)
        encoders = stages.build_encoders(trainer)
        data = fill.fill_caches(accelerator, encoders, base, loaded)

        # networks, optimizer, moving averages; loader workers start last, so that they share pictures decoded before
        state = build_state(ctx, trainer, data)
        if resume_from:
            resume.load(ctx, trainer, encoders, state, resume_from, saved)
        rate_factor = optimizer.learning_rate_schedule(run.config, clock.total_steps)
        checks = sanity_checks.SanityChecks(ctx, state.networks, state.optimizer, rate_factor)
        start_seconds = encoders.fill_seconds | datasets_lib.prepare(
            *data, show_progress=accelerator.is_main_process, num_classes=trainer.num_classes
        )
        micro_batches = training_batches(data.train, clock, base, accelerator.process_index, ctx.device, ctx.stop)
        tracking = tracker.Tracker(ctx, start_seconds)
        checkpoints = saver.Saver(ctx, state, tracking)
        validation = Validation(ctx, trainer, state.ema, encoders, data, checkpoints, tracking)
        accelerator.print(console.start_block(ctx, trainer, state.networks, data.train))
        with tracking, checkpoints, closing(micro_batches), progress.progress_bar(accelerator, clock) as bar:
            validation.make_up(clock.origin_step)  # if the run was stopped during a validation
            speed = meters.Speed()
            for step in ctx.stop.steps(clock.origin_step, clock.total_steps):
                rates = optimizer.set_learning_rates(state.optimizer, rate_factor(step))
                for micro_step in range(clock.accumulation_steps):
                    batch = encoders.encode(next(micro_batches))  # batch["slot"]: the examples' numbers in the run
                    seed_network(base.seed, step, clock.micro_batch(micro_step, accelerator.process_index), ctx.device)
                    with accelerator.accumulate(*trainer.modules.values()):
                        loss, values = trainer.compute_loss(batch, SlotRandom(base.seed, batch["slot"]), step)
                        accelerator.backward(state.nonfinite.poison_if_nonfinite(loss))
                    state.meter.add({"loss": loss} | values)
                applied, norms = optimizer.optimizer_step(accelerator, state.optimizer, run.config.max_grad_norm)
                if state.ema is not None:
                    state.ema.update(step, applied)
                state.meter.add(state.nonfinite.after_step(step, applied, norms) | norms)
                speed.examples += clock.global_batch_size
                bar.update()

                done = step + 1
                checks.after_step(done, batch["slot"])
                if clock.due(done, base.logging_steps):
                    means = state.meter.means() | skipped(data.train) | speed.metrics()
                    tracking.log_steps(clock.epochs(done) | rates | means, done)
                    console.show_metrics(bar, tracking.latest)
                with speed.paused():
                    checkpoints.after_step(done)
                    if ctx.stop.agreed():
                        break
                    if clock.due(done, base.save_model_steps, base.save_model_epochs) and done < clock.total_steps:
                        export_pipeline(ctx, trainer, state, tracking, validation)
                    validation.after_step(done)
            bar.close()
            checkpoints.wait()
            ctx.stop.finish(checkpoints.save, tracking.close)
            model_card.publish(ctx, trainer, tracking, export_pipeline(ctx, trainer, state, tracking, validation))
            accelerator.print(console.end_block(ctx, trainer, data.train, tracking.lost_writes))
    return ctx.output_dir


def load_data(ctx: RunContext, dry_run: DryRun | None) -> DataSets:
    """Builds both data sets and sets the run's clock; a dry run keeps a few examples and steps."""
    from trainers.engine.data.batches import shard_for_rank
    from trainers.engine.run.context import DataSets

    base = ctx.run.base
    with ctx.accelerator.main_process_first():  # it downloads; the others then find the files
        train_set, validation_set = datasets_lib.build(base, "train"), datasets_lib.build(base, "validation")
    ctx.clock, train_set = shard_for_rank(ctx.accelerator, base, train_set)
    data = DataSets(train_set, validation_set)
    if ctx.run.config.reads_captions:
        datasets_lib.check_captions(*data)
    if dry_run is not None:
        data = dry_run.shorten(ctx, data)
    datasets_lib.check_example(data.train.first_example(), base)
    ctx.stop.raise_if_asked()
    return data


def build_state(ctx: RunContext, trainer: Trainer, data: DataSets) -> TrainState:
    """Builds the task's networks, their optimizer and moving averages, and what counts metrics and skipped steps."""
    from trainers.engine.checkpoint.snapshot import TrainState
    from trainers.engine.optim.ema import EMA
    from trainers.engine.optim.networks import init_networks, prepare_networks
    from trainers.engine.optim.nonfinite import NonFiniteSteps
    from trainers.engine.optim.optimizer import build_optimizer
    from trainers.engine.tracking.meters import Meter

    ctx.stop.raise_if_asked()
    config = ctx.run.config
    networks = init_networks(trainer)
    optimizer = build_optimizer(trainer.param_groups(networks), config, ctx.clock, ctx.device)
    optimizer, meta_networks = prepare_networks(ctx.accelerator, trainer, networks, optimizer, ctx.run.base)
    ema = EMA(networks, config) if config.use_ema else None
    meter, nonfinite = Meter(ctx.accelerator), NonFiniteSteps(ctx)
    return TrainState(networks, meta_networks, optimizer, ema, meter, nonfinite, data.train)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 2 for a mistake in the configuration, or 1 for an error found later.

    After a signal it returns 143 (TERM), 130 (INT), 129 (HUP) or 75 (USR1).
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", help="JSON or YAML file with the sections `base` and the task's")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces what the file says")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="estimate the run's time, memory and disk space from a few steps"
    )
    parser.add_argument("--describe", nargs="?", const="", metavar="TYPE", help="list the tasks, or a task's options")
    parser.add_argument("--schema", nargs="?", const="", metavar="TYPE", help="print the JSON Schema of configs")
    parser.add_argument("--new", nargs=2, metavar=("TYPE", "FILE"), help="write a YAML config to begin with")
    add_trust_argument(parser)
    options = parser.parse_intermixed_args(arguments)
    if all(given is None for given in (options.describe, options.schema, options.new, options.config)):
        parser.error("a CONFIG is needed; configs/ holds examples, --describe lists the tasks")
    with lasting_output():
        try:
            return _run(options)
        except KeyboardInterrupt:
            return _fail("interrupted before the first step", 130)


def _run(options: argparse.Namespace) -> int:
    """Does what the parsed command line asks for; returns the exit code."""
    try:
        if options.describe is not None:
            print("\n".join(describe(options.describe or None)))
            return 0
        if options.schema is not None:
            print(schema_text(options.schema or None))
            return 0
        if options.new is not None:
            print(write_new_config(*options.new))
            return 0
        run = load_config(options.config, options.overrides, datasets_lib.problems, options.trust_code)
    except UserError as error:
        return _fail(error, 2)
    if options.print_config:
        print(run.as_yaml(), end="")
        return 0
    try:
        if options.dry_run:
            return _dry_run(run)
        train(run)
    except UserError as error:
        return _fail(error, 1)
    except Interrupted as interruption:
        if interruption.text:
            text = "the dry run was interrupted" if options.dry_run else interruption
            print(f"\n{text}", file=sys.stderr, flush=True)
        return interruption.code
    return 0


def _dry_run(run: RunConfig) -> int:
    """Trains the last steps in a temporary folder and prints what the whole run needs; returns 0 if it fits, else 1."""
    from trainers.engine.dry_run import report, sandbox, suggestions

    if sandbox.is_main():
        print(f"dry run: {sandbox.PROMISE}", file=sys.stderr, flush=True)
    with sandbox.open_dry_run(run) as dry_run:
        shortage = None
        try:
            with redirect_stdout(io.StringIO()):  # the messages of a real run would be wrong here
                train(dry_run.short, dry_run)
        except (MemoryError, RuntimeError, OSError) as error:
            shortage = suggestions.out_of_resources(error)
            if shortage is None:
                raise
        if not sandbox.is_main():
            if shortage is not None:
                raise FileError(shortage.text)
            return 0
        lines, fits = report.report(dry_run, shortage)
    print("\n".join(lines), flush=True)
    return 0 if fits else 1


def _fail(error: object, code: int) -> int:
    """Prints an error, once if all processes raise it: the others wait, and are ended when the first one exits."""
    rank = int(os.environ.get("RANK", 0))
    if rank != 0:
        time.sleep(5)
    where = f" on process {rank}" if rank else ""
    print(f"\nerror{where}: {shown_lines(error)}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    if sys.path[0] == str(Path(__file__).resolve().parent):  # where runs and data lie, too, in folders that are no code
        del sys.path[0]
    sys.exit(main())
