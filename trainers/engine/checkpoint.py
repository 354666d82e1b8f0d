"""Writing checkpoints: staged, flushed and renamed, so that no crash leaves one half done."""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer

from trainers.engine.agreement import on_main
from trainers.engine.clock import Clock
from trainers.engine.config import RunConfig
from trainers.engine.divergence import Divergence
from trainers.engine.durable import flush, write_tensors
from trainers.engine.ema import EMA
from trainers.engine.manifest import list_checkpoints, sha256
from trainers.engine.metering import Meter
from trainers.engine.snapshot import Snapshot, find_not_finite, snapshot

FORMAT = 1  # of state.json
SPARE_BYTES = 1 << 20  # beside the tensors: headers, texts, the file system's own


def save(
    accelerator: Accelerator,
    run: RunConfig,
    clock: Clock,
    networks: dict[str, nn.Module],
    ema: EMA | None,
    optimizer: Optimizer,
    train_set: Any,
    meter: Meter,
    divergence: Divergence,
    steps_done: int,
) -> None:
    """Writes output_dir/checkpoint-N and prunes old ones, or leaves the folder as it was.

    Every rank must call it; where checkpoint-N is there it does nothing. Raises OSError on every rank where the main
    process could not write, ValueError where something that was trained is not finite.
    """
    output_dir = Path(run.base.output_dir)
    counts = divergence.state()
    if divergence.hopeless or on_main(accelerator, lambda: (output_dir / f"checkpoint-{steps_done}").exists()):
        return
    broken = find_not_finite(networks, ema, optimizer)
    if broken is not None:
        raise ValueError(
            f"checkpoint-{steps_done} is not written: {broken} is not finite; continue from the checkpoint before with "
            "a lower learning rate"
        )
    state = {
        "format": FORMAT,
        "step": steps_done,
        "slot": clock.slot_at(steps_done),
        "global_batch_size": clock.global_batch_size,
        "total_steps": clock.total_steps,
        "num_examples": len(train_set),
        "fingerprint": train_set.fingerprint,
        "label_names": getattr(train_set, "label_names", None),
        "meter": meter.state(),
        "divergence": counts,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "config": run.as_dict(),
    }
    taken = snapshot(networks, ema, optimizer, state, accelerator.is_main_process)
    on_main(accelerator, lambda: publish(taken, output_dir))
    if accelerator.is_main_process and run.base.checkpoints_total_limit is not None:
        for _, folder in list_checkpoints(output_dir)[run.base.checkpoints_total_limit :]:
            _prune(folder)
    accelerator.wait_for_everyone()


def publish(taken: Snapshot, output_dir: Path) -> None:
    """Writes a snapshot to a temporary folder, flushes it and gives it its name; removes it where that fails."""
    final = output_dir / f"checkpoint-{taken.step}"
    staging = output_dir / f".tmp-checkpoint-{taken.step}-{secrets.token_hex(4)}"
    needed, free = taken.num_bytes + SPARE_BYTES, shutil.disk_usage(output_dir).free
    space = f"it needs {needed:,} bytes, {free:,} were free"
    intact = "older checkpoints are intact; make room and continue with base.resume_from_checkpoint=latest"
    if needed > free:
        raise OSError(f"{final.name} does not fit in {output_dir}: {space}; {intact}")
    try:
        write(taken, staging)
        if (output_dir / "metrics.jsonl").exists():
            flush(output_dir / "metrics.jsonl")  # a checkpoint is never ahead of the log
        staging.rename(final)
        flush(output_dir)
    except (OSError, SafetensorError) as failure:
        shutil.rmtree(staging, ignore_errors=True)
        raise OSError(f"{final.name} could not be written to {output_dir}: {failure}; {space}; {intact}") from None


def _prune(folder: Path) -> None:
    """Removes an old checkpoint; a failure is told, and is no reason to stop the training."""
    trash = folder.with_name(f".trash-{folder.name}-{secrets.token_hex(4)}")
    try:
        shutil.rmtree(folder.rename(trash))
    except OSError as error:
        print(f"WARNING: {folder.name} could not be removed: {error}", flush=True)


def write(taken: Snapshot, folder: Path) -> None:
    """Writes and flushes every file, the manifest last. Makes no collective call."""
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
