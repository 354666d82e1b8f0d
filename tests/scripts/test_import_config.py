"""scripts/import_config.py: kohya's files and command lines of training scripts become configs that our check accepts."""

from __future__ import annotations

import re
import shutil
import tomllib

import pytest
import torch
from image_folders import save
from run_folders import read_metrics
from safetensors.torch import save_file
from script_calls import run_script
from tiny_models import model

import datasets_lib
from datasets_lib.errors import InputError, MissingFileError
from scripts import import_config
from train import main as train
from trainers.engine.config.config import load_config
from trainers.engine.config.files import read_config_file
from trainers.inference.foreign_configs import diffusers_table, kohya, kohya_table, readers
from trainers.inference.foreign_configs.diffusers_scripts import SCRIPTS
from trainers.inference.foreign_configs.importing import import_config as imported
from trainers.inference.foreign_configs.kohya_data_table import DATA
from trainers.inference.foreign_configs.kohya_rules import CONVOLUTIONS, TEXT_LAYERS, TRANSFORMER
from trainers.inference.foreign_configs.written import value_text


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with pictures of a cat, of a dog and of the class, as kohya's folders and as plain ones."""
    for name in ("cat", "dog", "class", "data/10_ohwx cat", "data/3_dog", "reg/1_cat", "two/1_cat", "two/1_dog"):
        save(tmp_path / name / "0.png", 40)
        save(tmp_path / name / "1.png", 80)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(text, name="in.toml"):
    from pathlib import Path

    path = Path(name)
    path.write_text(text)
    return path


def made(path, *arguments):
    """The sections that the script writes, which our check accepts; comments behind the lines, and what is left out."""
    run_script(import_config, path, "out.yaml", *arguments)
    load_config("out.yaml", data_problems=datasets_lib.problems)
    return parsed("out.yaml")


def parsed(name):
    from pathlib import Path

    text = Path(name).read_text()
    left = dict(re.findall(r"^#   ([^ :]+)(?: = [^:]*)?: (.*)$", text, re.MULTILINE))
    return read_config_file(Path(name)), left


def command(script, options, launch="accelerate launch"):
    return written(f"{launch} {script}.py {options}", "train.sh")


KOHYA = """
[model]
pretrained_model_name_or_path = "{base}"
v2 = false
clip_skip = 2
max_token_length = 150

[network]
network_module = "networks.lora"
network_dim = 8
network_alpha = 4
network_args = ["conv_dim=8", "conv_alpha=4", "rank_dropout=0.1"]
unet_lr = 1e-4
text_encoder_lr = 5e-5
learning_rate = 1e-3

[training]
output_dir = "output"
output_name = "ohwx"
max_train_epochs = 10
train_batch_size = 2
gradient_accumulation_steps = 2
mixed_precision = "bf16"
seed = 42
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.1", "betas=(0.9, 0.99)", "decouple=True"]
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 100
min_snr_gamma = 5
noise_offset = 0.05
prior_loss_weight = 0.5
cache_latents = true
cache_latents_to_disk = true
save_every_n_epochs = 1
dataset_config = "data.toml"
log_with = "wandb"
wandb_api_key = "KEY-OF-MINE"
huggingface_token = "hf_OFMINE"
fp8_base = true
"""
SUBSETS = """
[general]
shuffle_caption = true
keep_tokens = 1
caption_extension = ".txt"

[[datasets]]
resolution = 512
batch_size = 4
enable_bucket = true

[[datasets.subsets]]
image_dir = "cat"
class_tokens = "ohwx cat"
num_repeats = 10

[[datasets.subsets]]
image_dir = "dog"
class_tokens = "dog"
caption_prefix = "photo, "
keep_tokens = 2
color_aug = true

[[datasets.subsets]]
image_dir = "class"
class_tokens = "cat"
is_reg = true
num_repeats = 2
"""


def test_a_lora_with_subsets(folder):
    written(SUBSETS, "data.toml")
    document, left = made(written(KOHYA.format(base=model("sd1-long"))))
    assert document["base"] == {
        "output_dir": "output/ohwx",
        "seed": 42,
        "num_epochs": 10,
        "train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "mixed_precision": "bf16",
        "save_model_epochs": 1,
        "logger": "wandb",
        "train_data_dir": [
            {"path": "cat", "caption": "ohwx cat", "repeats": 10},
            {"path": "dog", "caption": "dog", "trigger_word": "photo"},
            {"path": "class", "caption": "cat", "regularization": True},
        ],
        "shuffle_tags": True,
        "keep_tags": 1,
        "resolution": 512,
        "interpolation": "lanczos",
        "center_crop": True,
    }
    assert document["lora"] == {
        "learning_rate": {"unet": 1e-4, "text_encoder": 5e-5},
        "lr_scheduler": "cosine_with_restarts",
        "lr_warmup_steps": 100,
        "lr_num_cycles": 3,
        "optimizer": "adamw",
        "adam_beta1": 0.9,
        "adam_beta2": 0.99,
        "adam_weight_decay": 0.1,
        "pretrained_model_name_or_path": str(model("sd1-long")),
        "max_caption_tokens": 150,
        "clip_skip": 1,
        "snr_gamma": 5.0,
        "noise_offset": 0.05,
        "prior_loss_weight": 0.5,
        "cache_latents": "disk",
        "rank": 8,
        "lora_alpha": 4.0,
        "target_modules": TRANSFORMER + CONVOLUTIONS,
        "init_lora_weights": "kaiming",
        "train_text_encoder": True,
        "text_encoder_target_modules": TEXT_LAYERS,
    }
    assert left.keys() == {
        "v2", "network_module", "network_args.conv_alpha", "network_args.rank_dropout", "optimizer_args.decouple",
        "train_batch_size", "learning_rate", "dataset_config", "wandb_api_key", "huggingface_token", "fp8_base",
        "general.caption_extension", "datasets.1.enable_bucket", "datasets.1.subsets.2.keep_tokens",
        "datasets.1.subsets.2.color_aug", "datasets.1.subsets.3.num_repeats",
    }  # fmt: skip
    assert left["learning_rate"] == "has no effect beside unet_lr and text_encoder_lr"
    assert "general.keep_tokens was taken" in left["datasets.1.subsets.2.keep_tokens"]
    assert left["huggingface_token"].endswith("`hf auth login`")


def test_no_secret_and_no_other_value_of_an_unknown_option_is_written(folder, capsys):
    written(SUBSETS, "data.toml")
    path = written(KOHYA.format(base=model("sd1-long")) + 'my_password = "SESAME"\n')
    run_script(import_config, path, "out.yaml")
    run_script(import_config, path)
    secrets = f"export TOKEN=hf_EXPORTED\n{command('train_text_to_image_lora', LINE).read_text()} --hub_token=$TOKEN"
    run_script(import_config, written(f"{secrets} --other_token hf_OTHER", "train.sh"))
    shown = (folder / "out.yaml").read_text() + "".join(capsys.readouterr())
    for secret in ("KEY-OF-MINE", "hf_", "OFMINE", "SESAME", "EXPORTED", "OTHER"):
        assert secret not in shown
    for name in ("wandb_api_key", "huggingface_token", "my_password", "hub_token", "other_token"):
        assert f"#   {name}: " in shown


LINE = "--pretrained_model_name_or_path=someone/base --train_data_dir=cat"


def test_stable_diffusion_xl_with_buckets(folder):
    options = f"""
        pretrained_model_name_or_path = "{model("sdxl")}"
        network_module = "networks.lora"
        network_train_unet_only = true
        text_encoder_lr = [1e-5, 2e-5]
        cache_text_encoder_outputs = true
        clip_skip = 2
        no_half_vae = true
        max_train_steps = 500
        lr_scheduler = "cosine"
        lr_warmup_steps = 0.1
        train_data_dir = "data"
        resolution = "1024,768"
        enable_bucket = true
        min_bucket_reso = 512
        max_bucket_reso = 2048
        bucket_reso_steps = 32
        bucket_no_upscale = true
        random_crop = false
        flip_aug = true
        sample_every_n_steps = 100
        sample_sampler = "euler_a"
    """
    document, left = made(written(options))
    base, lora = document["base"], document["lora"]
    assert (base["resolution"], base["bucket_max_pixels"]) == (886, 1024 * 768)  # 886^2 is just below
    assert (base["buckets"], base["bucket_step"], base["center_crop"], base["random_flip"]) == (True, 32, True, True)
    assert (base["train_data_dir"], base["folder_repeats"]) == ("data", True)
    assert (base["max_train_steps"], base["train_batch_size"], base["valid_steps"]) == (500, 1, 100)
    assert (lora["learning_rate"], lora["lr_warmup_steps"], lora["train_text_encoder"]) == (2e-6, 50, False)
    assert (lora["rank"], lora["lora_alpha"], lora["cache_text"]) == (4, 1.0, "memory")
    assert "clip_skip" not in lora
    assert left["clip_skip"] == "has no effect there for Stable Diffusion XL"
    assert left.keys() >= {"min_bucket_reso", "max_bucket_reso", "bucket_no_upscale", "sample_sampler", "no_half_vae"}
    assert left["text_encoder_lr"] == "is of the text encoder, which is not trained"


def test_each_text_encoder_of_xl_has_its_rate(folder):
    options = f'pretrained_model_name_or_path = "{model("sdxl")}"\ntrain_data_dir = "data"\nresolution = 64\n'
    document, _ = made(written(f"{options}text_encoder_lr = [1e-5, 2e-5]\nlearning_rate = 1e-4"))
    assert document["lora"]["learning_rate"] == {"unet": 1e-4, "text_encoder": 1e-5, "text_encoder_2": 2e-5}
    (folder / "out.yaml").unlink()
    document, _ = made(written(f"{options}unet_lr = 1e-4\ntext_encoder_lr = 0"))
    assert (document["lora"]["learning_rate"], "train_text_encoder" in document["lora"]) == (1e-4, False)


FLAT = 'pretrained_model_name_or_path = "{base}"\nnetwork_dim = 4\nresolution = "64"\ntrain_data_dir = "data"\n'


def test_folders_with_repeats_and_pictures_of_the_class(folder):
    document, _ = made(written(FLAT.format(base=model("sd1")) + 'reg_data_dir = "reg"\nenable_bucket = true'))
    base = document["base"]
    assert (base["train_data_dir"], base["folder_repeats"], base["resolution"]) == ("data", True, 64)
    assert (base["class_data_dir"], base["class_caption"]) == ("reg/1_cat", "cat")
    assert "buckets" not in base
    assert (base["max_train_steps"], base["mixed_precision"]) == (1600, "no")


def test_several_folders_of_the_class_become_tables(folder):
    document, left = made(written(FLAT.format(base=model("sd1")) + 'reg_data_dir = "two"\ndataset_repeats = 1'))
    assert document["base"]["train_data_dir"] == [
        {"path": "data/10_ohwx cat", "caption": "ohwx cat", "repeats": 10},
        {"path": "data/3_dog", "caption": "dog", "repeats": 3},
        {"path": "two/1_cat", "caption": "cat", "regularization": True},
        {"path": "two/1_dog", "caption": "dog", "regularization": True},
    ]
    assert "folder_repeats" not in document["base"]
    assert left.keys() == {"dataset_repeats"}


def test_a_folder_of_the_class_without_numbers_has_no_effect(folder):
    document, left = made(written(FLAT.format(base=model("sd1")) + 'reg_data_dir = "cat"'))
    assert "class_data_dir" not in document["base"]
    assert left == {"reg_data_dir": "has no folder like 1_name, so it has no effect there"}


def test_fine_tuning(folder):
    options = f"""
        pretrained_model_name_or_path = "{model("sd2")}"
        v2 = true
        v_parameterization = true
        train_data_dir = "cat"
        in_json = "meta.json"
        dataset_repeats = 4
        resolution = [64, 64]
        learning_rate = 5e-6
        train_text_encoder = true
        max_grad_norm = 0.0
        full_bf16 = true
        masked_loss = true
    """
    document, left = made(written(options))
    assert document["base"]["train_data_dir"] == [{"path": "cat", "repeats": 4}]
    task = document["text_to_image"]
    assert (task["learning_rate"], task["prediction_type"], task["max_grad_norm"]) == (5e-6, "v_prediction", None)
    assert (task["use_ema"], task["lr_scheduler"], task["lr_warmup_steps"]) == (False, "constant", 0)
    assert left.keys() == {"v2", "in_json", "train_text_encoder", "full_bf16", "masked_loss"}


@pytest.mark.parametrize(
    ("options", "expected", "named"),
    [
        ('optimizer_type = "DAdaptAdam"\noptimizer_args = ["d0=1"]', {}, {"optimizer_type", "optimizer_args.d0"}),
        ("use_8bit_adam = false", {}, {"use_8bit_adam"}),
        ("clip_skip = 1", {"clip_skip": None}, set()),
        ('loss_type = "huber"\nhuber_c = 0.2\nhuber_scale = 0.5\nhuber_schedule = "constant"',
         {"loss_type": "huber", "huber_c": 0.1}, {"huber_schedule"}),
        ('loss_type = "smooth_l1"\nhuber_c = 0.2', {}, {"loss_type", "huber_c"}),
        ("min_timestep = 100\nmax_timestep = 900", {"timestep_range": [100, 900]}, set()),
        ("min_snr_gamma = 0", {"snr_gamma": None}, set()),
        ("lr_warmup_steps = 10", {}, {"lr_warmup_steps"}),
        ('max_train_epochs = 3\nlr_scheduler = "linear"\nlr_warmup_steps = "5%"', {}, {"lr_warmup_steps"}),
        ("network_dropout = 0.1\nscale_weight_norms = 1.0", {"lora_dropout": 0.1}, {"scale_weight_norms"}),
        ("keep_tokens = 2", {}, {"keep_tokens"}),
        ("seed = -1.5", {}, {"seed"}),
        ("zero_terminal_snr = true\nv_parameterization = true",
         {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, set()),
        ("ip_noise_gamma = 0.1\nmultires_noise_iterations = 6", {"input_perturbation": 0.1},
         {"multires_noise_iterations"}),
        ("cache_text_encoder_outputs = true", {}, {"cache_text_encoder_outputs"}),
        ("sample_every_n_steps = 5\nsample_every_n_epochs = 2", {}, {"sample_every_n_steps"}),
        ('caption_extension = ".cap"\ncaption_separator = ";"', {}, {"caption_extension", "caption_separator"}),
        ('resize_interpolation = "area"', {}, {"resize_interpolation"}),
    ],
)  # fmt: skip
def test_options_of_kohya(folder, options, expected, named):
    document, left = made(written(FLAT.format(base=model("sd1-long")) + options))
    assert {name: document["lora"].get(name) for name in expected} == expected
    assert ("lr_warmup_steps" in document["lora"]) == ("lr_warmup_steps" not in options)  # 0 is their default
    assert left.keys() == named


def test_prompts_of_a_file(folder):
    written("# mine\na cat --w 512 --s 20 --n blurry\n\na dog, wet - --n blurry --s 20 --l 7\n", "prompts.txt")
    document, _ = made(written(FLAT.format(base=model("sd1")) + 'sample_prompts = "prompts.txt"'))
    lora = document["lora"]
    assert (lora["validation_prompts"], lora["valid_batch_size"]) == (["a cat", "a dog, wet -"], 2)
    assert (lora["negative_prompt"], lora["num_inference_steps"]) == ("blurry", 20)
    assert "guidance_scale" not in lora
    (folder / "out.yaml").unlink()
    _, left = made(written(FLAT.format(base=model("sd1")) + 'sample_prompts = "none.txt"'))
    assert left == {"sample_prompts": "there is no such file; write its texts here"}


def test_kohyas_command_line_wins_over_its_file(folder):
    written(FLAT.format(base=model("sd1")) + "seed = 1\nmax_train_steps = 5", "options.toml")
    line = "--config_file options --seed 2 --network_args conv_dim=4 conv_alpha=1 --sdpa"
    document, left = made(command("train_network", line, "accelerate launch --mixed_precision bf16 --num_processes=2"))
    assert (document["base"]["seed"], document["base"]["max_train_steps"]) == (2, 5)
    assert document["base"]["mixed_precision"] == "bf16"
    assert document["lora"]["target_modules"] == TRANSFORMER + CONVOLUTIONS
    assert left.keys() == {"config_file", "sdpa", "launch.num_processes", "network_args.conv_alpha"}


DREAM = "--instance_data_dir=cat --instance_prompt='a photo of sks cat' --max_train_steps=400"
USUAL = {"lr_scheduler": "constant", "learning_rate": 1e-4}
OF_SCRIPTS = {
    "train_text_to_image": (
        "text_to_image", "--train_data_dir=cat --use_ema --dream_training --validation_prompts 'a cat' 'a dog'",
        {"num_epochs": 100, "resolution": 512, "train_data_dir": "cat", "valid_epochs": 5,
         "interpolation": "lanczos"},
        USUAL | {"use_ema": True, "dream_detail_preservation": 1.0, "validation_prompts": ["a cat", "a dog"],
                 "valid_batch_size": 2}, set(),
    ),
    "train_text_to_image_sdxl": (
        "text_to_image", "--train_data_dir=cat --proportion_empty_prompts=0.2 --validation_prompt='a cat'",
        {"num_epochs": 100, "resolution": 1024, "train_data_dir": "cat", "valid_epochs": 1,
         "interpolation": "lanczos"},
        USUAL | {"use_ema": False, "caption_dropout": 0.2, "validation_prompts": ["a cat"], "valid_batch_size": 4},
        set(),
    ),
    "train_text_to_image_lora": (
        "lora", "--train_data_dir=cat --max_train_steps=10 --num_train_epochs=3 --lr_scheduler=cosine --lr_warmup_steps=0 "
        "--validation_epochs=2 --resume_from_checkpoint=latest --report_to=all",
        {"max_train_steps": 10, "resolution": 512, "train_data_dir": "cat",
         "interpolation": "lanczos", "resume_from_checkpoint": "latest", "logger": "both"},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 0, "rank": 4},
        {"num_train_epochs", "validation_epochs"},
    ),
    "train_text_to_image_lora_sdxl": (
        "lora", "--train_data_dir=cat --train_text_encoder --rank 8 --debug_loss --random_flip",
        {"num_epochs": 100, "resolution": 1024, "train_data_dir": "cat",
         "interpolation": "lanczos", "random_flip": True},
        {"lr_scheduler": "constant", "rank": 8, "train_text_encoder": True}, {"debug_loss"},
    ),
    "train_dreambooth": (
        "text_to_image", f"{DREAM} --with_prior_preservation --class_data_dir=class --class_prompt='a cat' "
        "--prior_loss_weight=0.5 --num_class_images=200 --train_text_encoder --offset_noise",
        {"max_train_steps": 400, "train_batch_size": 4, "resolution": 512, "train_data_dir": "cat",
         "caption": "a photo of sks cat", "class_data_dir": "class", "class_caption": "a cat"},
        {"lr_scheduler": "constant", "learning_rate": 5e-6, "use_ema": False, "prior_loss_weight": 0.5,
         "noise_offset": 0.1}, {"num_class_images", "train_text_encoder"},
    ),
    "train_dreambooth_lora": (
        "lora", f"{DREAM} --class_data_dir=class --class_prompt='a cat' --pre_compute_text_embeddings --lora_dropout=0.1",
        {"max_train_steps": 400, "train_batch_size": 4, "resolution": 512, "train_data_dir": "cat",
         "caption": "a photo of sks cat", "interpolation": "lanczos"},
        {"lr_scheduler": "constant", "learning_rate": 5e-4, "rank": 4, "cache_text": "memory", "lora_dropout": 0.1},
        {"class_data_dir", "class_prompt"},
    ),
    "train_dreambooth_lora_sdxl": (
        "lora", f"{DREAM} --train_text_encoder --repeats=5 --use_dora --optimizer=AdamW --snr_gamma=5.0",
        {"max_train_steps": 400, "train_batch_size": 4, "resolution": 1024,
         "train_data_dir": [{"path": "cat", "repeats": 5}], "caption": "a photo of sks cat",
         "interpolation": "lanczos"},
        {"lr_scheduler": "constant", "learning_rate": {"unet": 1e-4, "text_encoder": 5e-6, "text_encoder_2": 5e-6},
         "adam_weight_decay": 1e-4, "rank": 4, "train_text_encoder": True, "use_dora": True, "optimizer": "adamw",
         "snr_gamma": 5.0}, set(),
    ),
    "train_unconditional": (
        "ddpm", "--train_data_dir=cat --ema_max_decay=0.99 --use_ema --overwrite_output_dir --save_images_epochs 5",
        {"num_epochs": 100, "train_data_dir": "cat", "valid_epochs": 5, "save_model_epochs": 10},
        {"lr_warmup_steps": 500, "adam_beta1": 0.95, "adam_weight_decay": 1e-6, "use_ema": True,
         "ema_max_decay": 0.99}, {"overwrite_output_dir"},
    ),
    "train_lcm_distill_lora_sd_wds": (
        "lcm_lora", "--train_data_dir=cat --lora_target_modules='to_q, to_k' --cast_teacher_unet --max_train_steps=9",
        {"max_train_steps": 9, "resolution": 512, "train_data_dir": "cat"},
        {"lr_scheduler": "constant", "lora_alpha": 64.0, "loss_type": "l2", "target_modules": ["to_q", "to_k"]},
        {"cast_teacher_unet"},
    ),
    "train_lcm_distill_lora_sdxl": (
        "lcm_lora", "--train_data_dir=cat --max_train_steps=9 --w_max=12 --loss_type=huber --lora_rank=32",
        {"max_train_steps": 9, "resolution": 1024, "train_data_dir": "cat"},
        {"lr_scheduler": "constant", "learning_rate": 1e-6, "lora_alpha": 64.0, "loss_type": "huber", "w_min": 3.0,
         "w_max": 12.0, "rank": 32}, set(),
    ),
    "train_lcm_distill_lora_sdxl_wds": (
        "lcm_lora", "--train_data_dir=cat --max_train_steps=9 --interpolation_type=lanczos",
        {"max_train_steps": 9, "resolution": 1024, "train_data_dir": "cat", "interpolation": "lanczos"},
        {"lr_scheduler": "constant", "lora_alpha": 64.0, "loss_type": "l2", "w_min": 3.0}, set(),
    ),
}  # fmt: skip


def test_every_script_of_diffusers_is_tested():
    assert OF_SCRIPTS.keys() == SCRIPTS.keys()


@pytest.mark.parametrize("script", OF_SCRIPTS)
def test_scripts_of_diffusers(folder, script):
    task, line, base, options, named = OF_SCRIPTS[script]
    source = model("sdxl" if "sdxl" in script else "sd1")
    name = "pretrained_teacher_model" if task == "lcm_lora" else "pretrained_model_name_or_path"
    line += "" if task == "ddpm" else f" --{name}={source}"
    document, left = made(command(script, line))
    options = options if task == "ddpm" else options | {"pretrained_model_name_or_path": str(source)}
    assert (document["base"], document[task]) == (base, options)
    assert left.keys() == named


def test_a_shell_script(folder):
    text = f"""#!/bin/bash
    # this isn't read: --seed=9
    export MODEL="{model("sd1")}"  # a comment
    NAME=cat OUT="runs/$NAME number 1"
    pip install diffusers; cd examples && \\
    CUDA_VISIBLE_DEVICES=0 accelerate launch --mixed_precision="fp16" --multi_gpu examples/train_text_to_image_lora.py \\
      --pretrained_model_name_or_path=$MODEL --train_data_dir "$NAME" \\
      # --seed=3
      --output_dir=${{OUT}} --center_crop \\
      --validation_prompt='a cat; a "dog" & $5' > log.txt 2>&1
    echo done
    """
    document, left = made(written(text, "train.sh"))
    base = document["base"]
    assert (base["output_dir"], base["train_data_dir"], base["mixed_precision"]) == ("runs/cat number 1", "cat", "fp16")
    assert base["center_crop"] is True
    assert document["lora"]["validation_prompts"] == ['a cat; a "dog" & $5']
    assert document["lora"]["pretrained_model_name_or_path"] == str(model("sd1"))
    assert left == {"launch.multi_gpu": "give it to accelerate launch as before"}


@pytest.mark.parametrize("value", ["$(touch x)", "`touch x`", '"$(touch x)"'])
def test_nothing_is_run(folder, value):
    with pytest.raises(InputError, match=r"train\.sh: .*is computed by the shell, and nothing is run here"):
        imported(command("train_text_to_image_lora", f"{LINE} --output_dir={value}"))
    assert not (folder / "x").exists()


def test_a_variable_of_elsewhere_stays_and_is_a_problem(folder, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(import_config, command("train_text_to_image_lora", f"{LINE} --output_dir=$OUT"), "out.yaml")
    assert ended.value.code == 1
    assert 'base.output_dir = "$OUT": environment variables are not read' in capsys.readouterr().err
    assert read_config_file(folder / "out.yaml")["base"]["output_dir"] == "$OUT"


def test_a_pickle_is_taken_over_and_the_check_says_what_to_do(folder, capsys):
    (folder / "model.ckpt").write_bytes(b"")
    path = written(FLAT.format(base="model.ckpt"))
    with pytest.raises(SystemExit) as ended:
        run_script(import_config, path)
    out, error = capsys.readouterr()
    assert ended.value.code == 1
    assert "pretrained_model_name_or_path: model.ckpt  # is a pickle, which is not read; take it as .safetensors" in out
    assert "lora.pretrained_model_name_or_path" in error
    assert ".ckpt is a pickle, which can run any code when it is read" in error


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_single_file_is_taken_over_and_says_its_family(family, folder):
    """By its tensors' names, and not by its own name."""
    first, text = "model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.text_model.x"
    xl = [
        "conditioner.embedders.0.transformer.x",
        "conditioner.embedders.1.model.x",
        "model.diffusion_model.label_emb.0.0.weight",
    ]
    tensors = dict.fromkeys([text] if family == "sd1" else xl, (1,)) | {first: (8, 4, 3, 3)}
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, folder / "model.safetensors")
    translation = kohya.translate(tomllib.loads(FLAT.format(base="model.safetensors")), {}, folder)
    assert translation.is_xl == (family == "sdxl")
    assert not [note for note in translation.notes if note.startswith("taken for Stable Diffusion")]
    assert translation.entries["task.pretrained_model_name_or_path"].remark == ""


PLAUSIBLE = {
    "network_module": "networks.lora", "network_args": ["conv_dim=4"], "optimizer_args": ["eps=1e-8"],
    "lr_scheduler": "cosine", "log_with": "wandb", "report_to": "wandb", "logger": "wandb", "sample_sampler": "ddim",
    "validation_scheduler": "DDPMScheduler", "resize_interpolation": "lanczos", "interpolation_type": "lanczos",
    "image_interpolation_mode": "bicubic", "loss_type": "huber", "resolution": 64, "mixed_precision": "bf16",
}  # fmt: skip
KINDS = {
    readers.flag: True, readers.whole: 2, readers.above_zero: 2, readers.one_less: 2, kohya_table.as_v: True,
    DATA["random_crop"].read: True,
}  # fmt: skip


def plausible(name, row):
    number = row.read in (readers.number, readers.unset_at_zero, kohya_table.minutes, DATA["caption_dropout_rate"].read)
    number = number or row.read is kohya_table.part_held_out
    return PLAUSIBLE.get(name, KINDS.get(row.read, 0.5 if number else "x"))


def names_of(text):
    """All names there that a written config mentions: behind lines, as the key of a line, or as left out."""
    above, _, below = text.partition("# Left out:")
    names = [re.match(r"#   ([^ :]+)", line)[1] for line in below.strip().splitlines()]
    for line in above.splitlines():
        if not line.startswith(" ") or line.endswith(":") or "  # default of" in line:
            continue
        before, _, comment = line.rpartition("  # ")
        first = comment.partition(":")[0] if before else ""
        key = re.match(r"[ -]+(\w+)", line)[1]
        names += first.split(", ") if re.fullmatch(r"[\w.]+(, [\w.]+)*", first) else [key]
    return [re.sub(r"^(network_args|optimizer_args)\..*", r"\1", name) for name in names]


@pytest.mark.parametrize("name", kohya_table.TABLE)
def test_every_option_of_kohya_appears_once(folder, name):
    value = value_text_of_toml(plausible(name, kohya_table.TABLE[name]))
    text = "network_dim = 4\n" if name != "network_dim" else ""
    if name in ("dataset_config", "config_file"):
        written("[[datasets]]\nresolution = 64\n", "data.toml")
        value = '"data.toml"'
    found = names_of(imported(written(f"{text}{name} = {value}\n")).text)
    assert found.count(name) == 1


def value_text_of_toml(value):
    return (
        f'["{value[0]}"]'
        if isinstance(value, list)
        else value_text(value)
        if not isinstance(value, str)
        else f'"{value}"'
    )


@pytest.mark.parametrize("level", ["general", "datasets.1", "datasets.1.subsets.1"])
def test_every_option_of_kohyas_data_appears_once_at_every_level(folder, level):
    lines = {name: f"{name} = {value_text_of_toml(plausible(name, row))}" for name, row in DATA.items()}
    if level != "datasets.1.subsets.1":
        lines.pop("image_dir")
    sections = {"general": "[general]", "datasets.1": "[[datasets]]", "datasets.1.subsets.1": "[[datasets.subsets]]"}
    text = "\n".join(
        f"{title}\n" + "\n".join(lines.values() if key == level else []) for key, title in sections.items()
    )
    written(f"{text}\n[[datasets.subsets]]\nimage_dir = 'cat'", "data.toml")
    made_text = imported(written('network_dim = 4\ndataset_config = "data.toml"')).text
    for name in lines:
        assert names_of(made_text).count(f"{level}.{name}") == 1, name


@pytest.mark.parametrize(
    "script",
    ["train_text_to_image", "train_dreambooth_lora_sdxl", "train_unconditional", "train_lcm_distill_lora_sdxl"],
)
def test_every_option_of_diffusers_appears_once(folder, script):
    values = {name: plausible(name, row) for name, row in diffusers_table.TABLE.items()}
    words = {name: "" if value is True else f"={value}" for name, value in values.items()}
    together = imported(command(script, " ".join(f"--{name}{word}" for name, word in words.items()))).text
    for name, word in words.items():
        assert names_of(together).count(name) == 1, name
        assert names_of(imported(command(script, f"--{name}{word}")).text).count(name) == 1, name


def test_all_options_of_kohya_at_once(folder):
    values = {name: plausible(name, row) for name, row in kohya_table.TABLE.items()}
    values = {name: value for name, value in values.items() if name not in ("dataset_config", "config_file")}
    text = "\n".join(f"{name} = {value_text_of_toml(value)}" for name, value in values.items())
    found = names_of(imported(written(text)).text)
    assert {name: found.count(name) for name in values} == dict.fromkeys(values, 1)


@pytest.mark.parametrize(
    "text", ["no", "1e-4", "${base.seed}", 'a "b" \\${c}', "x # y", "a: b", "~", "é\u2028\x07", "", "???x", " a", "[1]"]
)
def test_texts_come_back_as_they_are(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"base:\n  dataset: digits\n  num_epochs: 1\n  caption: {value_text(text)}\nlora:\n  pretrained_model_name_or_path: a/b\n"
    )
    assert load_config(path).base.caption == text


def test_a_line_feed_cannot_leave_a_comment(folder):
    text = imported(written(FLAT.format(base=model("sd1")) + 'training_comment = "x\\nlora: 1"\n"a\\nb: c" = 1')).text
    assert '#   training_comment = "x\\nlora: 1": has no equal here' in text
    assert "#   a: unknown option" in text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "x = ", r"a\.toml: cannot be read as TOML \(Invalid value \(at "),
        ("a.toml", "x = 1", r"a\.toml: none of its options is one of sd-scripts"),
        ("a.toml", "[[datasets]]\n", r"a\.toml: is a dataset_config; give the file of the trainer's options"),
        ("a.toml", 'network_module = "lycoris.kohya"', r"network_module = lycoris\.kohya: has no equal here"),
        ("a.toml", 'network_module = "networks.lora_flux"', "is of another model; Stable Diffusion 1, 2 and XL"),
        ("a.toml", 't5xxl = "t5"', "t5xxl: is of another model"),
        ("a.toml", 'dataset_config = "a.toml"', r"a\.toml: has no \[\[datasets\]\]"),
        ("a.json", '{"general": 1, "datasets": []}', r"a\.json: general must be a section"),
        ("a.sh", "rm -r x", r"a\.sh: holds no command that is understood; known scripts: train_text_to_image\.py, "),
        ("a.sh", "python train_flux_lora.py --a", r"understood \(found train_flux_lora\.py\)"),
        ("a.sh", "python train_dreambooth.py\npython train_dreambooth.py", "holds several training commands; keep one"),
        ("a.sh", "python train_dreambooth.py --a='", r"cannot be read as a command line \(No closing quotation"),
        ("a.sh", "train_db.py --foo", "none of its options is one of sd-scripts"),
    ],
)
def test_what_cannot_be_read(folder, name, text, message):
    path = written(text, name)
    with pytest.raises(InputError, match=message):
        imported(*((written("network_dim = 1"), path) if name == "a.json" else (path,)))


def test_files_that_are_not_there(folder, capsys):
    with pytest.raises(MissingFileError, match=r"none\.toml: there is no such file"):
        imported(folder / "none.toml")
    with pytest.raises(MissingFileError, match=r"dataset_config = data\.toml: there is no such file"):
        imported(written('dataset_config = "data.toml"'))
    (folder / "bytes.sh").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"bytes\.sh: is no text"):
        imported(folder / "bytes.sh")
    with pytest.raises(
        InputError, match="--dataset-config is of sd-scripts, and this is a command line of train_dreambooth.py"
    ):
        imported(command("train_dreambooth", LINE), written("", "data.toml"))


def test_the_output_is_a_new_yaml_file(folder, capsys):
    path = written(FLAT.format(base=model("sd1")))
    for output, message in (
        ("in.toml", "in.toml: exists; choose a new file"),
        ("out.txt", "out.txt: must end in .yaml"),
        ("none/out.yaml", "none/out.yaml: there is no folder"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_script(import_config, path, output)
    run_script(import_config, path)
    out, error = capsys.readouterr()
    assert out.startswith("# Made by scripts/import_config.py from in.toml (a file of sd-scripts).")
    assert "A config of the task lora; the check finds nothing." in error


def test_another_dataset_config(folder):
    written(SUBSETS, "data.toml")
    written("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'dog'", "other.toml")
    path = written(FLAT.format(base=model("sd1")) + 'dataset_config = "data.toml"')
    document, left = made(path, "--dataset-config", "other.toml")
    assert document["base"]["train_data_dir"] == [{"path": "dog"}]
    assert left["train_data_dir"] == "is ignored there beside a dataset_config"
    written('{"datasets": [{"subsets": [{"image_dir": "cat"}]}]}', "other.json")
    assert (
        imported(path, folder / "other.json").translation.entries["base.train_data_dir"].value[0]["path"].value == "cat"
    )


def test_a_folder_in_two_resolutions_is_taken_once(folder):
    datasets = "".join(
        f"[[datasets]]\nresolution = {side}\n[[datasets.subsets]]\nimage_dir = 'cat'\nnum_repeats = {side // 32}\n"
        for side in (64, 128)
    )
    written(datasets, "data.toml")
    text = f'pretrained_model_name_or_path = "{model("sd1")}"\nnetwork_dim = 2\ndataset_config = "data.toml"'
    document, left = made(written(text))
    assert document["base"]["train_data_dir"] == [{"path": "cat", "repeats": 2}]
    assert document["base"]["resolution"] == 64
    assert left.keys() == {"dataset_config"} | {
        f"datasets.2.{name}" for name in ("resolution", "subsets.1.image_dir", "subsets.1.num_repeats")
    }


def test_a_config_that_was_made_trains(folder):
    written(
        SUBSETS.replace("resolution = 512", "resolution = 32").replace("batch_size = 4", "batch_size = 2"), "data.toml"
    )
    shutil.rmtree(folder / "class")
    for number in range(2):
        save(folder / "class" / f"{number}.png", 120 + number)
    text = KOHYA.replace('log_with = "wandb"', "").replace("lr_warmup_steps = 100", "lr_warmup_steps = 1")
    text = text.replace("max_train_epochs = 10", "max_train_steps = 2").replace('mixed_precision = "bf16"', "")
    made(written(text.format(base=model("sd1-long")).replace("save_every_n_epochs = 1", "")))
    options = ["base.logging_steps=1", "base.logger=none", "lora.validation_prompts=[]"]
    assert train(["out.yaml", *options]) == 0
    assert [line["step"] for line in read_metrics(folder / "output/ohwx", prefix="loss")] == [1, 2]
    assert (folder / "output/ohwx/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "name", "reason"),
    [
        ('learning_rate = "fast"', "learning_rate", "is no number"),
        ("network_dim = 2.5", "network_dim", "is no whole number"),
        ('flip_aug = "yes"', "flip_aug", "is neither true nor false"),
        ("mixed_precision = []", "mixed_precision", "must have one value"),
        ("caption_dropout_rate = 2", "caption_dropout_rate", "is no fraction"),
        ("validation_split = 0.0", "validation_split", "is off, as here"),
        ("save_every_n_steps = 0", "save_every_n_steps", "switches it off, which is the default here"),
        ('resolution = "1,2,3"', "resolution", "is neither a side nor width and height"),
        ('text_encoder_lr = ["a"]', "text_encoder_lr", "is no number"),
        ("keep_tokens = 2", "keep_tokens", "keep_tags has an effect with shuffle_tags: true only"),
        ("network_dimm = 2", "network_dimm", "unknown option; did you mean network_dim?"),
        ("quite_else = 2", "quite_else", "unknown option"),
        ("save_model_epochs = 2", "save_model_epochs", "unknown option"),
        ('optimizer_type = "AdamW"\nuse_8bit_adam = true', "optimizer_type", "optimizer has its value already"),
        ('optimizer_type = "CAME"', "optimizer_type", "has no equal; adamw is used. There are adamw, "),
        ('lr_scheduler = "rex"', "lr_scheduler", "has no equal; constant is used (there are constant, "),
    ],
)
def test_why_a_value_is_left_out(folder, options, name, reason):
    text = 'pretrained_model_name_or_path = "a/b"\nnetwork_alpha = 1\n'
    left = {each.name: each.reason for each in imported(written(text + options)).translation.left}
    assert left[name].startswith(reason)


@pytest.mark.parametrize(
    ("base", "option", "is_xl"),
    [
        ("models/sd_xl_base", "", True),
        ("models/v1-5", "", False),
        ("models/mine", "cache_text_encoder_outputs = true", True),
        ("sd1", "", False),
        ("sdxl", "", True),
    ],
)
def test_whether_it_is_about_xl(folder, base, option, is_xl):
    base = model(base) if base in ("sd1", "sdxl") else base
    translation = imported(written(f"{FLAT.format(base=base)}clip_skip = 2\n{option}")).translation
    assert ("clip_skip" in {each.name for each in translation.left}) == is_xl == translation.is_xl


MENDED = {
    "two rates of text encoders": ("text_encoder_lr = [1e-5, 2e-5]", {"learning_rate": {"unet": 2e-6, "text_encoder": 1e-5, "text_encoder_2": 2e-5}}),
    "a schedule without an equal": ('lr_scheduler = "rex"', {"lr_scheduler": "constant"}),
    "the rate of Prodigy": ('optimizer_type = "DAdaptAdam"\nlearning_rate = 1.0\nnetwork_train_unet_only = true', {"learning_rate": None}),
    "a prefix that counts among the tags": (
        'caption_prefix = "ohwx, "\nkeep_tokens = 3\nshuffle_caption = true', {"keep_tags": 2, "trigger_word": "ohwx"}
    ),
    "empty texts": ('vae = ""\nnetwork_weights = ""\nhuggingface_repo_id = ""\nreg_data_dir = ""',
                    {"vae": None, "lora_weights": None, "push_to_hub": None, "class_data_dir": None}),
}  # fmt: skip


@pytest.mark.parametrize("case", MENDED)
def test_what_a_value_means(folder, monkeypatch, case):
    monkeypatch.chdir(folder)
    (folder / "10_ohwx").mkdir()
    text, expected = MENDED[case]
    made = imported(written(FLAT.format(base="a/b") + text)).translation
    found = {entry.here.split(".")[1]: entry.value for entry in made.entries.values()}
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    "secret", ["--hub_token:hf_SECRET", "--pretrained_model_name_or_path=https://user:hf_SECRET@host/a/b"]
)
def test_secrets_that_hang_on_names(folder, secret):
    command = f"accelerate launch train_text_to_image_lora.py {secret} --train_data_dir=x --output_dir=y"
    (folder / "a.sh").write_text(command)
    assert "SECRET" not in imported(folder / "a.sh").text


def test_a_default_of_the_shell_is_refused(folder):
    (folder / "a.sh").write_text('OUT=${OUT:-/x}\naccelerate launch train_text_to_image_lora.py --output_dir="$OUT/y"')
    with pytest.raises(InputError, match="is computed by the shell, and nothing is run here; write what it gives"):
        imported(folder / "a.sh")


def test_notes_stand_above(folder):
    text = imported(
        written(FLAT.format(base="a/b") + 'network_args = ["conv_dim=2"]\nloss_type = "huber"\noptimizer_type = "CAME"')
    ).text
    notes = re.findall(r"^# NOTE: (.*)$", text, re.MULTILINE)
    assert notes == [
        "taken for Stable Diffusion 1 or 2, as far as names and options tell",
        "convolutions have rank 2 there, and rank 4 here",
        "adamw is not the optimizer there: its learning rate, too, must be chosen anew",
        "huber_c changes with the noise there (huber_schedule), and is constant here",
    ]
