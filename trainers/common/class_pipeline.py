"""A pipeline for class-conditional UNets and transformers of pixels or latents, which diffusers lacks."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from datasets_lib.errors import InputError
from trainers.common.autoencoder.latents import decode
from trainers.common.diffusion.classes import class_numbers
from trainers.common.diffusion.guidance import Condition, Guidance, noise_levels
from trainers.common.diffusion.sampling import build_sampler, denoise


class ClassConditionalPipeline(DiffusionPipeline):
    """Draws pictures of classes by name or number.

    The network is a `unet` or a `transformer` with one embedding per class and a last one for "no class". A `vae`
    decodes if the network draws latents. `sampler` is a name that build_sampler knows; `id2label` names the classes,
    or is None: a dict, because diffusers takes lists for components. Read from a file, its keys are texts.
    """

    _optional_components = ["unet", "transformer", "vae"]  # noqa: RUF012  # as diffusers declares it

    def __init__(
        self,
        scheduler: object,
        unet: UNet2DModel | None = None,
        transformer: DiTTransformer2DModel | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        sampler: str = "ddpm",
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label, sampler=sampler)

    @property
    def network(self) -> UNet2DModel | DiTTransformer2DModel:
        return self.transformer if self.unet is None else self.unet

    @property
    def num_classes(self) -> int:
        config = self.network.config
        return config.num_embeds_ada_norm if self.unet is None else config.num_class_embeds - 1

    @property
    def label_names(self) -> list[str]:
        """The names in the order of their numbers; empty without names."""
        names = {int(number): name for number, name in (self.config.id2label or {}).items()}  # JSON's keys are strings
        return [names[number] for number in sorted(names)]

    @torch.no_grad()
    def __call__(
        self,
        classes: list[str | int] | str | int,
        guidance_scale: float | Guidance = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        sampler: str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draws one picture per class. `output_type` is pil, np or pt.

        `guidance_scale` may be a Guidance, which adds a rescale and an interval of noise levels.
        """
        asked_for = classes if isinstance(classes, list) else [classes]
        if not asked_for:
            raise InputError("classes = []: name at least one class")
        numbers = class_numbers("classes", asked_for, self.label_names, self.num_classes)
        labels = torch.tensor(numbers, device=self._execution_device)
        size, channels = self.network.config.sample_size, self.network.config.in_channels
        size = (size, size) if isinstance(size, int) else tuple(size)
        noise = randn_tensor((len(labels), channels, *size), generator=generator, device=self._execution_device)
        scheduler = build_sampler(sampler or self.config.sampler, self.scheduler)
        guidance = guidance_scale if isinstance(guidance_scale, Guidance) else Guidance(guidance_scale)
        sigma_of = noise_levels(self.scheduler)
        asked, none = {"class_labels": labels}, {"class_labels": torch.full_like(labels, self.num_classes)}

        def predict(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return guidance.predict(self._network, noisy, timestep, asked, none, sigma_of(timestep))

        sample = denoise(predict, scheduler, noise, num_inference_steps, generator, self.progress_bar)
        pixels = sample if self.vae is None else decode(self.vae, sample)
        images = VaeImageProcessor().postprocess(pixels.cpu(), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _network(self, noisy: torch.Tensor, timestep: torch.Tensor, condition: Condition) -> torch.Tensor:
        timesteps = timestep.to(noisy.device).expand(len(noisy))
        return self.network(noisy.to(self.network.dtype), timesteps, **condition).sample
