"""Single files in training and in scripts, in and out: as with the folder of the same pipeline."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import tiny_single_files
import torch
from marks import slow
from repository import tiny
from run_folders import losses
from safetensors.torch import load_file, save_file
from script_calls import run_script

from scripts import export_single_file, make_class_images, merge_lora, morph, sample, style_transfer
from train import main
from trainers.common.autoencoder.autoencoder import AutoencoderKL
from trainers.common.autoencoder.options import load_autoencoder
from trainers.common.model_files import Grid
from trainers.common.text_to_image.base_model import BaseModel
from trainers.single_file.writing import single_file_of

pytestmark = tiny_single_files.NEEDS_VOCABULARY
FAMILIES = ("sd1", "sd2", "sdxl")


def run(task, base, folder, *overrides):
    options = [
        "base.max_train_steps=2",
        "base.max_train_samples=8",
        f"{task}.valid_batch_size=1",
        f"base.output_dir={folder}",
    ]
    given = [str(tiny(task)), f"{task}.pretrained_model_name_or_path={base}", *options, *overrides]
    return main(given)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """folder_of(family): the same pipeline as the single file's, as a folder."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny_single_files.pipeline(family).save_pretrained(made[family])
        return made[family]

    return make


@pytest.mark.parametrize("family", ["sd1", slow("sdxl")])
def test_a_lora_of_a_file_is_that_of_its_folder(family, folder_of, tmp_path, capsys):
    file = tiny_single_files.single_file(family)
    rates = (
        'lora.learning_rate={"unet": 0.01, "text_encoder": 0.01, "text_encoder_2": 0.01}'
        if family == "sdxl"
        else "lora.use_ema=true"
    )
    for name, base in (("file", file), ("folder", folder_of(family))):
        assert run("lora", base, tmp_path / name, "lora.cache_latents=memory", "base.center_crop=true", rates) == 0
    assert losses(tmp_path / "file") == losses(tmp_path / "folder")
    first, second = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("file", "folder"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    out = capsys.readouterr().out
    kind = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    assert f'pipeline = {kind}.from_single_file("{file}")' in out
    run_script(sample, tmp_path / "file", "--prompt", "a cat", "--steps", "2", "--device", "cpu")
    run_script(
        sample,
        file,
        "--prompt",
        "a cat",
        "--lora",
        tmp_path / "file",
        "--steps",
        "2",
        "--output-dir",
        tmp_path / "drawn",
        "--device",
        "cpu",
    )
    picture = next((tmp_path / "drawn" / "samples").rglob("*.png"))
    run_script(sample, "--again", picture)
    run_script(merge_lora, file, tmp_path / "merged", "--lora", tmp_path / "file")
    run_script(export_single_file, tmp_path / "merged", tmp_path / "merged.safetensors")
    before, after = load_file(file), load_file(tmp_path / "merged.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {re.sub(r".*\.", "", key.removesuffix(".weight")) for key in changed if key.startswith("model.")} == {
        "to_q",
        "to_k",
        "to_v",
        "0",
    }


@pytest.mark.parametrize("family", [slow("sd1"), "sd2", slow("sdxl")])
def test_text_to_image_of_a_file_is_a_whole_pipeline_and_a_file_again(family, folder_of, tmp_path):
    from diffusers import DiffusionPipeline

    file = tiny_single_files.single_file(family)
    for name, base in (("file", file), ("folder", folder_of(family))):
        assert run("text_to_image", base, tmp_path / name, "text_to_image.cache_text=disk") == 0
    pipelines = [DiffusionPipeline.from_pretrained(tmp_path / name) for name in ("file", "folder")]
    for name, part in pipelines[0].components.items():
        if isinstance(part, torch.nn.Module):
            others = pipelines[1].components[name].state_dict()
            assert all(torch.equal(value, others[key]) for key, value in part.state_dict().items())
    assert pipelines[0].tokenizer.get_vocab() == pipelines[1].tokenizer.get_vocab()
    for dtype in ("float32", "float16", "bfloat16"):
        run_script(export_single_file, tmp_path / "file", tmp_path / f"{dtype}.safetensors", "--dtype", dtype)
        made, base = load_file(tmp_path / f"{dtype}.safetensors"), load_file(file)
        assert made.keys() == base.keys()
        assert {value.dtype for name, value in made.items() if name != "v_pred"} == {getattr(torch, dtype)}
        rest = [name for name in made if not name.startswith("model.diffusion_model.") and name != "v_pred"]
        assert all(torch.equal(made[name], base[name].to(made[name].dtype)) for name in rest)
        assert not torch.equal(
            made["model.diffusion_model.out.2.weight"],
            base["model.diffusion_model.out.2.weight"].to(made[rest[0]].dtype),
        )


# --- an autoencoder alone


@pytest.mark.parametrize("prefix", [slow(""), "first_stage_model."])
def test_an_autoencoder_alone_is_scaled_as_the_base_models(prefix, folder_of, tmp_path):
    """As the folder of the same one, with the base's scaling_factor, which its file does not say."""
    tensors = load_file(tiny_single_files.single_file("sdxl"))
    own = {
        name.removeprefix("first_stage_model."): value
        for name, value in tensors.items()
        if name.startswith("first_stage_model.")
    }
    save_file({prefix + name: value for name, value in own.items()}, tmp_path / "vae.safetensors")
    base = tiny_single_files.single_file("sdxl")
    for name, vae in (("alone", tmp_path / "vae.safetensors"), ("whole", base), ("folder", folder_of("sdxl") / "vae")):
        assert run("text_to_image", base, tmp_path / name, f"text_to_image.vae={vae}") == 0
    assert losses(tmp_path / "alone") == losses(tmp_path / "folder") == losses(tmp_path / "whole")
    if prefix:  # a base without an autoencoder
        save_file(
            {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)},
            tmp_path / "without.safetensors",
        )
        vae = f"text_to_image.vae={tmp_path / 'vae.safetensors'}"
        assert run("text_to_image", tmp_path / "without.safetensors", tmp_path / "without", vae) == 0
        assert losses(tmp_path / "without") == losses(tmp_path / "folder")
        assert run("text_to_image", tmp_path / "without.safetensors", tmp_path / "none") == 2
    config = json.loads((tmp_path / "alone" / "vae" / "config.json").read_text())
    assert (config["scaling_factor"], config["force_upcast"]) == (0.13025, True)


def test_an_autoencoder_alone_needs_a_base(tmp_path, capsys):
    own = {
        name: value
        for name, value in load_file(tiny_single_files.single_file("sd1")).items()
        if name.startswith("first_stage_model.")
    }
    save_file(own, tmp_path / "vae.safetensors")
    assert (
        main([str(tiny("conditional_ddpm")), f"conditional_ddpm.vae={tmp_path / 'vae.safetensors'}", "base.channels=3"])
        == 2
    )
    assert (
        "is an autoencoder alone, which does not say its scaling_factor; give a folder with config.json"
        in capsys.readouterr().err
    )


def test_training_of_an_autoencoder_begins_with_that_of_a_file():
    file = tiny_single_files.single_file("sd1")
    found = load_autoencoder("vae.pretrained_model_name_or_path", str(file), Grid(3, 32), trainable=True)
    assert isinstance(found, AutoencoderKL)
    own = tiny_single_files.pipeline("sd1").vae.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in found.state_dict().items())


def test_other_networks_are_in_no_file(tmp_path, capsys):
    options = ["ddpm.model_config=null", f"ddpm.pretrained_model_name_or_path={tiny_single_files.single_file('sd1')}"]
    assert main([str(tiny("ddpm")), *options, f"base.output_dir={tmp_path / 'none'}"]) == 1
    assert "is a Stable Diffusion 1, and holds no UNet2DModel" in capsys.readouterr().err


# --- the other scripts


def test_scripts_that_draw_take_a_file(tmp_path):
    from diffusers import ControlNetModel

    file, drawn = tiny_single_files.single_file("sd1"), ("--device", "cpu", "--steps", "2")
    run_script(make_class_images, file, "a cat", tmp_path / "class", "--number", "2", "--steps", "2")
    pictures = sorted((tmp_path / "class").glob("*.png"))
    assert len(pictures) == 2
    controlnet = ControlNetModel.from_unet(
        tiny_single_files.pipeline("sd1").unet, conditioning_embedding_out_channels=(8, 16, 32)
    )
    controlnet.save_pretrained(tmp_path / "controlnet")
    words = ("--controlnet", tmp_path / "controlnet", "--prompt", "a cat", "--output-dir", tmp_path / "style")
    run_script(style_transfer, file, pictures[0], *words, *drawn)
    assert (tmp_path / "style" / "00000.png").is_file()
    words = ("--prompt", "a cat", "--frames", "3", "--output-dir", tmp_path / "morph")
    run_script(morph, file, *pictures, *words, *drawn, "base.max_train_steps=2", "lora.rank=2")
    assert len(list((tmp_path / "morph" / "frames").glob("*.png"))) == 3


def test_a_file_for_inpainting(tmp_path, capsys):
    """It draws with a picture and a mask, and is no base of a training; exported, it is one again."""
    from PIL import Image

    file = tiny_single_files.write(tmp_path / "inpainting.safetensors", tiny_single_files.pipeline("sd1", channels=9))
    for name, mode, colour in (("image", "RGB", "red"), ("mask", "L", 255)):
        Image.new(mode, (32, 32), colour).save(tmp_path / f"{name}.png")
    drawn = ("--prompt", "a cat", "--steps", "2", "--device", "cpu", "--output-dir", tmp_path / "drawn")
    run_script(sample, file, "--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png", *drawn)
    assert list((tmp_path / "drawn").rglob("00000.png"))
    with pytest.raises(SystemExit, match="the pipeline is for inpainting; give --image and --mask"):
        run_script(sample, file, *drawn)
    assert run("lora", file, tmp_path / "run") == 1
    assert "its UNet sees 9 channels, and latents have 4; give a text-to-image model" in capsys.readouterr().err
    run_script(export_single_file, file, tmp_path / "again.safetensors")
    first, second = load_file(file), load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_is_exported_and_a_lora_is_not(tmp_path):
    base = tiny_single_files.single_file("sd1")
    assert (
        run("text_to_image", base, tmp_path / "run", "base.checkpointing_steps=1", "text_to_image.use_ema=false") == 0
    )
    for name in ("checkpoint-1", "checkpoint-2"):
        run_script(export_single_file, tmp_path / "run" / name, tmp_path / f"{name}.safetensors", "--dtype", "float16")
    run_script(export_single_file, tmp_path / "run", tmp_path / "run.safetensors", "--dtype", "float16")
    first, last, finished = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("checkpoint-1", "checkpoint-2", "run")
    )
    assert all(torch.equal(last[name], finished[name]) for name in finished)
    assert not all(torch.equal(first[name], finished[name]) for name in finished)
    assert run("lora", base, tmp_path / "lora") == 0
    with pytest.raises(
        SystemExit,
        match=r"lora: is a LoRA; bake it into its base first: scripts/merge_lora.py BASE MERGED --lora .*, and give MERGED",
    ):
        run_script(export_single_file, tmp_path / "lora", tmp_path / "none.safetensors")
    for output in ("x.ckpt", "run.safetensors"):
        with pytest.raises(SystemExit, match="must be a new file with the ending .safetensors"):
            run_script(export_single_file, base, tmp_path / output)
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda p: p.register_modules(scheduler=type(p.scheduler)(beta_schedule="linear")),
            "its scheduler has beta_schedule = linear, and readers take scaled_linear",
        ),
        (lambda p: p.scheduler.register_to_config(prediction_type="sample"), "it predicts sample"),
        (
            lambda p: p.vae.register_to_config(scaling_factor=0.5),
            "its vae has scaling_factor = 0.5, and readers take 0.18215",
        ),
        (
            lambda p: p.unet.register_to_config(attention_head_dim=4),
            "its unet has attention_head_dim = 4, and readers take 8",
        ),
        (lambda p: p.unet.register_to_config(act_fn="gelu"), "its unet has act_fn = gelu, and readers take silu"),
        (
            lambda p: setattr(p.text_encoder.config, "hidden_act", "gelu"),
            "its text_encoder has hidden_act = gelu, and readers take quick_gelu",
        ),
        (
            lambda p: p.tokenizer.add_tokens("<cat>"),
            "its tokenizer has 49,409 tokens and rows of 77, and is not CLIP's of 49,408 and 77",
        ),
    ],
)
def test_what_no_reader_would_know_is_refused(change, expected):
    pipeline = tiny_single_files.pipeline("sd1")
    change(pipeline)
    with pytest.raises(
        ValueError, match=re.escape(f"RUN: {expected}; a single file of Stable Diffusion 1 cannot say so")
    ):
        single_file_of(pipeline, "x", "RUN", torch.float32)


def test_numbers_too_large_for_half_precision_are_not_exported():
    pipeline = tiny_single_files.pipeline("sd1")
    pipeline.unet.conv_out.bias.data[0] = 1e6
    with pytest.raises(
        ValueError,
        match=re.escape(
            "RUN: model.diffusion_model.out.2.bias holds numbers that are not finite in torch.float16; take --dtype float32"
        ),
    ):
        single_file_of(pipeline, "x", "RUN", torch.float16)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_header_says_architecture_and_prediction(family):
    about = single_file_of(tiny_single_files.pipeline(family), "mine", "RUN", torch.float16)[1]
    architecture = {
        "sd1": "stable-diffusion-v1",
        "sd2": "stable-diffusion-v2-768-v",
        "sdxl": "stable-diffusion-xl-v1-base",
    }[family]
    assert about == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "mine",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "v" if family == "sd2" else "epsilon",
    }


def test_velocity_and_zero_snr_have_their_empty_tensors():
    change = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    tensors, about = single_file_of(tiny_single_files.pipeline("sdxl", **change), "x", "RUN", torch.float16)
    assert [tensors[name].numel() for name in ("v_pred", "ztsnr")] == [0, 0]
    assert about["modelspec.prediction_type"] == "v"
    plain = single_file_of(tiny_single_files.pipeline("sdxl"), "x", "RUN", torch.float16)[0]
    assert {"v_pred", "ztsnr"}.isdisjoint(plain)


# --- options


def test_options_that_a_file_does_not_have(tmp_path, capsys):
    file = tiny_single_files.single_file("sd1")
    assert run("lora", file, tmp_path / "run", "lora.revision=main", "lora.variant=fp16", "lora.clip_skip=2") == 2
    error = capsys.readouterr().err
    assert 'lora.revision = "main": has an effect with a name on the hub only, and this is on disk' in error
    assert 'lora.variant = "fp16": has an effect with folders and hub names only, and this is a single file' in error
    assert "lora.clip_skip = 2: the text encoder has 2 layers; give at most 1" in error


def test_a_file_of_another_content_is_another_base(tmp_path):
    """The key of cached texts and latents follows a file's content, and not its name."""
    first = tiny_single_files.single_file("sd1")
    shutil.copyfile(first, tmp_path / "moved.safetensors")
    changed = load_file(first)
    changed["cond_stage_model.transformer.text_model.final_layer_norm.bias"] += 1
    save_file(changed, tmp_path / "changed.safetensors")
    names = "text_encoder", "tokenizer"
    digests = [
        BaseModel("BASE", str(path)).digest(*names)
        for path in (first, tmp_path / "moved.safetensors", tmp_path / "changed.safetensors")
    ]
    assert digests[0] == digests[1] != digests[2]


# --- files of pipelines that began with a single file


@pytest.mark.parametrize("task", ["text_to_image", slow("lora")])
def test_pipelines_have_the_hubs_names_and_the_files_precision(task, tmp_path):
    """What was not trained or merged is in the file's half precision, by names that transformers 4 reads, with vocabularies."""
    run_script(
        export_single_file, tiny_single_files.single_file("sdxl"), tmp_path / "half.safetensors", "--dtype", "float16"
    )
    half, folder = tmp_path / "half.safetensors", tmp_path / "pipeline"
    if task == "lora":
        rates = 'lora.learning_rate={"unet": 0.01, "text_encoder": 0.01, "text_encoder_2": 0.01}'
        assert run("lora", half, tmp_path / "run", rates) == 0
        run_script(merge_lora, half, folder, "--lora", tmp_path / "run")
    else:
        assert run("text_to_image", half, folder) == 0
    for name in ("tokenizer", "tokenizer_2"):
        assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= {
            path.name for path in (folder / name).iterdir()
        }
    first, second = (load_file(folder / name / "model.safetensors") for name in ("text_encoder", "text_encoder_2"))
    assert all(key.startswith("text_model.") for key in first)
    assert {key.partition(".")[0] for key in second} == {"text_model", "text_projection"}
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for tensors in (first, second, vae) for value in tensors.values()} == {torch.float16}
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*.safetensors")} == {
        (folder / "model_index.json").stat().st_mode & 0o777
    }
    assert str(tmp_path) not in (folder / "model_index.json").read_text()
    run_script(
        sample, folder, "--prompt", "a cat", "--steps", "1", "--device", "cpu", "--output-dir", tmp_path / "drawn"
    )
    run_script(export_single_file, folder, tmp_path / "again.safetensors", "--dtype", "float16")
    before, after = load_file(half), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("first_stage_model."))
