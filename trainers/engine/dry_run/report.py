"""The report of `train.py CONFIG --dry-run`: memory, speed, time and disk of the whole run, and what to change."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from trainers.engine.dry_run.estimate import Measured, Part
from trainers.engine.dry_run.plan import DryRun
from trainers.engine.dry_run.suggestions import OutOfResources, Suggestion, disk_suggestions, memory_suggestions

GIB = 2**30


def report(dry_run: DryRun, shortage: OutOfResources | None) -> tuple[list[str], bool]:
    """Returns the lines, and whether the run fits."""
    measured, run = Measured(dry_run), dry_run.run
    device = torch.device("cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu")
    lines, disk = _memory(measured, device), None
    if measured.finished:
        disk = measured.disk()
        parts = measured.time_parts()
        lines += ["", _speed(measured), "", f"Time: {duration(sum(part.total for part in parts))}, from step 0"]
        lines += [*map(_row, parts), *_disk(measured, disk)]
        if disk["needed"] > disk["free"]:
            shortage = OutOfResources("disk", f"{disk['needed']:,} bytes are needed at once, {disk['free']:,} are free")
    if shortage is None:
        return [*lines, "", "It fits."], True
    gc.collect()  # frees the memory of the run
    suggestions = memory_suggestions(run, measured.unfinished_phase(), device)
    if shortage.of == "disk":
        suggestions = disk_suggestions(run, disk)
    return [*lines, "", *_verdict(measured, shortage, suggestions)], False


def _verdict(measured: Measured, shortage: OutOfResources, suggestions: list[Suggestion]) -> list[str]:
    where = "" if measured.finished or shortage.of == "disk" else f" in phase {measured.unfinished_phase()}"
    what = {"device": "memory of the device", "host": "main memory"}.get(shortage.of, "room on the disk")
    lines = [f"It does not fit: too little {what}{where}: {shortage.text}"]
    if not suggestions:
        return [*lines, "No option is left that would help; take a smaller network, or a larger machine."]
    return [*lines, "To change, what costs least first:", *(f"  {suggestion}" for suggestion in suggestions)]


def _memory(measured: Measured, device: torch.device) -> list[str]:
    whose = "of this process, resident"
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        whose = f"of {torch.cuda.get_device_name(device)}, which has {total:.1f} GiB"
    shape = f" ({measured.dry_run.largest})" if measured.dry_run.largest else ""
    rows = [f"  {phase:16} {peak:.2f} GiB" for phase, peak in measured.peaks().items()]
    return [f"Peak memory {whose}{shape}", *rows]


def _speed(measured: Measured) -> str:
    timed, size = len(measured.timed), measured.dry_run.plan.clock.global_batch_size
    steps = f"{timed} step{'s' * (timed > 1)} of {size} examples, after {len(measured.rates) - timed} to warm up"
    return f"Speed: {measured.examples_per_second:.1f} examples/s ({steps})"


def _row(part: Part) -> str:
    times = f"{part.times:,} x {part.seconds:.3f} s = " if part.times > 1 else ""
    return f"  {part.name:16} {times}{part.total:.1f} s" + (f"  ({part.how})" if part.how else "")


def duration(seconds: float) -> str:
    """Formats hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _disk(measured: Measured, disk: dict[str, int]) -> list[str]:
    plan, folder = measured.dry_run.plan, Path(measured.run.base.output_dir)
    checkpoints = f"{disk['kept']} of {plan.saves} checkpoints x {disk['checkpoint']:,} bytes"
    rows = [f"  checkpoints      {checkpoints} = {disk['kept'] * disk['checkpoint']:,} bytes"]
    rows += [f"  pipeline         {disk['pipeline']:,} bytes"]
    rows += [f"  caches           {disk['caches']:,} bytes"] if disk["caches"] else []
    rows += [f"  needed at once   {disk['needed']:,} bytes", f"  free             {disk['free']:,} bytes"]
    return ["", f"Disk, for {folder}", *rows]
