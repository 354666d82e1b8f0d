"""The temporary folder of a dry run, next to the run's, and its configuration, which does everything once."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from datasets_lib.errors import FileError, InputError
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import RunConfig
from trainers.engine.dry_run.plan import TIMED_STEPS, WARM_STEPS, DryRun
from trainers.engine.run.run_folder import LOCK, lock_folder, refuse_another_run, refuse_links
from trainers.engine.validation.metrics import LEAST_PICTURES

PROMISE = f"the run's last {WARM_STEPS + TIMED_STEPS} steps, one validation, one save; nothing of it stays"
SECONDS_OF_MAIN = 5.0  # for the first process to read its numbers if all fail


@contextmanager
def open_dry_run(run: RunConfig) -> Iterator[DryRun]:
    """Yields the short run, in a folder next to the run's that is removed afterwards; the run's own is not touched."""
    output_dir, main = Path(run.base.output_dir).absolute(), is_main()
    _check_run_folder(output_dir, run.base)
    parent = next(parent for parent in output_dir.parents if parent.is_dir())
    folder = parent / f".{output_dir.name[:200]}-dry-run"  # a file system's names have 255 bytes
    lock = _claim(folder) if main else None
    try:
        yield DryRun(run, _short(run, folder))
    except Exception as error:
        if not main:  # if this one fails alone, the first one waits for it and will be killed
            time.sleep(SECONDS_OF_MAIN)
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise InputError(f"{error}. That was in the dry run: {folder} is gone with it") from None
        raise
    finally:
        if main:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            lock.close()
        with suppress(OSError):
            folder.rmdir()  # another machine's, which is empty


def _check_run_folder(output_dir: Path, base: BaseConfig) -> None:
    """Raises the errors that the run itself would raise for its folder, without writing; a run in it is only noted."""
    nearest = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        what = "is not a folder" if not nearest.is_dir() else "may not be written"
        raise FileError(f"base.output_dir = {output_dir}: cannot be written ({nearest} {what}); choose another folder")
    if nearest == output_dir:
        refuse_links(output_dir, base)
        try:
            refuse_another_run(output_dir, base)
        except ValueError as held:  # which says nothing about what the run needs
            if is_main():
                print(f"NOTE: the run itself would be refused: {held}", file=sys.stderr, flush=True)


def _claim(folder: Path) -> TextIO | None:
    """Locks the folder, and removes what a killed dry run left there."""
    if folder.is_symlink():
        raise InputError(f"{folder}: is a link, and a dry run empties its folder; remove it")
    folder.mkdir(exist_ok=True)
    lock = lock_folder(folder)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    return lock


def is_main() -> bool:
    """Whether this is the first process, even before they are connected."""
    return int(os.environ.get("RANK", 0)) == 0


def _short(run: RunConfig, folder: Path) -> RunConfig:
    """Makes saves, validations and exports happen once, after the last step; nothing is written outside the folder."""
    never, base = sys.maxsize, run.base
    short = dataclasses.replace(
        base,
        output_dir=str(folder),
        encoder_cache_dir=str(folder / "encoder-cache"),
        resume_from_checkpoint=None,
        push_to_hub=False,
        logger="none",
        logging_steps=1,
        checkpointing_steps=never,
        checkpoints_total_limit=None,
        save_model_epochs=None,
        save_model_steps=None,
        valid_epochs=None,
        valid_steps=None,
        eval_steps=None if base.eval_steps is None else never,
        eval_num_samples=min(base.eval_num_samples, max(LEAST_PICTURES, 2 * base.train_batch_size)),
    )
    return run._replace(base=short)
