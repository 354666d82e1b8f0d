"""Estimates a whole run from the numbers that a dry run logged: memory by phase, time by part, disk space."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from datasets_lib.file_hashes import cache_directory
from trainers.engine.checkpoint.writer import SPARE_BYTES
from trainers.engine.dry_run.plan import WARM_STEPS, DryRun
from trainers.engine.encoders.cache import Cache
from trainers.engine.run.run_folder import METRICS, read_lines

PHASES = {  # with the prefix of their metrics
    "start": "start/", "steps": "", "save": "save/", "validation": "valid/", "evaluation": "eval/", "export": "export/",
}  # fmt: skip
NOTHING = 1e-3  # seconds: a data set had nothing to decode
NOT_PIPELINE = ("checkpoint-", "samples", "metrics", "config.yaml", "README.md", ".", "encoder-cache")


class Part(NamedTuple):
    """Something that the run does several times."""

    name: str
    times: int
    seconds: float
    how: str = ""

    @property
    def total(self) -> float:
        return self.times * self.seconds


class Measured:
    """The numbers that a dry run logged, as far as it got."""

    def __init__(self, dry_run: DryRun) -> None:
        self.dry_run, self.run, self.short = dry_run, dry_run.run, dry_run.short
        self.folder = Path(self.short.base.output_dir)
        self.lines = read_lines(self.folder / METRICS)
        logged = {key: value for line in self.lines for key, value in line.items()}
        self.seconds = {key.removesuffix("/seconds"): logged[key] for key in logged if key.endswith("/seconds")}
        self.rates = [line["examples_per_second"] for line in self.lines if "examples_per_second" in line]
        self.timed = self.rates[WARM_STEPS:] or self.rates
        self.examples_per_second = statistics.harmonic_mean(self.timed) if self.timed else 0.0
        self.finished = "export" in self.seconds

    def peaks(self) -> dict[str, float]:
        """Returns GiB by phase, of the phases that ended."""
        keys = {phase: f"{prefix}peak_memory_gib" for phase, prefix in PHASES.items()}
        found = {phase: [line[key] for line in self.lines if key in line] for phase, key in keys.items()}
        return {phase: max(peaks) for phase, peaks in found.items() if peaks}

    def unfinished_phase(self) -> str:
        """The first phase that did not end."""
        phases = [phase for phase in PHASES if phase != "evaluation" or self.run.base.eval_steps is not None]
        return next((phase for phase in phases if phase not in self.peaks()), phases[-1])

    def _seconds(self, start: str) -> dict[str, float]:
        """Returns the seconds of names with a prefix, by the rest of the name."""
        return {key.removeprefix(start): seconds for key, seconds in self.seconds.items() if key.startswith(start)}

    def _whole(self, phase: str) -> float:
        """Returns the seconds of a phase with those that the rest of its loops would have taken."""
        return self.seconds[phase] + self.dry_run.skipped[phase]

    def time_parts(self) -> list[Part]:
        """Divides the whole run's time into parts."""
        plan, held_out, scale = self.dry_run.plan, self.dry_run.held_out, self.dry_run.scale
        parts = [Part("start and end", 1, self._rest())]
        for column, spent in self._seconds("cache_").items():
            times = scale.get(f"cache_{column}", 1.0)
            what = f"{times:.4g} times the values encoded here"
            parts.append(Part(f"cache of {column}", 1, spent * times * self._missing(column), what))
        decoding = sum(spent * scale.get(f"prepare_{split}", 1.0) for split, spent in self._seconds("prepare_").items())
        if decoding > NOTHING:
            parts.append(Part("decoding ahead", 1, decoding, f"{(plan.clock.num_examples or 0) + held_out:,} pictures"))
        parts += [Part("steps", plan.clock.total_steps, plan.clock.global_batch_size / self.examples_per_second)]
        parts += [Part("saves", plan.saves, self.seconds["save"])]
        items = [f"{held_out:,} held-out examples"] if held_out else []
        items += ["a sampler's steps"] if self.dry_run.samples else []
        how = f"{' and '.join(items)} at the pace of the few that were run" if items else ""
        parts += [Part("validations", plan.validations, self._whole("valid"), how)]
        if plan.evaluations:
            ratio = self.run.base.eval_num_samples / self.short.base.eval_num_samples
            how = f"{ratio:.4g} times that of {self.short.base.eval_num_samples} pictures, so rather too much"
            parts.append(Part("evaluations", plan.evaluations, self._whole("eval") * ratio, how))
        parts += [Part("exports", plan.exports, self._whole("export"))]
        return [part for part in parts if part.total > 0]

    def _rest(self) -> float:
        """The process's lifetime without the parts counted elsewhere, including the first step, which warms up."""
        steps = sum(self.dry_run.plan.clock.global_batch_size / rate for rate in self.rates[1:])
        return time.time() - psutil.Process().create_time() - sum(self.seconds.values()) - steps

    def _missing(self, column: str) -> float:
        """The share of the values encoded here that the run's own cache lacks."""
        kind, base = column.rpartition("_")[2], self.run.base
        directory = cache_directory(base)
        here: set[str] = set()
        there: set[str] = set()
        for folder in (self.folder / "encoder-cache").glob(f"{kind}-*"):
            here |= _keys(folder)
            there |= _keys(directory / folder.name)
        return len(here - there) / len(here) if here else 1.0

    def disk(self) -> dict[str, int]:
        """Returns the bytes that the whole run needs, and free bytes; "kept" and "at_once" count checkpoints."""
        plan, limit = self.dry_run.plan, self.run.base.checkpoints_total_limit
        [checkpoint] = [_bytes_in(path) for path in self.folder.glob("checkpoint-*")]
        pipeline = sum(_bytes_in(path) for path in self.folder.iterdir() if not path.name.startswith(NOT_PIPELINE))
        kinds = {column.rpartition("_")[2]: column for column in self._seconds("cache_")}
        caches = 0
        for kind, column in kinds.items():
            encoded = sum(_bytes_in(path) for path in (self.folder / "encoder-cache").glob(f"{kind}-*"))
            caches += round(encoded * self.dry_run.scale.get(f"cache_{column}", 1.0) * self._missing(column))
        kept = min(plan.saves, limit or plan.saves)
        at_once = min(plan.saves, kept + 1)  # an old one is removed after the new one is complete
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


def _keys(folder: Path) -> set[str]:
    cache = Cache(folder)
    cache.look()
    return set(cache.files)


def _bytes_in(path: Path) -> int:
    files = [path] if path.is_file() else list(path.rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())
