"""Everything that training changes, which a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from datasets_lib.example import ImageData
from trainers.engine.optim.ema import EMA
from trainers.engine.optim.nonfinite import NonFiniteSteps
from trainers.engine.tracking.meters import Meter


@dataclass
class TrainState:
    """Everything that training changes: weights, averages, optimizer, open windows of metrics, place in the data."""

    networks: dict[str, nn.Module]  # without wrappers
    meta_networks: dict[str, nn.Module]  # without numbers, wrappers and shards: what an export fills
    optimizer: Optimizer
    ema: EMA | None
    meter: Meter
    nonfinite: NonFiniteSteps
    train_set: ImageData
