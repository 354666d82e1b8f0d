"""What was launched: accelerate's processes, precision and accumulation, checked against the configuration."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration

from trainers.engine.options import BaseConfig

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
TRACKERS = {"tensorboard": ["tensorboard"], "wandb": ["wandb"], "both": ["tensorboard", "wandb"], "none": None}


def start_accelerator(base: BaseConfig) -> Accelerator:
    """Joins the processes that the launcher started.

    Raises ValueError where they are not connected, for an engine that is not supported, and where the device cannot run
    the precision.
    """
    if base.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("base.mixed_precision = fp16: needs a CUDA device and none is visible; use bf16 or no")
    accelerator = Accelerator(
        # the plugin, because the number alone would give way to the environment
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=base.gradient_accumulation_steps),
        mixed_precision=base.mixed_precision,
        log_with=TRACKERS[base.logger],
        project_config=ProjectConfiguration(
            project_dir=base.output_dir, logging_dir=os.path.join(base.output_dir, base.logging_dir)
        ),
    )
    if accelerator.distributed_type not in SUPPORTED:
        raise ValueError(
            f"the launcher chose {accelerator.distributed_type.value}: not supported yet; launch with DDP "
            "(accelerate launch --multi_gpu)"
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"WORLD_SIZE = {launched}: the launcher started these, {accelerator.num_processes} are connected, "
            "and each would write the same folder; on CPUs launch with ACCELERATE_USE_CPU=true torchrun"
        )
    return accelerator


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of frozen networks."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


@contextmanager
def numerics(base: BaseConfig) -> Iterator[None]:
    """Sets TF32 and deterministic kernels for the run, and puts back what was set before."""
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
