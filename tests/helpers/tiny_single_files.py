"""Tiny Stable Diffusion models in the form of single files: CLIP's vocabulary, groups of 32, heads as published.

Their configs are written here by hand, and not read off a file.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import tiny_models

WIDTH = 32
SECOND = 2 * WIDTH  # of SDXL's second text encoder; by their widths diffusers tells the two apart
NEEDS_VOCABULARY = pytest.mark.skipif(find_spec("open_clip") is None, reason="needs the extra single-file")
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
VERSION = 2  # raise it when what is made here changes


def pipeline(family, channels=4, **scheduler):
    """A pipeline of "sd1", "sd2" or "sdxl" with random weights; one of 9 channels is for inpainting."""
    import diffusers

    xl = family == "sdxl"
    settings = {"sd1": {"attention_head_dim": 8}, "sd2": {"attention_head_dim": [1, 1], "use_linear_projection": True}}
    settings["sdxl"] = {
        **settings["sd2"],
        "transformer_layers_per_block": [1, 2],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + SECOND,
    }
    parts = {"unet": _unet(WIDTH + (SECOND if xl else 0), channels, **settings[family]), "vae": _vae(xl)}
    parts |= {"text_encoder": _text("CLIPTextModel", "gelu" if family == "sd2" else "quick_gelu")}
    parts |= {"tokenizer": _tokenizer("!" if family == "sd2" else "<|endoftext|>")}
    if xl:
        parts |= {
            "text_encoder_2": _text("CLIPTextModelWithProjection", "gelu", layers=3, width=SECOND),
            "tokenizer_2": _tokenizer("!"),
        }
    kind = {"sd1": "PNDM", "sd2": "DDIM", "sdxl": "EulerDiscrete"}[family]
    noise = NOISE | {"steps_offset": 1, "prediction_type": "v_prediction" if family == "sd2" else "epsilon"}
    noise |= {} if xl else {"set_alpha_to_one": False}
    noise |= {"sd1": {"skip_prk_steps": True}, "sd2": {"clip_sample": False}, "sdxl": {"timestep_spacing": "leading"}}[
        family
    ]
    parts["scheduler"] = getattr(diffusers, f"{kind}Scheduler")(**noise | scheduler)
    name = f"StableDiffusion{'XL' if xl else ''}{'Inpaint' if channels == 9 else ''}Pipeline"
    unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, name)(**parts, **({} if xl else unchecked))


def write(path, made):
    """Writes a pipeline as a single file."""
    import torch

    from trainers.single_file.writing import single_file_of
    from trainers.weight_files import write_tensors

    tensors, about = single_file_of(made, path.stem, "tiny", torch.float32)
    write_tensors(tensors, path, about)
    return path


def single_file(family):
    """The file of a tiny pipeline, made where it is not there."""
    path = tiny_models.FOLDER / f"single-{family}-{VERSION}.safetensors"
    if not path.is_file():
        tiny_models.FOLDER.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{tiny_models.secrets.token_hex(4)}-{path.name}")
        write(staging, pipeline(family)).rename(path)
    return path


def _unet(text_width, channels, **settings):
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        **settings,
    )


def _vae(xl):
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.13025 if xl else 0.18215,
        force_upcast=xl,
    )


def _text(kind, activation, layers=2, width=WIDTH):
    import torch
    import transformers

    torch.manual_seed(2 if kind == "CLIPTextModel" else 3)
    config = transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=1,
        hidden_act=activation,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return getattr(transformers, kind)(config).eval()


def _tokenizer(pad):
    import tempfile
    from pathlib import Path

    from transformers import CLIPTokenizer

    from trainers.single_file.vocabulary import write_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder) / "tokenizer", pad)
        return CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer")
