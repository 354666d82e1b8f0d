"""The run folder: locked during the run; its files appear whole, so that a reader never sees a part of one."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator

from datasets_lib.errors import InputError
from datasets_lib.foreign import check_regular, shown
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.distributed.shared_folders import PROBE, Folders, find_folders
from trainers.engine.run.files import write_text
from trainers.engine.run.held_folder import HeldFolder
from trainers.weight_files import weight_files

# of a finished pipeline, a single network, or an adapter
INDEX_FILES = ("model_index.json", "config.json", "pytorch_lora_weights.safetensors")
RUN_FILES = ("metrics.jsonl", "config.yaml", *INDEX_FILES, "README.md")
CHECKPOINT_NAME = re.compile(r"checkpoint-([1-9]\d*)")
LEFT_OVER = re.compile(r"\.(tmp|trash)-(checkpoint|pipeline)-.*")
LEFT_OVER_FILE = re.compile(r"\.tmp-[0-9a-f]{16}")
SAMPLES = "samples"  # folder of grids, and of what scripts draw
LOCK = ".lock"
METRICS = "metrics.jsonl"
SKIPPED_STEPS = "skipped_steps.jsonl"
LINE_CHARACTERS = 1 << 20  # of a JSON-lines file at most; what is longer is no line of ours


@contextmanager
def open_run_folder(accelerator: Accelerator, base: BaseConfig) -> Iterator[tuple[Folders, HeldFolder]]:
    """Creates the folder, finds the processes that share it, and holds each folder's lock inside the block."""
    folders = find_folders(accelerator, Path(base.output_dir), "base.output_dir")
    with ExitStack() as locks, HeldFolder(Path(base.output_dir)) as held:
        folders.on_mains(lambda: _take(base, locks))
        yield folders, held


def _take(base: BaseConfig, locks: ExitStack) -> None:
    output_dir = Path(base.output_dir)
    refuse_links(output_dir, base)
    lock = lock_folder(output_dir)
    if lock is not None:  # otherwise temporary files may belong to a live run
        locks.enter_context(lock)
        _sweep(output_dir)
    refuse_another_run(output_dir, base)


def refuse_links(output_dir: Path, base: BaseConfig) -> None:
    """Raises ValueError for a link in the place of what a run writes: it could lead anywhere."""
    logs = Path(base.logging_dir, base.tracker_project)
    names = [*map(Path, (LOCK, SKIPPED_STEPS, SAMPLES, *RUN_FILES)), logs, *logs.parents[:-1]]
    names.append(Path(base.logging_dir, "wandb"))
    for path in (output_dir / name for name in names):
        if path.is_symlink():
            raise InputError(f"base.output_dir = {output_dir}: {path} is a link; replace it by what it leads to")


def lock_folder(output_dir: Path, option: str = "base.output_dir") -> TextIO | None:
    """Locks the folder until the returned file is closed or this process ends; None if locks are not supported.

    A POSIX lock: data workers that this process forks do not inherit it, so they cannot keep a dead run's folder
    locked. Raises ValueError with the holder's pid and host if another run uses the folder.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    wrong = f"{option} = {output_dir}: {LOCK} in it is not a file of its own; remove it"
    try:
        descriptor = os.open(output_dir / LOCK, flags, 0o666)
    except IsADirectoryError:
        raise InputError(wrong) from None
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:  # what is written into it must not change another file
        os.close(descriptor)
        raise InputError(wrong)
    file = open(descriptor, "r+", encoding="utf-8", errors="replace")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            print(f"WARNING: {output_dir} cannot be locked ({error}); make sure that only one run uses it", flush=True)
            file.close()
            return None
        file.seek(0)
        holder = shown(file.read(200).strip()) or "another process"
        file.close()
        raise InputError(
            f"{option} = {output_dir}: in use by {holder}; wait for that run, stop it with kill -TERM, or choose "
            f"another {option}"
        ) from None
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _sweep(output_dir: Path) -> None:
    """Removes temporary files of a run that died while writing; that we hold the lock shows that it is dead."""
    for path in sorted([*output_dir.iterdir(), *output_dir.glob(f"{SAMPLES}/.tmp-*")]):
        if LEFT_OVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            print(f"Removing {shown(path.name)}, left behind by a run that was killed", flush=True)
            shutil.rmtree(path)
        elif (path.name.startswith(PROBE) or LEFT_OVER_FILE.fullmatch(path.name)) and not path.is_dir():
            path.unlink(missing_ok=True)


def refuse_another_run(output_dir: Path, base: BaseConfig) -> None:
    """Raises ValueError if the folder holds a run and none is resumed."""
    held = sorted(path.name for path in output_dir.iterdir() if path.is_dir() or path.name in RUN_FILES)
    held = [] if held == [base.logging_dir] else held  # left behind by a failed start
    if held and not base.resume_from_checkpoint:
        names = ", ".join(map(shown, held[:5]))
        raise InputError(
            f"base.output_dir = {output_dir}: holds a run or other folders already ({names}); continue "
            "with base.resume_from_checkpoint=latest, choose another base.output_dir, or remove the folder"
        )


def publish_pipeline(staging: Path, output_dir: Path) -> list[str]:
    """Moves a staged pipeline into the run folder, the index file last; returns the names of its entries."""
    for index in INDEX_FILES:
        (output_dir / index).unlink(missing_ok=True)  # until one is back, a mixture is not mistaken for a pipeline
    names = sorted(path.name for path in staging.iterdir())
    for file in weight_files(output_dir):  # such as of a variant that an earlier export had
        file.path.unlink()
    for name in sorted(names, key=INDEX_FILES.__contains__):
        old = output_dir / name
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
        (staging / name).rename(output_dir / name)
    staging.rmdir()
    return names


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the objects of a JSON-lines file, without the last line of a killed run if it is incomplete."""
    found = []
    if not path.exists():
        return []
    with check_regular(path).open(encoding="utf-8", errors="replace") as file:
        while line := file.readline(LINE_CHARACTERS):
            with suppress(ValueError, RecursionError):
                found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and type(line.get("step")) is int]


def cut_lines(path: Path, steps_done: int) -> None:
    """Drops a JSON-lines file's lines after a step, which a resumed run writes again."""
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if line["step"] <= steps_done]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def set_metrics_aside(output_dir: Path, prefix: str, keep: bool) -> None:
    """Copies a run's logs to names with a prefix before their lines are cut; without `keep`, moves them."""
    for name in (METRICS, SKIPPED_STEPS):
        if (output_dir / name).exists():
            (shutil.copy if keep else shutil.move)(output_dir / name, output_dir / (prefix + name))
