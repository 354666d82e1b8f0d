"""Long runs, watched from outside: scripts/benchmarks/soak.py --minutes 10

A third of the time each: steps with checkpoints and validations; a stream with broken shards and pictures, read by two
workers; starts from `latest` that TERM ends at random moments. Resident memory, open files, threads and speed at the
start and at the end; the table goes into docs/performance.md.
"""

from __future__ import annotations

import argparse
import io
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from datasets_lib.images.source import Source
from datasets_lib.streaming.writing import write_shard
from scripts.benchmarks.bench import write
from scripts.benchmarks.runs import ROOT
from trainers.engine.run.run_folder import METRICS, read_lines

PAGE = ROOT / "docs" / "performance.md"
CONFIG = "configs/tests/ddpm.json"
ENDLESS = [
    "base.max_train_steps=100000000", "base.checkpointing_steps=500", "base.checkpoints_total_limit=2",
    "base.logging_steps=10", "ddpm.ddpm_num_inference_steps=10", "ddpm.lr_scheduler=constant",
]  # fmt: skip
SHARDS, EXAMPLES, SIDE = 12, 200, 16
END_SECONDS = 120  # that a stopping run may take


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), CONFIG, *ENDLESS, f"base.output_dir={folder}/run", *overrides]
    with (folder / "log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def watched(folder: Path, seconds: float, *overrides: str) -> dict[str, Any]:
    """Lets a run go on for some seconds; returns what it held at the start and at the end, and how fast it was."""
    process, seen = start(folder, *overrides), []
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(1)
        if logged(folder):  # it has imported everything, and trains
            seen.append(held(process.pid))
    process.send_signal(signal.SIGTERM)
    code, rates = process.wait(END_SECONDS), logged(folder)
    if code != 143 or len(seen) < 10:
        raise ValueError(f"{folder}/log: the run ended with {code}; it must train until it is stopped")
    first, last = seen[len(seen) // 10], seen[-1]  # the first tenth warms up
    fifth = max(1, len(rates) // 5)
    speeds = [statistics.median(each) for each in (rates[1 : 1 + fifth], rates[2 * fifth : 3 * fifth], rates[-fifth:])]
    pairs = {name: (first[name], last[name]) for name in first}
    return {"minutes": seconds / 60, "steps": 10 * len(rates)} | pairs | {"examples_per_second": tuple(speeds)}


def logged(folder: Path) -> list[float]:
    lines = read_lines(folder / "run" / METRICS)
    return [line["examples_per_second"] for line in lines if "examples_per_second" in line]


def held(pid: int) -> dict[str, int]:
    """Resident memory, open files and threads of a process and its workers."""
    parent = psutil.Process(pid)
    family = [parent, *parent.children(recursive=True)]
    return {
        "resident_mib": sum(each.memory_info().rss for each in family) >> 20,
        "open_files": sum(each.num_fds() for each in family),
        "threads": sum(each.num_threads() for each in family),
    }


def stopped_starts(folder: Path, seconds: float) -> dict[str, Any]:
    """Starts from `latest` again and again, with TERM at a random moment; counts what went wrong."""
    rng, codes = random.Random(0), []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        process = start(folder, "base.resume_from_checkpoint=latest")
        time.sleep(rng.uniform(0.5, 25))
        process.send_signal(signal.SIGTERM)
        codes.append(process.wait(END_SECONDS))
    steps = [line["step"] for line in read_lines(folder / "run" / METRICS) if "loss" in line]
    return {
        "minutes": seconds / 60,
        "starts": len(codes),
        "ended_by_the_signal": sum(code in (143, -signal.SIGTERM) for code in codes),
        "tracebacks": (folder / "log").read_text(encoding="utf-8").count("Traceback"),
        "steps_logged": len(steps),
        "gaps_or_repetitions": sum(later - earlier != 10 for earlier, later in pairwise(steps)),
    }


def write_shards(folder: Path) -> None:
    """Tar files of digits' size: one of them cut, one noise, one with a broken header, a broken picture in each."""
    rng = np.random.default_rng(0)
    for number in range(SHARDS):
        path = folder / f"{number:03}.tar"
        write_shard(path, examples(rng), "webdataset", Source([], str(folder), ""))
        content = bytearray(path.read_bytes())
        if number == 1:
            content = content[: len(content) * 2 // 3]
        elif number == 2:
            content = bytearray(rng.bytes(50_000))
        elif number == 3:
            place = len(content) // 2 // 512 * 512
            content[place : place + 512] = rng.bytes(512)
        path.write_bytes(content)


def examples(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for number in range(EXAMPLES):
        data = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)).save(data, "PNG")
        yield {"image": data.getvalue() if number != EXAMPLES // 2 else data.getvalue()[:40]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of all three together (10)")
    asked = parser.parse_args()
    seconds, found = asked.minutes * 60 / 3, []
    with tempfile.TemporaryDirectory() as made:
        steps, stream, starts, data = (Path(made, name) for name in ("steps", "stream", "starts", "data"))
        for folder in (steps, stream, starts, data):
            folder.mkdir()
        validated = ["base.valid_steps=1000", "base.validation_split=0.02"]
        found.append({"run": "steps, checkpoints, validations"} | watched(steps, seconds, *validated))
        write_shards(data)
        options = ["base.dataset=null", f"base.train_data_dir={data}", "base.streaming=true", "base.bad_images=skip"]
        options += ["base.dataloader_num_workers=2", "base.shard_retries=0", "base.max_train_samples=null"]
        found.append({"run": "a stream with broken shards"} | watched(stream, seconds, *options))
        cycles = stopped_starts(starts, seconds)
    print(write("soak", found, f"scripts/benchmarks/soak.py --minutes {asked.minutes:g}", PAGE))
    print(write("soak_starts", [cycles], f"scripts/benchmarks/soak.py --minutes {asked.minutes:g}", PAGE))


if __name__ == "__main__":
    main()
