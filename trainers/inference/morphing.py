"""DiffMorpher (arXiv 2312.07409): morphs one picture into another with two single-picture LoRAs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from datasets_lib.errors import InputError
from trainers.common.autoencoder.latents import decode
from trainers.common.diffusion.objective import Predict
from trainers.common.diffusion.sampling import to_unit_range
from trainers.common.lora.files import read_lora
from trainers.common.lora.loading import check_fit
from trainers.common.text_to_image.prompts import EMBEDS, POOLED, size_conditions
from trainers.inference.inversion import ddim_schedulers, invert, picture_latents, slerp, with_statistics_between
from trainers.inference.lora_pipeline import add_loras
from trainers.inference.text_embedding import embed_prompts, settings_of_loras


class Morph:
    """Morphs two pictures in a Stable Diffusion pipeline, each with its LoRA and prompt, without guidance.

    At w a weight W of the network becomes W + (1 - w) D_1 + w D_2, with D = alpha / r B A. The factors B and A are not
    interpolated themselves, because their product would contain B_1 A_2 and B_2 A_1. Raises as check_morph does.
    """

    def __init__(
        self, pipeline: Any, loras: list[Path], prompts: list[str], steps: int, attention: float, adain: bool
    ) -> None:
        self.pipeline, self.unet, self.adain = pipeline, pipeline.unet, adain
        check_morph(pipeline, loras, attention)
        self.names = list(add_loras(pipeline, [(lora, 1.0) for lora in loras]))
        self.sampler, self.inverse = ddim_schedulers(pipeline.scheduler, steps)
        self.shared = SharedAttention(self.unet) if attention else None
        self.shared_steps = round(attention * steps)
        self.texts = settings_of_loras(loras)
        self.asked = [self._embed(number, prompt) for number, prompt in enumerate(prompts)]

    def mix(self, weight: float) -> None:
        """Sets the LoRAs' weights to 1 - weight and weight; a LoRA of weight 0 is inactive."""
        mixed = {name: share for name, share in zip(self.names, (1 - weight, weight), strict=True) if share}
        self.pipeline.set_adapters(list(mixed), list(mixed.values()))

    @torch.no_grad()
    def invert(self, pictures: Tensor) -> None:
        """Finds the noises [1, c, h, w] of two pictures [2, 3, H, W] in [-1, 1], each with only its own LoRA."""
        self.noises = []
        for number, picture in enumerate(pictures):
            self.mix(number)
            latents = picture_latents(self.pipeline.vae, picture[None])
            self.noises.append(invert(self.predict(number), self.inverse, latents))

    def noise(self, weight: float) -> Tensor:
        """Interpolates the noises of the pictures, [1, c, h, w]."""
        first, last = (noise.double() for noise in self.noises)
        noise = slerp(first, last, weight)
        return (with_statistics_between(noise, first, last, weight) if self.adain else noise).float()

    @torch.no_grad()
    def frames(self, weights: list[float]) -> Tensor:
        """Draws pictures [N, 3, H, W] in [0, 1], on the CPU, for weights from 0 (the first picture) to 1 (the other).

        All frames take a step, the two ends first, before any takes the next one, so that only the keys and values of
        one step are kept.
        """
        samples = [self.noise(weight) for weight in weights]
        ends_first = sorted(range(len(weights)), key=lambda number: weights[number] not in (0.0, 1.0))
        for step, timestep in enumerate(tqdm(self.sampler.timesteps, f"{len(weights)} frames")):
            for number in ends_first:
                weight = weights[number]
                self.mix(weight)
                with self.shared.at(weight) if self.shared and step < self.shared_steps else nullcontext():
                    predicted = self.predict(weight)(samples[number], timestep).float()
                samples[number] = self.sampler.step(predicted, timestep, samples[number]).prev_sample
        return torch.cat([to_unit_range(decode(self.pipeline.vae, sample)).cpu() for sample in samples])

    def predict(self, weight: float) -> Predict:
        """Returns the UNet's prediction with the active LoRAs and interpolated prompts."""
        first, last = self.asked
        asked = {name: torch.lerp(first[name], last[name], weight) for name in first}
        embeds, pooled = asked[EMBEDS], asked.get(POOLED)

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            added = None
            if pooled is not None:
                target = tuple(side * self.pipeline.vae_scale_factor for side in noisy.shape[2:])
                whole = torch.tensor([target], device=noisy.device)
                added = {"text_embeds": pooled, "time_ids": size_conditions(whole, torch.zeros_like(whole), target)}
            return self.unet(noisy.to(self.unet.dtype), timestep, embeds, added_cond_kwargs=added).sample

        return predict

    @torch.no_grad()
    def _embed(self, number: int, prompt: str) -> dict[str, Tensor]:
        """Embeds a picture's prompt with its own LoRA, which may also adapt the text encoders."""
        self.mix(number)
        if self.texts is not None:
            return embed_prompts(self.pipeline, [prompt], self.texts)
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        found = self.pipeline.encode_prompt(prompt, device=self.pipeline.device, **options)
        return {EMBEDS: found[0]} | ({POOLED: found[2]} if hasattr(self.pipeline, "text_encoder_2") else {})


def check_morph(pipeline: Any, loras: list[Path], attention: float) -> None:
    """Raises ValueError for an unsuitable base, or a LoRA that does not fit or is a DoRA."""
    channels = pipeline.unet.config.in_channels
    if channels != pipeline.vae.config.latent_channels:
        raise InputError(f"the base's UNet reads {channels} channels; inpainting bases do not fit")
    if attention and not shared_layers(pipeline.unet):
        raise InputError("the base's UNet has no self-attention in its up blocks; give --attention 0")
    for path in loras:
        lora = read_lora(path)
        if lora.is_dora:
            raise InputError(f"{path}: is a DoRA, whose weights are no sum that can be mixed; train without use_dora")
        check_fit(path, lora, pipeline)


def shared_layers(unet: nn.Module) -> list[nn.Module]:
    """Returns the layers that make keys and values in the self-attention of the UNet's up blocks."""
    names = [name for name, _ in unet.named_modules() if name.startswith("up_blocks") and name.endswith("attn1")]
    return [unet.get_submodule(f"{name}.{kind}") for name in names for kind in ("to_k", "to_v")]


class SharedAttention:
    """Interpolates keys and values in the self-attention of a UNet's up blocks between those of the two ends."""

    def __init__(self, unet: nn.Module) -> None:
        self.layers = shared_layers(unet)
        self.ends: dict[float, list[Tensor]] = {}  # keys and values in the order in which layers run

    @contextmanager
    def at(self, weight: float) -> Iterator[None]:
        """For one call of the UNet: at an end (0 or 1) keeps its keys and values, in between replaces them."""
        if weight in (0.0, 1.0):
            kept = self.ends[weight] = []
            hooks = [layer.register_forward_hook(lambda _, __, rows: kept.append(rows)) for layer in self.layers]
        else:
            mixed = (torch.lerp(a, b, weight) for a, b in zip(self.ends[0.0], self.ends[1.0], strict=True))
            hooks = [layer.register_forward_hook(lambda *_: next(mixed)) for layer in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def evenly_distant(weights: list[float], distances: list[float]) -> list[float]:
    """Respaces weights so that neighbouring frames are about equally far apart; `distances` are the current ones.

    Distances are interpolated linearly between the measured frames. Raises ValueError if all are 0.
    """
    way = np.concatenate([[0.0], np.cumsum(distances)])
    if not way[-1] > 0:
        raise InputError("rescheduling: all frames look the same; the two pictures must differ")
    found = np.interp(np.linspace(0, way[-1], len(weights)), way, weights)
    return [weights[0], *found[1:-1].tolist(), weights[-1]]
