"""Writes a checkpoint under a temporary name, flushes and renames it: a crash never leaves a partial one."""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path

from datasets_lib.errors import FileError
from datasets_lib.file_hashes import sha256
from trainers.engine.checkpoint.manifest import MANIFEST
from trainers.engine.checkpoint.snapshot import Snapshot
from trainers.engine.run.files import flush, write_text
from trainers.engine.run.run_folder import METRICS
from trainers.weight_files import write_tensors

SPARE_BYTES = 1 << 20  # for headers, texts and the file system, besides the tensors
INTACT = "older checkpoints are intact; make room and continue with base.resume_from_checkpoint=latest"


def stage(taken: Snapshot, output_dir: Path) -> Path:
    """Writes and flushes a snapshot in a temporary folder, which it returns; raises OSError if that fails."""
    name = f"checkpoint-{taken.step}"
    staging = output_dir / f".tmp-{name}-{secrets.token_hex(4)}"
    needed, free = taken.num_bytes + SPARE_BYTES, shutil.disk_usage(output_dir).free
    space = f"it needs {needed:,} bytes, {free:,} were free"
    if needed > free:
        raise FileError(f"{name} does not fit in {output_dir}: {space}; {INTACT}")
    try:
        write(taken, staging)
        if (output_dir / METRICS).exists():
            flush(output_dir / METRICS)  # a checkpoint is never ahead of the log
    except OSError as failure:
        shutil.rmtree(staging, ignore_errors=True)
        raise FileError(f"{name} could not be written to {output_dir}: {failure}; {space}; {INTACT}") from None
    return staging


def seal(staging: Path) -> None:
    """Renames a staged checkpoint to its final name; removes it if that fails."""
    output_dir, name = staging.parent, staging.name.removeprefix(".tmp-").rpartition("-")[0]
    try:
        staging.rename(output_dir / name)
        flush(output_dir)
    except OSError as failure:
        shutil.rmtree(staging, ignore_errors=True)
        raise FileError(f"{name} could not be written to {output_dir}: {failure}; {INTACT}") from None


def remove(folder: Path) -> None:
    """Renames an old checkpoint, then deletes its files; a failure only prints a warning."""
    try:
        shutil.rmtree(folder.rename(folder.with_name(f".trash-{folder.name}-{secrets.token_hex(4)}")))
    except OSError as error:
        print(f"WARNING: {folder.name} could not be removed: {error}", flush=True)


def write(taken: Snapshot, folder: Path) -> None:
    """Writes and flushes every file, the manifest last."""
    for name, values in taken.tensors.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(values, folder / name)
    for name, text in taken.texts.items():
        write_text(folder / name, text)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(folder)): [path.stat().st_size, sha256(path)] for path in files}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    for path in [*folder.rglob("*"), folder]:
        flush(path)
