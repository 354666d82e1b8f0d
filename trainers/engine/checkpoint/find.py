"""Finds the checkpoint to resume from: complete, undamaged, and the same in every output folder of the launch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from datasets_lib.errors import InputError, MissingFileError
from trainers.engine.checkpoint.manifest import MANIFEST, DamagedCheckpoint, list_checkpoints, tensor_digests, verify
from trainers.engine.distributed.shared_folders import Folders
from trainers.engine.run.context import RunContext


class Copy(NamedTuple):
    """One output folder's copy of a checkpoint: hashes of its tensors, or the reason why it cannot be used."""

    digests: dict[str, str] | None
    fault: str = ""


def find_checkpoint(ctx: RunContext) -> Path | None:
    """Returns the checkpoint's folder as this process sees it; None for a start from step 0. Collective.

    Raises FileNotFoundError for a name or path that does not exist, DamagedCheckpoint if all are damaged, ValueError if
    the output folders hold different ones.
    """
    folders, output_dir, resume = ctx.folders, ctx.output_dir, ctx.run.base.resume_from_checkpoint
    if not resume:
        return None
    if resume in (True, "latest"):
        return _find_latest(folders, output_dir)
    found = folders.on_mains(lambda: _find_named(output_dir, str(resume)))
    for place, (_, digests) in zip(folders.places, found, strict=True):
        if digests != found[0][1]:
            places = f"{folders.places[0]} and {place}"
            raise InputError(f"resume_from_checkpoint = {resume}: {places} hold different ones; copy one over")
    return found[folders.number][0]


def _find_latest(folders: Folders, output_dir: Path) -> Path | None:
    listed = folders.on_mains(lambda: [step for step, _ in list_checkpoints(output_dir)])
    steps, newest_advice = sorted(set().union(*listed), reverse=True), ""
    for folder in (output_dir / f"checkpoint-{step}" for step in steps):
        copies = folders.on_mains(partial(_look, folders, folder))
        faults = [copy.fault for copy in copies if copy.fault]
        if not faults and any(copy.digests != copies[0].digests for copy in copies):
            faults = [f"{folder.name}: it is not the same in {' and '.join(folders.places)}"]
        if not faults:
            return folder
        for fault in faults:
            folders.accelerator.print(f"WARNING: skipping {fault}", flush=True)
        if advice := _advice(folder, folders.places, copies):
            folders.accelerator.print(f"  {advice}", flush=True)
        newest_advice = newest_advice or advice
    if newest_advice:
        raise InputError(f"no checkpoint is intact and the same in {' and '.join(folders.places)}; {newest_advice}")
    if steps:
        raise DamagedCheckpoint(
            f"all {len(steps)} checkpoints in {output_dir} are damaged; remove them to start at step 0"
        )
    folders.accelerator.print(f"No checkpoint in {output_dir}: starting at step 0", flush=True)
    return None


def _look(folders: Folders, folder: Path) -> Copy:
    place, where = folders.places[folders.number], f"on {folders.hosts[folders.rank]}: " if folders.several else ""
    if not folder.is_dir():
        return Copy(None, f"{folder.name}: it is missing in {place}")
    try:
        verify(folder)
    except DamagedCheckpoint as error:
        return Copy(None, f"a damaged checkpoint: {where}{error}")
    return Copy(tensor_digests(folder))


def _advice(folder: Path, places: list[str], copies: list[Copy]) -> str:
    """Says how to make a checkpoint usable that is intact in some folder; empty if it is intact in none."""
    for intact, copy in zip(places, copies, strict=True):
        if not copy.fault:
            others = [place for place, other in zip(places, copies, strict=True) if other.digests != copy.digests]
            copying = f"copy it from {intact} to {' and '.join(others)}"
            return f"to continue from {folder.name}, {copying}, or start on {intact.partition(':')[0]} alone"
    return ""


def _find_named(output_dir: Path, name: str) -> tuple[Path, dict[str, str]]:
    for folder in (output_dir / name, Path(name)):
        inside = list_checkpoints(folder)
        if inside and not (folder / MANIFEST).exists():
            advice = f"a folder of checkpoints; name one, such as {inside[0][1]}"
            raise MissingFileError(f"resume_from_checkpoint = {name}: {advice}")
        if folder.is_dir():
            verify(folder)
            return folder, tensor_digests(folder)
    there = ", ".join(folder.name for _, folder in list_checkpoints(output_dir)) or "none"
    raise MissingFileError(f"resume_from_checkpoint = {name}: no such folder; checkpoints in {output_dir}: {there}")
