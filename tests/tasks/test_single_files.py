"""Single files of Stable Diffusion: names and shapes at full size against diffusers' conversion, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_single_files
import torch
from marks import slow
from safetensors.torch import load_file, save_file
from tiny_single_files import NEEDS_VOCABULARY

from trainers.common.text_to_image.base_model import BaseModel, base_model_problems, text_layers
from trainers.pretrained import read_model
from trainers.single_file import vocabulary
from trainers.single_file.configs import network_config
from trainers.single_file.families import FAMILIES, SD1, SD2, SDXL
from trainers.single_file.header import Header
from trainers.single_file.names import CLIP, OPEN_CLIP, original_names
from trainers.single_file.reading import without_weights
from trainers.single_file.recognition import FIRST, SingleFile, open_single_file
from trainers.single_file.tensors import as_original, from_original

PARTS = ("unet", "vae", "text_encoder", "tokenizer")
TENSORS = {  # of the published files, without buffers: UNet, autoencoder, text encoders
    "sd1": (686, 248, 196), "sd2": (686, 248, 280), "sdxl": (1680, 248, 196, 389),
}  # fmt: skip
FAMILY = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}


def published(family):
    """The networks of full size on the meta device, by numbers written here."""
    import transformers
    from diffusers import AutoencoderKL, UNet2DConditionModel

    xl = family == "sdxl"
    unet = {
        "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
        "sd2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        "sdxl": {
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    }[family]
    large = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    huge = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
    giant = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
    config = transformers.CLIPTextConfig
    with torch.device("meta"):
        found = {"unet": UNet2DConditionModel(sample_size=128 if xl else 64, **unet)}
        found["vae"] = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            scaling_factor=0.13025 if xl else 0.18215,
        )
        first = config(**huge, hidden_act="gelu") if family == "sd2" else config(**large)
        found["text_encoder"] = transformers.CLIPTextModel(first)
        if xl:
            second = config(**giant, hidden_act="gelu", projection_dim=1280)
            found["text_encoder_2"] = transformers.CLIPTextModelWithProjection(second)
    return found


def in_original_names(networks, family, **more):
    """All tensors by their names in a single file."""
    found = dict(more)
    for name, (kind, prefix) in family.networks.items():
        state = networks[name].state_dict()
        for original, keys in original_names(kind, state).items():
            found[prefix + original] = as_original(original, [state[key] for key in keys])
    return found


def single_of(tensors, family, about=None):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return SingleFile(Path("model.safetensors"), "model", Header(shapes, {}, about or {}), family, shapes[FIRST][1])


@pytest.fixture(scope="module", params=FAMILY)
def full(request):
    networks = published(request.param)
    return request.param, networks, in_original_names(networks, FAMILY[request.param])


def test_names_of_full_size_are_those_that_diffusers_converts(full):
    from diffusers.loaders import single_file_utils as theirs

    name, networks, tensors = full
    family = FAMILY[name]
    assert len(tensors) == sum(TENSORS[name])
    assert theirs.infer_diffusers_model_type(tensors) == {"sd1": "v1", "sd2": "v2", "sdxl": "xl_base"}[name]
    found = {
        "unet": theirs.convert_ldm_unet_checkpoint(tensors, networks["unet"].config),
        "vae": theirs.convert_ldm_vae_checkpoint(tensors, networks["vae"].config),
    }
    for network, (kind, prefix) in family.networks.items():
        if kind == CLIP:
            found[network] = theirs.convert_ldm_clip_checkpoint(tensors)
        elif kind == OPEN_CLIP:
            found[network] = theirs.convert_open_clip_checkpoint(networks[network], tensors, prefix)
    used = 0
    for network, converted in found.items():
        state = {key.removeprefix("text_model."): value for key, value in networks[network].state_dict().items()}
        converted = {key.removeprefix("text_model."): value for key, value in converted.items()}
        assert {key: tuple(value.shape) for key, value in converted.items()} == {
            key: tuple(value.shape) for key, value in state.items()
        }
        used += len(original_names(family.networks[network].kind, networks[network].state_dict()))
    assert used == len(tensors)  # every tensor of the file belongs to one network


def test_configs_of_full_size_are_the_published_ones(full):
    name, networks, tensors = full
    single = single_of(tensors, FAMILY[name])
    for network, own in networks.items():
        made = without_weights(single, network, type(own))
        assert {key: value.shape for key, value in made.state_dict().items()} == {
            key: value.shape for key, value in own.state_dict().items()
        }
        config = own.config if network in ("unet", "vae") else own.config.to_dict()
        for key, value in network_config(single, network).items():
            if key in (
                "_class_name",
                "architectures",
                "upcast_attention",
                "force_upcast",
                "projection_dim",
                "sample_size",
            ):
                continue
            wanted = list(config[key]) if isinstance(config[key], tuple) else config[key]
            wanted = [1] * len(value) if key == "transformer_layers_per_block" and wanted == 1 else wanted
            assert value == wanted, (network, key)
    assert network_config(single, "vae").get("force_upcast", False) == (name == "sdxl")  # as LatentSpace reads it
    sizes = [network_config(single, network)["sample_size"] for network in ("unet", "vae")]
    assert sizes == ([128, 1024] if name == "sdxl" else [64, 512])


def test_stable_diffusion_2_of_768_pixels_and_its_24th_layer(full):
    name, _, tensors = full
    if name != "sd2":
        pytest.skip("of Stable Diffusion 2")
    first = {key: value for key, value in tensors.items() if ".resblocks.0." in key}
    last = {key.replace(".resblocks.0.", ".resblocks.23."): value for key, value in first.items()}
    single = single_of(tensors | last, SD2, {"modelspec.architecture": "stable-diffusion-v2-768-v"})
    assert network_config(single, "text_encoder")["num_hidden_layers"] == 23
    assert network_config(single, "unet")["sample_size"] == 96


@pytest.mark.parametrize(
    ("name", "count"), [("mid.attn_1", 1), ("text_projection", 1), ("transformer.resblocks.0.attn.in_proj_weight", 3)]
)
def test_tensors_come_back_as_they_were(name, count):
    name = f"decoder.{name}.q.weight" if name == "mid.attn_1" else name
    parts = [torch.randn(4, 4) for _ in range(count)]
    back = from_original(name, as_original(name, parts), count)
    assert all(map(torch.equal, parts, back))
    assert len(back) == count


# --- tiny files: read as diffusers reads them


@NEEDS_VOCABULARY
@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.float16, slow(torch.bfloat16)], ids=str)
@pytest.mark.parametrize("family", FAMILY)
def test_networks_are_those_that_diffusers_reads(family, dtype, tmp_path):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    path = tiny_single_files.single_file(family)
    if dtype != torch.float32:  # a file of half precision
        half = {name: value.to(dtype) for name, value in load_file(path).items()}
        path = tmp_path / "half.safetensors"
        save_file(half, path, {"modelspec.prediction_type": "v"})
    base = BaseModel("BASE", str(path))
    for network, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        theirs = kind.from_single_file(str(path), config=str(base.folder), subfolder=network, torch_dtype=torch.float32)
        ours = read_model(kind, path, subfolder=network)
        assert not ours.training
        assert_equal(ours, theirs)
        assert {p.dtype for p in read_model(kind, path, subfolder=network, torch_dtype=torch.float16).parameters()} == {
            torch.float16
        }
    made = tiny_single_files.pipeline(family)
    for name in base.text_encoder_names:
        ours = base.text_encoder(name, torch.float32)
        assert_equal(ours, getattr(made, name).to(dtype).float())
        assert ours.config._attn_implementation == getattr(made, name).config._attn_implementation


def assert_equal(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@NEEDS_VOCABULARY
@pytest.mark.parametrize("family", FAMILY)
def test_a_pipeline_of_a_file_draws_what_its_pipeline_drew(family):
    from diffusers import DiffusionPipeline

    asked = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    pipelines = tiny_single_files.pipeline(family), read_model(DiffusionPipeline, tiny_single_files.single_file(family))
    assert type(pipelines[0]) is type(pipelines[1])
    first, second = (p("a photo", generator=torch.Generator().manual_seed(0), **asked).images for p in pipelines)
    assert (first == second).all()
    assert pipelines[0].unet.config.sample_size == pipelines[1].unet.config.sample_size


@NEEDS_VOCABULARY
def test_buffers_averages_and_other_trainings_are_left_out(tmp_path):
    """Everything that published files hold besides, by name; nothing else may be there."""
    tensors, more = load_file(tiny_single_files.single_file("sd1")), torch.zeros(1)
    besides = (
        "alphas_cumprod", "betas", "posterior_variance", "global_step", "scale_factor", "denoiser.sigmas",
        "model_ema.decay", "model_ema.diffusion_modelinput_blocks00weight", "first_stage_model.loss.logvar",
        "first_stage_model.model_ema.decay", "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.transformer.vision_model.x", "cond_stage_model.logit_scale",
    )  # fmt: skip
    save_file(tensors | {name: torch.zeros(1) for name in besides}, tmp_path / "more.safetensors")
    base = BaseModel("BASE", str(tmp_path / "more.safetensors"))
    assert_equal(
        base.unet(torch.float32), BaseModel("BASE", str(tiny_single_files.single_file("sd1"))).unet(torch.float32)
    )
    base.text_encoder("text_encoder", torch.float32)
    other = tmp_path / "other.safetensors"
    save_file(tensors | {"model.diffusion_model.time_embed.cond_proj.weight": more}, other)
    with pytest.raises(
        ValueError, match="its unet has time_embed.cond_proj.weight besides: it is not built as Stable Diffusion 1 is"
    ):
        BaseModel("BASE", str(other)).unet(torch.float32)
    save_file({name: value for name, value in tensors.items() if "out.2.bias" not in name}, other)
    with pytest.raises(ValueError, match=r"BASE = .*other.safetensors, unet: its unet lacks out.2.bias"):
        BaseModel("BASE", str(other)).unet(torch.float32)
    save_file(tensors | {"first_stage_model.decoder.conv_out.bias": torch.zeros(5)}, other)
    with pytest.raises(ValueError, match=re.escape("its vae has decoder.conv_out.bias [5], and [3] is wanted")):
        read_pipeline(other)


def read_pipeline(path):
    from diffusers import DiffusionPipeline

    return read_model(DiffusionPipeline, path)


@NEEDS_VOCABULARY
def test_names_of_early_files_and_linear_attention_of_the_autoencoder(tmp_path):
    path = tiny_single_files.single_file("sd1")
    tensors = {
        name.replace(".transformer.text_model.", ".transformer."): value for name, value in load_file(path).items()
    }
    early = {
        name: value[:, :, 0, 0] if ".attn_1." in name and value.dim() == 4 else value for name, value in tensors.items()
    }
    save_file({name: value.contiguous() for name, value in early.items()}, tmp_path / "early.safetensors")
    for network in ("vae", "text_encoder"):
        assert_equal(
            getattr(read_pipeline(tmp_path / "early.safetensors"), network), getattr(read_pipeline(path), network)
        )


# --- what a file is, and what it predicts


def tensors_of(family):
    """Those of a file that says nothing of what it predicts."""
    return {n: tensor for n, tensor in load_file(tiny_single_files.single_file(family)).items() if n != "v_pred"}


def header_only(path, *names, about=None, dtype=torch.float16, **shapes):
    save_file({name: torch.zeros(shapes.get(name, (1,)), dtype=dtype) for name in names}, path, about)
    return str(path)


UNET, FIRST_SHAPE = FIRST, (8, 4, 3, 3)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"],
            "is a LoRA, and a base is needed; scripts take it by --lora",
        ),
        (["unet.down_blocks.0.attn.to_q.lora_A.weight"], "is a LoRA"),
        (["lora_unet_x.hada_w1_a"], "is a LoRA"),
        (["model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale"], "is a FLUX model"),
        (["double_blocks.0.img_mod.lin.weight"], "is a FLUX model"),
        (["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"], "is a Stable Diffusion 3 model"),
        (["control_model.time_embed.0.weight"], "is a ControlNet"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "is an autoencoder alone, for option vae"),
        (["first_stage_model.encoder.conv_in.weight"], "is an autoencoder alone, for option vae"),
        (
            ["down_blocks.0.resnets.0.conv1.weight"],
            "is one network in diffusers' names, of a pipeline's folder; give that folder",
        ),
        (["text_model.final_layer_norm.weight"], "is a text encoder alone"),
        (["emb_params"], "is an embedding (textual inversion)"),
        (["input_blocks.0.0.weight"], "is a UNet alone, or another model than Stable Diffusion"),
        (["blocks.0.attn.weight"], "is no model that is known here (its first tensor is blocks.0.attn.weight)"),
        ([UNET], "has no text encoder that is known here"),
        ([UNET, "conditioner.embedders.0.model.ln_final.weight"], "is the refiner of Stable Diffusion XL"),
        ([UNET, "edm_mean"], "is Playground 2.5, whose noise is another"),
        ([UNET, "edm_vpred.sigma_max"], "is CosXL, whose noise is another"),
        (
            [UNET, "cond_stage_model.model.ln_final.weight", "model.diffusion_model.label_emb.0.0.weight"],
            "is a unCLIP model, which draws from pictures",
        ),
    ],
)
def test_files_that_are_no_base_are_named(names, expected, tmp_path):
    path = header_only(tmp_path / "x.safetensors", *names, **{UNET: FIRST_SHAPE})
    [problem] = base_model_problems(path, PARTS)
    assert problem.startswith(expected)
    assert "a Stable Diffusion 1, 2 or XL model with its text encoders is needed" in problem
    assert text_layers(path) == []
    with pytest.raises(ValueError, match=re.escape(f"BASE = {path}: {expected}")):
        BaseModel("BASE", path)


@pytest.mark.parametrize(
    ("channels", "what"),
    [(5, "a depth model"), (7, "an upscaler"), (8, "an instruct-pix2pix model"), (12, "another model")],
)
def test_networks_that_see_more_are_named(channels, what, tmp_path):
    path = header_only(tmp_path / "x.safetensors", UNET, **{UNET: (8, channels, 3, 3)})
    [problem] = base_model_problems(path, PARTS)
    assert problem.startswith(f"is {what}: its UNet sees {channels} channels, not 4 or, for inpainting, 9")


def test_quantised_files_and_files_of_other_formats(tmp_path):
    path = header_only(tmp_path / "x.safetensors", UNET, dtype=torch.float8_e4m3fn, **{UNET: FIRST_SHAPE})
    assert next(base_model_problems(path, PARTS)).startswith(
        "is quantised (F8_E4M3), which can be neither trained nor merged"
    )
    for name, expected in {
        "x.ckpt": ".ckpt is a pickle, which can run any code when it is read, and is not read here; take the model as .safetensors, or",
        "x.PT": ".pt is a pickle",
        "x.bin": ".bin is a pickle",
        "x.gguf": "must be .safetensors, found .gguf; quantised models cannot be trained",
        "x.txt": "must be .safetensors, found .txt",
        "broken.safetensors": f"{tmp_path}/broken.safetensors: cannot be read as safetensors (",
    }.items():
        (tmp_path / name).write_bytes(b"no such file")
        [problem] = base_model_problems(str(tmp_path / name), PARTS)
        assert problem.startswith(expected)
        with pytest.raises(ValueError, match=re.escape(expected)):
            BaseModel("BASE", str(tmp_path / name))
    [problem] = base_model_problems(str(tmp_path / "none.safetensors"), PARTS)
    assert problem == f"{tmp_path}/none.safetensors: there is no such file; check the name"
    [problem] = base_model_problems("https://host/model.ckpt", PARTS)
    assert problem == "https:/host/model.ckpt: there is no such file; check the name"
    (tmp_path / "large.safetensors").write_bytes((40 << 20).to_bytes(8, "little") + bytes(41 << 20))
    [problem] = base_model_problems(str(tmp_path / "large.safetensors"), PARTS)
    assert problem.endswith("its header has 41,943,040 bytes, and at most 33,554,432 are read")


@NEEDS_VOCABULARY
@pytest.mark.parametrize(
    ("family", "about", "marks", "beside", "expected"),
    [
        ("sd1", {}, [], None, "epsilon"),
        ("sd1", {}, [], "model: {params: {parameterization: v}}", "v_prediction"),
        ("sd2", {"modelspec.prediction_type": "v"}, [], None, "v_prediction"),
        ("sd2", {"modelspec.prediction_type": "epsilon"}, [], None, "epsilon"),
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-512"}, [], None, "epsilon"),
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-768-v"}, [], None, "v_prediction"),
        ("sd2", {}, [], "model: {params: {parameterization: v}}", "v_prediction"),
        ("sd2", {}, [], "model: {target: x, params: {linear_start: 0.1}}", "epsilon"),
        ("sdxl", {}, [], None, "epsilon"),
        ("sdxl", {}, ["v_pred"], None, "v_prediction"),
        ("sdxl", {}, ["v_pred", "ztsnr"], None, "v_prediction"),
        ("sdxl", {"modelspec.prediction_type": "v"}, [], None, "v_prediction"),
        ("sd1", {}, ["v_pred", "ztsnr"], None, "v_prediction"),
    ],
)
def test_what_a_file_predicts_is_found_out(family, about, marks, beside, expected, tmp_path):
    tensors = tensors_of(family) | {mark: torch.zeros(0) for mark in marks}
    save_file(tensors, tmp_path / "x.safetensors", about)
    if beside is not None:
        (tmp_path / "x.yaml").write_text(beside)
    assert list(base_model_problems(str(tmp_path / "x.safetensors"), PARTS)) == []
    sampler = BaseModel("BASE", str(tmp_path / "x.safetensors")).sampler
    assert sampler.config.prediction_type == expected
    assert bool(sampler.config.get("rescale_betas_zero_snr")) == ("ztsnr" in marks)
    assert sampler.config.get("timestep_spacing") == ("trailing" if "ztsnr" in marks else "leading")


@NEEDS_VOCABULARY
def test_a_stable_diffusion_2_that_does_not_say_what_it_predicts_is_asked_about(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(tensors_of("sd2"), path)
    [problem] = base_model_problems(str(path), PARTS)
    assert problem.startswith(
        "is a Stable Diffusion 2, and does not say whether it predicts velocity (of 768 pixels) or noise (the base of 512)"
    )
    assert "x.yaml beside it" in problem
    assert "model: {params: {parameterization: v}} (or eps)" in problem
    with pytest.raises(ValueError, match="does not say whether it predicts velocity"):
        BaseModel("BASE", str(path))
    for text in ("model: {params: {parameterization: x0}}", "[", "model: 1", "a: 1"):
        (tmp_path / "x.yaml").write_text(text)
        [problem] = base_model_problems(str(path), PARTS)
        assert (
            problem
            == "the config beside it, x.yaml, must hold model: {params: {parameterization: v}} or eps, as configs of the original code do"
        )
    save_file(load_file(path), path, {"modelspec.prediction_type": "rf"})
    [problem] = base_model_problems(str(path), PARTS)
    assert problem == "its header says modelspec.prediction_type = rf; known are epsilon and v"


def test_inpainting_is_found_out_by_its_channels(tmp_path):
    """That of Stable Diffusion 2 was made of the base that predicts noise."""
    tensors = {UNET: (8, 9, 3, 3), "cond_stage_model.model.ln_final.weight": (8,)}
    single = open_single_file(Path(header_only(tmp_path / "x.safetensors", *tensors, **tensors)), "x")
    assert single.is_inpainting
    from trainers.single_file.prediction import prediction_type

    assert prediction_type(single) == "epsilon"


# --- the vocabulary


def test_without_the_package_the_command_that_installs_it_is_said(monkeypatch):
    monkeypatch.setattr(vocabulary, "PACKAGE", "no_such_package_here")
    with pytest.raises(
        FileNotFoundError,
        match=re.escape("a package has it: pip install 'diffloop[single-file]', or pip install open-clip-torch"),
    ):
        vocabulary.find_vocabulary()


def test_another_vocabulary_is_refused(monkeypatch, tmp_path):
    (tmp_path / vocabulary.FILE).write_bytes(b"none")
    monkeypatch.setattr(vocabulary, "find_vocabulary", lambda: tmp_path / vocabulary.FILE)
    with pytest.raises(OSError, match="is not CLIP's vocabulary of 49,408 tokens; install it again"):
        vocabulary.write_tokenizer(tmp_path / "tokenizer", "!")


@NEEDS_VOCABULARY
def test_the_tokens_are_clips(tmp_path):
    base = BaseModel("BASE", str(tiny_single_files.single_file("sdxl")))
    first, second = base.tokenizers()
    assert [first.pad_token_id, second.pad_token_id, second.pad_token] == [49407, 0, "!"]
    rows = [
        tokenizer("A photo, of 12 cats", padding="max_length", max_length=14).input_ids for tokenizer in (first, second)
    ]
    known = [49406, 320, 1125, 267, 539, 272, 273, 3989, 49407]  # by CLIP's own tokenizer
    assert rows == [known + [49407] * 5, known + [0] * 5]
    assert len(first) == 49408
    assert len((base.folder / "tokenizer" / "merges.txt").read_text().splitlines()) == 1 + 49152 - 256 - 2
    assert json.loads((base.folder / "tokenizer" / "vocab.json").read_text())["!"] == 0
    assert not first("a" * 1000, truncation=True, max_length=77).input_ids[77:]
    folder = base.folder
    del base
    assert not folder.exists()


def test_families_are_told_by_their_text_encoders():
    assert [family.title[-1] for family in FAMILIES] == ["L", "2", "1"]


@NEEDS_VOCABULARY
def test_the_lines_that_load_an_lcm_lora_set_it_too(tmp_path):
    from trainers.lcm_lora import LCMLoRAConfig, LCMLoRATrainer

    save_file(tensors_of("sd2"), tmp_path / "x.safetensors", {"modelspec.prediction_type": "epsilon"})
    base, config = BaseModel("BASE", str(tmp_path / "x.safetensors")), LCMLoRAConfig(pretrained_model_name_or_path="x")
    prompts = SimpleNamespace(usage=lambda: {"clip_skip": "", "prepared": ""})
    trainer = SimpleNamespace(usage=LCMLoRATrainer.usage, config=config, prompts=prompts, base_model=base)
    trainer.scheduler_usage = lambda: ""
    lines = LCMLoRATrainer.usage_of(trainer, "out").splitlines()
    assert lines[1] == 'pipeline = StableDiffusionPipeline.from_single_file("x")'
    assert "original_inference_steps=50, prediction_type='epsilon')" in lines[3]


@NEEDS_VOCABULARY
def test_the_lines_that_load_a_lora_set_what_diffusers_does_not_find_out(tmp_path):
    """diffusers takes a Stable Diffusion 2 for one of velocity, and all others for noise."""
    from trainers.common.lora.training import AdapterTrainer

    cases = {
        "sd1": ({}, []), "sd2": ({"modelspec.prediction_type": "epsilon"}, []), "sdxl": ({}, ["v_pred", "ztsnr"]),
        "sd2-v": ({"modelspec.prediction_type": "v"}, []),
    }  # fmt: skip
    lines = {}
    for name, (about, marks) in cases.items():
        tensors = tensors_of(name.removesuffix("-v")) | {mark: torch.zeros(0) for mark in marks}
        save_file(tensors, tmp_path / f"{name}.safetensors", about)
        base = BaseModel("BASE", str(tmp_path / f"{name}.safetensors"))
        trainer = SimpleNamespace(base_model=base, scheduler_changes={}, learned=SimpleNamespace(sampler=base.sampler))
        lines[name] = [base.loading()[:2], AdapterTrainer.scheduler_usage(trainer).partition("\n")[2].rstrip()]
    loaded = "pipeline.scheduler = {}.from_config(pipeline.scheduler.config, prediction_type={!r}{})"
    zero = ", rescale_betas_zero_snr=True, timestep_spacing='trailing'"
    assert lines == {
        "sd1": [("StableDiffusionPipeline", "from_single_file"), ""],
        "sd2": [("StableDiffusionPipeline", "from_single_file"), loaded.format("DDIMScheduler", "epsilon", "")],
        "sdxl": [
            ("StableDiffusionXLPipeline", "from_single_file"),
            loaded.format("EulerDiscreteScheduler", "v_prediction", zero),
        ],
        "sd2-v": [("StableDiffusionPipeline", "from_single_file"), ""],
    }
