"""A model of a step on many processes: bytes that each holds and sends, and the time that follows.

Bytes are those that this project's engines keep and exchange; time and GPUs are assumptions, `Hardware`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Size

from scripts.benchmarks.counting import Network, Passes

FLOAT = 4  # bytes of weights that are trained, of their gradients where they are summed, of moments and averages
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20  # of DDP
ZERO_BUCKET, ZERO_LIVE = 500_000_000, 1_000_000_000  # numbers: DeepSpeed's reduce_bucket_size and max_live_parameters
UPDATE_BYTES = 72  # moved for a trained number by the norm, clipping, fused AdamW and averaging: 18 reads and writes
Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "reduce", "broadcast"]
Phase = Literal["forward", "backward", "update"]
# how often a process sends the whole tensor, on the average of them and but for its own part of it
RING: dict[Kind, int] = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "reduce": 1, "broadcast": 1}
GLOO: dict[Kind, int] = RING | {
    "reduce_scatter": 2,
    "reduce": 2,
}  # as measured: it reduces all, and keeps what was asked for


@dataclass(frozen=True)
class Collective:
    """The messages of a phase of a step: how many, and the bytes of their whole tensors together."""

    kind: Kind
    phase: Phase
    count: int
    num_bytes: int

    def sent(self, processes: int, factors: dict[Kind, int] = RING) -> float:
        """Bytes that each process sends, and receives."""
        return factors[self.kind] * (processes - 1) / processes * self.num_bytes


def part(units: Iterable[Iterable[Size]], processes: int) -> int:
    """Numbers of the largest shard: FSDP2 cuts each weight along its first axis, and fills up what does not divide."""
    return sum(math.ceil(shape[0] / processes) * shape[1:].numel() for unit in units for shape in unit)


def held(engine: str, network: Network, processes: int, width: int, micro_batches: int = 1) -> dict[str, float]:
    """Bytes in each process by what they are; FSDP2 gathers weights in numbers of `width` bytes, 2 with bf16."""
    whole = network.parameters
    if processes == 1:
        return _kept(whole, FLOAT * whole)
    if engine == "DDP":
        return _kept(whole, FLOAT * whole, in_flight=FLOAT * whole)
    if engine == "FSDP2":
        own = part(network.units, processes)
        rest, *blocks = (sum(shape.numel() for shape in unit) for unit in network.units)
        largest = max(blocks, default=rest)
        # before the last micro-batch nothing is sent, and whole gradients wait
        gradients = FLOAT * (own if micro_batches == 1 else whole)
        # a block's gradients and what is sent of them; what is in no block, a block and the next one
        return _kept(own, gradients, (width + FLOAT) * largest, gathered=width * (rest + 2 * largest))
    own, bucket = math.ceil(whole / processes), FLOAT * min(ZERO_BUCKET, whole)
    if engine == "ZeRO-2":
        return _kept(own, FLOAT * own, bucket, copies=FLOAT * whole)
    if engine == "ZeRO-3":
        return _kept(own, FLOAT * own, bucket, copies=FLOAT * own, gathered=FLOAT * min(ZERO_LIVE, whole))
    raise ValueError(f"engine {engine}: must be DDP, FSDP2, ZeRO-2 or ZeRO-3")


def _kept(own: int, gradients: int, in_flight: int = 0, copies: int = 0, gathered: int = 0) -> dict[str, float]:
    """`own` numbers are moved by the optimizer, `copies` are bytes of the same weights that the network holds."""
    return {
        "weights": FLOAT * own + copies,
        "gradients": gradients,
        "moments": 2 * FLOAT * own,
        "averages": FLOAT * own,
        "gradients in flight": in_flight,
        "gathered weights": gathered,
    }


def exchanged(engine: str, network: Network, processes: int, width: int, micro_batches: int = 1) -> list[Collective]:
    """The messages of a step; DDP and FSDP2 reduce gradients once, whatever the number of micro-batches."""
    if processes == 1:
        return []
    whole, micro = network.parameters, micro_batches
    if engine == "DDP":
        buckets = 1 + math.ceil((FLOAT * whole - FIRST_BUCKET_BYTES) / BUCKET_BYTES)
        return [Collective("all_reduce", "backward", buckets, FLOAT * whole)]
    if engine == "FSDP2":
        units, filled = len(network.units), processes * part(network.units, processes)
        blocks = processes * part(network.units[1:], processes)  # what is in no block stays gathered
        return [
            Collective("all_gather", "forward", micro * units, micro * width * filled),
            Collective("all_gather", "backward", micro * (units - 1), micro * width * blocks),
            Collective("reduce_scatter", "backward", units, FLOAT * filled),
        ]
    buckets = math.ceil(whole / ZERO_BUCKET)
    if engine == "ZeRO-2":  # DeepSpeed reduces whole buckets, and each process keeps its part
        reduced = Collective("all_reduce", "backward", micro * buckets, micro * FLOAT * whole)
        return [reduced, Collective("all_gather", "update", buckets, FLOAT * whole)]
    return [
        Collective("all_gather", "forward", micro * network.layers, micro * FLOAT * whole),
        Collective("all_gather", "backward", micro * network.layers, micro * FLOAT * whole),
        Collective("reduce_scatter", "backward", micro * buckets, micro * FLOAT * whole),
    ]


class Hardware(NamedTuple):
    """Assumptions: an H100 SXM, NVLink between 8, a network card of 400 Gbit/s for each GPU between nodes."""

    flops_per_second: float = 989e12  # dense bf16
    utilisation: float = 0.35  # of that, in the passes
    memory_gb: float = 80.0
    usable_memory: float = 0.9  # the rest is for CUDA, workspaces of its libraries, fragments and passing tensors
    memory_gb_per_second: float = 2700.0  # 80 % of 3,350
    gpus_per_node: int = 8
    nvlink_gb_per_second: float = 450.0  # of a GPU, each way
    network_gb_per_second: float = 50.0
    bandwidth_reached: float = 0.75  # of these two
    node_latency_us: float = 2.0  # from GPU to GPU
    network_latency_us: float = 8.0  # from node to node
    overlap: float = 0.8  # of a pass, behind which communication can hide

    def seconds(self, collective: Collective, processes: int) -> float:
        """A ring through all GPUs enters and leaves a node over all of its cards, so these carry a part each.

        The latency is that of a ring's hops; reductions of all go up and down a tree.
        """
        nodes, within = math.ceil(processes / self.gpus_per_node), min(processes, self.gpus_per_node)
        cards = self.gpus_per_node * self.network_gb_per_second
        rate = 1e9 * (self.nvlink_gb_per_second if nodes == 1 else min(self.nvlink_gb_per_second, cards))
        if collective.kind == "all_reduce":
            latency = 2 * (math.log2(within) * self.node_latency_us + math.log2(nodes) * self.network_latency_us)
        else:
            latency = (processes - nodes) * self.node_latency_us + (nodes - 1) * self.network_latency_us
        return 1e-6 * collective.count * latency + collective.sent(processes) / (rate * self.bandwidth_reached)


def assumptions(given: Iterable[str]) -> Hardware:
    """The hardware with other values, given as NAME=VALUE; ValueError for an unknown name or what is not positive."""
    hardware: Any = Hardware()
    for each in given:
        name, _, value = each.partition("=")
        if name not in hardware._fields:
            raise ValueError(f"--assume {each}: {name} is unknown; must be one of {', '.join(hardware._fields)}")
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not number > 0:
            raise ValueError(f"--assume {each}: must be NAME=VALUE with a number above 0")
        hardware = hardware._replace(**{name: number})
    return hardware


class Step(NamedTuple):
    """Seconds."""

    compute: float
    update: float
    communication: float
    exposed: float  # the part of it that nothing hides

    @property
    def seconds(self) -> float:
        return self.compute + self.update + self.exposed


def step(
    flops: dict[Phase, float],
    trained: float,
    messages: list[Collective],
    seconds_of: Callable[[Collective], float],
    hardware: Hardware,
) -> Step:
    """A step of these FLOPs and messages that updates so many numbers in each process.

    In each pass the communication hides behind a part of the computation, all but one message: nothing is computed
    before the first block is there, and nothing after the last gradient.
    """
    passes = {phase: count / (hardware.flops_per_second * hardware.utilisation) for phase, count in flops.items()}
    total, exposed = 0.0, 0.0
    for phase in ("forward", "backward", "update"):
        own = [each for each in messages if each.phase == phase]
        seconds = sum(map(seconds_of, own))
        one = seconds / max(sum(each.count for each in own), 1)
        total += seconds
        exposed += max(seconds - hardware.overlap * passes.get(phase, 0.0), one)
    return Step(sum(passes.values()), UPDATE_BYTES * trained / (1e9 * hardware.memory_gb_per_second), total, exposed)


def flops_of(passes: Passes, examples: int, checkpointing: bool) -> dict[Phase, float]:
    """Of the passes of a step."""
    again = passes.again_flops if checkpointing else 0
    return {"forward": examples * passes.forward_flops, "backward": examples * (passes.backward_flops + again)}


def activations(passes: Passes, examples: int, checkpointing: bool) -> int:
    """Bytes that the passes of a micro-batch keep at most."""
    return examples * (passes.outside + passes.block if checkpointing else passes.kept) + passes.copies
