"""Diffusion transformers: how they start, what they are told, their loss and guidance by hand, what is saved."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from recorded_samples import recorded_samples
from repository import ROOT
from run_folders import losses

from train import main
from trainers.base import RunInfo
from trainers.common.class_pipeline import ClassConditionalPipeline, Guidance
from trainers.common.diffusion.dit_transformer import PATCHES, build_dit, default_dit, dit_problems
from trainers.common.model_files import Grid
from trainers.dit import DiTConfig, DiTTrainer
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import ConfigError, load_config
from trainers.engine.run.randomness import SlotRandom
from trainers.inference.saved_run import load_trainer, open_run

TASK = "dit"
TINY = "configs/tests/models/dit_transformer.json"
SHAPE = json.loads((ROOT / TINY).read_text())
FLOW = {"objective": "rectified_flow", "time_shift": 2.0, "sampler": "euler"}
GRID = Grid(1, 16)


def make(**options):
    """A trainer of ten digits whose network, in eval mode, has random weights everywhere."""
    options = {"model_config": TINY, "ddpm_num_steps": 20, "ddpm_num_inference_steps": 4} | options
    trainer = DiTTrainer(DiTConfig(**options), BaseConfig(resolution=16, channels=1))
    names = [str(digit) for digit in range(10)]
    trainer.run = RunInfo(device=torch.device("cpu"), weight_dtype=torch.float32, label_names=names)
    trainer.setup()
    trainer.modules = trainer.unwrapped = trainer.init_modules()
    torch.manual_seed(0)
    for weights in trainer.modules["transformer"].parameters():
        torch.nn.init.normal_(weights, std=0.2)
    trainer.modules["transformer"].eval()
    return trainer


def batch_of(size):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(size, 1, 16, 16, generator=generator) * 2 - 1
    return {"image": image, "label": torch.arange(size) % 10, "slot": torch.arange(size)}


# --- the network


def test_a_fresh_network_predicts_0_and_its_blocks_change_nothing():
    """adaLN-Zero, arXiv 2212.09748, section 3.2."""
    network = build_dit(TINY, None, GRID, 10).train()
    pictures, timesteps, labels = torch.randn(3, 1, 16, 16), torch.tensor([0, 7, 19]), torch.tensor([0, 4, 10])
    assert torch.equal(network(pictures, timesteps, labels).sample, torch.zeros(3, 1, 16, 16))
    for block in network.transformer_blocks:
        tokens = torch.randn(3, 16, 16)
        assert torch.equal(block(tokens, timestep=timesteps, class_labels=labels), tokens)


def test_labels_are_dropped_by_nobody_else():
    """diffusers' own label dropout would use torch's generator; the row for "no class" is there all the same."""
    network = make().modules["transformer"]
    for block in network.transformer_blocks:
        assert block.norm1.emb.class_embedder.embedding_table.num_embeddings == 11
    told = network(torch.ones(64, 1, 16, 16), torch.full((64,), 5), torch.full((64,), 3)).sample
    embedders = [block.norm1.emb.class_embedder.train() for block in network.transformer_blocks]
    before = torch.get_rng_state()
    again = network(torch.ones(64, 1, 16, 16), torch.full((64,), 5), torch.full((64,), 3)).sample
    assert torch.equal(again, told)
    assert torch.equal(torch.get_rng_state(), before)
    embedders[0].dropout_prob = 1.0  # the comparison can fail
    assert not torch.allclose(network(torch.ones(64, 1, 16, 16), torch.full((64,), 5), torch.full((64,), 3))[0], told)


def test_a_timestep_between_two_others_is_told_apart():
    trainer, noisy = make(), torch.ones(1, 1, 16, 16)
    condition = {"class_labels": torch.tensor([3])}
    found = [trainer._network(noisy, torch.tensor(t), condition) for t in (3, 3.0, 3.5, 4)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    for other in (found[0], found[3]):
        assert not torch.allclose(found[2], other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("resolution", [8, 16, 28, 32, 64, 100, 256, 512])
def test_the_default_fits(resolution):
    assert list(dit_problems(None, Grid(4, resolution))) == []
    assert PATCHES // 2 <= resolution // default_dit(Grid(4, resolution))["patch_size"] <= PATCHES


MISFITS = [
    ({"patch_size": 3}, "has patch_size = 3, which must divide base.resolution = 16"),
    ({"patch_size": 0}, "has patch_size = 0, which must divide base.resolution = 16"),
    ({"in_channels": 3}, "has in_channels = 3, base.channels is 1; make them equal"),
    ({"out_channels": 3}, "has out_channels = 3, base.channels is 1; make them equal"),
    ({"out_channels": 2}, "has out_channels = 2, half of them a variance, which is not trained here; it must be 1"),
    (
        {"attention_head_dim": 7},
        "has num_attention_heads x attention_head_dim = 14, which must be a multiple of 4: sine and cosine",
    ),
    ({"patch_size": "two"}, "is no config of a DiTTransformer2DModel: '<' not supported"),
]


@pytest.mark.parametrize(("settings", "message"), MISFITS)
def test_shapes_that_do_not_fit(settings, message, tmp_path, tiny_config):
    (tmp_path / "network.json").write_text(json.dumps(SHAPE | settings))
    with pytest.raises(ConfigError) as caught:
        load_config(tiny_config(TASK, **{"dit.model_config": str(tmp_path / "network.json")}))
    assert f'dit.model_config = "{tmp_path / "network.json"}": {message}' in str(caught.value)


def test_what_a_file_may_leave_out(tmp_path):
    (tmp_path / "network.json").write_text(json.dumps(SHAPE | {"out_channels": None}))
    assert list(dit_problems(str(tmp_path / "network.json"), GRID)) == []
    missing = "is no config of a DiTTransformer2DModel: it does not say patch_size, num_layers, num_attention_heads"
    [problem] = dit_problems("unet_digits", GRID)  # diffusers would have made a DiT-XL of it
    assert problem == missing


def test_pretrained_weights_that_do_not_fit(tmp_path):
    def error(network, grid=GRID, num_classes=10):
        network.save_pretrained(tmp_path / "transformer")
        with pytest.raises(ValueError, match=rf"pretrained_model_name_or_path = {tmp_path}: ") as caught:
            build_dit(None, str(tmp_path), grid, num_classes)
        shutil.rmtree(tmp_path / "transformer")
        return str(caught.value)

    shape = SHAPE | {"in_channels": 1, "num_embeds_ada_norm": 10, "sample_size": 16}

    def of_shape(**changed):
        return DiTTransformer2DModel(**shape | changed)

    found = error(of_shape(), Grid(1, 32))
    assert "has positions for sample_size = 16, base.resolution is 32; make them equal" in found
    assert "has num_embeds_ada_norm = 10, and this run needs 9" in error(of_shape(), num_classes=9)
    assert "has out_channels = 2, half of them a variance" in error(of_shape(out_channels=2))
    unet = UNet2DModel.from_config(json.loads((ROOT / "configs/tests/models/unet2d.json").read_text()))
    assert "must be of class DiTTransformer2DModel, found UNet2DModel" in error(unet)
    with pytest.raises(FileNotFoundError, match="no DiTTransformer2DModel in safetensors format could be read; give a"):
        build_dit(None, str(tmp_path / "nothing"), GRID, 10)
    of_shape().save_pretrained(tmp_path / "transformer")
    kept = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer").state_dict()
    for name, weights in build_dit(None, str(tmp_path), GRID, 10).state_dict().items():
        assert torch.equal(weights, kept[name])


# --- what is learned


def test_the_loss_by_hand():
    """diffusers' scheduler and network, the run's draws; a third of the labels is replaced by the number 10."""
    trainer, batch = make(label_dropout=0.3), batch_of(60)
    rng = SlotRandom(0, batch["slot"])
    noise, timesteps = rng.normal("noise", (1, 16, 16)), rng.integers("timestep", 20)
    dropped = rng.bernoulli("label_dropout", 0.3)
    assert 5 < dropped.sum() < 35
    labels = torch.where(dropped, 10, batch["label"])
    noisy = trainer.scheduler.add_noise(batch["image"], noise, timesteps)
    expected = (trainer.modules["transformer"](noisy, timesteps, labels).sample - noise).square().mean()
    loss, _ = trainer.compute_loss(batch, SlotRandom(0, batch["slot"]), 0)
    torch.testing.assert_close(loss, expected)
    trainer.training = False
    told = (trainer.modules["transformer"](noisy, timesteps, batch["label"]).sample - noise).square().mean((1, 2, 3))
    metrics = trainer.validation_metrics(batch, SlotRandom(0, batch["slot"]))
    torch.testing.assert_close(metrics["loss"], told)
    assert not torch.allclose(told.mean(), expected)


def test_the_loss_of_a_flow_by_hand():
    trainer, batch = make(objective="rectified_flow", label_dropout=0.0), batch_of(20)
    rng = SlotRandom(0, batch["slot"])
    noise, times = rng.normal("noise", (1, 16, 16)), rng.uniform("time")
    noisy = torch.lerp(batch["image"], noise, times[:, None, None, None])
    velocity = trainer.modules["transformer"](noisy, 20 * times, batch["label"]).sample
    loss, _ = trainer.compute_loss(batch, SlotRandom(0, batch["slot"]), 0)
    torch.testing.assert_close(loss, (velocity - (noise - batch["image"])).square().mean())


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
@torch.no_grad()
def test_guidance_by_hand(scale):
    """1 is the class alone, 0 the row for "no class"."""
    trainer = make(sampler="ddim", guidance_scale=scale)
    slots, labels, none = torch.arange(3), torch.tensor([4, 0, 9]), torch.full((3,), 10)
    scheduler = DDIMScheduler.from_config(trainer.scheduler.config)
    scheduler.set_timesteps(4)
    sample = torch.stack([torch.randn(1, 16, 16, generator=each) for each in SlotRandom(0, slots).generators()])
    for timestep in scheduler.timesteps:
        told, untold = (
            trainer.modules["transformer"](sample, timestep.expand(3), rows).sample for rows in (labels, none)
        )
        prediction = {0.0: untold, 1.0: told}.get(scale, untold + scale * (told - untold))
        sample = scheduler.step(prediction, timestep, sample).prev_sample
    drawn = trainer.sample([{"label": label} for label in labels.tolist()], SlotRandom(0, slots))["samples"]
    torch.testing.assert_close(drawn, (sample / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


# --- runs


@pytest.mark.parametrize("options", [{"sampler": "ddim", "guidance_rescale": 0.3}, FLOW], ids=["ddpm", "flow"])
def test_the_pipeline_draws_the_validations_pictures(options, run_in_process, monkeypatch):
    drawn = recorded_samples(monkeypatch, DiTTrainer)
    folder = run_in_process(task=TASK, **{f"dit.{name}": value for name, value in options.items()})
    pictures, labels, rng = drawn[-1]  # with averaged weights
    assert labels == list(range(10))
    pipeline = DiTTrainer.load_pipeline(folder)
    rng.asked.clear()
    settings = {"num_inference_steps": 2, "generator": rng.generators(), "output_type": "pt"}
    guidance = Guidance(1.5, options.get("guidance_rescale", 0.0))
    found = pipeline([str(label) for label in labels], guidance, **settings).images
    torch.testing.assert_close(found, pictures, rtol=0, atol=1e-5)
    saved = load_trainer(open_run(folder), device="cpu")
    rng.asked.clear()
    again = saved.sample([{"label": label} for label in labels], rng)["samples"]
    torch.testing.assert_close(again, pictures, rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(run_in_process):
    plain = run_in_process("plain", TASK)
    assert losses(plain) == losses(run_in_process("less", TASK, **{"base.gradient_checkpointing": True}))


def test_a_finished_run_as_shape_and_as_initial_weights(run_in_process):
    first = run_in_process("first", TASK)
    same_shape = run_in_process("shape", TASK, **{"dit.model_config": str(first / "transformer")})
    assert losses(same_shape) == losses(first)
    options = {"dit.model_config": None, "dit.pretrained_model_name_or_path": str(first), "dit.learning_rate": 1e-30}
    second = run_in_process("second", TASK, **options)
    before, after = (DiTTransformer2DModel.from_pretrained(folder / "transformer") for folder in (first, second))
    for name, weights in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], weights, rtol=1e-6, atol=1e-7)


def test_in_latents(run_in_process, tiny_config, tmp_path):
    """And, without guidance, in diffusers' own pipeline, whose "no class" is the number 1000."""
    vae = tmp_path / "vae"
    assert main(["configs/tests/vae.json", f"base.output_dir={vae}", "base.max_train_steps=4"]) == 0
    wrong = {"dit.vae": str(vae), "dit.model_config": TINY}
    (tmp_path / "wide.json").write_text(json.dumps(SHAPE | {"patch_size": 16}))
    with pytest.raises(ConfigError, match="has patch_size = 16, which must divide the latents' size = 8"):
        load_config(tiny_config(TASK, **wrong | {"dit.model_config": str(tmp_path / "wide.json")}))
    folder = run_in_process(task=TASK, **wrong, **{"dit.guidance_scale": 1.0, "dit.sampler": "ddim"})
    pipeline = ClassConditionalPipeline.from_pretrained(folder)
    assert pipeline.transformer.config.in_channels == 2
    assert pipeline.transformer.config.sample_size == 8
    trainer = load_trainer(open_run(folder), device="cpu")
    drawn = trainer.sample([{"label": number} for number in range(4)], SlotRandom(0, torch.arange(4)))["samples"]
    random = {"generator": SlotRandom(0, torch.arange(4)).generators()}
    images = pipeline([0, 1, 2, 3], num_inference_steps=2, output_type="pt", **random).images
    torch.testing.assert_close(images, drawn, rtol=1e-4, atol=1e-5)
    theirs = DiTPipeline(pipeline.transformer, pipeline.vae, DDIMScheduler.from_config(pipeline.scheduler.config))
    random = {"generator": SlotRandom(0, torch.arange(4)).generators()}
    images = theirs([0, 1, 2, 3], 1.0, num_inference_steps=2, output_type="pt", **random).images
    torch.testing.assert_close(images, drawn, rtol=1e-4, atol=1e-5)
