"""The model of scaling.py beside what is measured on two processes of a CPU, which gloo connects."""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from scripts.benchmarks.counting import Network, count, zeros
from scripts.benchmarks.measured import ENGINES
from scripts.benchmarks.runs import in_processes, in_turns
from scripts.benchmarks.scaling import GLOO, Collective, Hardware, activations, exchanged, flops_of, held, step
from trainers.common.diffusion.dit_transformer import build_dit
from trainers.common.model_files import Grid
from trainers.common.unet2d import build_unet2d

GRID, CLASSES = Grid(1, 16), 10  # of the configs in measured.py
BATCH, WIDTH = 4, 4  # few examples, so that messages take a part of a step; bytes of float32
OWN_LOOPBACK = ("unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
MIB = 2**20
NETWORKS = {
    "ddpm": (lambda: build_unet2d("unet_digits", None, GRID), zeros(sample=(1, 16, 16))),
    "dit": (lambda: build_dit("dit_digits", None, GRID, CLASSES), zeros(hidden_states=(1, 16, 16), class_labels=())),
}


def tables(asked: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Rows of the tables `engines`, what is held and sent, and `steps`: runs take turns, in processes of one thread."""
    by_bytes, by_time = [], []
    for task, (build, inputs) in NETWORKS.items():
        network = count(build, inputs, ("no",), cuda=False)
        sides = {engine: partial(run, engine, task, asked.steps) for engine in ENGINES}
        found = in_turns(sides | {"links": partial(links, 10 * asked.steps)}, asked.pairs)
        messages = found.pop("links")
        for engine, runs in found.items():
            name = {"network": f"{task}, {network.parameters / 1e6:.1f} M", "engine": engine}
            by_bytes.append(name | bytes_of(engine, network, runs))
            by_time.append(name | times_of(engine, network, runs, found["one process"], messages))
    return {"engines": by_bytes, "steps": by_time}


def run(engine: str, task: str, steps: int) -> dict[str, Any]:
    """Measurements of a run's first process, and the seconds of its restart."""
    with tempfile.TemporaryDirectory() as folder:
        given = (folder, engine, task, steps, f"base.train_batch_size={BATCH}")
        return launched("measure", *given) | {"restart_seconds": launched("restart", *given)}


def links(repetitions: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        return launched("links", folder, "DDP", repetitions)


def launched(mode: str, folder: str | Path, engine: str, *arguments: Any) -> Any:
    """Runs a function of measured.py on the engine's processes and returns the first one's result."""
    given = [mode, str(folder), engine, *map(str, arguments)]
    return in_processes("scripts.benchmarks.measured", given, folder, ENGINES[engine][0], 1, own_loopback())


def own_loopback() -> tuple[str, ...]:
    """A command in front of another that gives it a loopback of its own; none where the system does not allow it."""
    tried = subprocess.run([*OWN_LOOPBACK, "true"], capture_output=True)
    return OWN_LOOPBACK if tried.returncode == 0 else ()


def bytes_of(engine: str, network: Network, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Pairs are (measured, calculated), "-" where it is not seen; what is sent is by process and step."""
    processes, first = ENGINES[engine][0], runs[0]
    messages = exchanged(engine, network, processes, WIDTH)
    given = [Collective(kind, "backward", *sums) for kind, sums in first["messages"].items()]
    measured = first["held"] | {"activations": first["activations"]}
    kept = held(engine, network, processes, WIDTH) | {"activations": activations(network.passes["no"], BATCH, False)}
    pairs = {name: (measured[name], size) for name, size in kept.items() if name in measured}
    return {f"{name}_mib": ("-" if a is None else a / MIB, b / MIB) for name, (a, b) in pairs.items()} | {
        "sent_on_the_wire_mib": _median(runs, "wire") / processes / MIB,
        "in_messages": sum(each.sent(processes, GLOO) for each in given) / MIB,
        "calculated": sum(each.sent(processes, GLOO) for each in messages) / MIB,
        "on_a_ring": sum(each.sent(processes) for each in messages) / MIB,
    }


def times_of(
    engine: str,
    network: Network,
    runs: list[dict[str, Any]],
    alone: list[dict[str, Any]],
    links: list[dict[str, list[float]]],
) -> dict[str, Any]:
    """Medians; nothing is predicted for one process, from which the computation is known."""
    messages = exchanged(engine, network, ENGINES[engine][0], WIDTH)
    seconds, predicted = _median(runs, "step_seconds"), _predicted(network, messages, alone, links)
    return {
        "ms_per_step": 1000 * seconds,
        "predicted": 1000 * predicted if messages else "",
        "predicted_over_measured": predicted / seconds if messages else "",
        "seconds_from_restart_to_step": _median(runs, "restart_seconds"),
        "single_runs": [1000 * run["step_seconds"] for run in runs],
        "messages_alone": links,
    }


def _median(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def _predicted(
    network: Network, messages: list[Collective], alone: list[dict[str, Any]], links: list[dict[str, list[float]]]
) -> float:
    """Seconds of a step: that of one process is the computation, and what messages take alone hides behind nothing."""
    flops = flops_of(network.passes["no"], BATCH, False)
    rate = sum(flops.values()) / _median(alone, "step_seconds")
    cpu = Hardware(flops_per_second=rate, utilisation=1.0, memory_gb_per_second=math.inf, overlap=0.0)

    def seconds_of(message: Collective) -> float:
        each, by_byte = (statistics.median(link[message.kind][part] for link in links) for part in (0, 1))
        return message.count * each + message.num_bytes * by_byte

    return step(flops, 0, messages, seconds_of, cpu).seconds
