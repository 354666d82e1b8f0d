"""Predictions of the model in scaling.py for large networks on 8, 64 and 512 GPUs: calculated, nothing runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from scripts.benchmarks.counting import Inputs, Network, Precision, count, zeros
from scripts.benchmarks.scaling import FLOAT, Hardware, activations, assumptions, exchanged, flops_of, held, step
from trainers.common.diffusion.dit_transformer import build_dit
from trainers.common.model_files import Grid
from trainers.common.text_to_image.unet2d_condition import build_unet

# the precision of the passes, by engine
ENGINES: dict[str, Precision] = {"DDP": "autocast", "FSDP2": "bf16", "ZeRO-2": "autocast", "ZeRO-3": "autocast"}
WIDTH = 2  # bytes of a number in bf16
GPUS, PARTS_GPUS = (8, 64, 512), 64
SAME = 0.9  # of the fastest engine's rate: the model is no better, so the simplest one of these is taken
TOKENS = 77  # of a caption


class Case(NamedTuple):
    """A network, what it sees, and how it is trained; latents and texts come from caches, so it is alone on the GPU."""

    build: Callable[[], nn.Module]
    inputs: Inputs
    batch: int  # of a GPU
    checkpointing: bool


CASES = {
    "SD 1.5, 512 px": Case(
        lambda: build_unet("unet_sd15", Grid(4, 64), 768),
        zeros(sample=(4, 64, 64), encoder_hidden_states=(TOKENS, 768)),
        16,
        False,
    ),
    "SDXL, 1024 px": Case(
        lambda: build_unet("unet_sdxl", Grid(4, 128), 2048, 1280),
        zeros(sample=(4, 128, 128), encoder_hidden_states=(TOKENS, 2048), text_embeds=(1280,), time_ids=(6,)),
        8,
        True,
    ),
    "DiT 2B, 512 px": Case(
        lambda: build_dit("dit_2b", None, Grid(4, 64), 1000),
        zeros(hidden_states=(4, 64, 64), class_labels=()),
        32,
        True,
    ),
}


def tables(asked: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Rows of the tables `predictions`, and of `memory` with what the bytes are on PARTS_GPUS."""
    hardware, found, parts = assumptions(asked.assume), [], []
    for name, case in CASES.items():
        network = count(case.build, case.inputs, ("autocast", "bf16"), cuda=True)
        for gpus in GPUS:
            rows = [{"network": name, "gpus": gpus} | predicted(e, case, network, gpus, hardware) for e in ENGINES]
            best = taken(rows)
            found += [row | {"take": "x" if row is best else ""} for row in rows]
        parts += [{"network": name, "engine": e} | gigabytes(e, case, network, PARTS_GPUS) for e in ENGINES]
    return {"predictions": found, "memory": parts}


def described(hardware: Hardware) -> str:
    """The assumptions in a line."""
    return "assumed " + ", ".join(f"{name} {value:g}" for name, value in hardware._asdict().items()).replace("_", " ")


def taken(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the engines that fit, which stand in the order of their simplicity, the first that is about the fastest."""
    fitting = [row for row in rows if row["fits"] == "yes"]
    fastest = max((row["images_per_second"] for row in fitting), default=0.0)
    return next((row for row in fitting if row["images_per_second"] >= SAME * fastest), None)


def gigabytes(engine: str, case: Case, network: Network, gpus: int) -> dict[str, float]:
    """Memory of a GPU by part, in 10^9 bytes."""
    kept = held(engine, network, gpus, WIDTH)
    kept["activations"] = activations(network.passes[ENGINES[engine]], case.batch, case.checkpointing)
    return {name: value / 1e9 for name, value in kept.items()}


def predicted(engine: str, case: Case, network: Network, gpus: int, hardware: Hardware) -> dict[str, Any]:
    """A row; the efficiency is over a GPU that has all the memory it needs and nobody to talk to."""
    memory = sum(gigabytes(engine, case, network, gpus).values())
    flops = flops_of(network.passes[ENGINES[engine]], case.batch, case.checkpointing)
    messages = exchanged(engine, network, gpus, WIDTH)
    own = held(engine, network, gpus, WIDTH)["averages"] / FLOAT
    found = step(flops, own, messages, lambda each: hardware.seconds(each, gpus), hardware)
    alone = step(flops, network.parameters, [], lambda each: 0.0, hardware)
    return {
        "global_batch": gpus * case.batch,
        "engine": engine,
        "memory_gb": memory,
        "fits": "yes" if memory <= hardware.usable_memory * hardware.memory_gb else "no",
        "sent_gb_per_step": sum(each.sent(gpus) for each in messages) / 1e9,
        "messages": sum(each.count for each in messages),
        "ms_in_passes": 1000 * found.compute,
        "in_the_update": 1000 * found.update,
        "waiting": 1000 * found.exposed,
        "ms_per_step": 1000 * found.seconds,
        "efficiency": alone.seconds / found.seconds,
        "images_per_second": gpus * case.batch / found.seconds,
    }
