"""The families of Stable Diffusion: where the networks of each stand in a file, and numbers that no tensor shows."""

from __future__ import annotations

from typing import Any, NamedTuple

from trainers.single_file.names import CLIP, OPEN_CLIP, UNET, VAE


class Network(NamedTuple):
    """A network of a single file."""

    kind: str  # of names
    prefix: str  # of its tensors' names


class Family(NamedTuple):
    """One of the three architectures."""

    title: str
    networks: dict[str, Network]  # by the names of diffusers' folders
    pads: tuple[str, ...]  # the padding token of each tokenizer
    pixels: int  # of a side in training; Stable Diffusion 2 has more where it predicts velocity
    scaling_factor: float | None  # of latents
    scheduler: dict[str, Any]  # the published one, without noise and prediction
    architecture: str  # in the words of modelspec's headers

    @property
    def is_xl(self) -> bool:
        return "text_encoder_2" in self.networks


KINDS = {  # the library and class of each network
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}
PUBLISHED = {"unet": Network(UNET, "model.diffusion_model."), "vae": Network(VAE, "first_stage_model.")}
END, MARK = "<|endoftext|>", "!"  # CLIP's own padding, and the one of OpenCLIP's number 0

SD1 = Family(
    "Stable Diffusion 1",
    {**PUBLISHED, "text_encoder": Network(CLIP, "cond_stage_model.transformer.")},
    (END,),
    512,
    0.18215,
    {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False},
    "stable-diffusion-v1",
)
SD2 = Family(
    "Stable Diffusion 2",
    {**PUBLISHED, "text_encoder": Network(OPEN_CLIP, "cond_stage_model.model.")},
    (MARK,),
    512,
    0.18215,
    {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
    "stable-diffusion-v2-512",
)
SDXL = Family(
    "Stable Diffusion XL",
    {
        **PUBLISHED,
        "text_encoder": Network(CLIP, "conditioner.embedders.0.transformer."),
        "text_encoder_2": Network(OPEN_CLIP, "conditioner.embedders.1.model."),
    },
    (END, MARK),
    1024,
    0.13025,
    {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    "stable-diffusion-xl-v1-base",
)
ALONE = Family("autoencoder alone", {"vae": Network(VAE, "")}, (), 512, None, {}, "")  # of whichever family
FAMILIES = (SDXL, SD2, SD1)
V_OF_SD2 = (768, "stable-diffusion-v2-768-v")  # pixels and architecture of Stable Diffusion 2 that predicts velocity
ORIGINAL_CODE = "https://github.com/Stability-AI/generative-models"  # modelspec's word for the original names


def architecture_of(family: Family, is_velocity: bool) -> str:
    """Returns modelspec's name of a family whose UNet predicts velocity or noise."""
    return V_OF_SD2[1] if family is SD2 and is_velocity else family.architecture
