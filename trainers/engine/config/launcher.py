"""Values that a launcher says in the environment, such as `accelerate launch --mixed_precision`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast, get_args

from trainers.engine.config.base_options import BaseConfig, Precision


def resolve_launcher_values(base: BaseConfig, environment: Mapping[str, str]) -> Iterator[str]:
    """Replaces null by the launcher's values, whose defaults `no` and 1 count as unset; yields contradictions."""
    contradiction = "base.{0} = {1}: the launcher says {2} = {3}; make them equal, or set base.{0}=null".format
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in get_args(Precision):
        yield f"ACCELERATE_MIXED_PRECISION = {precision}: must be no, fp16 or bf16; change --mixed_precision"
    elif precision not in ("no", base.mixed_precision or precision):
        yield contradiction("mixed_precision", base.mixed_precision, "ACCELERATE_MIXED_PRECISION", precision)
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", str(base.gradient_accumulation_steps or steps)):
        variable = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
        yield contradiction("gradient_accumulation_steps", base.gradient_accumulation_steps, variable, steps)
    elif steps != "1" and base.global_batch_size is not None:
        launched = f"the launcher says ACCELERATE_GRADIENT_ACCUMULATION_STEPS = {steps}"
        yield f"base.global_batch_size = {base.global_batch_size}: {launched}; give one of them"
    base.mixed_precision = base.mixed_precision or cast(Precision, precision)
    if base.global_batch_size is None:
        base.gradient_accumulation_steps = base.gradient_accumulation_steps or int(steps)
