"""A pipeline for class-conditional UNets and transformers of pixels or latents, which diffusers lacks.

A finished run holds a copy of this file as pipeline.py, so that diffusers draws where there is no diffloop:
`DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`. It therefore imports nothing of diffloop's. What
diffloop shares with it, such as guidance, is defined here.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Optional

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

MODULE = "pipeline"  # the copy's name without .py, which diffusers looks for

Condition = dict[str, Tensor]  # a network's conditioning inputs: tensors [B, ...] by name
Network = Callable[[Tensor, Tensor, Condition], Tensor]  # (noisy [B, ...], timesteps, condition) -> prediction


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598): its strength, and the noise levels at which it acts.

    With `scale` 1 the prediction is the conditional one and with 0 the unconditional one; neither doubles the batch.
    `rescale` in [0, 1] is phi of arXiv 2305.08891, section 3.4. For noise levels sigma (see noise_levels) outside of
    the `interval` (low, high] the prediction is the conditional one, arXiv 2404.07724.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: Sequence[float] | None = None

    def predict(
        self, network: Network, noisy: Tensor, timestep: Tensor, asked: Condition, none: Condition, sigma: float
    ) -> Tensor:
        """Predicts in one forward, of twice the batch if guidance acts; `none` is the condition to move away from."""
        scale = self.scale if self.interval is None or self.interval[0] < sigma <= self.interval[1] else 1.0
        if scale == 1.0:
            return network(noisy, timestep, asked)
        if scale == 0.0:
            return network(noisy, timestep, none)
        conditions = {name: torch.cat([rows, none[name]]) for name, rows in asked.items()}
        both = network(torch.cat([noisy, noisy]), timestep, conditions).float()
        conditional, unconditional = both.chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        if self.rescale == 0.0:
            return guided
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

        return rescale_noise_cfg(guided, conditional, guidance_rescale=self.rescale)


def noise_levels(scheduler: diffusers.SchedulerMixin) -> Callable[[Tensor | float], float]:
    """Returns sigma(timestep), noise over signal: sqrt((1 - alpha_bar) / alpha_bar), or t / (1 - t) for a flow."""
    if not hasattr(scheduler, "alphas_cumprod"):
        total = scheduler.config.num_train_timesteps
        return lambda timestep: _ratio(float(timestep) / total, 1 - float(timestep) / total)
    alphas_cumprod = scheduler.alphas_cumprod.tolist()  # a copy: the scheduler's tensor moves to the device
    return lambda timestep: _ratio((1 - alphas_cumprod[int(timestep)]) ** 0.5, alphas_cumprod[int(timestep)] ** 0.5)


def _ratio(noise: float, signal: float) -> float:
    return noise / signal if signal > 0 else math.inf


def denoise(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: diffusers.SchedulerMixin,
    noise: Tensor,
    num_inference_steps: int,
    generators: list[torch.Generator] | torch.Generator | None,
    progress: Callable[[Iterable], Iterable] = iter,
    after_step: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Runs the reverse process on a copy of `scheduler`; a pipeline with the same generators draws the same."""
    scheduler = _fresh(scheduler)  # set_timesteps changes a scheduler
    scheduler.set_timesteps(num_inference_steps)
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)  # a flow has none
    random = {"generator": generators} if "generator" in signature(scheduler.step).parameters else {}
    sample = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in progress(scheduler.timesteps):
        prediction = predict(scale(sample, timestep), timestep).float()
        sample = scheduler.step(prediction, timestep, sample, **random).prev_sample
        if after_step is not None:
            after_step(sample)
    return sample


def _fresh(scheduler: diffusers.SchedulerMixin) -> diffusers.SchedulerMixin:
    """Makes a scheduler with the same settings; `from_config` would warn of those of the kind that it was made from."""
    known = signature(type(scheduler)).parameters
    return type(scheduler)(**{name: value for name, value in scheduler.config.items() if name in known})


def find_sampler(name: str, scheduler: diffusers.SchedulerMixin) -> diffusers.SchedulerMixin:
    """Builds the sampler ddpm, ddim, dpmsolver++ or euler (of a flow one of the last two) for a training schedule.

    Raises ValueError for any other name.
    """
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        if name == "dpmsolver++":
            config = scheduler.config
            settings = {"num_train_timesteps": config.num_train_timesteps, "flow_shift": config.shift}
            settings |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
            return diffusers.DPMSolverMultistepScheduler(**settings)
        if name != "euler":
            raise ValueError(f"sampler = {name}: a flow has euler or dpmsolver++")
        return type(scheduler).from_config(scheduler.config)
    if name == "ddim":
        return diffusers.DDIMScheduler.from_config(scheduler.config)
    if name == "dpmsolver++":
        return diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type="dpmsolver++")
    if name == "euler":
        return diffusers.EulerDiscreteScheduler.from_config(scheduler.config)
    if name != "ddpm":
        raise ValueError(f"sampler = {name}: must be one of ddpm, ddim, dpmsolver++, euler")
    return type(scheduler).from_config(scheduler.config)


def find_classes(option: str, classes: Sequence[str | int], names: list[str], num_classes: int) -> list[int]:
    """Resolves names and numbers; names come first: with the names "1" and "0" the class "1" is number 0.

    Raises ValueError, naming the `option`, for any other class.
    """
    known = {str(number): number for number in range(num_classes)} | {n: i for i, n in enumerate(names)}
    for item in classes:
        if item not in (known if isinstance(item, str) else range(num_classes)):
            allowed = f"0 to {num_classes - 1}" + (f", or {', '.join(names)}" if names else "")
            raise ValueError(f"{option}: {item!r} is no class; allowed: {allowed}")
    return [item if isinstance(item, int) else known[item] for item in classes]


class ClassConditionalPipeline(DiffusionPipeline):
    """Draws pictures of classes by name or number.

    The network is a `unet` or a `transformer` with one embedding per class and a last one for "no class". A `vae`
    decodes if the network draws latents. `sampler` is a name that find_sampler knows; `id2label` names the classes,
    or is None: a dict, because diffusers takes lists for components. Read from a file, its keys are texts.
    """

    _optional_components = ["unet", "transformer", "vae"]  # noqa: RUF012  # as diffusers declares it
    source: ClassVar[bytes] = Path(__file__).read_bytes()  # of this file: diffusers may run another from its place

    def __init__(  # diffusers before 0.38 reads these annotations, and knows no others
        self,
        scheduler: diffusers.SchedulerMixin,
        unet: Optional[UNet2DModel] = None,
        transformer: Optional[DiTTransformer2DModel] = None,
        id2label: Optional[dict] = None,
        sampler: str = "ddpm",
        vae: Optional[AutoencoderKL] = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label, sampler=sampler)

    @classmethod
    def _dict_from_json_file(cls, *place: Any, **options: Any) -> dict[str, Any]:
        """Reads the index; the class is this one, whatever file diffusers would run for its own name of it."""
        index = super()._dict_from_json_file(*place, **options)
        return index | ({"_class_name": cls.__name__} if "_class_name" in index else {})

    def save_config(self, save_directory: str | Path, *place: Any, **options: Any) -> None:
        """Writes model_index.json, and this file beside it."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / f"{MODULE}.py").write_bytes(self.source)
        super().save_config(save_directory, *place, **options)

    def to_json_string(self) -> str:
        index = json.loads(super().to_json_string()) | {"_class_name": [MODULE, "ClassConditionalPipeline"]}
        index.pop("_name_or_path", None)  # a path of this machine
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

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
            raise ValueError("classes = []: name at least one class")
        numbers = find_classes("classes", asked_for, self.label_names, self.num_classes)
        labels = torch.tensor(numbers, device=self._execution_device)
        size, channels = self.network.config.sample_size, self.network.config.in_channels
        size = (size, size) if isinstance(size, int) else tuple(size)
        noise = randn_tensor((len(labels), channels, *size), generator=generator, device=self._execution_device)
        scheduler = find_sampler(sampler or self.config.sampler, self.scheduler)
        guidance = Guidance(guidance_scale) if isinstance(guidance_scale, int | float) else guidance_scale
        sigma_of = noise_levels(self.scheduler)
        asked, none = {"class_labels": labels}, {"class_labels": torch.full_like(labels, self.num_classes)}

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            return guidance.predict(self._network, noisy, timestep, asked, none, sigma_of(timestep))

        sample = denoise(predict, scheduler, noise, num_inference_steps, generator, self.progress_bar)
        pixels = sample if self.vae is None else self._decode(sample)
        images = VaeImageProcessor().postprocess(pixels.cpu(), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _network(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        timesteps = timestep.to(noisy.device).expand(len(noisy))
        return self.network(noisy.to(self.network.dtype), timesteps, **condition).sample

    def _decode(self, scaled: Tensor) -> Tensor:
        config = self.vae.config
        latents = scaled / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()
