"""Reads and checks a checkpoint's state.json: types, ranges, and what follows from the folder's name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from datasets_lib.errors import InputError
from datasets_lib.foreign import read_json, shown
from trainers.engine.config.schema import coerce
from trainers.options import Bounds

FORMAT = 1  # of state.json
STATE = "state.json"
MOST_BYTES = 64 << 20  # of a JSON file of a checkpoint: a stream's positions are the largest part
MOST = 2**62  # of any count
MOST_EXAMPLES_OF_A_STEP = 1 << 24
STEP_OF_NAME = re.compile(r"(?:set-aside-[0-9a-f]+-)?checkpoint-(\d+)")
Count = Annotated[int, Bounds(0, MOST)]
Many = Annotated[int, Bounds(1, MOST)]

FIELDS: dict[str, Any] = {
    "step": Many,
    "slot": Many,
    "global_batch_size": Annotated[int, Bounds(1, MOST_EXAMPLES_OF_A_STEP)],
    "total_steps": Many,
    "num_examples": Many | None,
    "fingerprint": str,
    "stream": list[dict[str, Any]] | None,
    "label_names": list[str] | None,
    "meter": dict[str, Any],
    "divergence": dict[str, Any],
    "scaler": dict[str, Any] | None,
    "config": dict[str, dict[str, Any]],
}
METER = {"names": list[str], "windows": list[list[list[float]]]}
DIVERGENCE = {"skipped_in_a_row": Count, "overflows_in_a_row": Count}
PROCESS = {"turn": Count, "readers": list[dict[str, Any] | None], "skipped_before": list[Count]}
READER = {
    "place": list[Count], "lost_shards": Count, "bad_images": Count, "rows_read": Count,
    "seconds": Annotated[float, Bounds(0)],
}  # fmt: skip
BUFFER = {"drawn": Count, "since": list[Count], "rows": Count, "kept": list[Count]}


class OtherVersion(InputError):
    """A checkpoint in another format of this file."""


def read_state_file(folder: Path) -> dict[str, Any]:
    """Returns a checkpoint's state.json; raises ValueError if diffloop does not write it so, or OtherVersion."""
    path = folder / STATE
    state = read_json(path, MOST_BYTES)
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds no mapping")
    if (found := state.get("format")) != FORMAT:
        raise OtherVersion(f"{folder}: written by another version of diffloop (format {shown(found)}, not {FORMAT})")
    try:
        return _checked(folder, state)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _checked(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    state = {"format": FORMAT} | _fields(state, FIELDS, "")
    step, slot = state["step"], state["slot"]
    named = STEP_OF_NAME.fullmatch(folder.resolve().name)
    if named and int(named[1]) != step:
        raise InputError(f"step = {step}: must be {named[1]}, as the folder's name says")
    if not step <= slot <= step * MOST_EXAMPLES_OF_A_STEP:
        raise InputError(f"slot = {slot}: cannot be that of step {step}")
    if state["total_steps"] < step:
        raise InputError(f"total_steps = {state['total_steps']}: must be at least step {step}")
    if len(state["config"]) != 2 or "base" not in state["config"]:
        raise InputError("config: must hold two sections, base and the task's")
    for name, value in (state["scaler"] or {}).items():  # not converted: torch takes no float for a whole number
        if type(value) not in (int, float) or not math.isfinite(value):
            raise InputError(f"scaler.{shown(name)} = {shown(value)}: must be a number")
    state["divergence"] = _fields(state["divergence"], DIVERGENCE, "divergence.")
    if state["meter"]:
        state["meter"] = _meter(_fields(state["meter"], METER, "meter."))
    if state["stream"] is not None:
        state["stream"] = [_process(part, f"stream[{number}].") for number, part in enumerate(state["stream"])]
    return state


def _fields(values: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = {}
    for name, kind in kinds.items():
        try:
            found[name] = coerce(values.get(name), kind)
        except ValueError as allowed:
            what = f"{where}{name} = {shown(values[name])}" if name in values else f"lacks {where}{name}"
            raise InputError(f"{what}: must be {allowed}") from None
    return found


def _meter(meter: dict[str, Any]) -> dict[str, Any]:
    """Checks that each process has a sum and a count for every name."""
    names = len(meter["names"])
    if not all(len(window) == names and all(len(pair) == 2 for pair in window) for window in meter["windows"]):
        raise InputError(f"meter.windows: must hold two numbers for each of {names} names")
    return meter


def _process(part: dict[str, Any], where: str) -> dict[str, Any]:
    """Checks the place of one process in a stream."""
    process = _fields(part, PROCESS, where)
    if len(process["skipped_before"]) != 2 or not process["turn"] < len(process["readers"]):
        raise InputError(f"{where}turn or {where}skipped_before: does not fit its readers")
    readers = enumerate(process["readers"])
    process["readers"] = [_reader(reader, f"{where}readers[{n}].") if reader else reader for n, reader in readers]
    return process


def _reader(values: dict[str, Any], where: str) -> dict[str, Any]:
    reader = _fields(values, READER, where)
    if len(reader["place"]) != 3:
        raise InputError(f"{where}place: must be three numbers")
    if "buffer" not in values:
        return reader
    buffer = _fields(_fields(values, {"buffer": dict[str, Any]}, where)["buffer"], BUFFER, f"{where}buffer.")
    kept, rows = buffer["kept"], buffer["rows"]
    different = len(set(kept)) == len(kept)
    if not (len(buffer["since"]) == 3 and different and max(kept, default=-1) < rows <= reader["rows_read"]):
        raise InputError(f"{where}buffer: its rows do not fit together")
    return reader | {"buffer": buffer}
