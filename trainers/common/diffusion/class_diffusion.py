"""Base class of class-conditional diffusion tasks: label dropout, guidance, pictures by class, the pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainers.base import BaseConfig, CacheKind, Encoder, RandomSource
from trainers.common.autoencoder.latents import LatentSpace, cache_problems, latents_problems, vae_config
from trainers.common.autoencoder.options import latent_grid
from trainers.common.diffusion.classes import class_numbers, count_classes, labels_of
from trainers.common.diffusion.guidance import ClassifierGuidance, classifier_problems
from trainers.common.diffusion.objective import Predict
from trainers.common.diffusion.pixel_diffusion import PixelDiffusionConfig, PixelDiffusionTrainer
from trainers.common.model_files import Grid
from trainers.options import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat
from trainers.pretrained import read_model

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.base import DataSet
    from trainers.common.class_pipeline import Condition


@dataclass(kw_only=True)
class ClassDiffusionConfig(PixelDiffusionConfig):
    """Options for latents, classes and guidance."""

    free_on_resume: ClassVar[tuple[str, ...]] = (
        *PixelDiffusionConfig.free_on_resume, "guidance_scale", "guidance_rescale", "guidance_interval",
        "valid_classes", "classifier", "classifier_scale", "cache_latents",
    )  # fmt: skip
    training_only: ClassVar[tuple[str, ...]] = ("cache_latents",)

    vae: str | None = None  # finished vae run or hub name of an AutoencoderKL, whose latents are diffused; null: pixels
    cache_latents: CacheKind | None = None  # encode each picture once; null: at every step
    num_classes: Positive | None = None  # null: the number of classes that the data set names
    label_dropout: Fraction = 0.1  # fraction of training examples whose class is hidden
    guidance_scale: NonNegativeFloat = 1.0  # of validation pictures; 1: no guidance, 0: no class
    guidance_rescale: Fraction = 0.0  # from 0 to 1: rescale guided predictions to the conditional one's std
    guidance_interval: list[float] | None = None  # [low, high]: noise levels sigma with guidance; null: all
    classifier: str | None = None  # a finished noisy_classifier run, for classifier guidance; null: none
    classifier_scale: PositiveFloat = 1.0  # strength of classifier guidance, besides guidance_scale
    valid_classes: list[str | NonNegative] | None = None  # drawn in a column each, by name or number; null: all

    def problems(self, base: BaseConfig) -> Iterator[tuple[str, str]]:
        yield from super().problems(base)
        if self.vae is not None:
            yield from (("vae", problem) for problem in latents_problems(self.vae))
            yield from cache_problems({"cache_latents": self.cache_latents}, base)
            if self.classifier is not None:
                yield "classifier", "has seen noisy pixels, and cannot guide latents; leave it or vae null"
        yield from self.without_effect(("cache_latents",), "vae", self.vae is not None)
        if self.classifier is not None and self.is_flow:
            yield "classifier", "has seen another noise than a flow's; leave it null"
        interval = self.guidance_interval
        if interval is not None and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
            yield "guidance_interval", "must be [low, high] with 0 <= low < high"
        guided, guides = ("guidance_rescale", "guidance_interval"), self.guidance_scale not in (0.0, 1.0)
        yield from self.without_effect(guided, "a guidance_scale other than 0 and 1", guides)
        yield from self.without_effect(("classifier_scale",), "classifier", self.classifier is not None)
        if self.classifier is not None:
            yield from (("classifier", problem) for problem in classifier_problems(self.classifier, base))
        if self.valid_classes == []:
            yield "valid_classes", "must name at least one class, or be null"

    def seen(self, base: BaseConfig) -> Grid | None:
        if self.vae is None:
            return super().seen(base)
        settings = vae_config(self.vae)
        return None if settings is None else latent_grid(settings, base.resolution)


def usage_by_class(network: str, subfolder: str) -> str:
    """Returns the code that loads and samples a result; `network` is the class of what lies in the sub-folder."""
    return (
        "from diffusers import DiffusionPipeline\n"
        'pipeline = DiffusionPipeline.from_pretrained("{output_dir}", trust_remote_code=True)  # runs its pipeline.py\n'
        "images = pipeline([0, 1], {guidance_scale}, num_inference_steps={ddpm_num_inference_steps}).images\n"
        'images[0].save("sample.png")\n'
        "# for what runs no code of a model, the network alone: "
        f'{network}.from_pretrained("{{output_dir}}", subfolder="{subfolder}")'
    )


class ClassDiffusionTrainer(PixelDiffusionTrainer):
    """Trains a network conditioned on a class number, with one number past the last class for "no class"."""

    config: ClassDiffusionConfig
    pipeline_tag = "unconditional-image-generation"  # the nearest of the hub's words: without a prompt
    hub_tags = ("class-conditional-image-generation",)
    task: ClassVar[str]  # the section's name, for messages
    num_classes: int
    classifier: ClassifierGuidance | None = None

    def setup(self) -> None:
        config = self.config
        if config.vae is not None:
            place = f"{self.task}.vae", config.vae, self.base, self.device, self.weight_dtype, self.run.encoded_by
            self.latents = LatentSpace(*place, offloaded=config.cache_latents is not None)
        super().setup()
        self.num_classes = count_classes(self.task, self, config.num_classes)
        drawn, names = config.valid_classes or range(self.num_classes), self.run.label_names or []
        self.columns = class_numbers(f"{self.task}.valid_classes", drawn, names, self.num_classes)
        self.grid_columns = len(self.columns)
        if config.classifier is not None:
            self.classifier = ClassifierGuidance.load(
                config.classifier, config.classifier_scale, self.scheduler, self.num_classes, self.device
            )

    def encoders(self) -> dict[str, Encoder]:
        return {} if self.latents is None else {"latents": self.latents.encoder(self.config.cache_latents)}

    def predictor(self, batch: dict[str, Any], rng: RandomSource) -> Predict:
        """Hides some of the labels in training."""
        labels = labels_of(self.task, batch)
        if self.training:
            labels = labels.masked_fill(rng.bernoulli("label_dropout", self.config.label_dropout), self.num_classes)
        return lambda noisy, timesteps: self._network(noisy, timesteps, {"class_labels": labels})

    def _network(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        timesteps = timesteps.to(noisy.device).expand(len(noisy))  # a sampler gives one for all
        return self.modules[self.network_name](noisy, timesteps, **condition).sample

    def sample_requests(self, validation_set: DataSet | None) -> list[dict]:
        """Cycles through the classes: `valid_batch_size` pictures in all, but at least one of each class."""
        count = max(self.config.valid_batch_size, len(self.columns))
        return [{"label": self.columns[number % len(self.columns)]} for number in range(count)]

    def evaluation_requests(self, count: int, validation_set: DataSet | None = None) -> list[dict]:
        return [{"label": number % self.num_classes} for number in range(count)]

    def sample(self, requests: list[dict], rng: RandomSource) -> dict[str, Tensor]:
        import torch

        from trainers.common.class_pipeline import Guidance

        config = self.config
        labels = torch.tensor([request["label"] for request in requests], device=self.device)
        guidance = Guidance(config.guidance_scale, config.guidance_rescale, config.guidance_interval)
        asked, none = {"class_labels": labels}, {"class_labels": torch.full_like(labels, self.num_classes)}

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            prediction = guidance.predict(self._network, noisy, timestep, asked, none, self.sigma_of(timestep))
            if self.classifier is not None:
                prediction = self.classifier.guide(prediction, noisy, timestep, labels)
            return prediction

        return {"samples": self.draw(predict, rng)}

    def save_pipeline(self, output_dir: Path) -> None:
        from trainers.common.class_pipeline import ClassConditionalPipeline

        network = {self.network_name: self.raw(self.network_name)}
        id2label = dict(enumerate(self.run.label_names)) if self.run.label_names else None
        sampler = self.config.chosen_sampler
        pipeline = ClassConditionalPipeline(self.scheduler, **network, id2label=id2label, sampler=sampler)
        pipeline.save_pretrained(output_dir)
        if self.latents is not None:
            self.latents.copy_to(output_dir / "vae", kept=self.base.export_variant)
            pipeline.register_to_config(vae=("diffusers", "AutoencoderKL"))
            pipeline.save_config(output_dir)

    @classmethod
    def load_pipeline(cls, output_dir: str | Path) -> Any:
        from trainers.common.class_pipeline import ClassConditionalPipeline

        return read_model(ClassConditionalPipeline, output_dir)
