"""DeepSpeed: the settings that a run makes and refuses, and its way of preparing, backward and step."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from datasets_lib.errors import InputError
from trainers.base import Trainer, TrainerConfig
from trainers.engine.config.base_options import BaseConfig

DDP = "launch with DDP (accelerate launch --multi_gpu)"
# allowed in DeepSpeed's configuration file: bucket sizes, logging, and batches and precision equal to the run's
OPTIONS = frozenset(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
     "zero_optimization", "bf16", "fp16", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "comms_logger",
     "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
)  # fmt: skip
ZERO_OPTIONS = frozenset(
    ("stage", "offload_optimizer", "offload_param", "overlap_comm", "reduce_bucket_size", "allgather_bucket_size",
     "allgather_partitions", "reduce_scatter", "contiguous_gradients", "round_robin_gradients", "sub_group_size",
     "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size",
     "stage3_param_persistence_threshold", "stage3_gather_16bit_weights_on_model_save", "memory_efficient_linear")
)  # fmt: skip
OFFLOAD_OPTIONS = frozenset(("device", "nvme_path", "pin_memory"))


class Backward(DeepSpeedEngineWrapper):
    """accelerate's wrapper of the engine, without the optimizer step that it takes in the last backward."""

    def backward(self, loss: Tensor, sync_gradients: bool = True, **options: Any) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **options)


def in_use(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def prepare(
    accelerator: Accelerator, trainer: Trainer, networks: dict[str, nn.Module], optimizer: Optimizer
) -> tuple[list[nn.Module], AcceleratedOptimizer]:
    """Prepares the network and optimizer; raises ValueError as configure_deepspeed does."""
    configure_deepspeed(accelerator, networks, trainer.config, trainer.base)
    [network] = networks.values()
    engine, wrapped = accelerator.prepare(network, optimizer)
    accelerator.deepspeed_engine_wrapped = Backward(engine)
    network.zero_optimizer = wrapped.optimizer  # which zero.py asks for parts of the weights
    return [engine], wrapped


def step(accelerator: Accelerator, optimizer: AcceleratedOptimizer) -> tuple[Tensor, dict[str, Tensor]]:
    """Clips by the norm of all groups, and steps if it is finite; returns the same as optimizer_step."""
    engine, device = accelerator.deepspeed_engine_wrapped.engine, accelerator.device
    engine.step()
    norm = torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32, device=device)
    applied = torch.tensor(float(not optimizer.optimizer.overflow), device=device)  # known to the host already
    return applied, {f"grad_norm/{optimizer.param_groups[0]['name']}": norm}


def check_deepspeed(accelerator: Accelerator) -> None:
    """Raises ValueError for settings of the launcher that are not supported.

    Also stops transformers from dividing every network that it loads under ZeRO-3, including frozen encoders, which
    nothing would gather again.
    """
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    zero_settings = settings["zero_optimization"]
    stage = zero_settings.get("stage")
    if stage not in (2, 3):
        raise InputError(f"zero_stage = {stage!r}: must be 2 or 3; without them {DDP}")
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise InputError(f"DeepSpeed's configuration has a section {section}: the run's own is used; take it out")
    _refuse_unknown("", settings, OPTIONS)
    _refuse_unknown("zero_optimization.", zero_settings, ZERO_OPTIONS)
    for option in ("offload_optimizer", "offload_param"):
        offload = zero_settings.get(option) or {}
        if offload.get("device", "none") not in ("none", "cpu"):
            raise InputError(f"{option}_device = {offload['device']}: must be none or cpu")
        _refuse_unknown(f"zero_optimization.{option}.", offload, OFFLOAD_OPTIONS)
    if accelerator.mixed_precision == "fp16":
        raise InputError(f"base.mixed_precision = fp16: not supported with DeepSpeed; use bf16, or {DDP}")
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _refuse_unknown(section: str, settings: dict[str, Any], allowed: frozenset[str]) -> None:
    """Refuses other settings: some change the numbers, such as quantized or hierarchically divided weights."""
    unknown = sorted(settings.keys() - allowed)
    if unknown:
        raise InputError(
            f"DeepSpeed's configuration has {section}{unknown[0]}: not known to keep what a run promises; take it out. "
            f"Allowed there: {', '.join(sorted(allowed))}"
        )


def configure_deepspeed(
    accelerator: Accelerator, networks: dict[str, nn.Module], config: TrainerConfig, base: BaseConfig
) -> None:
    """Sets DeepSpeed's options from the run's configuration; raises ValueError for contradictions."""
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    _refuse(networks, base)
    if accelerator.mixed_precision != base.mixed_precision:
        raise InputError(
            f"DeepSpeed's configuration says {accelerator.mixed_precision}, and base.mixed_precision is "
            f"{base.mixed_precision}: take its sections bf16 and fp16 out, or make them equal"
        )
    steps, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
    own = {
        "train_batch_size": base.train_batch_size * steps * processes,
        "train_micro_batch_size_per_gpu": base.train_batch_size,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": config.max_grad_norm or 0.0,
    }
    for option, value in own.items():
        said = settings.get(option, "auto")
        if said not in ("auto", value) and (option, said) != ("gradient_accumulation_steps", 1):  # accelerate's default
            raise InputError(
                f"the launcher says {option} = {said}, and the run's configuration comes to {value}: leave the "
                "launcher's out, or make them equal"
            )
    # without modules of lower precision weights are gathered and gradients summed in float32; bf16 would sum in bf16
    autocast = {"dtype": "bfloat16", "lower_precision_safe_modules": []}
    settings |= own | {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW also runs on the CPU, and needs no compiler
        "bf16": {"enabled": False},  # would make the weights bf16
        "torch_autocast": {"enabled": base.mixed_precision == "bf16"} | autocast,
    }


def _refuse(networks: dict[str, nn.Module], base: BaseConfig) -> None:
    if len(networks) > 1:
        raise InputError(
            f"DeepSpeed trains one network, and this run has {len(networks)} ({', '.join(networks)}); {DDP}, or train "
            "one of them"
        )
    if base.compile:
        raise InputError(f"base.compile = true: not supported with DeepSpeed; set it to false, or {DDP}")
