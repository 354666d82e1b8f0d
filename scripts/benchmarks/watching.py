"""Looks into a step of a run: what autograd keeps, what the process holds, what it exchanges."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.benchmarks.counting import bytes_of, saving
from trainers.engine.distributed.sharding import local

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "reduce", "broadcast")


def watch(module: nn.Module, found: dict[str, Any]) -> ExitStack:
    """Counts what autograd keeps of a forward pass until it is closed.

    Weights that were gathered for the pass are gone again at its end.
    """
    hooks, watching, kept = ExitStack(), ExitStack(), []

    def before(*_: Any) -> None:
        kept.append(watching.enter_context(saving(module, {})))

    def after(*_: Any) -> None:
        watching.close()
        found["activations"] = found.get("activations", 0) + bytes_of(kept.pop())

    for handle in (module.register_forward_pre_hook(before), module.register_forward_hook(after)):
        hooks.callback(handle.remove)
    return hooks


def states(modules: Iterable[nn.Module], optimizer: Any, ema: Any) -> dict[str, int | None]:
    """Bytes by what they are, after a step; DeepSpeed's optimizer moves weights of its own.

    Of gradients in flight only DDP's lasting buckets can be seen.
    """
    inner, modules = optimizer.optimizer, list(modules)
    masters = getattr(inner, "single_partition_of_fp32_groups", getattr(inner, "fp32_partitioned_groups_flat", []))
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    wrappers = [module for module in modules if isinstance(module, DistributedDataParallel)]
    buckets = [wrapper._get_ddp_logging_data()["rebuilt_bucket_sizes"] for wrapper in wrappers]
    weights = [getattr(p, "ds_tensor", p) for module in modules for p in module.parameters()]
    return {
        "weights": held([*weights, *masters]),
        "moments": held([moment for moment in moments if moment.dim()]),
        "averages": held(list(ema.averages.values()) if ema is not None else []),
        "gradients in flight": sum(int(size) for sizes in buckets for size in sizes.split(",")) if wrappers else None,
    }


def gradients_of(optimizer: Any) -> list[Tensor | None]:
    """The gradients that the optimizer is about to use: DeepSpeed has parts in separate tensors."""
    inner = optimizer.optimizer
    if hasattr(inner, "grad_partitions_flat_buffer"):  # ZeRO-3
        return [inner.grad_partitions_flat_buffer]
    if hasattr(inner, "averaged_gradients"):  # ZeRO-2
        return [part for parts in inner.averaged_gradients.values() for part in parts or ()]
    return [p.grad for group in optimizer.param_groups for p in group["params"]]


def held(tensors: list[Tensor | None]) -> int:
    return sum(local(tensor.detach()).nbytes for tensor in tensors if tensor is not None)


class Messages(TorchDispatchMode):
    """Counts the messages that processes exchange inside the block, and the bytes of the whole tensors, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function.__name__.replace("_", "")  # such as _allgather_base_ and allreduce_coalesced_
        kind = next((kind for kind in KINDS if name.startswith(kind.replace("_", ""))), None)
        if function.namespace == "c10d" and kind is not None:
            sums = self.found.setdefault(kind, [0, 0])
            sums[0] += 1
            sums[1] += max(_bytes_in(argument) for argument in arguments)
        return function(*arguments, **(options or {}))


def _bytes_in(argument: Any) -> int:
    if isinstance(argument, (list, tuple)):
        return sum(map(_bytes_in, argument))
    return argument.nbytes if isinstance(argument, Tensor) else 0


def loopback_bytes() -> int:
    """Bytes sent so far, read when all processes have arrived."""
    if not dist.is_initialized():
        return 0
    dist.barrier()
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    [counters] = [line.split()[1:] for line in lines if line.strip().startswith("lo:")]
    dist.barrier()
    return int(counters[8])
