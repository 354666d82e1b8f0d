"""An exponential moving average of trained weights, in float32, as a function of the optimizer step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainers.base import TrainerConfig
from trainers.engine.distributed.sharding import Part, part_from, part_of, refresh, trained_parameters


def ema_decay(step: int, config: TrainerConfig) -> float:
    """The decay after a step, counted from 0, as of diffusers' EMAModel with use_ema_warmup."""
    if step <= 0:
        return 0.0
    return min(1 - (1 + step / config.ema_inv_gamma) ** -config.ema_power, config.ema_max_decay)


PIECE = 1 << 24  # numbers updated at once: their differences, or copies, need as much memory


def move(averages: list[Tensor], weights: list[Tensor], rate: Tensor) -> None:
    """averages += rate * (weights - averages) in a few kernels; CUDA's lerp would use one per tensor."""
    for some, towards in pieces(averages, weights):
        differences = torch._foreach_sub(towards, some)
        torch._foreach_mul_(differences, rate)
        torch._foreach_add_(some, differences)


def pieces(averages: list[Tensor], weights: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yields both lists in parts of at most PIECE numbers, or of one tensor."""
    first, numbers = 0, 0
    for end, average in enumerate(averages):
        if end > first and numbers + average.numel() > PIECE:
            yield averages[first:end], weights[first:end]
            first, numbers = end, 0
        numbers += average.numel()
    yield averages[first:], weights[first:]


class EMA:
    """Averages of several networks' trained parameters, or of their shards, by "network.parameter" name."""

    def __init__(self, networks: dict[str, nn.Module], config: TrainerConfig) -> None:
        self.config, self.networks = config, networks
        self.parameters = trained_parameters(networks)
        self.weights = [part_of(p).tensor for p in self.parameters.values()]  # the same memory
        device = "cpu" if config.offload_ema else None
        self.averages = {
            name: weight.to(device, copy=True) for name, weight in zip(self.parameters, self.weights, strict=True)
        }

    @torch.no_grad()
    def update(self, step: int, applied: Tensor) -> None:
        """Moves the averages towards the weights; `applied` is a 0-dim tensor, 0 if the step was skipped."""
        averages = list(self.averages.values())
        rate = applied * (1 - ema_decay(step, self.config))  # a tensor: the host does not know of a skipped step
        if averages[0].device.type != "cpu":
            move(averages, self.weights, rate)
            return
        on_host = rate.item()
        for some, towards in pieces(averages, self.weights):  # by offload_ema, or ZeRO-3 with weights in main memory
            torch._foreach_lerp_(some, [weight.to("cpu") for weight in towards], on_host)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the networks hold the averages instead of their weights."""
        own = [weight.clone() for weight in self.weights]
        try:
            self._copy_to_networks(self.averages.values())
            yield
        finally:
            self._copy_to_networks(own)

    def _copy_to_networks(self, values: Iterable[Tensor]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)
        refresh(self.networks)

    def load(self, values: dict[str, Tensor]) -> None:
        """Loads whole averages by name."""
        for name, average in self.averages.items():
            average.copy_(part_from(values[name], self.parameters[name]))

    def averages_of(self, network: str) -> dict[str, Part]:
        """Returns one network's averages by parameter name, divided like the parameters."""
        own = trained_parameters({network: self.networks[network]})
        return {name.removeprefix(f"{network}."): Part(self.averages[name], p) for name, p in own.items()}

    def settings(self, steps_done: int) -> dict[str, Any]:
        """Returns the entries that diffusers' EMAModel.save_pretrained adds to a network's config.json."""
        return {
            "decay": self.config.ema_max_decay,
            "min_decay": 0.0,
            "optimization_step": steps_done,
            "update_after_step": 0,
            "use_ema_warmup": True,
            "inv_gamma": self.config.ema_inv_gamma,
            "power": self.config.ema_power,
        }
