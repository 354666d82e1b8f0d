"""Warnings of libraries that say nothing to a user are gone, and others from the same places come through."""

from __future__ import annotations

import json
import warnings
from inspect import signature
from types import SimpleNamespace

import diffusers
import pytest
import torch
from heard import heard
from script_calls import run_script
from tiny_models import lora_file, model

from scripts import merge_lora
from trainers.common.autoencoder.latents import LatentSpace
from trainers.common.class_pipeline import ClassConditionalPipeline, _fresh, denoise
from trainers.common.diffusion.consistency import lcm_scheduler
from trainers.common.diffusion.sampling import build_sampler
from trainers.engine.config.base_options import BaseConfig
from trainers.inference.lora_pipeline import add_loras, load_pipeline
from trainers.pretrained import read_model

FLOAT32 = "There are modules in UNet2DConditionModel that should be kept in float32: "


def hear(call):
    """What a call says, and what it returns."""
    with heard() as texts:
        found = call()
    return texts, found


def test_names_of_classes_are_read_in_silence(tmp_path):
    network = diffusers.UNet2DModel(
        16, 1, 1, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), num_class_embeds=3,
    )  # fmt: skip
    pipeline = ClassConditionalPipeline(diffusers.DDPMScheduler(), unet=network, id2label={0: "cat", 1: "dog"})
    pipeline.save_pretrained(tmp_path)
    texts, again = hear(lambda: ClassConditionalPipeline.from_pretrained(tmp_path))
    assert (texts, again.label_names) == ([], ["cat", "dog"])
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"id2label": 1.5}))
    texts, _ = hear(lambda: ClassConditionalPipeline.from_pretrained(tmp_path))
    assert len(texts) == 1
    assert texts[0].startswith("Expected types for id2label: ")


def test_an_autoencoder_is_read_in_half_precision_instead_of_cast():
    folder = model("sd1")
    base = BaseConfig(resolution=32)
    space = LatentSpace("vae", str(folder), base, torch.device("cpu"), torch.bfloat16)
    texts, vae = hear(lambda: space.vae)
    assert (texts, vae.dtype, vae.training) == ([], torch.bfloat16, False)
    texts, expected = hear(lambda: space.load().to(torch.bfloat16))
    assert [text.startswith("There are modules in AutoencoderKL") for text in texts] == [True]  # it would be heard
    for name, weights in expected.state_dict().items():
        assert torch.equal(vae.state_dict()[name], weights), name
    assert space.load().dtype == torch.float32


def test_merging_casts_in_silence(tmp_path):
    options = [model("sd1"), tmp_path / "merged", "--lora", lora_file(tmp_path), "--dtype", "bfloat16"]
    texts, _ = hear(lambda: run_script(merge_lora, *options))
    assert texts == []


def test_a_pipeline_gets_its_precision_by_the_name_that_diffusers_wants(monkeypatch):
    dtypes = {"default": torch.float16, "vae": torch.float32}
    texts, pipeline = hear(lambda: load_pipeline(str(model("sd1")), dtypes))
    assert texts == []
    assert (pipeline.unet.dtype, pipeline.vae.dtype) == (torch.float16, torch.float32)
    asked = []
    monkeypatch.setattr(diffusers, "__version__", "0.38.1")
    monkeypatch.setattr(
        "trainers.inference.lora_pipeline.read_model",
        lambda kind, base, **options: asked.append(options) or SimpleNamespace(fuse_lora=None),
    )
    load_pipeline("base")
    assert asked[0]["torch_dtype"] == torch.float32
    assert "dtype" not in asked[0]


def test_a_pipeline_without_a_safety_checker_is_not_told_of_one():
    texts, pipeline = hear(lambda: load_pipeline(str(model("sdxl"))))
    assert (texts, type(pipeline).__name__) == ([], "StableDiffusionXLPipeline")
    texts, _ = hear(lambda: read_model(diffusers.DiffusionPipeline, model("sdxl"), safety_chequer=None))
    assert [text.partition(" are not")[0] for text in texts] == ["Keyword arguments {'safety_chequer': None}"]
    pipeline = load_pipeline(str(model("sd1")))
    assert (pipeline.safety_checker, pipeline.config.requires_safety_checker) == (None, False)


def test_a_second_adapter_is_no_surprise(tmp_path, monkeypatch):
    pipeline = load_pipeline(str(model("sd1")))
    loras = [(lora_file(tmp_path / name, seed=seed), 0.5) for seed, name in enumerate("ab")]
    texts, weights = hear(lambda: add_loras(pipeline, loras))
    assert (texts, weights) == ([], {"lora_0": 0.5, "lora_1": 0.5})
    assert set(pipeline.unet.peft_config) == {"lora_0", "lora_1"}
    monkeypatch.setattr(pipeline, "load_lora_into_unet", lambda *_, **__: warnings.warn("something else", stacklevel=1))
    monkeypatch.setattr(pipeline, "set_adapters", lambda *_: None)
    texts, _ = hear(lambda: add_loras(pipeline, loras[:1]))
    assert texts == ["something else"]


@pytest.mark.parametrize("name", ["lcm", "pndm", "ddpm", "ddim", "dpmsolver++", "euler"])
def test_a_sampler_made_of_another_one_draws_in_silence(name):
    """The copy that draws is the one that `from_config` makes, which would tell of the settings of the first one."""
    base = diffusers.PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    sampler = {"lcm": lambda: lcm_scheduler(base, 50), "pndm": lambda: base}.get(
        name, lambda: build_sampler(name, diffusers.DDPMScheduler.from_config(base.config, clip_sample=False))
    )()
    noise, generators = torch.zeros(1, 1, 4, 4), [torch.Generator()]
    texts, _ = hear(lambda: denoise(lambda sample, time: 0.1 * sample, sampler, noise, 4, generators))
    assert texts == []
    texts, expected = hear(lambda: type(sampler).from_config(sampler.config))
    assert ["skip_prk_steps" in text for text in texts] == ([True] if name == "lcm" else [])
    found = _fresh(sampler)
    for each in (found, expected):
        each.set_timesteps(4)
    own = {key for key in expected.config if key in signature(type(sampler)).parameters}
    assert {key: found.config[key] for key in own} == {key: expected.config[key] for key in own}
    for key, wanted in vars(expected).items():
        value, is_tensor = vars(found)[key], torch.is_tensor(wanted)
        assert key == "_internal_dict" or (torch.equal(value, wanted) if is_tensor else str(value) == str(wanted)), key
