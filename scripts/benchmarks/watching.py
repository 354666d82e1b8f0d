"""Looks into a step of a run: what autograd keeps, what the process holds, what it exchanges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from trainers.engine.distributed.sharding import local

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "reduce", "broadcast")


@contextmanager
def activations(module: nn.Module, found: dict[str, Any]) -> Iterator[None]:
    """Adds to found["activations"] the bytes that autograd keeps of the module's forward passes inside the block.

    Weights do not count: those that are gathered for the pass are gone again at its end.
    """
    kept: dict[int, torch.UntypedStorage] = {}  # by identity

    def keep(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):  # whose numbers ZeRO-3 takes away again
            return tensor
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor.detach()  # the tensor itself would keep the node that it comes from

    saving = saved_tensors_hooks(keep, lambda tensor: tensor)

    def before(*_: Any) -> None:
        saving.__enter__()

    def after(*_: Any) -> None:
        saving.__exit__()
        for parameter in module.parameters():
            kept.pop(parameter.untyped_storage()._cdata, None)
        found["activations"] = found.get("activations", 0) + sum(storage.nbytes() for storage in kept.values())
        kept.clear()

    with module.register_forward_pre_hook(before), module.register_forward_hook(after):
        yield


def states(modules: Iterable[nn.Module], optimizer: Any, ema: Any) -> dict[str, int]:
    """Bytes by what they are, after a step. DeepSpeed's optimizer updates copies of the weights."""
    inner, modules = optimizer.optimizer, list(modules)
    copies = getattr(inner, "single_partition_of_fp32_groups", getattr(inner, "fp32_partitioned_groups_flat", []))
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    wrappers = [module for module in modules if isinstance(module, DistributedDataParallel)]
    beside = [wrapper for wrapper in wrappers if not wrapper.gradient_as_bucket_view]  # else the gradients lie in them
    buckets = [wrapper._get_ddp_logging_data()["rebuilt_bucket_sizes"] for wrapper in beside]
    weights = [getattr(p, "ds_tensor", p) for module in modules for p in module.parameters()]
    return {
        "weights": held([*weights, *copies]),
        "moments": held([moment for moment in moments if moment.dim()]),
        "averages": held(list(ema.averages.values()) if ema is not None else []),
        "ddp_buckets": sum(int(size) for sizes in buckets for size in sizes.split(",")),
    }


def gradients_of(optimizer: Any) -> list[Tensor | None]:
    """The gradients that the optimizer is about to use: DeepSpeed has parts in separate tensors."""
    inner = optimizer.optimizer
    if hasattr(inner, "grad_partitions_flat_buffer"):  # ZeRO-3
        return [inner.grad_partitions_flat_buffer]
    if hasattr(inner, "averaged_gradients"):  # ZeRO-2
        return [part for parts in inner.averaged_gradients.values() for part in parts or ()]
    return [p.grad for group in optimizer.param_groups for p in group["params"]]


def memory_of(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the memory in which tensors lie, each piece once."""
    storages = [local(tensor.detach()).untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held(tensors: list[Tensor | None]) -> int:
    return sum(local(tensor.detach()).nbytes for tensor in tensors if tensor is not None)


class Messages(TorchDispatchMode):
    """Counts the bytes of the whole tensors that processes exchange inside the block, by kind of message."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function.__name__.replace("_", "")  # such as _allgather_base_ and allreduce_coalesced_
        kind = next((kind for kind in KINDS if name.startswith(kind.replace("_", ""))), None)
        if function.namespace == "c10d" and kind is not None:
            self.num_bytes[kind] = self.num_bytes.get(kind, 0) + max(map(_bytes_in, arguments))
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
