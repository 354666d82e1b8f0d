"""Class-conditional diffusion: labels, their dropout, guidance against its definition, and the pipeline that is saved."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from PIL import Image
from recorded_samples import recorded_samples
from run_folders import losses, read_metrics

from train import main
from trainers.base import RunInfo
from trainers.common.class_pipeline import ClassConditionalPipeline, Guidance, noise_levels
from trainers.common.diffusion.class_diffusion import ClassDiffusionConfig
from trainers.common.diffusion.sampling import build_sampler
from trainers.conditional_ddpm import ConditionalDDPMTrainer
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import ConfigError, load_config
from trainers.engine.run.randomness import SlotRandom

TASK = "conditional_ddpm"
NAMES = [str(digit) for digit in range(10)]


def guided(guidance, sigma=1.0):
    """(prediction, conditional, unconditional, labels of each call) where the network multiplies by label + 1."""
    noisy, labels, batches = torch.randn(2, 1, 4, 4), torch.tensor([1, 4]), []

    def network(noisy, timestep, condition):
        batches.append(condition["labels"].tolist())
        return noisy * (condition["labels"][:, None, None, None] + 1.0)

    asked, none = {"labels": labels}, {"labels": torch.full_like(labels, 10)}
    found = guidance.predict(network, noisy, torch.tensor(3), asked, none, sigma)
    return found, noisy * torch.tensor([2.0, 5.0])[:, None, None, None], noisy * 11.0, batches


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 7.5])
def test_guidance_against_its_definition(scale):
    found, conditional, unconditional, batches = guided(Guidance(scale))
    torch.testing.assert_close(found, unconditional + scale * (conditional - unconditional))
    assert batches == {0.0: [[10, 10]], 1.0: [[1, 4]]}.get(scale, [[1, 4, 10, 10]])  # one forward


def test_guidance_only_in_its_interval():
    """(low, high], as in arXiv 2404.07724; outside of it the prediction is the conditional one, at no extra cost."""
    for sigma, inside in ((0.1, False), (0.5, False), (0.6, True), (2.0, True), (2.1, False)):
        found, conditional, unconditional, batches = guided(Guidance(3.0, interval=(0.5, 2.0)), sigma)
        expected = unconditional + 3 * (conditional - unconditional) if inside else conditional
        torch.testing.assert_close(found, expected)
        assert len(batches[0]) == (4 if inside else 2)


def test_rescaled_guidance_has_the_standard_deviation_of_the_conditional_prediction():
    found, conditional, _, _ = guided(Guidance(5.0, rescale=1.0))
    torch.testing.assert_close(found.std(dim=(1, 2, 3)), conditional.std(dim=(1, 2, 3)))
    half, conditional, unconditional, _ = guided(Guidance(5.0, rescale=0.5))
    plain = unconditional + 5 * (conditional - unconditional)
    factor = conditional.std(dim=(1, 2, 3), keepdim=True) / plain.std(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(half, 0.5 * plain * factor + 0.5 * plain)


def test_noise_levels():
    scheduler = DDPMScheduler(num_train_timesteps=50, rescale_betas_zero_snr=True)
    sigma_of, alpha_bar = noise_levels(scheduler), scheduler.alphas_cumprod[40].item()
    assert sigma_of(40) == pytest.approx(math.sqrt((1 - alpha_bar) / alpha_bar))
    assert sigma_of(torch.tensor(49)) == math.inf  # pure noise
    of_flow = noise_levels(FlowMatchEulerDiscreteScheduler(num_train_timesteps=50))
    assert of_flow(torch.tensor(12.5)) == pytest.approx(0.25 / 0.75)
    assert of_flow(50) == math.inf


def make(names=NAMES, **options):
    options = {"model_config": "configs/tests/models/unet2d.json", "ddpm_num_steps": 20} | options
    trainer = ConditionalDDPMTrainer(ClassDiffusionConfig(**options), BaseConfig(resolution=16, channels=1))
    trainer.run = RunInfo(device=torch.device("cpu"), weight_dtype=torch.float32, label_names=names)
    trainer.setup()
    trainer.modules = trainer.init_modules()
    return trainer


def test_labels_are_dropped_per_example_in_training_only():
    trainer, seen = make(label_dropout=0.3), []
    trainer._network = lambda noisy, timesteps, condition: seen.append(condition["class_labels"]) or noisy
    batch = {"image": torch.zeros(4000, 1, 16, 16), "label": torch.arange(4000) % 10, "slot": torch.arange(4000)}
    trainer.compute_loss(batch, SlotRandom(0, batch["slot"]), 0)
    dropped = seen[0] == 10
    assert dropped.float().mean() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(seen[0][~dropped], batch["label"][~dropped])
    part = {name: values[:40] for name, values in batch.items()}
    trainer.compute_loss(part, SlotRandom(0, part["slot"]), 0)
    assert torch.equal(seen[1], seen[0][:40])  # a function of the slot, not of the batch
    trainer.training = False
    trainer.compute_loss(part, SlotRandom(0, part["slot"]), 0)
    trainer.validation_metrics(part, SlotRandom(0, part["slot"]))
    assert torch.equal(seen[2], part["label"])
    assert torch.equal(seen[3], part["label"])


def test_the_network_has_an_embedding_more_than_there_are_classes():
    assert make().modules["unet"].class_embedding.num_embeddings == 11
    assert make(names=None, num_classes=3).modules["unet"].class_embedding.num_embeddings == 4


def test_errors_of_classes(tmp_path):
    with pytest.raises(ValueError, match=r"num_classes = 9: the data set names 10 classes; set it to null"):
        make(num_classes=9)
    with pytest.raises(ValueError, match="the data set names no classes; say how many it has"):
        make(names=None)
    with pytest.raises(ValueError, match=r"valid_classes: 'x' is no class; allowed: 0 to 9, or 0, 1"):
        make(valid_classes=["x"])
    batch = {"image": torch.zeros(1, 1, 16, 16)}
    with pytest.raises(ValueError, match="needs labels, and the data set has none"):
        make().compute_loss(batch, SlotRandom(0, torch.zeros(1, dtype=torch.int64)), 0)
    UNet2DModel.from_config(json.loads(Path("configs/tests/models/unet2d.json").read_text())).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has num_class_embeds = None, and this run needs 11"):
        make(model_config=None, pretrained_model_name_or_path=str(tmp_path))


RULES = [
    ({"guidance_interval": [2, 1]}, "guidance_interval = [2.0, 1.0]: must be [low, high] with 0 <= low < high"),
    ({"guidance_interval": [1]}, "must be [low, high] with 0 <= low < high"),
    (
        {"guidance_scale": 1.0, "guidance_rescale": 0.5},
        "guidance_rescale = 0.5: has an effect with a guidance_scale other",
    ),
    ({"valid_classes": []}, "valid_classes = []: must name at least one class, or be null"),
    ({"sampler": "heun"}, "must be one of ddpm, ddim, dpmsolver++"),
]


@pytest.mark.parametrize(("options", "message"), RULES)
def test_rules(options, message, tiny_config):
    path = tiny_config(TASK, **{f"{TASK}.{name}": value for name, value in options.items()})
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)


def test_a_grid_has_a_column_per_class_and_the_averaged_weights_below(run_in_process):
    classes = {f"{TASK}.valid_classes": ["3", 7, "1"], f"{TASK}.valid_batch_size": 6, "base.validation_split": 0.02}
    folder = run_in_process(task=TASK, **classes)
    side = 64 + 2  # pictures of 16 pixels are enlarged 4 times
    size = Image.open(folder / "samples" / "samples-step-000006.png").size
    assert size == (3 * side + 2, 2 * (2 * side + 2) + 8)
    logged = {"step", "valid/loss", "valid_ema/loss", "valid/seconds", "valid/peak_memory_gib"}
    assert set(read_metrics(folder, prefix="valid")[0]) == logged


def test_the_pipeline_draws_the_validations_pictures(run_in_process, monkeypatch):
    """Loaded back with one line, asked by name, with the noise of the last validation."""
    drawn = recorded_samples(monkeypatch, ConditionalDDPMTrainer)
    options = {"guidance_scale": 2.0, "sampler": "ddim", "guidance_rescale": 0.3, "guidance_interval": [0.1, 5.0]}
    folder = run_in_process(task=TASK, **{f"{TASK}.{name}": value for name, value in options.items()})
    pictures, labels, rng = drawn[-1]  # with averaged weights
    pipeline = ConditionalDDPMTrainer.load_pipeline(folder)
    rng.asked.clear()
    settings = {"num_inference_steps": 2, "generator": rng.generators(), "output_type": "pt"}
    found = pipeline([str(label) for label in labels], Guidance(2.0, 0.3, (0.1, 5.0)), **settings).images
    torch.testing.assert_close(found, pictures, rtol=0, atol=1e-5)
    assert ClassConditionalPipeline.from_pretrained(folder).label_names == NAMES


def test_the_pipeline_says_which_classes_it_knows(run_in_process):
    pipeline = ConditionalDDPMTrainer.load_pipeline(run_in_process(task=TASK))
    for wrong in ("ten", 10, -1):
        with pytest.raises(ValueError, match=rf"classes: '?{wrong}'? is no class; allowed: 0 to 9, or 0, 1"):
            pipeline(wrong)
    assert pipeline("3", num_inference_steps=2).images[0].size == (16, 16)
    assert pipeline([3, 4], num_inference_steps=2, output_type="np", return_dict=False)[0].shape == (2, 16, 16, 1)


def test_the_pipeline_in_half_precision_and_without_classes(run_in_process):
    folder = run_in_process(task=TASK)
    pipeline = ClassConditionalPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert pipeline([3], num_inference_steps=2, guidance_scale=2.0).images[0].size == (16, 16)
    with pytest.raises(ValueError, match="name at least one class"):
        pipeline([])
    with pytest.raises(ValueError, match=r"sampler = heun: must be one of ddpm, ddim, dpmsolver\+\+"):
        pipeline([3], sampler="heun")


def test_the_pipelines_index_has_components_that_a_hub_can_serve(run_in_process):
    """diffusers takes each list in model_index.json for a component, with a file of its own."""
    from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders

    folder = run_in_process(task=TASK)
    index = json.loads((folder / "model_index.json").read_text())
    files = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    custom, folders = _get_custom_components_and_folders("me/digits", dict(index), files, files)
    assert (custom, sorted(folders)) == ({}, ["scheduler", "transformer", "unet", "vae"])
    assert index["vae"] == index["transformer"] == [None, None]  # as diffusers writes optional ones that are not there


def test_a_pipeline_of_before_there_were_transformers(run_in_process):
    folder = run_in_process(task=TASK)
    index = json.loads((folder / "model_index.json").read_text())
    del index["transformer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert ClassConditionalPipeline.from_pretrained(folder).num_classes == 10


def test_names_that_look_like_numbers():
    """A number is a place, a text is a name; a place that is not there is an error even where a name looks like it."""
    assert make(names=["10", "20"], valid_classes=["20", 0]).columns == [1, 0]
    with pytest.raises(ValueError, match="10 is no class; allowed: 0 to 1, or 10, 20"):
        make(names=["10", "20"], valid_classes=[10])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++"])
def test_samplers_keep_the_schedule_that_was_trained_with(sampler):
    scheduler = DDPMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    built = build_sampler(sampler, scheduler)
    assert torch.equal(built.alphas_cumprod, scheduler.alphas_cumprod)
    assert built.config.prediction_type == "v_prediction"
    assert built is not scheduler


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++"])
def test_samplers_run(sampler, run_in_process):
    folder = run_in_process(task=TASK, **{f"{TASK}.sampler": sampler})
    assert len(losses(folder)) == 6
    assert ClassConditionalPipeline.from_pretrained(folder).config.sampler == sampler


def test_data_without_labels_is_told(tiny_config, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        Image.new("L", (16, 16), 50 * number).save(tmp_path / "pictures" / f"{number}.png")
    source = {"base.dataset": None, "base.train_data_dir": str(tmp_path / "pictures"), "base.max_train_samples": None}
    assert main([str(tiny_config(TASK, **source))]) == 1
    assert "num_classes = null: the data set names no classes" in capsys.readouterr().err
    latest = {"base.resume_from_checkpoint": "latest", f"{TASK}.num_classes": 2}
    assert main([str(tiny_config(TASK, **source, **latest))]) == 1
    assert "conditional_ddpm needs labels, and the data set has none" in capsys.readouterr().err
