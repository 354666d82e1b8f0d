"""Options shared by tasks on a Stable Diffusion pipeline: base model, captions, objective, caches, validation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from trainers.base import BaseConfig, CacheKind, TrainerConfig
from trainers.common.autoencoder.latents import cache_problems, latents_problems
from trainers.common.text_to_image.base_model import base_model_problems, text_layers
from trainers.common.text_to_image.prompts import TextSettings, clip_skip_problem
from trainers.options import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat
from trainers.single_file.header import is_single_file

BIAS = ("timestep_bias_multiplier", "timestep_bias_portion", "timestep_bias_begin", "timestep_bias_end")

OF_DENOISING = (
    "prediction_type", "snr_gamma", "noise_offset", "input_perturbation", "rescale_betas_zero_snr",
    "dream_detail_preservation", "timestep_range", "timestep_bias_strategy",
)  # fmt: skip


@dataclass(kw_only=True)
class StableDiffusionConfig(TrainerConfig):
    """Options of the base model, the UNet's objective, the caches, and validation."""

    free_on_resume: ClassVar[tuple[str, ...]] = (
        *TrainerConfig.free_on_resume, "cache_latents", "cache_text", "validation_prompts", "negative_prompt",
        "sampler", "num_inference_steps", "guidance_scale", "guidance_rescale", "clip_score_model",
    )  # fmt: skip
    takes_buckets: ClassVar[bool] = True
    reads_captions: ClassVar[bool] = True
    training_only: ClassVar[tuple[str, ...]] = ("cache_latents", "cache_text", "clip_score_model")

    pretrained_model_name_or_path: str | None = None  # folder, .safetensors or hub name: Stable Diffusion 1, 2 or XL
    revision: str | None = None  # of the base model on the hub; null: the latest
    variant: str | None = None  # of its weight files, such as fp16; null: none
    vae: str | None = None  # another AutoencoderKL, such as one made for half precision; null: the base model's

    max_caption_tokens: Literal[75, 150, 225] = 75  # of a caption, read in chunks of 75; longer ones are cut
    clip_skip: Positive | None = None  # text encoder layers left out: 1 is kohya's and A1111's 2; null: none, XL's 2
    caption_dropout: Fraction = 0.0  # fraction of training examples whose caption is hidden, for guidance; 0.1 is usual
    prediction_type: Literal["epsilon", "v_prediction"] | None = None  # what the UNet predicts; null: the base model's
    snr_gamma: PositiveFloat | None = None  # min-SNR loss weights, 5 is usual; null: every timestep weighs 1
    loss_type: Literal["l2", "huber"] = "l2"  # huber: 2 c (sqrt(e^2 + c^2) - c), for data with outliers
    huber_c: PositiveFloat = 0.1  # c of huber
    noise_offset: NonNegativeFloat = 0.0  # size of a random shift of each channel's noise: darker, brighter pictures
    input_perturbation: NonNegativeFloat = 0.0  # further noise in the UNet's input, not in its target; 0.1 is usual
    rescale_betas_zero_snr: bool = False  # make the last timestep pure noise (arXiv 2305.08891); needs v_prediction
    dream_detail_preservation: PositiveFloat | None = None  # p of DREAM (arXiv 2312.00210), 1 is usual; null: off
    timestep_range: list[NonNegative] | None = None  # [low, high): training timesteps; null: all
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = "none"  # timesteps to draw more often
    timestep_bias_multiplier: PositiveFloat = 1.0  # how many times as often
    timestep_bias_portion: Fraction = 0.25  # of earlier or later: fraction of the timesteps at that end
    timestep_bias_begin: NonNegative = 0  # of range: the first timestep
    timestep_bias_end: Positive = 1000  # of range: the one after the last
    prior_loss_weight: NonNegativeFloat = 1.0  # weight of the loss on base.class_data_dir (prior preservation)

    cache_latents: CacheKind | None = None  # encode each picture once; null: at every step
    cache_text: CacheKind | None = None  # encode each caption once; null: at every step

    validation_prompts: list[str] | None = None  # texts to draw; null: captions, held-out first; []: none
    negative_prompt: str | None = None  # text that guidance moves away from; null: the empty text
    sampler: Literal["ddpm", "ddim", "dpmsolver++", "euler"] | None = None  # null: the base model's own
    num_inference_steps: Positive = 30  # steps of the sampler
    guidance_scale: NonNegativeFloat = 7.5  # 1: none
    guidance_rescale: Fraction = 0.0  # from 0 to 1: rescale guided predictions to the conditional one's std
    clip_score_model: str | None = None  # folder or hub name of a CLIP to score validation pictures; null: none

    def problems(self, base: BaseConfig) -> Iterator[tuple[str, str]]:
        yield from super().problems(base)
        for problem in base_model_problems(self.pretrained_model_name_or_path, self.parts_needed()):
            yield "pretrained_model_name_or_path", problem
        if self.vae is not None:
            yield from (("vae", problem) for problem in latents_problems(self.vae, has_base=True))
        if self.revision is not None and Path(self.pretrained_model_name_or_path or "").exists():
            yield "revision", "has an effect with a name on the hub only, and this is on disk"
        if self.variant is not None and is_single_file(self.pretrained_model_name_or_path or ""):
            yield "variant", "has an effect with folders and hub names only, and this is a single file"
        if skipped := clip_skip_problem(self.clip_skip, text_layers(self.pretrained_model_name_or_path)):
            yield "clip_skip", skipped
        yield from self._objective_problems()
        yield from self._timestep_problems()
        yield from self._cache_problems(base)
        if base.channels != 3:
            found = f"sees pictures with 3 channels, and base.channels is {base.channels}"
            yield "pretrained_model_name_or_path", found
        guided = ("guidance_rescale", "negative_prompt")
        yield from self.without_effect(guided, "a guidance_scale above 1", self.guidance_scale > 1)
        drawn = self.validation_prompts != []
        yield from self.without_effect(("clip_score_model",), "pictures, and validation_prompts is empty", drawn)
        with_prior = base.has_class_images
        yield from self.without_effect(("prior_loss_weight",), "base.class_data_dir", with_prior)

    @property
    def texts(self) -> TextSettings:
        return TextSettings(self.max_caption_tokens, self.clip_skip)

    def parts_needed(self) -> tuple[str, ...]:
        """Returns the folders that the base model must have."""
        return ("unet", *(("vae",) if self.vae is None else ()), "text_encoder", "tokenizer")

    def _objective_problems(self) -> Iterator[tuple[str, str]]:
        yield from self.without_effect(("huber_c",), "loss_type: huber", self.loss_type == "huber")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            yield "rescale_betas_zero_snr", "needs prediction_type: v_prediction; noise says nothing at SNR 0"
        if self.dream_detail_preservation is not None and self.prediction_type == "v_prediction":
            yield "dream_detail_preservation", "is defined for prediction_type: epsilon only"

    def _timestep_problems(self) -> Iterator[tuple[str, str]]:
        limits = self.timestep_range
        if limits is not None and not (len(limits) == 2 and limits[0] < limits[1]):
            yield "timestep_range", "must be [low, high] with 0 <= low < high"
        strategy = self.timestep_bias_strategy
        yield from self.without_effect(BIAS[:1], "a timestep_bias_strategy", strategy != "none")
        ends = strategy in ("earlier", "later")
        yield from self.without_effect(BIAS[1:2], "timestep_bias_strategy: earlier or later", ends)
        yield from self.without_effect(BIAS[2:], "timestep_bias_strategy: range", strategy == "range")
        if strategy == "range" and self.timestep_bias_begin >= self.timestep_bias_end:
            yield "timestep_bias_begin", f"must be below timestep_bias_end = {self.timestep_bias_end}"
        if strategy != "none" and self.timestep_bias_multiplier == 1.0:
            yield "timestep_bias_strategy", "has an effect with a timestep_bias_multiplier other than 1 only"

    def _cache_problems(self, base: BaseConfig) -> Iterator[tuple[str, str]]:
        """Yields caches whose entries would differ from one epoch to the next."""
        yield from cache_problems({"cache_latents": self.cache_latents, "cache_text": self.cache_text}, base)
        if self.cache_text is not None and base.shuffle_tags:
            yield "cache_text", "keeps one order of the tags: set base.shuffle_tags: false"

    def timestep_weights(self, low: int, high: int) -> list[float] | None:
        """Returns the relative frequency of each timestep in [low, high); None: uniform."""
        if self.timestep_bias_strategy == "none":
            return None
        biased = math.floor(self.timestep_bias_portion * (high - low))
        first, last = {
            "earlier": (low, low + biased),
            "later": (high - biased, high),
            "range": (self.timestep_bias_begin, self.timestep_bias_end),
        }[self.timestep_bias_strategy]
        return [self.timestep_bias_multiplier if first <= t < last else 1.0 for t in range(low, high)]
