"""Counts what a network's passes take on meta tensors, which have a shape and no numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from torch import Size, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from trainers.engine.distributed.fsdp import shard_by_blocks

Storages = dict[int, torch.UntypedStorage]  # by identity
Inputs = Callable[[int], dict[str, Tensor]]  # of a batch of so many examples
Precision = Literal["no", "autocast", "bf16"]  # autocast: float32 weights, as DDP has them; bf16: all, as in FSDP2
FLOAT_32 = (nn.functional.group_norm, nn.functional.layer_norm)


class Passes(NamedTuple):
    """FLOPs and bytes of an example; `copies` are bytes that any batch needs, such as weights in half precision."""

    forward_flops: int
    backward_flops: int
    again_flops: int  # of the forward passes that gradient checkpointing does once more
    kept: int  # between the passes
    outside: int  # of it with gradient checkpointing: what is not in a block, and the blocks' inputs
    block: int  # in the backward pass with it: what the block that needs the most keeps
    copies: int


class Network(NamedTuple):
    """Shapes of weights by the units that FSDP2 gathers at once, first what is in no block; passes by precision."""

    units: list[list[Size]]
    layers: int  # modules that have weights themselves, which ZeRO-3 gathers one by one
    passes: dict[Precision, Passes]

    @property
    def parameters(self) -> int:
        return sum(shape.numel() for unit in self.units for shape in unit)


class NormsInFloat32(TorchFunctionMode):
    """Imitates what CUDA's autocast does to norms, which a CPU's does not."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if function in FLOAT_32:
            arguments, options = torch.utils._pytree.tree_map_only(Tensor, Tensor.float, (arguments, options))
        return function(*arguments, **options)


def zeros(**shapes: tuple[int, ...]) -> Inputs:
    """Batches of zeros of these shapes by name, and of timesteps; () is a whole number."""
    return lambda size: {
        name: torch.zeros(size, *shape, dtype=torch.float32 if shape else torch.long)
        for name, shape in (shapes | {"timestep": ()}).items()
    }


def count(build: Callable[[], nn.Module], inputs: Inputs, precisions: tuple[Precision, ...], cuda: bool) -> Network:
    """Builds the network for each precision without memory, and counts its passes as on CUDA or as on a CPU."""
    found = {}
    with FakeTensorMode():
        for precision in precisions:
            network = _built(build, torch.bfloat16 if precision == "bf16" else torch.float32)
            found[precision] = passes_of(network, inputs, precision, cuda)
    layers = sum(any(True for _ in module.parameters(recurse=False)) for module in network.modules())
    return Network(units_of(network), layers, found)


def _built(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build().train()
    finally:
        torch.set_default_dtype(usual)


def units_of(network: nn.Module) -> list[list[Size]]:
    """As FSDP2 gathers them in this project: shapes of what is in no block, then of each block without inner ones."""
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None, mixed_precision_policy=None)
    shard_by_blocks(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), {"network": network})
    units: dict[str, list[Size]] = {"": []}
    for name, module in network.named_modules():
        if type(module).__name__ in plugin.transformer_cls_names_to_wrap:
            units[f"{name}."] = []
    for name, parameter in network.named_parameters():
        units[max((unit for unit in units if name.startswith(unit)), key=len)].append(parameter.shape)
    return [units.pop(""), *filter(None, units.values())]


def passes_of(network: nn.Module, inputs: Inputs, precision: Precision, cuda: bool = False) -> Passes:
    """Returns the cost that a third example adds to two, and that of any batch."""
    two, three = (_pass(network, inputs(size), precision, cuda) for size in (2, 3))
    example = [b - a for a, b in zip(two, three, strict=True)]
    return Passes._make([*example, two[3] - 2 * example[3]])


def _pass(network: Any, batch: dict[str, Tensor], precision: Precision, cuda: bool) -> tuple[int, ...]:
    """The counts of `Passes` for this batch; each block that can be checkpointed is watched by itself."""
    rest: Storages = {}
    inputs: Storages = {}
    blocks: list[Storages] = []
    again = 0

    def block(module: nn.Module, *arguments: Any) -> Any:
        nonlocal again
        inputs.update(storages([each for each in arguments if isinstance(each, Tensor)]))
        before = flops.get_total_flops()
        with saving(network, {}) as own:
            result = module(*arguments)
        blocks.append(own)
        again += flops.get_total_flops() - before
        return result

    network.enable_gradient_checkpointing(block)
    if precision == "bf16":
        batch = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}
    with FlopCounterMode(display=False) as flops:
        with ExitStack() as contexts:
            if precision == "autocast":
                contexts.enter_context(torch.autocast("cpu", torch.bfloat16))
            contexts.enter_context(NormsInFloat32() if cuda and precision == "autocast" else nullcontext())
            contexts.enter_context(saving(network, rest))
            predicted = _called(network, batch)
        forward = flops.get_total_flops()
        predicted.float().square().mean().backward()
    network.zero_grad()
    kept = rest | {key: value for own in blocks for key, value in own.items()}
    outside = rest | inputs
    most = max((bytes_of({key: own[key] for key in own.keys() - outside.keys()}) for own in blocks), default=0)
    return forward, flops.get_total_flops() - forward, again, bytes_of(kept), bytes_of(outside), most


def _called(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    sdxl = {name: batch[name] for name in ("text_embeds", "time_ids") if name in batch}
    rest = {name: value for name, value in batch.items() if name not in sdxl}
    return network(**rest, **({"added_cond_kwargs": sdxl} if sdxl else {})).sample


@contextmanager
def saving(network: nn.Module, found: Storages) -> Iterator[Storages]:
    """Collects what autograd keeps inside, without the network's weights."""
    weights = storages(list(network.parameters()))

    def keep(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):  # whose numbers ZeRO-3 takes away again
            return tensor
        found.update(storages([tensor]))
        return tensor.detach()  # the tensor itself would keep the node that it comes from

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found
    for key in weights.keys() & found.keys():
        del found[key]


def storages(tensors: list[Tensor]) -> Storages:
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}


def bytes_of(storages: Storages) -> int:
    return sum(storage.nbytes() for storage in storages.values())
