"""Tiny Stable Diffusion pipelines on disk, in the layout of the hub's, tokenizer files included.

They are made from configs with random weights, once for all tests, in outputs/tests: `python tests/helpers/tiny_models.py` makes
all of them.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "outputs" / "tests"
CAPTIONS = ["a photo of a cat", "a photo of a dog", "a handwritten three", "sks, tag one, tag two"]
TEXT_WIDTH = 32
LONG = {"length": 77, "layers": 3}

VERSION = 2  # raise it when what is made here changes


def model(family):
    """The folder of "sd1", "sd2" (v prediction), "sdxl" or "clip"; made where it is not there.

    "sd1-long" and "sdxl-long" have the length of the real ones' text encoders, 77 tokens, and three layers or more.
    """
    folder = FOLDER / f"{family}-{VERSION}"
    if not folder.is_dir():
        staging = FOLDER / f".tmp-{family}-{secrets.token_hex(4)}"
        makers = {"sd1": _sd1, "sd2": _sd2, "sdxl": _sdxl, "clip": _clip}
        makers |= {"sd1-long": partial(_sd1, **LONG), "sdxl-long": partial(_sdxl, **LONG)}
        makers[family](staging)
        try:
            staging.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(staging)
    return folder


def lora_file(folder, family="sd1", seed=0, **settings):
    """A LoRA with random weights for the UNet of `model(family)`, in a folder; `settings` are peft's."""
    import torch
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    from trainers.common.lora.files import save_lora

    unet = UNet2DConditionModel.from_pretrained(model(family) / "unet")
    torch.manual_seed(seed)
    usual = {"r": 4, "lora_alpha": 2, "target_modules": ["to_q", "to_k", "to_v"], "init_lora_weights": False}
    unet.add_adapter(LoraConfig(**usual | settings), adapter_name="default")
    return save_lora(folder, {"unet": unet}, {})


def _sd1(folder, **text):
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    unet = _unet(cross_attention_dim=TEXT_WIDTH, attention_head_dim=2)
    scheduler = PNDMScheduler(**_NOISE, skip_prk_steps=True, steps_offset=1)
    _save_sd(StableDiffusionPipeline, unet, scheduler, folder, **text)


def _sd2(folder):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    unet = _unet(cross_attention_dim=TEXT_WIDTH, attention_head_dim=[2, 4], use_linear_projection=True)
    scheduler = DDIMScheduler(**_NOISE, prediction_type="v_prediction", steps_offset=1, clip_sample=False)
    _save_sd(StableDiffusionPipeline, unet, scheduler, folder)


def _save_sd(pipeline, unet, scheduler, folder, **text):
    tokenizer, text_encoder = _text(folder / "tokenizer", "CLIPTextModel", **text)
    parts = {"vae": _vae(), "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
    made = pipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    _save(made, folder)


def _sdxl(folder, length=16, layers=2):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer, text_encoder = _text(folder / "tokenizer", "CLIPTextModel", length, layers)
    more = layers + (layers > 2)  # the real ones differ, too
    tokenizer_2, text_encoder_2 = _text(folder / "tokenizer_2", "CLIPTextModelWithProjection", length, more)
    unet = _unet(
        cross_attention_dim=2 * TEXT_WIDTH,
        attention_head_dim=[2, 4],
        use_linear_projection=True,
        transformer_layers_per_block=[1, 2],
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
    )
    parts = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    parts |= {"tokenizer": tokenizer, "tokenizer_2": tokenizer_2, "unet": unet}
    scheduler = EulerDiscreteScheduler(**_NOISE, steps_offset=1)
    vae = _vae(scaling_factor=0.13025, force_upcast=True)
    _save(StableDiffusionXLPipeline(vae=vae, scheduler=scheduler, **parts, add_watermarker=False), folder)


def _clip(folder):
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer, text_encoder = _text(folder / "text", "CLIPTextModel")
    sides = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sides, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text_encoder.config.to_dict(), vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    size = {"shortest_edge": 32}
    images = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)


_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def _unet(**settings):
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **settings,
    )


def _vae(**settings):
    """4 times smaller latents: 8 x 8 for 32 x 32 pixels."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        **settings,
    )


def _text(folder, kind, length=16, layers=2):
    import torch
    import transformers

    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from scripts.data.make_base import build_text_encoder, write_tokenizer

    torch.manual_seed(2 if kind == "CLIPTextModel" else 3)
    tokenizer = write_tokenizer(folder, CAPTIONS, max_length=length)
    encoder = build_text_encoder(tokenizer, TEXT_WIDTH, layers=layers)
    if kind == "CLIPTextModelWithProjection":
        encoder = transformers.CLIPTextModelWithProjection(encoder.config)
    return tokenizer, encoder


def _save(pipeline, folder):
    """As on the hub: the tokenizers' files stay those that write_tokenizer wrote; no force_upcast but in SDXL."""
    kept = {name: folder / name for name in ("tokenizer", "tokenizer_2") if (folder / name).is_dir()}
    for name, path in kept.items():
        path.rename(folder / f".{name}")
    pipeline.save_pretrained(folder)
    from scripts.data.make_base import save_text_encoder

    for name in ("text_encoder", "text_encoder_2"):
        if getattr(pipeline, name, None) is not None:
            save_text_encoder(getattr(pipeline, name), folder / name)
    for name, path in kept.items():
        shutil.rmtree(path)
        (folder / f".{name}").rename(path)
    config = folder / "vae" / "config.json"
    settings = json.loads(config.read_text())
    if "XL" not in type(pipeline).__name__:
        settings.pop("force_upcast")
    config.write_text(json.dumps(settings, indent=2))


if __name__ == "__main__":
    os.chdir(ROOT)
    for family in ("sd1", "sd2", "sdxl", "clip", "sd1-long", "sdxl-long"):
        print(model(family))
