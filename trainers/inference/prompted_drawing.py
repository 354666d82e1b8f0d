"""Draws prompts with diffusers' pipelines: LoRAs at several scales, clip skip, inpainting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from datasets_lib.errors import InputError
from trainers.base import Fraction, NonNegativeFloat, Positive, RandomSource, Section
from trainers.common.autoencoder.latents import decode
from trainers.common.diffusion.consistency import lcm_scheduler
from trainers.common.diffusion.sampling import build_sampler, trained_with
from trainers.common.lora.files import ddim_timesteps
from trainers.common.text_to_image.prompts import TextSettings, clip_skip_problem
from trainers.inference.lora_pipeline import check_finite, check_negative_prompt, check_strength, weigh_loras
from trainers.inference.text_embedding import prompt_arguments

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

Sampler = Literal["ddpm", "ddim", "dpmsolver++", "euler", "lcm"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
DDIM_TIMESTEPS = 50  # of the teacher of the published LCM-LoRAs
WHITE = 128  # of 255: pixels of a mask that are at least this are redrawn


@dataclass(frozen=True)
class Inpainting:
    """A picture (RGB) to redraw wherever a mask (L) of its size is white."""

    image: Image.Image
    mask: Image.Image
    strength: float  # in (0, 1]: fraction of the sampler's steps; 1 starts from pure noise

    def __post_init__(self) -> None:
        if self.image.size != self.mask.size:
            (width, height), (w, h) = self.image.size, self.mask.size
            raise InputError(f"--mask: has {w} x {h} pixels, and --image {width} x {height}; give one of the same size")
        if pil_to_tensor(self.mask).max() < WHITE:
            raise InputError("--mask: nothing in it is white, so nothing would be drawn")

    def composed(self, drawn: Tensor) -> Tensor:
        """Pastes drawn pictures [N, 3, H, W], resized, into the original wherever the mask is white."""
        width, height = self.image.size
        if drawn.shape[2:] != (height, width):
            drawn = nn.functional.interpolate(drawn, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        return torch.where(pil_to_tensor(self.mask) >= WHITE, drawn, pil_to_tensor(self.image) / 255)


@dataclass(kw_only=True)
class PromptSettings(Section):
    """Sampling settings; a guidance_scale of at most 1 means no guidance, as in diffusers."""

    size: tuple[int, int] | None = None  # height and width in pixels; None: the UNet's sample size
    sampler: Sampler | None = None  # None: the pipeline's own
    num_inference_steps: Positive = 30
    guidance_scale: NonNegativeFloat = 7.5
    guidance_rescale: Fraction = 0.0
    negative_prompt: str | None = None
    clip_skip: int | None = None  # last layers of the text encoders to leave out
    max_caption_tokens: int | None = None  # what a run or LoRA was trained with; None: diffusers embeds the prompts
    lora_scales: list[float] | None = None  # draw each picture with the LoRAs' weights times each of these

    @property
    def texts(self) -> TextSettings | None:
        """How prompts are embedded; None: as diffusers does, which applies clip_skip to no negative prompt."""
        return None if self.max_caption_tokens is None else TextSettings(self.max_caption_tokens, self.clip_skip)


class PromptedPipeline:
    """Draws with `sample(requests, rng)` like a Trainer; a picture depends only on its request and generator.

    `loras` are the weights of the pipeline's adapters by name, `plain_sampler` is the sampler where all of them are 0,
    if it is another: LoRAs can change what the UNet predicts.
    """

    draws_held_out, grid_columns, sample_batch_size = False, None, 4  # as in a Trainer
    frames: list[Tensor] | None = None  # if a list, gets the pictures [N, 3, H, W] after every step
    progress: Callable[[Iterable], Iterable] = staticmethod(iter)  # the pipeline shows its own
    training = False
    modules: dict[str, Any]  # networks by name

    def __init__(
        self,
        pipeline: Any,
        loras: dict[str, float],
        settings: PromptSettings,
        inpainting: Inpainting | None = None,
        plain_sampler: SchedulerMixin | None = None,
    ) -> None:
        from diffusers import AutoPipelineForInpainting

        self.loras, self.settings, self.inpainting = loras, settings, inpainting
        self.pipeline = AutoPipelineForInpainting.from_pipe(pipeline) if inpainting else pipeline
        self.samplers = {True: pipeline.scheduler, False: plain_sampler or pipeline.scheduler}  # with LoRAs, without
        self.modules = {n: part for n, part in pipeline.components.items() if isinstance(part, nn.Module)}
        self.pipeline.set_progress_bar_config(desc="sampling", leave=False)
        self.pipeline.vae.enable_slicing()  # decoding needs more memory than all the rest
        self._check()

    @property
    def device(self) -> torch.device:
        return self.pipeline.device

    def _check(self) -> None:
        settings, pipeline = self.settings, self.pipeline
        if settings.lora_scales is not None and not self.loras:
            raise InputError("--lora-scales: there is no LoRA; give one with --lora, or a run of task lora")
        columns = [self.column(scale) for scale in settings.lora_scales or []]
        if columns and (len(set(columns)) < len(columns) or not any(self.loras.values())):
            shown = ", ".join(columns)
            raise InputError(f"--lora-scales: {shown}: the columns are alike; give weights and scales that differ")
        check_negative_prompt(settings.negative_prompt, settings.guidance_scale)
        if settings.guidance_rescale and settings.guidance_scale <= 1:
            found = f"has no effect with guidance {settings.guidance_scale:g}"
            raise InputError(f"--guidance-rescale {settings.guidance_rescale:g}: {found}; give --guidance above 1")
        if settings.clip_skip is not None:
            self._skip_layers(settings.clip_skip)
        if self.inpainting is None and pipeline.unet.config.in_channels == 9:
            raise InputError("the pipeline is for inpainting; give --image and --mask")
        if self.inpainting is not None:
            check_strength(self.inpainting.strength, settings.num_inference_steps)
            if settings.guidance_rescale and "XL" not in type(pipeline).__name__:
                raise InputError("--guidance-rescale: diffusers' inpainting has it for SDXL only; set 0")

    def _skip_layers(self, skipped: int) -> None:
        """Prepares the text encoders for clip_skip; ValueError if they have too few layers."""
        encoders = [part for name, part in self.modules.items() if name.startswith("text_encoder")]
        if problem := clip_skip_problem(skipped, [encoder.config.num_hidden_layers for encoder in encoders]):
            raise InputError(f"--clip-skip {skipped}: {problem}")
        for encoder in encoders:
            if not hasattr(encoder, "text_model"):  # diffusers reads it, and transformers 5 lacks it
                object.__setattr__(encoder, "text_model", encoder)  # as a module it would contain itself

    def column(self, scale: float) -> str:
        """Names the column of a scale: by the weight of a single LoRA, or by the scale of several."""
        weights = list(self.loras.values())
        return f"weight {weights[0] * scale + 0.0:g}" if len(weights) == 1 else f"scale {scale:g}"  # + 0.0: never -0

    def sample(self, requests: list[dict], rng: RandomSource) -> dict[str, Tensor]:
        """Draws pictures [N, 3, H, W] in [0, 1] by column: "samples", or one for each LoRA scale."""
        scales, generators = self.settings.lora_scales, rng.generators()
        found = {}
        for scale in scales or [1.0]:
            weights = {name: weight * scale for name, weight in self.loras.items()}
            weigh_loras(self.pipeline, weights)
            self.pipeline.scheduler = self.samplers[any(weights.values())]
            same_noise = [generator.clone_state() for generator in generators]
            found["samples" if scales is None else self.column(scale)] = self._draw(requests, same_noise)
        return found

    def _draw(self, requests: list[dict], generators: list[torch.Generator]) -> Tensor:
        settings, count = self.settings, len(requests)
        asked = {name: getattr(settings, name) for name in ("num_inference_steps", "guidance_scale", "clip_skip")}
        asked |= {"guidance_rescale": settings.guidance_rescale} if settings.guidance_rescale else {}
        prompts, guided = [request["prompt"] for request in requests], settings.guidance_scale > 1
        asked |= prompt_arguments(self.pipeline, prompts, settings.negative_prompt, guided, settings.texts)
        asked |= dict(zip(("height", "width"), self._size(), strict=True))
        if self.inpainting is not None:  # one copy each, or the first generator would encode for all
            asked |= {"image": [self.inpainting.image] * count, "mask_image": [self.inpainting.mask] * count}
            asked["strength"] = self.inpainting.strength
        asked |= {"generator": generators, "callback_on_step_end": self._keep_frame}
        return self._finished(self.pipeline(**asked, output_type="pt").images)

    def _size(self) -> tuple[int, int]:
        """Height and width in pixels, multiples of the pixels per latent."""
        factor, unet = self.pipeline.vae_scale_factor, self.pipeline.unet
        if self.inpainting is not None:
            return tuple(max(factor, round(side / factor) * factor) for side in self.inpainting.image.size[::-1])
        return self.settings.size or (unet.config.sample_size * factor,) * 2

    def _finished(self, images: Tensor) -> Tensor:
        images = images.float().cpu()
        check_finite(images)
        return images if self.inpainting is None else self.inpainting.composed(images)

    def _keep_frame(self, pipeline: Any, step: int, timestep: Tensor, known: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.frames is not None:
            images = decode(pipeline.vae, known["latents"])
            self.frames.append(self._finished(pipeline.image_processor.postprocess(images, "pt")))
        return known


def named_sampler(name: str, scheduler: SchedulerMixin, loras: Iterable[Path] = ()) -> SchedulerMixin:
    """Builds the sampler ddpm, ddim, dpmsolver++, euler or lcm, with the noise of a pipeline's scheduler.

    lcm takes its number of DDIM timesteps from the header of one of the LoRA files, or else 50.
    """
    noise = trained_with(scheduler)
    if name == "lcm" and noise.config.get("beta_schedule"):
        said = [ddim_timesteps(path) for path in loras]
        return lcm_scheduler(noise, next(filter(None, said), DDIM_TIMESTEPS))
    return for_pipelines(build_sampler(name, noise))


def for_pipelines(sampler: SchedulerMixin) -> SchedulerMixin:
    """Adds the members that Stable Diffusion's pipelines need and the Euler sampler of flows lacks."""
    if not hasattr(sampler, "init_noise_sigma"):
        sampler.init_noise_sigma = 1.0
        sampler.scale_model_input = lambda sample, timestep: sample
        sampler.add_noise = lambda sample, noise, timesteps: sampler.scale_noise(sample, timesteps, noise)
    return sampler
