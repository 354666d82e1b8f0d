"""Joins the launched processes, and checks them, precision and accumulation against the configuration."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)

from datasets_lib.errors import InputError
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.distributed import backends


def start_accelerator(base: BaseConfig) -> Accelerator:
    """Joins the launched processes; raises ValueError for what they, or their devices, do not support."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    backends.check_devices()
    if base.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError("base.mixed_precision = fp16: needs a CUDA device and none is visible; use bf16 or no")
    # otherwise accelerate's choice, which has none for DeepSpeed without GPUs
    on_cpu = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and not torch.cuda.is_available()
    accelerator = Accelerator(
        # the plugin, because the number alone would give way to the environment
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation_steps(base, launched)),
        mixed_precision=base.mixed_precision,
        kwargs_handlers=[
            InitProcessGroupKwargs("gloo" if on_cpu else None, timeout=timedelta(seconds=base.collective_timeout)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # else there are two of each gradient
        ],
    )
    backends.check_engine(accelerator)
    if launched != accelerator.num_processes:
        raise InputError(
            f"WORLD_SIZE = {launched}: the launcher started these, {accelerator.num_processes} are connected, "
            "and each would write the same folder; on CPUs launch with ACCELERATE_USE_CPU=true torchrun"
        )
    return accelerator


def accumulation_steps(base: BaseConfig, num_processes: int) -> int:
    """Micro-batches per optimizer step; raises ValueError if `global_batch_size` is not divisible."""
    if base.global_batch_size is None:
        return base.gradient_accumulation_steps or 1
    at_once = base.train_batch_size * num_processes
    steps, left = divmod(base.global_batch_size, at_once)
    if left:
        raise InputError(
            f"base.global_batch_size = {base.global_batch_size}: must be a multiple of {at_once} = "
            f"{base.train_batch_size} (train_batch_size) x {num_processes} processes"
        )
    return steps


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


@contextmanager
def numerics(base: BaseConfig) -> Iterator[None]:
    """Sets TF32 and deterministic kernels inside the block."""
    before = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        torch.set_float32_matmul_precision("high" if base.allow_tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = base.allow_tf32
        if base.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's libraries start
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        torch.use_deterministic_algorithms(was_deterministic)
