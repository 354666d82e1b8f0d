"""What a run leaves on the table, measured where it runs."""

from __future__ import annotations

import functools
import time

import torch
from accelerate import Accelerator

from trainers.engine.config.base_options import BaseConfig

WORTH_SAYING = 1.3  # times faster: below that, another process may have made the difference
# of the convolution that is timed, by kind of device: a few milliseconds each, and a GPU must have enough to do
SHAPES = {"cpu": (4, 128, 16, 16), "cuda": (16, 256, 64, 64)}
ROUNDS = 5


def precision_note(accelerator: Accelerator, base: BaseConfig) -> list[str]:
    """One line on how much faster bfloat16 is than the run's float32, where it is."""
    if base.mixed_precision != "no" or not accelerator.is_main_process:
        return []
    ratio = bf16_speedup(accelerator.device)
    line = f"a convolution in bf16 is {ratio:.1f} times faster here than in float32: base.mixed_precision=bf16"
    return [line] if ratio >= WORTH_SAYING else []


@functools.cache
def bf16_speedup(device: torch.device) -> float:
    """How many times faster a convolution and its gradients are in bfloat16 than in float32; 0 where it has none.

    They are timed in turns and the fastest of each counts, as other processes only ever slow one down.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return 0.0
    shape = SHAPES.get(device.type, SHAPES["cpu"])
    images = torch.full(shape, 0.5, device=device)  # nothing random is drawn
    weight = torch.full((shape[1], shape[1], 3, 3), 0.01, device=device)
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(ROUNDS):
        for dtype, times in seconds.items():
            times.append(_seconds(images.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()))
    return min(seconds[torch.float32]) / min(seconds[torch.bfloat16])


def _seconds(images: torch.Tensor, weight: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.nn.functional.conv2d(images, weight, padding=1).sum().backward()
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - began
