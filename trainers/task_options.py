"""The options that every task has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from trainers.engine.config.base_options import BaseConfig
from trainers.options import Bounds, Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section


@dataclass(kw_only=True)
class TrainerConfig(Section):
    """Optimizer, learning rate, and averaging of the weights."""

    free_on_resume: ClassVar[tuple[str, ...]] = ("valid_batch_size", "offload_ema")
    replaced: ClassVar[dict[str, dict[Any, tuple[str, Any]]]] = {
        "use_8bit_adam": {False: ("optimizer", "adamw"), True: ("optimizer", "adamw_8bit")}
    }
    training_only: ClassVar[tuple[str, ...]] = ()  # of no use after training: ignored when a run is loaded
    initial_weights: ClassVar[tuple[str, ...]] = ("pretrained_model_name_or_path",)  # ignored if all weights are saved
    export_is_base_model: ClassVar[bool] = False  # whether a finished run is a valid pretrained_model_name_or_path
    reads_captions: ClassVar[bool] = False  # whether captions and class images are used
    exports_networks: ClassVar[bool] = True  # whether a finished run holds whole networks
    takes_buckets: ClassVar[bool] = False  # whether height and width may differ between batches

    learning_rate: PositiveFloat | dict[str, float] = 1e-4  # peak of the schedule; a dict: one rate per network
    scale_lr: bool = False  # multiply the learning rate by the global batch size
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr", "cosine_with_restarts",
        "polynomial", "one_cycle", "warmup_cosine",
    ] = "cosine"  # shape of the learning rate over the optimizer steps  # fmt: skip
    lr_warmup_steps: NonNegative | None = None  # steps; null: 30 % (one_cycle), 15 % (warmup_cosine), else 500 or 10 %
    lr_min_ratio: Fraction = 0.1  # floor of cosine_with_min_lr, as a fraction of learning_rate
    lr_num_cycles: Positive = 1  # cycles of cosine_with_restarts
    lr_power: PositiveFloat = 1.0  # exponent of polynomial
    optimizer: str = "adamw"  # a name in OPTIMIZERS, such as adamw_8bit: on CUDA, with the extra bitsandbytes
    adam_beta1: Annotated[float, Bounds(0, 0.999999)] = 0.9  # decay of the gradient's moving average
    adam_beta2: Annotated[float, Bounds(0, 0.9999999)] = 0.999  # decay of the squared gradient's moving average
    adam_weight_decay: NonNegativeFloat = 1e-2  # decoupled weight decay, as in AdamW
    adam_epsilon: PositiveFloat = 1e-8  # added to the denominator of the update
    max_grad_norm: PositiveFloat | None = 1.0  # clip each network's gradient to this norm; null: no clipping
    use_ema: bool = True  # average the weights; validation shows both, the finished pipeline holds the average
    ema_max_decay: Fraction = 0.9999  # upper limit of the average's decay
    ema_inv_gamma: PositiveFloat = 1.0  # decay at step s is 1 - (1 + s / ema_inv_gamma) ** -ema_power
    ema_power: PositiveFloat = 0.75  # see ema_inv_gamma
    offload_ema: bool = False  # keep the averages in main memory: slower, saves device memory
    valid_batch_size: Positive = 16  # pictures drawn at each validation, over all processes

    def problems(self, base: BaseConfig) -> Iterator[tuple[str, str]]:
        """Yields (option, problem and remedy) for values and combinations that the types cannot rule out."""
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            yield "lr_warmup_steps", "has no effect with lr_scheduler: constant; use constant_with_warmup, or null"
        for option, schedule in (
            ("lr_min_ratio", "cosine_with_min_lr"),
            ("lr_num_cycles", "cosine_with_restarts"),
            ("lr_power", "polynomial"),
        ):
            yield from self.without_effect((option,), f"lr_scheduler: {schedule}", self.lr_scheduler == schedule)
        averaging = ("ema_max_decay", "ema_inv_gamma", "ema_power", "offload_ema")
        yield from self.without_effect(averaging, "use_ema: true", self.use_ema)
        if isinstance(self.learning_rate, dict) and any(rate <= 0 for rate in self.learning_rate.values()):
            yield "learning_rate", "every rate must be above 0"
