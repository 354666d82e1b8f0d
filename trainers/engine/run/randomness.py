"""Random numbers without state: SplitMix64 of (seed, slot, draw, element), so that any split of a batch agrees."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    """Reinterprets an unsigned 64-bit integer as int64."""
    value &= MASK
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's shift of int64 keeps the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64 tensors, whose products wrap around."""
    x = (x ^ _shift_right(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    x = x.bitwise_xor_(_shift_right(x, 27)).mul_(_signed(0x94D049BB133111EB))
    return x.bitwise_xor_(_shift_right(x, 31))


def key_of(seed: int, *names: str | int) -> int:
    """Hashes a seed and names to a 63-bit key, the same in every process and version."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class SlotRandom:
    """Draws for the examples of one micro-batch; each depends on (seed, slot, name) alone.

    Integers have the same bits on every device; normals agree up to the last bits of a logarithm and a cosine.
    `stream` separates validation and sampling from training. Asking for a name twice raises ValueError.
    """

    def __init__(self, seed: int, slots: Tensor, stream: str = "train") -> None:
        self.seed = seed
        self.spread = slots * _signed(GOLDEN)  # [B] int64 on the device of the draws
        self.stream = stream
        self.asked: set[str] = set()

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal [B, *shape] float32 by Box-Muller; at most 6.7 standard deviations."""
        count = math.prod(shape)
        bits = self._bits(name, -(-count // 2))
        # 32 bits for each of the two uniforms; adding a half avoids log(0)
        radius = ((_shift_right(bits, 32).float() + 0.5) * 2.0**-32).log_().mul_(-2).clamp_(min=0).sqrt_()
        angle = (bits & 0xFFFFFFFF).float().mul_(2 * math.pi * 2.0**-32)
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return pairs[:, :count].reshape(-1, *shape)

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform [B, *shape] float32 in [0, 1), multiples of 2**-24."""
        bits = self._bits(name, math.prod(shape))
        return (_shift_right(bits, 40).float() * 2.0**-24).reshape(-1, *shape)

    def integers(self, name: str, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform [B, *shape] int64 in [0, high)."""
        return (_shift_right(self._bits(name, math.prod(shape)), 1) % high).reshape(-1, *shape)

    def bernoulli(self, name: str, p: float) -> Tensor:
        """[B] bool, True with probability p."""
        return self.uniform(name) < p

    def generators(self) -> list[torch.Generator]:
        """One CPU generator per example, so that the pictures do not depend on the device."""
        seeds = _shift_right(self._bits("generators", 1), 1).flatten().tolist()
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def _bits(self, name: str, count: int) -> Tensor:
        """[B, count] int64, uniform over all 64 bits."""
        if name in self.asked:
            raise ValueError(f"the draw {name!r} was asked for twice in one step; give every draw its own name")
        self.asked.add(name)
        example = mix(self.spread + _signed(key_of(self.seed, self.stream, name)))
        element = torch.arange(1, count + 1, device=example.device) * _signed(GOLDEN)
        return mix(mix(example)[:, None] + element[None, :])


def example_generator(seed: int, slot: int) -> torch.Generator:
    """Makes the generator for one example's augmentation."""
    return torch.Generator().manual_seed(key_of(seed, "augment", slot))


def seed_network(seed: int, step: int, micro_batch: int, device: torch.device) -> None:
    """Reseeds the generators of the CPU and the device, which dropout uses; `micro_batch` counts over all processes.

    torch.manual_seed would query every kind of device, which takes as long as the rest of the loop in a small step.
    """
    key = key_of(seed, "network", step, micro_batch)
    torch.default_generator.manual_seed(key)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(key)
