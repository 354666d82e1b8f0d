"""diffloop: `accelerate launch train.py CONFIG [section.key=value ...]`, one loop for every diffusion task."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import datasets_lib
from trainers.engine.config.config import RunConfig, describe, load_config
from trainers.engine.config.errors import Interrupted, is_message
from trainers.engine.config.files import ConfigError

if TYPE_CHECKING:
    from trainers.engine.dry_run.plan import DryRun


def train(run: RunConfig, dry_run: DryRun | None = None) -> Path:
    """Trains one run from its config to its finished pipeline; returns the run's folder."""
    from trainers.engine.checkpoint import find, resume
    from trainers.engine.checkpoint.saver import Saver
    from trainers.engine.checkpoint.warm_up import warm_up
    from trainers.engine.data import batches as feeding
    from trainers.engine.data.stream_batches import skipped
    from trainers.engine.distributed import launch
    from trainers.engine.dry_run import plan as rehearsal
    from trainers.engine.encoders.fill import fill_caches
    from trainers.engine.encoders.stages import FrozenEncoders
    from trainers.engine.export import model_card, pipeline
    from trainers.engine.optim import optimizer as optimization
    from trainers.engine.optim.ema import EMA
    from trainers.engine.optim.networks import build_trainer, prepare_networks
    from trainers.engine.optim.nonfinite import NonFiniteSteps
    from trainers.engine.optim.sanity_checks import SanityChecks
    from trainers.engine.run.progress import progress_bar
    from trainers.engine.run.randomness import SlotRandom, seed_network
    from trainers.engine.run.run_folder import open_run_folder
    from trainers.engine.run.signals import Stopping
    from trainers.engine.tracking import console
    from trainers.engine.tracking.meters import Meter, Speed
    from trainers.engine.tracking.tracker import Tracker
    from trainers.engine.validation.validation import Validation

    base, config, output_dir = run.base, run.config, Path(run.base.output_dir)
    model_card.check_hub_login(base.push_to_hub)
    accelerator = launch.start_accelerator(base)
    device, rank = accelerator.device, accelerator.process_index
    folder = open_run_folder(accelerator, base, dry_run is not None)
    with Stopping(accelerator, base) as stopping, folder as folders, launch.numerics(base):
        resume_from = find.find_checkpoint(accelerator, folders, output_dir, base.resume_from_checkpoint)

        # data
        with accelerator.main_process_first():  # it downloads, the others find the files
            train_set, validation_set = datasets_lib.build(base, "train"), datasets_lib.build(base, "validation")
        clock, train_set = feeding.shard_for_rank(accelerator, base, train_set)
        clock, train_set, validation_set = rehearsal.shortened(dry_run, stopping, clock, train_set, validation_set)
        datasets_lib.check_example(datasets_lib.first_example(train_set), base)
        saved, clock = resume.read_state(accelerator, resume_from, run, clock, train_set)

        # networks and optimizer
        trainer = build_trainer(accelerator, run, clock, train_set, validation_set)
        networks = trainer.init_modules()
        optimizer = optimization.build_optimizer(trainer.param_groups(networks), config, clock, device)
        optimizer = prepare_networks(accelerator, trainer, networks, optimizer, base)
        rate_factor = optimization.schedule(config, clock.total_steps)
        ema = EMA(networks, config) if config.use_ema else None
        stages = FrozenEncoders(trainer.encoders(), device)
        trainer.encoded = stages.encoded
        train_set, validation_set = sets = fill_caches(accelerator, stages, base, train_set, validation_set)
        meter = Meter(accelerator)
        divergence = NonFiniteSteps(accelerator, output_dir, base, clock, stopping)
        if resume_from:
            warm_up(accelerator, trainer, stages, optimizer, train_set, clock, base)
            resume.load(accelerator, folders, run, resume_from, saved, networks, ema, optimizer, meter, divergence)
        watches = SanityChecks(accelerator, networks, optimizer, clock, rate_factor)
        datasets_lib.prepare(*sets, show_progress=accelerator.is_main_process, num_classes=trainer.num_classes)

        # steps
        tracking = Tracker(accelerator, run, output_dir, clock.origin_step, stages.fill_seconds, dry_run)
        batches = feeding.training_batches(train_set, clock, base, rank, device, stopping)
        trained = networks, ema, optimizer
        saving = Saver(accelerator, folders, tracking, clock, *trained, train_set, meter, divergence, stopping)
        validation = Validation(accelerator, trainer, ema, stages, sets, clock, stopping, saving, tracking)
        export_pipeline = partial(pipeline.export_pipeline, accelerator, trainer, ema, tracking, clock, validation)
        accelerator.print(console.start_block(accelerator, folders, run, trainer, networks, clock, train_set))
        with tracking, saving, closing(batches), progress_bar(accelerator, clock) as bar:
            validation.make_up(clock.origin_step)
            done, speed = clock.origin_step, Speed()
            for step in stopping.steps(clock.origin_step, clock.total_steps):
                learning_rates = optimization.set_learning_rates(optimizer, rate_factor(step))
                for micro_step in range(clock.accumulation_steps):
                    batch = stages.encode(next(batches))
                    seed_network(base.seed, step, clock.micro_batch(micro_step, rank), device)
                    with accelerator.accumulate(*trainer.modules.values()):
                        loss, values = trainer.compute_loss(batch, SlotRandom(base.seed, batch["slot"]), step)
                        accelerator.backward(divergence.checked(loss))
                    meter.add({"loss": loss} | values)
                applied, norms = optimization.optimizer_step(accelerator, optimizer, config.max_grad_norm, ema)
                if ema is not None:
                    ema.update(step, applied)
                meter.add(divergence.after_step(step, applied, norms) | norms)
                speed.examples += clock.global_batch_size
                bar.update()

                done = step + 1
                watches.after_step(done, batch["slot"])
                if clock.due(done, base.logging_steps):
                    metrics = clock.epochs(done) | learning_rates | meter.means() | skipped(train_set)
                    tracking.log_steps(metrics | {"examples_per_second": speed.examples_per_second()}, done)
                    console.show_metrics(bar, tracking.latest)
                with speed.paused():
                    saving.after_step(done)
                    if stopping.agreed():
                        break
                    if clock.due(done, base.save_model_steps, base.save_model_epochs) and done < clock.total_steps:
                        export_pipeline(done)
                    validation.after_step(done)
            bar.close()
            saving.wait()
            stopping.finish(done, saving.save, tracking.close)

            # finish
            pipeline_files = export_pipeline(done)
            model_card.publish(accelerator, run, trainer, tracking, pipeline_files)
            accelerator.print(console.end_block(trainer, folders, output_dir, train_set))
    return output_dir


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: returns 0, 2 for a mistake in the configuration, 1 for one that shows later.

    After a signal: 143 (TERM), 130 (INT) or 75 (USR1).
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", help="JSON or YAML file with the sections `base` and the task's")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces what the file says")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would take, from a few steps of it")
    parser.add_argument("--describe", nargs="?", const="", metavar="TYPE", help="list the tasks, or a task's options")
    options = parser.parse_intermixed_args(arguments)
    if options.describe is None and options.config is None:
        parser.error("a CONFIG is needed; configs/ holds examples, --describe lists the tasks")
    try:
        if options.describe is not None:
            print("\n".join(describe(options.describe or None)))
            return 0
        run = load_config(options.config, options.overrides, datasets_lib.problems)
    except (ConfigError, FileNotFoundError) as error:
        return _fail(error, 2)
    if options.print_config:
        print(run.as_yaml(), end="")
        return 0
    try:
        if options.dry_run:
            return _dry_run(run)
        train(run)
    except (ValueError, OSError) as error:
        if not is_message(error):
            raise
        return _fail(error, 1)
    except Interrupted as interruption:
        if interruption.text:
            text = "the dry run was interrupted" if options.dry_run else interruption
            print(f"\n{text}", file=sys.stderr, flush=True)
        return interruption.code
    except KeyboardInterrupt:
        return _fail("interrupted before the first step", 130)
    return 0


def _dry_run(run: RunConfig) -> int:
    """Trains the last steps in a folder of their own and prints what the whole run takes: 0 where it fits, else 1."""
    from trainers.engine.dry_run import report, suggestions
    from trainers.engine.dry_run import sandbox as dry_run

    if dry_run.is_main():
        print(f"dry run: {dry_run.PROMISE}", file=sys.stderr, flush=True)
    with dry_run.open_dry_run(run) as rehearsal:
        shortage = None
        try:
            with redirect_stdout(io.StringIO()):  # what a run says of itself is not true of this one
                train(rehearsal.short, rehearsal)
        except (MemoryError, RuntimeError, OSError) as error:
            shortage = suggestions.out_of_resources(error)
            if shortage is None:
                raise
        if not dry_run.is_main():
            if shortage is not None:
                raise OSError(shortage.text)
            return 0
        lines, fits = report.report(rehearsal, shortage)
    print("\n".join(lines), flush=True)
    return 0 if fits else 1


def _fail(error: object, code: int) -> int:
    """Prints an error that every process has once: when the first one ends, the launcher ends those that still wait."""
    rank = int(os.environ.get("RANK", 0))
    if rank != 0:
        time.sleep(5)
    print(f"\nerror{f' on process {rank}' if rank else ''}: {error}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
