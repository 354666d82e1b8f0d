"""What a run asks of DeepSpeed, and what it does not do with it."""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn

from trainers.base import TrainerConfig
from trainers.engine.options import BaseConfig

DDP = "launch with DDP (accelerate launch --multi_gpu)"


def check_deepspeed(accelerator: Accelerator) -> None:
    """Raises ValueError for settings of the launcher that are not supported; networks are then built whole.

    accelerate would have transformers divide every network that it loads under ZeRO-3, frozen encoders too, which
    nothing gathers again.
    """
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    zero_settings = settings["zero_optimization"]
    stage = zero_settings.get("stage")
    if stage not in (2, 3):
        raise ValueError(f"zero_stage = {stage}: must be 2 or 3; without them {DDP}")
    for option in ("offload_optimizer", "offload_param"):
        device = zero_settings.get(option, {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise ValueError(f"{option}_device = {device}: must be none or cpu")
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise ValueError(f"DeepSpeed's configuration has a section {section}: the run's own is used; take it out")
    if accelerator.mixed_precision == "fp16":
        raise ValueError(f"base.mixed_precision = fp16: not supported with DeepSpeed; use bf16, or {DDP}")
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def configure_deepspeed(
    accelerator: Accelerator, networks: dict[str, nn.Module], config: TrainerConfig, base: BaseConfig
) -> None:
    """Tells DeepSpeed what the run's configuration says, before it prepares the network.

    Raises ValueError for what it cannot do, and where the launcher says something else.
    """
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    _refuse(networks, base)
    clipping, own = settings.get("gradient_clipping", "auto"), config.max_grad_norm or 0.0
    if clipping not in ("auto", own):
        raise ValueError(
            f"the launcher says gradient_clipping = {clipping}, and the run's max_grad_norm is "
            f"{config.max_grad_norm}: leave the launcher's out, or make them equal"
        )
    # without modules of lower precision weights are gathered and gradients summed in float32; bf16 would sum in bf16
    autocast = {"dtype": "bfloat16", "lower_precision_safe_modules": []}
    settings |= {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": base.train_batch_size,
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "gradient_clipping": own,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU as well, and needs no compiler
        "bf16": {"enabled": False},  # would make the weights bf16
        "torch_autocast": {"enabled": accelerator.mixed_precision == "bf16"} | autocast,
    }


def _refuse(networks: dict[str, nn.Module], base: BaseConfig) -> None:
    if len(networks) > 1:
        raise ValueError(
            f"DeepSpeed trains one network, and this run has {len(networks)} ({', '.join(networks)}); {DDP}, or train "
            "one of them"
        )
    if base.compile:
        raise ValueError(f"base.compile = true: not supported with DeepSpeed; set it to false, or {DDP}")
