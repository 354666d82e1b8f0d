"""What a whole run takes, from the numbers that a rehearsal logged: memory by phase, time by part, disk."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from trainers.engine.checkpoint.writer import SPARE_BYTES
from trainers.engine.dry_run.plan import WARM_STEPS, DryRun
from trainers.engine.encoders.cache import Cache
from trainers.engine.run.run_folder import METRICS, read_lines

PHASES = {
    "start": "start",
    "": "steps",
    "save": "save",
    "valid": "validation",
    "eval": "evaluation",
    "export": "export",
}
NOT_PIPELINE = ("checkpoint-", "samples", "metrics", "config.yaml", "README.md", ".", "encoder-cache")


class Part(NamedTuple):
    """So many times so many seconds."""

    name: str
    times: int
    seconds: float
    how: str = ""

    @property
    def total(self) -> float:
        return self.times * self.seconds


class Measured:
    """What a rehearsal logged, as far as it came."""

    def __init__(self, rehearsal: DryRun) -> None:
        self.rehearsal, self.run, self.short = rehearsal, rehearsal.run, rehearsal.short
        self.folder = Path(self.short.base.output_dir)
        self.lines = read_lines(self.folder / METRICS)
        self.values = {key: value for line in self.lines for key, value in line.items()}
        self.rates = [line["examples_per_second"] for line in self.lines if "examples_per_second" in line]
        self.timed = self.rates[WARM_STEPS:] or self.rates

    @property
    def finished(self) -> bool:
        return "export/seconds" in self.values

    def peaks(self) -> dict[str, float]:
        """GiB by phase, of those that ended."""
        found = {}
        for prefix, phase in PHASES.items():
            peaks = [line[key] for line in self.lines if (key := f"{prefix}/peak_memory_gib".lstrip("/")) in line]
            if peaks:
                found[phase] = max(peaks)
        return found

    def unfinished_phase(self) -> str:
        """The first phase that did not end."""
        phases = [phase for phase in PHASES.values() if phase != "evaluation" or self.run.base.eval_steps is not None]
        return next((phase for phase in phases if phase not in self.peaks()), phases[-1])

    @property
    def examples_per_second(self) -> float:
        """Of the timed steps together."""
        return statistics.harmonic_mean(self.timed)

    def _seconds(self, phase: str) -> float:
        return self.values[f"{phase}/seconds"] + self.values[f"{phase}/skipped_seconds"]

    def time_parts(self) -> list[Part]:
        """What the whole run's time is made of."""
        plan, scale = self.rehearsal.plan, self.rehearsal.scale
        parts = [Part("start and end", 1, self._rest())]
        for column, seconds in self._fill_seconds().items():
            share, what = self._missing(column), f"{scale.get(column, 1):.4g} times what was encoded here"
            parts.append(Part(f"cache of {column}", 1, seconds * scale.get(column, 1.0) * share, what))
        decoded = [pair for pair in self.rehearsal.sets if _prepare_seconds(pair[1])]
        decoding = sum(_prepare_seconds(few) * len(whole) / len(few) for whole, few in decoded)
        parts += [Part("decoding ahead", 1, decoding, f"{plan.examples + plan.held_out:,} pictures")]
        parts += [Part("steps", plan.steps, plan.global_batch_size / self.examples_per_second)]
        parts += [Part("saves", plan.saves, self._seconds("save"))]
        items = [f"{plan.held_out:,} held-out examples"] if plan.held_out else []
        items += ["a sampler's steps"] if self.rehearsal.samples else []
        how = f"{' and '.join(items)} at the pace of the few that were run" if items else ""
        parts += [Part("validations", plan.validations, self._seconds("valid"), how)]
        if plan.evaluations:
            ratio = self.run.base.eval_num_samples / self.short.base.eval_num_samples
            how = f"{ratio:.4g} times that of {self.short.base.eval_num_samples} pictures, so rather too much"
            parts.append(Part("evaluations", plan.evaluations, self._seconds("eval") * ratio, how))
        parts += [Part("exports", plan.exports, self._seconds("export"))]
        return [part for part in parts if part.total > 0]

    def _fill_seconds(self) -> dict[str, float]:
        found = {}
        for key, seconds in self.values.items():
            if key.startswith("cache_"):
                found[key.removeprefix("cache_").removesuffix("/seconds")] = seconds
        return found

    def _rest(self) -> float:
        """The process's life until now without what is counted elsewhere; the first step, which warms up, is in it."""
        phases = ("save", "valid", "eval", "export")
        elsewhere = sum(self.values.get(f"{phase}/seconds", 0.0) for phase in phases)
        elsewhere += sum(self._fill_seconds().values()) + sum(_prepare_seconds(few) for _, few in self.rehearsal.sets)
        elsewhere += sum(self.rehearsal.plan.global_batch_size / rate for rate in self.rates[1:])
        return time.time() - psutil.Process().create_time() - elsewhere

    def _missing(self, column: str) -> float:
        """Which part of what was encoded here the run's own cache does not hold."""
        kind, base = column.rpartition("_")[2], self.run.base
        directory = Path(base.encoder_cache_dir or Path(base.output_dir).parent / "encoder-cache")
        here, there = set(), set()
        for folder in (self.folder / "encoder-cache").glob(f"{kind}-*"):
            here |= _keys(folder)
            there |= _keys(directory / folder.name)
        return len(here - there) / len(here) if here else 1.0

    def disk(self) -> dict[str, int]:
        """Bytes, of the whole run and free where it will be; "kept" and "at_once" are numbers of checkpoints."""
        plan, limit = self.rehearsal.plan, self.run.base.checkpoints_total_limit
        [checkpoint] = [_bytes_in(path) for path in self.folder.glob("checkpoint-*")]
        pipeline = sum(_bytes_in(path) for path in self.folder.iterdir() if not path.name.startswith(NOT_PIPELINE))
        kinds = {column.rpartition("_")[2]: column for column in self._fill_seconds()}
        caches = 0
        for kind, column in kinds.items():
            encoded = sum(_bytes_in(path) for path in (self.folder / "encoder-cache").glob(f"{kind}-*"))
            caches += round(encoded * self.rehearsal.scale.get(column, 1.0) * self._missing(column))
        kept = min(plan.saves, limit or plan.saves)
        at_once = min(plan.saves, kept + 1)  # an old one goes after the new one is there
        pipelines = min(plan.exports, 2)
        return {
            "checkpoint": checkpoint,
            "kept": kept,
            "at_once": at_once,
            "pipeline": pipeline,
            "caches": caches,
            "needed": checkpoint * at_once + pipeline * pipelines + caches + SPARE_BYTES,
            "free": shutil.disk_usage(self.folder).free + _bytes_in(self.folder),
        }


def _prepare_seconds(dataset: object) -> float:
    return getattr(dataset, "prepare_seconds", 0.0)


def _keys(folder: Path) -> set[str]:
    cache = Cache(folder)
    cache.look()
    return set(cache.files)


def _bytes_in(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
