"""A checkpoint's files: staged, flushed and renamed, so that no crash leaves one half done. No collective calls."""

from __future__ import annotations

import json
import secrets
import shutil
from concurrent.futures import Executor
from pathlib import Path

from safetensors import SafetensorError

from trainers.engine.checkpoint.snapshot import Snapshot
from trainers.engine.run.files import flush, sha256, write_tensors
from trainers.engine.run.run_folder import METRICS

FORMAT = 1  # of state.json
SPARE_BYTES = 1 << 20  # beside the tensors: headers, texts, the file system's own
INTACT = "older checkpoints are intact; make room and continue with base.resume_from_checkpoint=latest"


def stage(taken: Snapshot, output_dir: Path) -> Path:
    """Writes a snapshot to a temporary folder and flushes it; returns the folder. A thread may do it.

    Raises OSError where it does not fit or cannot be written, after it has removed the folder.
    """
    name = f"checkpoint-{taken.step}"
    staging = output_dir / f".tmp-{name}-{secrets.token_hex(4)}"
    needed, free = taken.num_bytes + SPARE_BYTES, shutil.disk_usage(output_dir).free
    space = f"it needs {needed:,} bytes, {free:,} were free"
    if needed > free:
        raise OSError(f"{name} does not fit in {output_dir}: {space}; {INTACT}")
    try:
        write(taken, staging)
        if (output_dir / METRICS).exists():
            flush(output_dir / METRICS)  # a checkpoint is never ahead of the log
    except (OSError, SafetensorError) as failure:
        shutil.rmtree(staging, ignore_errors=True)
        raise OSError(f"{name} could not be written to {output_dir}: {failure}; {space}; {INTACT}") from None
    return staging


def seal(staging: Path) -> None:
    """Gives a staged checkpoint its name; removes it where that fails."""
    output_dir, name = staging.parent, staging.name.removeprefix(".tmp-").rpartition("-")[0]
    try:
        staging.rename(output_dir / name)
        flush(output_dir)
    except OSError as failure:
        shutil.rmtree(staging, ignore_errors=True)
        raise OSError(f"{name} could not be written to {output_dir}: {failure}; {INTACT}") from None


def remove(folder: Path, thread: Executor) -> None:
    """Takes the name from an old checkpoint at once, and removes its files in a thread: that may take long.

    A failure is told, and is no reason to stop the training.
    """
    try:
        trash = folder.rename(folder.with_name(f".trash-{folder.name}-{secrets.token_hex(4)}"))
        thread.submit(_remove_files, trash, folder.name)
    except OSError as error:
        print(f"WARNING: {folder.name} could not be removed: {error}", flush=True)


def _remove_files(trash: Path, name: str) -> None:
    try:
        shutil.rmtree(trash)
    except OSError as error:
        print(f"WARNING: {name} could not be removed: {error}", flush=True)


def write(taken: Snapshot, folder: Path) -> None:
    """Writes and flushes every file, the manifest last."""
    for path, values in taken.tensors.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(values, folder / path)
    for path, text in taken.texts.items():
        (folder / path).write_text(text, encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(folder)): [path.stat().st_size, sha256(path)] for path in files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        flush(path)
