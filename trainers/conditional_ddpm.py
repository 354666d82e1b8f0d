"""Task `conditional_ddpm`: a class-conditional pixel-space diffusion model with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from trainers.base import Bounds, Fraction, NonNegativeFloat, Positive, RandomSource, Section
from trainers.common.guidance import Guidance, noise_level
from trainers.common.pixel_diffusion import PixelDiffusionConfig, PixelDiffusionTrainer

if TYPE_CHECKING:
    from torch import Tensor

ClassNumber = Annotated[int, Bounds(0)]


@dataclass(kw_only=True)
class ConditionalDDPMConfig(PixelDiffusionConfig):
    """Options of the section `conditional_ddpm`."""

    passive: ClassVar[tuple[str, ...]] = (
        *PixelDiffusionConfig.passive, "guidance_scale", "guidance_rescale", "guidance_interval", "valid_classes",
    )  # fmt: skip

    num_classes: Positive | None = None  # null: as many as the data set names
    label_dropout: Fraction = 0.1  # part of the examples whose class is hidden in training
    guidance_scale: NonNegativeFloat = 1.0  # of the pictures at validations; 1: conditional alone, 0: no class
    guidance_rescale: Fraction = 0.0  # how far guided predictions get the conditional one's standard deviation
    guidance_interval: list[float] | None = None  # [low, high] of the noise level sigma to guide in; null: all
    valid_classes: list[str | ClassNumber] | None = None  # one column each, by name or number; null: all classes

    def problems(self, base: Section) -> Iterator[tuple[str, str]]:
        yield from super().problems(base)
        interval = self.guidance_interval
        if interval is not None and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
            yield "guidance_interval", "must be [low, high] with 0 <= low < high"
        for option in ("guidance_rescale", "guidance_interval"):
            if getattr(self, option) and self.guidance_scale in (0.0, 1.0):
                yield option, "has an effect with a guidance_scale other than 0 and 1 only"
        if self.valid_classes == []:
            yield "valid_classes", "must name at least one class, or be null"


class ConditionalDDPMTrainer(PixelDiffusionTrainer):
    """Trains a UNet2DModel with an embedding per class and one for "no class"; the result draws classes by name."""

    Config = ConditionalDDPMConfig
    usage = (
        "from trainers.common.class_pipeline import ClassConditionalPipeline\n"
        'pipeline = ClassConditionalPipeline.from_pretrained("{output_dir}")\n'
        'pipeline([0, 1], guidance_scale={guidance_scale}).images[0].save("sample.png")'
    )

    def network_settings(self) -> dict[str, Any]:
        named, given = len(self.label_names or []), self.config.num_classes
        if named and given and named != given:
            raise ValueError(
                f"conditional_ddpm.num_classes = {given}: the data set names {named} classes; set it to null"
            )
        if not (named or given):
            raise ValueError("conditional_ddpm.num_classes = null: the data set names no classes; say how many it has")
        self.num_classes = given or named
        self.columns = self._class_numbers(self.config.valid_classes or list(range(self.num_classes)))
        self.grid_columns = len(self.columns)
        return {"num_class_embeds": self.num_classes + 1, "class_embed_type": None}

    def _class_numbers(self, classes: list[str | int]) -> list[int]:
        names = self.label_names or []
        for item in classes:
            if item not in names and item not in range(self.num_classes):
                allowed = f"0 to {self.num_classes - 1}" + (f", or {', '.join(names)}" if names else "")
                raise ValueError(f"conditional_ddpm.valid_classes: {item!r} is no class; allowed: {allowed}")
        return [names.index(item) if item in names else item for item in classes]

    def compute_loss(self, batch: dict[str, Any], rng: RandomSource, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        labels = self._labels(batch)
        if self.training:  # per example, so that a batch has both
            labels = labels.masked_fill(rng.bernoulli("label_dropout", self.config.label_dropout), self.num_classes)
        return self.objective.loss(self._asking(labels), batch["image"], rng).mean(), {}

    def validation_metrics(self, batch: dict[str, Any], rng: RandomSource) -> dict[str, Tensor]:
        return {"loss": self.objective.loss(self._asking(self._labels(batch)), batch["image"], rng)}

    def _labels(self, batch: dict[str, Any]) -> Tensor:
        if "label" not in batch:
            raise ValueError("conditional_ddpm needs labels, and the data set has none; give a folder per class")
        return batch["label"]

    def _asking(self, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda noisy, timesteps: self._network(noisy, timesteps, labels)

    def _network(self, noisy: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        return self.modules["unet"](noisy, timesteps, class_labels=labels).sample

    def sample_requests(self, validation_set: Any) -> list[dict]:
        """Rows of one picture per class, `valid_batch_size` in all but at least one row."""
        rows = max(1, self.config.valid_batch_size // len(self.columns))
        return [{"label": label} for _ in range(rows) for label in self.columns]

    def sample(self, requests: list[dict], rng: RandomSource) -> dict[str, Tensor]:
        import torch

        config = self.config
        labels = torch.tensor([request["label"] for request in requests], device=self.device)
        interval = tuple(config.guidance_interval) if config.guidance_interval else None
        guidance = Guidance(config.guidance_scale, config.guidance_rescale, interval)

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            sigma = noise_level(self.scheduler.alphas_cumprod, timestep)
            return guidance.predict(self._network, noisy, timestep, labels, self.num_classes, sigma)

        return {"samples": self.draw(predict, rng)}

    def save_pipeline(self, output_dir: Path) -> None:
        from trainers.common.class_pipeline import ClassConditionalPipeline

        pipeline = ClassConditionalPipeline(self.raw("unet"), self.scheduler, self.label_names, self.config.sampler)
        pipeline.save_pretrained(output_dir)

    @classmethod
    def load_pipeline(cls, output_dir: str | Path) -> Any:
        from trainers.common.class_pipeline import ClassConditionalPipeline

        return ClassConditionalPipeline.from_pretrained(output_dir)
