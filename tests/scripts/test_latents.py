"""Latents in files, as a data set, and in place of pixels."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch
from marks import slow
from PIL import Image
from repository import ROOT
from run_folders import losses, read_metrics
from script_calls import run_script

import datasets_lib
from scripts import evaluate, replay, sample
from train import main
from trainers.common.autoencoder.latents import LatentSpace
from trainers.common.class_pipeline import ClassConditionalPipeline
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import ConfigError, load_config
from trainers.engine.run.randomness import SlotRandom
from trainers.inference.saved_run import load_trainer, open_run

TASK = "conditional_ddpm"
SMALL_UNET = json.loads((ROOT / "configs/tests/models/unet2d.json").read_text())


class Encoded:
    """A data set of one's own: the posteriors of another one's pictures, by the autoencoder in the folder `vae`."""

    options = ("center_crop", "random_flip")

    def __init__(self, pictures, vae):
        self.pictures, self.fingerprint = pictures, pictures.fingerprint
        self.network = diffusers.AutoencoderKL.from_pretrained(vae).requires_grad_(False)

    def __len__(self):
        return len(self.pictures)

    def get(self, index, generator):
        example = self.pictures.get(index, None)
        posterior = self.network.encode(example.pop("image")[None]).latent_dist
        return {**example, "mean": posterior.mean[0], "logvar": posterior.logvar[0]}


def build_encoded(args, split, vae):
    return Encoded(digits(split), vae)


def encoded_digits(vae):
    return {"base.dataset": f"{__name__}:build_encoded", "base.dataset_args": {"vae": str(vae)}}


def digits(split="train"):
    options = {"channels": 1, "resolution": 16, "validation_split": 0.02, "num_epochs": 1}
    return datasets_lib.build(BaseConfig(dataset="digits", **options), split)


def test_what_is_wrong_with_an_example_of_latents():
    zeros = torch.zeros(2, 3, 3)
    for example, message in (
        ({"mean": zeros}, r"'image', or 'mean' and 'logvar' of latents, got \['mean'\]"),
        ({"mean": zeros, "logvar": 0}, "mean and logvar must be float32 tensors of one shape, logvar is int"),
        ({"mean": zeros, "logvar": zeros[:1]}, r"of one shape, logvar is torch.float32 \[1, 3, 3\]"),
        ({"mean": zeros, "logvar": zeros / 0}, "an example's logvar holds NaN or infinity; every value must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            datasets_lib.check_example(example, BaseConfig())


def space(vae, resolution=16):
    base = BaseConfig(channels=1, resolution=resolution, num_epochs=1)
    return LatentSpace("vae", str(vae), base, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("force_upcast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_an_autoencoder_that_overflows_in_half_precision_stays_in_float32(force_upcast, dtype, vae, tmp_path):
    network = diffusers.AutoencoderKL.from_pretrained(vae)
    network.register_to_config(force_upcast=force_upcast)
    network.save_pretrained(tmp_path)
    base = BaseConfig(channels=1, resolution=16, num_epochs=1)
    found = LatentSpace("vae", str(tmp_path), base, torch.device("cpu"), torch.bfloat16)
    assert found.vae.dtype == dtype
    encoder = found.encoder()
    columns = encoder.encode(encoder.build(), torch.zeros(2, 1, 16, 16))
    assert {rows.dtype for rows in columns.values()} == {dtype}
    assert found.draw(columns, SlotRandom(0, torch.arange(2))).dtype == torch.float32
    assert found.decode(torch.zeros(2, 2, 8, 8)).dtype == torch.float32


def test_latents_are_shifted_and_scaled_as_the_config_says(vae):
    found, config = space(vae), diffusers.AutoencoderKL.from_pretrained(vae).config
    assert found.grid.shape == (2, 8, 8)
    assert config.shift_factor != 0
    batch = {"mean": torch.randn(3, 2, 8, 8), "logvar": torch.randn(3, 2, 8, 8)}
    slots = torch.arange(3)
    noise = SlotRandom(0, slots).normal("latent", (2, 8, 8))
    expected = (batch["mean"] + (batch["logvar"] / 2).exp() * noise - config.shift_factor) * config.scaling_factor
    torch.testing.assert_close(found.draw(batch, SlotRandom(0, slots)), expected)
    decoded = found.vae.decode(batch["mean"]).sample
    torch.testing.assert_close(found.decode(found.scaled(batch["mean"])), decoded, rtol=1e-4, atol=1e-5)


@pytest.fixture
def in_latents(vae, tmp_path):
    """Options of a class task in latents of the autoencoder, with a tiny network."""

    def options(task, **more):
        (tmp_path / "unet.json").write_text(json.dumps(SMALL_UNET | {"in_channels": 2, "out_channels": 2}))
        network = {f"{TASK}.model_config": str(tmp_path / "unet.json")} if task == TASK else {}
        return {f"{task}.vae": str(vae), "base.center_crop": True, **network, **more}

    return options


@pytest.mark.parametrize("task", [TASK, slow("dit")])
def test_cached_and_uncached_training_are_the_same_to_the_bit(task, in_latents, run_in_process):
    eighths = {"base.max_train_samples": 40, "base.validation_split": 8 / 1797, "base.train_batch_size": 8}
    options = in_latents(task, **eighths, **{"base.random_flip": True})
    plain = run_in_process("plain", task, **options)
    for kind in ("memory", "disk"):
        cached = run_in_process(kind, task, **options, **{f"{task}.cache_latents": kind})
        assert losses(cached) == losses(plain)
        assert_same_files(cached, plain)


def test_cached_latents_are_known_by_the_pictures_and_the_autoencoder(
    in_latents, run_in_process, vae, tmp_path, capsys
):
    shutil.copytree(vae, tmp_path / "changed")
    network = diffusers.AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        network.decoder.conv_out.bias += 1e-3
    network.save_pretrained(tmp_path / "changed")
    options = in_latents(TASK, **{f"{TASK}.cache_latents": "disk", "base.max_train_steps": 1})

    def encoded(name, **changed):
        run_in_process(name, TASK, **options | changed)
        return capsys.readouterr().out

    assert "cache latents: 40 of 40 to encode" in encoded("first")
    assert "cache latents: 0 of 40 to encode" in encoded("again")
    assert "cache latents: 40 of 80 to encode" in encoded("flips", **{"base.random_flip": True})
    printed = encoded("other", **{f"{TASK}.vae": str(tmp_path / "changed")})
    assert f"{tmp_path / 'encoder-cache'} holds outputs of another encoder, precision or version" in printed
    assert "cache latents: 40 of 40 to encode" in printed


def assert_same_files(run, other):
    """Weights, optimizer state and pictures, byte for byte."""
    names = [path.relative_to(run) for path in run.rglob("*") if path.suffix in (".safetensors", ".png")]
    assert len(names) > 5
    for name in names:
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


def test_the_autoencoder_leaves_the_device_when_latents_are_cached(in_latents, run_in_process, monkeypatch):
    places, decode = [], LatentSpace.decode
    moves, to = [], torch.nn.Module.to

    def moved(self, *arguments, **options):
        if isinstance(self, diffusers.AutoencoderKL):
            moves.append(str(arguments[0]))
        return to(self, *arguments, **options)

    monkeypatch.setattr(torch.nn.Module, "to", moved)
    monkeypatch.setattr(LatentSpace, "decode", lambda self, z: places.append(len(moves)) or decode(self, z))
    run_in_process("run", TASK, **in_latents(TASK, **{f"{TASK}.cache_latents": "memory"}))
    assert moves[places[0] - 1] == "cpu"  # after the cache was filled
    assert moves[-1] == "cpu"  # after the last pictures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, 'cache_latents = "disk": has an effect with vae only'),
        ({"vae": "VAE"}, "keeps one crop of each picture: set base.center_crop: true"),
        ({"vae": "VAE", "base.streaming": True}, "with base.streaming nothing is; set it to null"),
        (
            {"cache_latents": None, "base.encoder_cache_dir": "x"},
            "has an effect with cache_latents or cache_text: disk",
        ),
    ],
)
@pytest.mark.parametrize("task", [TASK, "dit"])
def test_mistakes_with_cached_latents(options, message, vae, task, tiny_config, capsys):
    options = {"cache_latents": "disk"} | options
    values = {key if "." in key else f"{task}.{key}": value for key, value in options.items()}
    values = {key: str(vae) if value == "VAE" else value for key, value in values.items()}
    assert main([str(tiny_config(task, **values))]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(vae, tmp_path_factory):
    """A latent diffusion model trained on a data set of latents, and one that encodes on the fly."""
    folder = tmp_path_factory.mktemp("latent-diffusion")
    shared = [f"{TASK}.vae={vae}", f"{TASK}.model_config=null", "base.max_train_samples=null", "base.max_train_steps=3"]
    shared += ["base.train_batch_size=20", "base.validation_split=0.02"]  # 36 held-out pictures in few batches
    own = [f"base.dataset={__name__}:build_encoded", f"base.dataset_args.vae={vae}", f"{TASK}.num_classes=10"]
    for name, data in (("encoded", own), ("live", [])):
        assert main(["configs/tests/conditional_ddpm.json", f"base.output_dir={folder / name}", *shared, *data]) == 0
    return folder / "encoded", folder / "live"


def test_latents_of_a_data_set_train_like_pictures(runs):
    encoded, live = [[float.fromhex(value) for value in losses(folder).values()] for folder in runs]
    assert encoded == pytest.approx(live, rel=1e-5)
    metrics = [read_metrics(folder, prefix="valid/loss")[-1]["valid_ema/loss"] for folder in runs]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)


@pytest.mark.parametrize("task", ["ddpm", "vae", TASK, "dit", "noisy_classifier"])
def test_tasks_that_need_pictures(task, vae, tiny_config, capsys):
    classes = {} if task in ("ddpm", "vae") else {f"{task}.num_classes": 10}
    assert main([str(tiny_config(task, **encoded_digits(vae), **classes))]) == 1
    expected = "the data set holds latents, and this run needs pictures; conditional_ddpm.vae and dit.vae take latents"
    assert expected in capsys.readouterr().err


def test_metrics_in_the_loop_need_pictures(vae, tiny_config, capsys):
    options = {f"{TASK}.vae": str(vae), f"{TASK}.model_config": None, f"{TASK}.num_classes": 10}
    metrics = {"base.eval_steps": 3, "base.eval_features": "none"}
    assert main([str(tiny_config(TASK, **encoded_digits(vae), **options, **metrics))]) == 1
    assert "the data set holds latents, and metrics compare pictures; set it to null" in capsys.readouterr().err


def test_replaying_a_step_of_latents(runs, capsys):
    run_script(replay, runs[0], 1, "--trust-code")
    text = capsys.readouterr().out
    assert f"loss {float.fromhex(losses(runs[0])[1]):.6g}," in text
    assert "pictures:" not in text


def test_the_pipeline_holds_the_autoencoder_and_decodes(runs, vae):
    pipeline = ClassConditionalPipeline.from_pretrained(runs[0])
    assert pipeline.scheduler.config.clip_sample is False  # latents have no bounds
    assert pipeline.unet.config.in_channels == 2
    trainer = load_trainer(open_run(runs[0]), device="cpu")
    generators = SlotRandom(0, torch.arange(4)).generators()
    images = pipeline([0, 1, 2, 3], 1.5, num_inference_steps=2, generator=generators, output_type="pt").images
    drawn = trainer.sample([{"label": number} for number in range(4)], SlotRandom(0, torch.arange(4)))["samples"]
    assert images.shape == (4, 1, 16, 16)
    torch.testing.assert_close(images, drawn, rtol=1e-4, atol=1e-5)


def test_scripts_draw_from_latents_when_the_autoencoder_has_moved(runs, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(runs[1], folder)
    state = folder / "checkpoint-3" / "state.json"
    saved = json.loads(state.read_text())
    saved["config"][TASK]["vae"] = "gone"
    state.write_text(json.dumps(saved))
    manifest = json.loads((folder / "checkpoint-3" / "manifest.json").read_text())
    from datasets_lib.file_hashes import sha256

    manifest["state.json"] = [state.stat().st_size, sha256(state)]
    (folder / "checkpoint-3" / "manifest.json").write_text(json.dumps(manifest))
    run_script(sample, folder, "--number", 10, "--gif")
    assert Image.open(folder / "samples" / "seed-0" / "denoising.gif").n_frames >= 2
    assert len(list((folder / "samples" / "seed-0" / "samples").rglob("*.png"))) == 10
    shutil.rmtree(folder / "checkpoint-3")
    run_script(sample, folder, "--number", 10, "--output-dir", tmp_path / "again")
    pictures = [path / "samples.png" for path in (folder / "samples" / "seed-0", tmp_path / "again")]
    assert Image.open(pictures[0]).tobytes() == Image.open(pictures[1]).tobytes()


def test_metrics_want_pictures(runs, capsys):
    run_script(evaluate, runs[1], "--number", 20, "--features", "none")
    assert "class_accuracy" in json.loads(capsys.readouterr().out)
    with pytest.raises(SystemExit, match="the data set holds latents; name the pictures', as with base.dataset="):
        run_script(evaluate, runs[0], "--number", 20, "--features", "none", "--trust-code")
    pictures = ["base.dataset=digits", "base.validation_split=0.1"]  # another data set has no arguments of this one
    run_script(evaluate, runs[0], "--number", 20, "--features", "none", *pictures)
    assert "class_accuracy" in json.loads(capsys.readouterr().out)


@pytest.fixture
def without_hub(monkeypatch):
    """Where a hub does not answer, its library tries for long."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_mistakes_in_the_option(vae, tmp_path, tiny_config, capsys, without_hub):
    def problems(**options):
        with pytest.raises(ConfigError) as caught:
            load_config(tiny_config(TASK, **{f"{TASK}.{name}": value for name, value in options.items()}))
        return str(caught.value).replace('"', "")

    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    assert f"vae = {empty}: must be a finished vae run: a folder with config.json or vae/" in problems(vae=empty)
    checkpoint = str(vae / "checkpoint-4" / "vae")
    unknown = "its scaling_factor is not known yet: give the finished run, not one of its checkpoints"
    assert f"vae = {checkpoint}: {unknown}" in problems(vae=checkpoint, model_config=None)
    channels = json.dumps({"in_channels": 1, "out_channels": 1, "block_out_channels": [8, 8]})
    (tmp_path / "unet.json").write_text(channels)
    wrong = problems(vae=str(vae), model_config=str(tmp_path / "unet.json"))
    assert "has in_channels = 1, the autoencoder's latent_channels is 2; make them equal" in wrong
    assert "classifier = x: has seen noisy pixels, and cannot guide latents" in problems(vae=str(vae), classifier="x")
    path = tiny_config(TASK, **{f"{TASK}.vae": "no/such-name", f"{TASK}.model_config": None})
    assert main([str(path)]) == 1
    assert f"{TASK}.vae = no/such-name: no AutoencoderKL in safetensors format" in capsys.readouterr().err
