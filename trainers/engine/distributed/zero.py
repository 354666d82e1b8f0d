"""DeepSpeed's ZeRO-2 and ZeRO-3: a process's part of a parameter and of its optimizer state.

Weights stay float32 and bf16 is torch's autocast, as on the other engines, so parts of the network's weights are parts
of those that the optimizer updates. ZeRO-2 keeps whole weights and updates a part; ZeRO-3 keeps a part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Divided = Any  # a parameter with the attributes that DeepSpeed adds to it, which torch's type does not have


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 keeps a part of it in each process, as it does for frozen weights too."""
    return hasattr(parameter, "ds_tensor")


def is_divided(parameter: Tensor) -> bool:
    """Whether ZeRO-2 updates a part of it in each process; the part may be empty."""
    return hasattr(parameter, "_hp_mapping")


def holds_part(parameter: Tensor) -> bool:
    """Whether DeepSpeed divides its updates, and with ZeRO-3 the weight too."""
    return is_sharded(parameter) or is_divided(parameter)


def part_of(parameter: Divided) -> Tensor:
    """Returns this process's part, flat; shares its memory."""
    if is_sharded(parameter):
        return parameter.ds_tensor.detach()
    mapping = parameter._hp_mapping
    return parameter.detach().flatten()[:0] if mapping is None else mapping.lp_fragment.detach()


def whole_of(part: Tensor, parameter: Divided) -> Tensor:
    """Gathers something that is divided like the parameter. Collective."""
    part = part.to(parameter.device)  # collectives of GPUs take nothing from main memory
    if is_sharded(parameter):
        group = parameter.ds_process_group
        gathered = part.new_empty(part.numel() * dist.get_world_size(group))  # the last part is padded
        dist.all_gather_into_tensor(gathered, part.contiguous(), group=group)
        return gathered[: parameter.ds_numel].view(parameter.ds_shape)
    gathered = part.new_zeros(parameter.numel())
    if parameter._hp_mapping is not None:
        gathered[_place_in_weight(parameter)].copy_(part)
    dist.all_reduce(gathered, group=parameter._dp_group)
    return gathered.view(parameter.shape)


def part_from(whole: Tensor, parameter: Divided) -> Tensor:
    """Takes this process's part of a whole tensor, flat."""
    if is_sharded(parameter):
        size, rank = parameter.ds_tensor.numel(), dist.get_rank(parameter.ds_process_group)
        own = whole.flatten()[rank * size : (rank + 1) * size]
        return nn.functional.pad(own, (0, size - own.numel()))
    has_part = parameter._hp_mapping is not None
    return whole.flatten()[_place_in_weight(parameter) if has_part else slice(0)]


def _place_in_weight(parameter: Divided) -> slice:
    address = parameter._hp_mapping.lp_fragment_address
    return slice(address.start, address.start + address.numel)


def optimizer_of(networks: dict[str, nn.Module]) -> Any | None:
    """Returns DeepSpeed's optimizer of the one network that it trains; None on another engine."""
    return next((getattr(network, "zero_optimizer", None) for network in networks.values()), None)


@torch.no_grad()
def refresh(optimizer: Any, masters: bool = False) -> None:
    """Updates other processes' copies after `part_of` was written to, and with `masters` the optimizer's."""
    if hasattr(optimizer, "persistent_parameters"):
        optimizer.parameter_offload.partition_all_parameters()  # some stay whole after a forward pass
        if optimizer.persistent_parameters:  # small ones, which ZeRO-3 keeps whole in addition to their parts
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    else:
        from deepspeed.runtime.utils import all_gather_dp_groups

        all_gather_dp_groups(
            groups_flat=optimizer.bit16_groups_flat,
            partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )
    if masters:
        optimizer.refresh_fp32_params()


def optimizer_parts(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    """Returns this process's part of a parameter's state by key; single numbers are whole."""
    if not optimizer.state:
        return {}
    flat, place = _place_in_state(optimizer, parameter)
    state = optimizer.state[flat]
    return {key: value if value.ndim == 0 else value[place] for key, value in state.items()}


def _place_in_state(optimizer: Any, parameter: Divided) -> tuple[Tensor, slice]:
    """Returns the flat tensor that the optimizer updates, and the place of the parameter's part in it."""
    if is_sharded(parameter):
        group, start, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
        return optimizer.fp32_partitioned_groups_flat[group], slice(start, start + count)
    mapping = parameter._hp_mapping
    if mapping is None:
        return optimizer.single_partition_of_fp32_groups[0], slice(0, 0)
    address = mapping.hp_fragment_address
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    return flat, slice(address.start, address.start + address.numel)


@torch.no_grad()
def load_optimizer(optimizer: Any, saved: dict[nn.Parameter, dict[str, Tensor]]) -> None:
    """Loads whole state by parameter; parameters that DeepSpeed updates together share a step count."""
    for parameter, values in saved.items():
        flat, place = _place_in_state(optimizer, parameter)
        state = optimizer.state[flat]
        for key, value in values.items():
            if value.ndim == 0:
                state[key] = value.to(flat.device)
            else:
                state.setdefault(key, torch.zeros_like(flat))[place].copy_(part_from(value, parameter))
