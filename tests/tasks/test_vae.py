"""The task `vae`: networks, training, resume, validation, the finished autoencoder, and its errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from features import Features
from marks import slow
from PIL import Image
from processes import launch
from resuming import check_resume
from run_folders import final_state, losses, read_metrics
from safetensors.torch import load_file

import datasets_lib
from scripts import evaluate, sample
from train import main, train
from trainers.base import RunInfo, Section
from trainers.common.autoencoder.autoencoder import AutoencoderKL, LatentStatistics, latent_moments
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import ConfigError, load_config
from trainers.engine.run.randomness import SlotRandom
from trainers.inference.saved_run import load_trainer, open_run
from trainers.vae import VAEConfig, VAETrainer

CONFIG = "configs/tests/vae.json"
RECONSTRUCTION = {  # without a perceptual and an adversarial term
    f"vae.{name}": VAEConfig.__dataclass_fields__[name].default for name in VAEConfig.training_only
} | {"vae.learning_rate": 1e-3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished tiny run on all digits, with its checkpoints."""
    folder = tmp_path_factory.mktemp("vae") / "run"
    options = [f"base.output_dir={folder}", "base.validation_split=0.1", "base.max_train_samples=null"]
    assert main([CONFIG, *options, "base.checkpointing_steps=3", "base.valid_steps=6"]) == 0
    return folder


def digits(split, resolution=16):
    base = BaseConfig(dataset="digits", channels=1, resolution=resolution, validation_split=0.1, num_epochs=1)
    dataset = datasets_lib.build(base, split)
    return torch.stack([dataset.get(number, None)["image"] for number in range(len(dataset))])


# --- the network


def test_forward_is_encode_draw_and_decode():
    settings = json.loads(Path("configs/tests/models/autoencoder.json").read_text())
    vae = AutoencoderKL.from_config(settings).eval()
    pixels, noise = torch.rand(3, 1, 16, 16), torch.randn(3, 2, 8, 8)
    posterior = vae.encode(pixels).latent_dist
    drawn, moments = vae(pixels, noise)
    torch.testing.assert_close(drawn, vae.decode(posterior.mean + posterior.std * noise).sample)
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.logvar], dim=1))
    assert torch.equal(vae(pixels)[0], vae.decode(posterior.mode()).sample)
    assert torch.equal(vae(latents=noise)[0], vae.decode(noise).sample)
    assert vae(pixels, decode=False)[0] is None


def test_latent_statistics_are_those_of_draws():
    torch.manual_seed(0)
    moments = torch.randn(50, 4, 6, 6) * 0.7 + 0.2
    mean, logvar = moments.chunk(2, dim=1)
    draws = mean + (logvar / 2).exp() * torch.randn(400, *mean.shape)  # 720,000 of each channel: their mean is within
    # four of its standard errors, 4 * 1.3 / 720,000 ** 0.5
    rows = latent_moments(moments)
    found = LatentStatistics({name: values.mean().item() for name, values in rows.items()})
    torch.testing.assert_close(found.mean.float(), draws.mean((0, 1, 3, 4)), rtol=0, atol=6e-3)
    torch.testing.assert_close(found.std.float(), draws.transpose(0, 2).flatten(1).std(1), rtol=2e-3, atol=0)
    assert found.total_std == pytest.approx(draws.std().item(), rel=2e-3)
    assert found.total_mean == pytest.approx(draws.mean().item(), abs=2e-3)


# --- training


@pytest.mark.parametrize(("start", "at"), [(3, 4), slow(3, 2), slow(4, 4)])
def test_resume_is_exact_before_and_after_the_discriminator_starts(start, at, tiny_config):
    options = {
        "vae.adversarial_start_step": start,
        "base.gradient_accumulation_steps": 2,
        "base.validation_split": 0.02,
    }
    whole, _ = check_resume(tiny_config, options, {"base.valid_steps": 1}, at=at, task="vae")
    lines = read_metrics(whole, prefix="loss")
    assert [("discriminator" in line) for line in lines] == [line["step"] > start for line in lines]
    assert [line["grad_norm/discriminator"] > 0 for line in lines] == [line["step"] > start for line in lines]


def test_every_term_and_both_networks_are_logged(trained):
    line = read_metrics(trained, prefix="loss")[-1]
    terms = {"reconstruction", "perceptual", "kl", "adversarial", "adaptive_weight", "discriminator", "r1", "lecam"}
    assert terms | {"lr", "lr/discriminator", "grad_norm/vae", "grad_norm/discriminator"} <= set(line)
    assert (line["lr"], line["lr/discriminator"]) == (1e-3, 2e-4)
    game = 0.5 * line["adaptive_weight"] * line["adversarial"] + line["discriminator"]
    game += 0.1 / 2 * line["r1"] + 0.01 * line["lecam"]
    assert line["loss"] == pytest.approx(
        line["reconstruction"] + line["perceptual"] + 1e-4 * line["kl"] + game, rel=1e-5
    )


def two_and_one(tmp_path, *options):
    """Folders of a run on two processes, and of one with two micro-batches per step."""
    shared = [CONFIG, "base.max_train_samples=25", "base.checkpointing_steps=6", *options]
    folders = [tmp_path / "two", tmp_path / "one"]
    done = launch(*shared, f"base.output_dir={folders[0]}", processes=2)
    assert done.returncode == 0, done.stderr
    done = launch(*shared, f"base.output_dir={folders[1]}", "base.gradient_accumulation_steps=2")
    assert done.returncode == 0, done.stderr
    return folders


def test_gradients_are_averaged_over_two_processes(tmp_path):
    """Both networks' weights and moments, and the buffers of the moving averages, bit for bit."""
    two, one = two_and_one(tmp_path, "base.validation_split=0.02")
    assert losses(two) == losses(one)
    assert final_state(two) == final_state(one)
    found = [read_metrics(folder, prefix="valid")[-1] for folder in (two, one)]
    for name, value in found[0].items():
        assert name in ("valid/seconds", "valid/peak_memory_gib") or found[1][name] == pytest.approx(value, rel=1e-5), (
            name
        )
    scales = [json.loads((folder / "config.json").read_text())["scaling_factor"] for folder in (two, one)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-6)
    pictures = [(folder / "samples" / "reconstructions-step-000006.png").read_bytes() for folder in (two, one)]
    assert pictures[0] == pictures[1]


@pytest.mark.slow
@pytest.mark.parametrize(("start", "at"), [(15, 10), (10, 10), (5, 10)])
def test_resume_on_three_processes_is_exact_around_the_start(start, at, tmp_path):
    """At the start itself the discriminator has had no backward yet, and its buckets are in their first order."""
    options = ["base.max_train_steps=20", "base.max_train_samples=25", f"vae.adversarial_start_step={start}"]
    options += ["base.checkpointing_steps=10", "vae.discriminator_channels=64", "vae.discriminator_layers=2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert launch(CONFIG, *options, f"base.output_dir={whole}", processes=3).returncode == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-20")
    (cut / "config.json").unlink()
    resumed = launch(CONFIG, *options, f"base.output_dir={cut}", "base.resume_from_checkpoint=latest", processes=3)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(cut) == losses(whole)
    assert final_state(cut, 20) == final_state(whole, 20)


def test_another_split_of_the_global_batch(run_in_process):
    """Equal but for the adaptive weight, which belongs to a micro-batch."""
    options = {"vae.adaptive_weight": False, "vae.adversarial_start_step": 2, "base.max_train_samples": 25}
    runs = [
        run_in_process(
            f"{size}",
            "vae",
            **options,
            **{"base.train_batch_size": size, "base.gradient_accumulation_steps": 8 // size},
        )
        for size in (8, 2)
    ]
    whole, split = [[float.fromhex(value) for value in losses(folder).values()] for folder in runs]
    assert split == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"base.gradient_checkpointing": True},
        slow({"base.mixed_precision": "bf16"}),
        {"vae.adversarial_loss": "vanilla", "vae.reconstruction_loss": "l2", "vae.kl_warmup_steps": 4},
        slow(RECONSTRUCTION | {"vae.reconstruction_loss": "huber", "vae.huber_delta": 0.2, "vae.model_config": None}),
        {"base.resolution": 32, "base.channels": 3, "vae.model_config": None, "base.dataset": "digits"},
    ],
)
def test_options_train(options, run_in_process):
    folder = run_in_process("run", "vae", **options)
    values = [float.fromhex(value) for value in losses(folder).values()]
    assert len(values) == 6
    assert all(value == value for value in values)
    if "base.gradient_checkpointing" in options:
        reference = losses(run_in_process("reference", "vae"))
        expected = [float.fromhex(value) for value in reference.values()]
        assert values == pytest.approx(expected, rel=1e-5)


def test_training_the_decoder_alone(trained, run_in_process, monkeypatch, capsys):
    """Latents, and with them the scaling factor, stay what they are; a checkpoint holds the decoder only."""
    options = {"vae.pretrained_model_name_or_path": str(trained), "vae.model_config": None, "vae.decoder_only": True}
    options |= {"vae.kl_weight": 1e-6}  # the default: it has no effect
    folder = run_in_process("decoder", "vae", **options, **{"base.validation_split": 0.1})
    before, after = [load_file(f / "diffusion_pytorch_model.safetensors") for f in (trained, folder)]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {"decoder", "post_quant_conv"}
    factors = [json.loads((f / "config.json").read_text())["scaling_factor"] for f in (trained, folder)]
    assert factors[0] == factors[1] != 0.18215
    line = read_metrics(folder, prefix="loss")[0]  # before the discriminator starts; the KL is logged, and not in it
    assert line["loss"] == pytest.approx(line["reconstruction"] + line["perceptual"], rel=1e-6)
    held = load_file(folder / "checkpoint-6" / "vae" / "trainable.safetensors")
    assert {name.split(".")[0] for name in held} == {"decoder", "post_quant_conv"}

    run_script(monkeypatch, sample, folder, "--number", "2")
    from_checkpoint = Image.open(folder / "samples" / "seed-0" / "reconstructions.png").tobytes()
    shutil.rmtree(folder / "checkpoint-6")
    run_script(monkeypatch, sample, folder, "--number", "2")
    assert Image.open(folder / "samples" / "seed-0" / "reconstructions.png").tobytes() == from_checkpoint


def test_another_pretrained_network_is_refused_on_resume(trained, tmp_path, tiny_config, capsys):
    """The frozen encoder comes from there, and the decoder would be trained for another one's latents."""
    shutil.copytree(trained, tmp_path / "other")
    options = {"vae.model_config": None, "vae.decoder_only": True, "vae.kl_weight": 1e-6, "base.max_train_steps": 6}
    place = "vae.pretrained_model_name_or_path"
    train(load_config(tiny_config("vae", "run", **options, **{place: str(trained)})))
    changed = {place: str(tmp_path / "other"), "base.resume_from_checkpoint": "latest"}
    assert main([str(tiny_config("vae", "run", **options, **changed))]) == 1
    assert f'{place}: "{trained}" -> "{tmp_path / "other"}"' in capsys.readouterr().err


def test_a_signal_ends_the_measurement_of_latents_in_the_middle_of_a_run(tiny_config, monkeypatch, capsys):
    """The pipeline of that step is given up; the run saves and ends as after any signal."""
    measure, asked = VAETrainer.data_statistics, []

    def interrupted(trainer, batch, rng):
        if not asked:
            os.kill(os.getpid(), signal.SIGTERM)
        asked.append(len(batch["slot"]))
        return measure(trainer, batch, rng)

    monkeypatch.setattr(VAETrainer, "data_statistics", interrupted)
    path = tiny_config("vae", **RECONSTRUCTION, **{"base.save_model_steps": 2})
    assert main([str(path)]) == 143
    assert "The pipeline of step 2 is not written: the run is asked to stop" in capsys.readouterr().out
    assert asked == [4]  # one batch of ten
    folder = path.with_suffix("")
    assert not (folder / "config.json").exists()
    assert main([str(path), "base.resume_from_checkpoint=latest"]) == 0
    assert (folder / "config.json").exists()


def test_a_discriminator_that_would_never_start(tiny_config, capsys):
    options = {"base.max_train_steps": None, "base.num_epochs": 1, "vae.adversarial_start_step": 10}
    assert main([str(tiny_config("vae", **options))]) == 1
    assert "vae.adversarial_start_step = 10: must be below the run's 10 steps" in capsys.readouterr().err


def run_script(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    script.main()


# --- the result


def test_the_result_is_an_autoencoder_of_diffusers(trained):
    vae = diffusers.AutoencoderKL.from_pretrained(trained)
    assert json.loads((trained / "config.json").read_text())["_class_name"] == "AutoencoderKL"
    assert isinstance(VAETrainer.load_pipeline(trained), diffusers.AutoencoderKL)
    averaged = load_file(trained / "checkpoint-6" / "vae_ema" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, averaged[name]) for name, value in vae.state_dict().items())
    checkpoint = diffusers.AutoencoderKL.from_pretrained(trained / "checkpoint-6" / "vae")
    assert checkpoint.config.latent_channels == 2
    assert checkpoint.config.scaling_factor is None  # not known yet
    last = read_metrics(trained, prefix="valid")[-1]
    images = digits("validation")
    with torch.no_grad():
        reconstruction = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    error = ((reconstruction - images) / 2).square().mean((1, 2, 3))
    assert last["valid_ema/psnr"] == pytest.approx((-10 * error.log10()).mean().item(), rel=1e-4)


@torch.no_grad()
def test_scaled_latents_have_unit_standard_deviation_on_held_out_data(trained):
    vae = diffusers.AutoencoderKL.from_pretrained(trained)
    latents = vae.encode(digits("validation")).latent_dist.sample(torch.Generator().manual_seed(0))
    assert (latents * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.02)
    assert vae.config.shift_factor is None
    of_training = vae.encode(digits("train")).latent_dist.sample(torch.Generator().manual_seed(0))
    assert vae.config.scaling_factor == pytest.approx(1 / of_training.std().item(), rel=5e-3)


def test_a_shift_is_estimated_where_it_is_asked_for(run_in_process):
    folder = run_in_process(
        "run", "vae", **RECONSTRUCTION, **{"vae.estimate_shift": True, "base.validation_split": 0.1}
    )
    vae = diffusers.AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        latents = vae.encode(digits("train")).latent_dist.sample(torch.Generator().manual_seed(0))
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert scaled.mean().item() == pytest.approx(0, abs=0.05)  # 40 of these digits were measured
    assert scaled.std().item() == pytest.approx(1, abs=0.05)


def test_validation_metrics_and_pictures(trained):
    last = read_metrics(trained, prefix="valid")[-1]
    latents = {f"latent_{kind}/{channel}" for kind in ("mean", "std") for channel in range(2)}
    names = {"loss", "reconstruction", "perceptual", "kl", "psnr", "ssim", "latent_mean", "latent_std", *latents}
    logged = {f"{kind}/{name}" for kind in ("valid", "valid_ema") for name in names}
    assert set(last) == {"step", "valid/seconds", "valid/peak_memory_gib"} | logged
    assert last["valid/loss"] == pytest.approx(
        last["valid/reconstruction"] + last["valid/perceptual"] + 1e-4 * last["valid/kl"], rel=1e-5
    )
    strips = Image.open(trained / "samples" / "reconstructions-step-000006.png")
    assert strips.size == (2 * (2 * (3 * 64 + 2) + 2) + 8, 2 * (64 + 2) + 2)  # raw and averaged, 2 x 2 strips of 3
    assert Image.open(trained / "samples" / "random_latents-step-000006.png").size[1] == 2 * (64 + 2) + 2


def trainer_of(trained):
    return load_trainer(open_run(trained), device="cpu")


def test_strips_hold_the_original_its_reconstruction_and_their_difference(trained):
    trainer = trainer_of(trained)
    image = digits("validation")[:1]
    with torch.no_grad():
        drawn = trainer.sample([{"example": 0, "image": image[0]}], SlotRandom(0, torch.tensor([0])))
        expected = trainer.raw("vae")(image)[0].clamp(-1, 1) / 2 + 0.5
    original, reconstruction, difference = drawn["reconstructions"].chunk(3, dim=3)
    torch.testing.assert_close(original, image / 2 + 0.5)
    torch.testing.assert_close(reconstruction, expected)
    torch.testing.assert_close(difference, (0.5 + expected - original).clamp(0, 1))
    assert drawn["random_latents"].shape == (1, 1, 16, 16)


def test_random_latents_have_the_latents_distribution(trained, monkeypatch):
    trainer = trainer_of(trained)
    seen = []
    decode = lambda latents: (seen.append(latents) or torch.zeros(len(latents), 1, 16, 16), None)  # noqa: E731
    monkeypatch.setattr(trainer, "modules", {"vae": decode})
    requests = [{}] * 500
    trainer.sample(requests, SlotRandom(0, torch.arange(500)))
    images = digits("train")
    with torch.no_grad():
        latents = diffusers.AutoencoderKL.from_pretrained(trained).encode(images).latent_dist.sample()
    assert seen[0].std().item() == pytest.approx(latents.std().item(), rel=0.02)
    means = {"latent_mean/0": 1.0, "latent_mean/1": -2.0, "latent_square/0": 1.25, "latent_square/1": 5.0}
    kept = trainer.validation_summary(means | {"psnr": 3.0})
    assert kept == pytest.approx(
        {"psnr": 3, "latent_mean/0": 1, "latent_mean/1": -2, "latent_std/0": 0.5, "latent_std/1": 1}
        | {"latent_mean": -0.5, "latent_std": (3.125 - 0.25) ** 0.5}
    )
    trainer.sample(requests, SlotRandom(0, torch.arange(500)))
    torch.testing.assert_close(seen[1].mean((0, 2, 3)), torch.tensor([1.0, -2.0]), rtol=0, atol=0.03)
    torch.testing.assert_close(seen[1].std((0, 2, 3)), torch.tensor([0.5, 1.0]), rtol=0.02, atol=0)


def test_rfid_in_the_loop_is_that_of_the_script(tmp_path, run_in_process, monkeypatch, capsys):
    torch.jit.script(Features()).save(tmp_path / "features.pt")
    options = {"base.eval_steps": 6, "base.eval_num_samples": 50, "base.validation_split": 0.1}
    options |= {"base.eval_features": str(tmp_path / "features.pt")}
    folder = run_in_process("run", "vae", **options)
    [line] = read_metrics(folder, prefix="eval/")
    assert set(line) == {"step", "eval/seconds", "eval/peak_memory_gib", "eval/rfid", "eval/rkid"}
    capsys.readouterr()
    perceptual = "vae.perceptual_loss=ms_ssim"
    run_script(
        monkeypatch,
        evaluate,
        folder,
        perceptual,
        "--number",
        "50",
        "--features",
        tmp_path / "features.pt",
        "--trust-code",
    )
    found = json.loads(capsys.readouterr().out)
    assert found["rfid"] == pytest.approx(line["eval/rfid"], rel=1e-3)
    assert found["rfid"] > 0
    assert {"psnr", "ssim", "perceptual", "kl", "latent_std"} <= set(found)
    assert (folder / "evaluation" / "nearest.png").is_file()


def test_metrics_need_held_out_pictures(trained, tiny_config, tmp_path, monkeypatch, capsys):
    options = {"base.eval_steps": 3, "base.eval_features": "none"}
    assert main([str(tiny_config("vae", **options))]) == 1
    expected = "base.eval_steps = 3: this task draws no pictures without base.validation_split; set it to null"
    assert expected in capsys.readouterr().err
    options |= {"base.validation_split": 0.1}
    assert main([str(tiny_config("vae", "none", **options))]) == 1
    expected = "base.eval_steps = 3: base.eval_features = none measures nothing of reconstructions; name a network"
    assert expected in capsys.readouterr().err
    torch.jit.script(Features()).save(tmp_path / "features.pt")
    options |= {"base.eval_features": str(tmp_path / "features.pt"), "base.validation_split": 0.002}
    assert main([str(tiny_config("vae", "few", **options)), "--trust-code"]) == 1
    assert "the validation set give 4 pictures, and metrics need 5; set it to null" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="task vae draws no pictures without base.validation_split"):
        run_script(monkeypatch, evaluate, trained, "base.validation_split=null", "--features", "none")


def test_pictures_of_a_run_whose_data_is_gone(trained, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    run_script(monkeypatch, sample, folder, "--number", "3")
    assert {path.name for path in (folder / "samples" / "seed-0").glob("*.png")} == {
        "random_latents.png",
        "reconstructions.png",
    }
    assert "without" not in capsys.readouterr().err
    gone = ["base.dataset=null", "base.train_data_dir=gone"]
    run_script(monkeypatch, sample, folder, *gone, "--number", "3")
    assert [path.name for path in (folder / "samples" / "seed-0").glob("*.png")] == ["random_latents.png"]
    assert "without held-out pictures: " in capsys.readouterr().err


# --- pretrained networks and errors


def test_a_pretrained_network_from_a_folder_and_its_subfolder(trained, tmp_path, tiny_config):
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / "model" / "vae").mkdir(parents=True, exist_ok=True)
        shutil.copy(trained / name, tmp_path / "model" / "vae")
    for subfolder in (None, "vae"):
        place = {"vae.pretrained_model_name_or_path": str(tmp_path / "model"), "vae.subfolder": subfolder}
        run = load_config(tiny_config("vae", **place, **{"vae.model_config": None}))
        trainer = VAETrainer(run.config, run.base)
        trainer.run = RunInfo(device=torch.device("cpu"), weight_dtype=torch.float32)
        trainer.setup()
        vae = trainer.init_modules()["vae"]
        assert torch.equal(
            vae.state_dict()["decoder.conv_out.weight"],
            load_file(trained / "diffusion_pytorch_model.safetensors")["decoder.conv_out.weight"],
        )
    again = train(load_config(tiny_config("vae", name="again", **place, **{"vae.model_config": None})))
    assert (again / "config.json").is_file()


def test_pretrained_networks_that_cannot_be_used(trained, tmp_path, tiny_config, capsys):
    def error(**options):
        assert main([str(tiny_config("vae", **{"vae.model_config": None}, **options))]) == 1
        return capsys.readouterr().err

    name = "vae.pretrained_model_name_or_path"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{name} = {empty}: no AutoencoderKL in safetensors format could be read" in error(**{name: str(empty)})
    wrong = error(**{name: str(trained), "base.channels": 3})
    assert f"{name} = {trained}: has in_channels = 1, base.channels is 3; make them equal" in wrong


def test_a_network_of_another_kind_or_with_gaps(trained, tmp_path, tiny_config, capsys):
    from safetensors.torch import save_file

    def error(path):
        options = {"vae.model_config": None, "vae.pretrained_model_name_or_path": str(path)}
        assert main([str(tiny_config("vae", **options))]) == 1
        return capsys.readouterr().err

    unet = diffusers.UNet2DModel.from_config(json.loads(Path("configs/tests/models/unet2d.json").read_text()))
    unet.save_pretrained(tmp_path / "unet")
    assert "must be of class AutoencoderKL, found UNet2DModel" in error(tmp_path / "unet")
    (tmp_path / "gaps").mkdir()
    shutil.copy(trained / "config.json", tmp_path / "gaps")
    weights = load_file(trained / "diffusion_pytorch_model.safetensors")
    weights.pop("quant_conv.weight")
    save_file(weights, tmp_path / "gaps" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    assert "its weights lack quant_conv.weight" in error(tmp_path / "gaps")


def test_random_latents_wait_until_their_distribution_is_known(run_in_process):
    folder = run_in_process("run", "vae", **RECONSTRUCTION, **{"base.valid_steps": 3})  # nothing is held out
    assert not (folder / "samples").exists()
    assert json.loads((folder / "checkpoint-6" / "vae" / "config.json").read_text())["scaling_factor"] is None
    assert trainer_of(folder).sample_requests(None) == [{}] * 4  # the finished network beside it knows
    (folder / "config.json").unlink()
    assert trainer_of(folder).sample_requests(None) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perceptual_weight": 2.0}, "perceptual_weight = 2.0: has an effect with perceptual_loss only"),
        ({"lecam_weight": 0.1}, "lecam_weight = 0.1: has an effect with adversarial_loss only"),
        ({"huber_delta": 0.2}, "huber_delta = 0.2: has an effect with reconstruction_loss: huber only"),
        ({"kl_weight": 0.0, "kl_warmup_steps": 5}, "kl_warmup_steps = 5: has an effect with kl_weight above 0 only"),
        ({"decoder_only": True}, "decoder_only = true: has an effect with pretrained_model_name_or_path only"),
        ({"subfolder": "vae"}, 'subfolder = vae: has an effect with pretrained_model_name_or_path only'),
        (
            {"pretrained_model_name_or_path": "x", "decoder_only": True, "estimate_shift": True},
            "estimate_shift = true: has an effect with a trained encoder only",
        ),
        (
            {"pretrained_model_name_or_path": "x", "model_config": "y"},
            "model_config = y: has no effect with pretrained_model_name_or_path; leave one of them null",
        ),
        ({"model_config": "nothing"}, "model_config = nothing: must be a folder with config.json, a JSON file, or a"),
        (
            {"model_config": "configs/tests/models/autoencoder.json"},
            "model_config = configs/tests/models/autoencoder.json: has in_channels = 1, base.channels is 3; make them equal",
        ),
        ({"perceptual_loss": "vgg"}, "perceptual_loss = vgg: must be one of: lpips (VGG16, downloaded by torchvision)"),
        (
            {"adversarial_loss": "hinge", "discriminator_layers": 5},
            "discriminator_layers = 5: needs a base.resolution of at least 96; take fewer layers",
        ),
        (
            {"pretrained_model_name_or_path": "x", "decoder_only": True, "kl_weight": 0.5},
            "kl_weight = 0.5: has an effect with a trained encoder only",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_options(options, message, tmp_path):
    base = {"output_dir": "x", "train_data_dir": "x", "resolution": 64, "max_train_steps": 10}
    (tmp_path / "config.json").write_text(json.dumps({"base": base, "vae": options}))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.json")
    assert f"  vae.{message}" in str(caught.value).replace('"', "")


def test_gradients_within_a_step_and_compilation_exclude_each_other(tmp_path):
    base = {"output_dir": "x", "train_data_dir": "x", "resolution": 64, "num_epochs": 1, "compile": True}
    for options, wrong in (({}, True), ({"adaptive_weight": False}, False), ({"r1_weight": 1.0}, True)):
        found = list(VAEConfig(adversarial_loss="hinge", **options).problems(BaseConfig(**base)))
        text = "with adaptive_weight or r1_weight needs gradients within a step, which base.compile does not give"
        assert found == ([("adversarial_loss", f"{text}; switch one of them off")] if wrong else [])


def test_the_default_network_halves_as_often_as_it_says():
    for resolution, factor in ((16, 4), (32, 4), (64, 8), (256, 8)):
        base = BaseConfig(train_data_dir="x", resolution=resolution, num_epochs=1)
        trainer = VAETrainer(VAEConfig(), base)
        trainer.run = RunInfo(device=torch.device("cpu"), weight_dtype=torch.float32)
        trainer.setup()
        if resolution < 256:  # else 84 million parameters
            assert trainer.init_modules()["vae"].encode(
                torch.zeros(1, 3, resolution, resolution)
            ).latent_dist.mean.shape[2:] == (resolution // factor, resolution // factor)
            assert trainer.latent_shape == (4, resolution // factor, resolution // factor)
        assert not list(VAEConfig().problems(base))
    assert issubclass(BaseConfig, Section)
