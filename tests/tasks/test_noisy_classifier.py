"""The classifier of noisy pictures, and the guidance that it gives, against closed forms."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from run_folders import read_metrics

from train import main
from trainers.base import RunInfo
from trainers.common.diffusion.guidance import ClassifierGuidance
from trainers.conditional_ddpm import ConditionalDDPMTrainer
from trainers.engine.config.config import ConfigError, load_config
from trainers.engine.run.randomness import SlotRandom
from trainers.noisy_classifier import NoisyClassifierConfig, NoisyClassifierTrainer

TASK = "noisy_classifier"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished tiny run on digits."""
    folder = tmp_path_factory.mktemp("classifier") / "run"
    options = [f"base.output_dir={folder}", "base.validation_split=0.02"]
    assert main(["configs/tests/noisy_classifier.json", *options]) == 0
    return folder


def test_metrics_and_files(trained):
    last = read_metrics(trained, prefix="valid")[-1]
    names = {"loss", "accuracy", "accuracy_without_noise"}
    logged = {f"{kind}/{name}" for kind in ("valid", "valid_ema") for name in names}
    assert set(last) == {"step", "valid/seconds", "valid/peak_memory_gib"} | logged
    assert read_metrics(trained, prefix="accuracy")
    assert not (trained / "samples").exists()  # it draws no pictures
    assert NoisyClassifierTrainer.load_pipeline(trained).config.out_channels == 10


def test_loss_and_accuracy_against_their_definitions(monkeypatch):
    trainer = NoisyClassifierTrainer(
        NoisyClassifierConfig(model_config="configs/tests/models/unet2d.json", ddpm_num_steps=20),
        load_config("configs/tests/noisy_classifier.json").base,
    )
    names = list("0123456789")
    trainer.run = RunInfo(device=torch.device("cpu"), weight_dtype=torch.float32, label_names=names)
    trainer.setup()
    trainer.modules = trainer.init_modules()
    logits = torch.randn(64, 10)
    seen = []
    monkeypatch.setattr(trainer, "_logits", lambda noisy, timesteps: seen.append((noisy, timesteps)) or logits)
    labels = torch.arange(64) % 10
    batch = {"image": torch.randn(64, 1, 16, 16), "label": labels, "slot": torch.arange(64)}
    loss, logged = trainer.compute_loss(batch, SlotRandom(0, batch["slot"]), 0)
    expected = -(logits - logits.logsumexp(1, keepdim=True)).gather(1, labels[:, None]).mean()
    torch.testing.assert_close(loss, expected)
    assert logged["accuracy"].item() == (logits.argmax(1) == labels).float().mean().item()
    [(noisy, timesteps)] = seen
    alpha_bar = trainer.scheduler.alphas_cumprod[timesteps][:, None, None, None]
    noise = SlotRandom(0, batch["slot"]).normal("noise", (1, 16, 16))
    torch.testing.assert_close(noisy, alpha_bar.sqrt() * batch["image"] + (1 - alpha_bar).sqrt() * noise)
    trainer.training = False
    trainer.validation_metrics(batch, SlotRandom(0, batch["slot"]))
    assert torch.equal(seen[-1][0], batch["image"])  # without noise
    assert seen[-1][1].tolist() == [0] * 64


MEANS = torch.tensor([[-1.0, 0.5], [2.0, 1.0], [0.0, -3.0]])


def gaussian_logits(noisy, timestep):
    """log p(class | x) up to a constant of x for classes that are unit Gaussians; its gradient has a closed form."""
    return -(noisy.flatten(1)[:, None] - MEANS).square().sum(2) / 2


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_shift_of_a_prediction_against_its_definition(prediction_type):
    """The gradient of log p(y | x) is m_y - E[m]; noise moves by -scale s grad, whatever the network predicts."""
    torch.manual_seed(0)
    scheduler = DDPMScheduler(num_train_timesteps=50, prediction_type=prediction_type)
    guidance = ClassifierGuidance(gaussian_logits, 1.7, scheduler)
    timestep, labels = torch.tensor(30), torch.tensor([0, 2, 1, 1])
    noisy, noise = torch.randn(4, 1, 1, 2), torch.randn(4, 1, 1, 2)
    alpha_bar = scheduler.alphas_cumprod[30]
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def as_predicted(noise):
        clean = (noisy - s * noise) / a
        return {"epsilon": noise, "sample": clean, "v_prediction": a * noise - s * clean}[prediction_type]

    weights = gaussian_logits(noisy, timestep).softmax(1)
    gradient = (MEANS[labels] - weights @ MEANS).reshape(noisy.shape)
    with torch.no_grad():  # as while pictures are drawn
        found = guidance.guide(as_predicted(noise), noisy, timestep, labels)
    torch.testing.assert_close(found, as_predicted(noise - 1.7 * s * gradient))


def test_pure_noise_is_not_guided():
    scheduler = DDPMScheduler(
        num_train_timesteps=20, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    scheduler.alphas_cumprod[-1] = 0.0  # the library stops just above
    prediction = torch.randn(2, 1, 1, 2)
    guided = ClassifierGuidance(gaussian_logits, 2.0, scheduler).guide(
        prediction, torch.randn(2, 1, 1, 2), torch.tensor(19), torch.tensor([0, 1])
    )
    assert torch.equal(guided, prediction)


def test_a_diffusion_run_guided_by_the_classifier(trained, run_in_process, monkeypatch):
    """With guidance_scale 0 the network is told no class: what is left of the labels comes from the classifier."""
    drawn, original = [], ConditionalDDPMTrainer.sample
    monkeypatch.setattr(
        ConditionalDDPMTrainer, "sample", lambda *a: drawn.append(original(*a)["samples"]) or {"samples": drawn[-1]}
    )
    options = {"guidance_scale": 0.0, "valid_classes": [3, 7], "valid_batch_size": 2}
    task = "conditional_ddpm"
    for scale in (None, 1.0, 50.0):
        given = {} if scale is None else {"classifier": str(trained), "classifier_scale": scale}
        named = {f"{task}.{name}": value for name, value in (options | given).items()}
        run_in_process(f"run-{scale}", task, **named)
    plain, weak, strong = drawn[1], drawn[3], drawn[5]  # with averaged weights
    assert 0 < (weak - plain).abs().max() < (strong - plain).abs().max()


def test_another_noise_schedule_is_an_error(trained, tiny_config, capsys):
    options = {"conditional_ddpm.classifier": str(trained), "conditional_ddpm.ddpm_num_steps": 30}
    assert main([str(tiny_config("conditional_ddpm", **options))]) == 1
    assert f"classifier = {trained}: it was trained with another noise schedule" in capsys.readouterr().err


def test_a_classifier_of_other_classes_is_an_error(trained, tiny_config, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "nine")
    config = tmp_path / "nine" / "classifier" / "config.json"
    weights = tmp_path / "nine" / "classifier" / "diffusion_pytorch_model.safetensors"
    network = UNet2DModel.from_config(json.loads(config.read_text()) | {"out_channels": 9})
    weights.unlink()
    network.save_pretrained(config.parent)
    assert main([str(tiny_config("conditional_ddpm", **{"conditional_ddpm.classifier": str(tmp_path / "nine")}))]) == 1
    assert "nine: knows 9 classes, not 10" in capsys.readouterr().err


def test_a_classifier_of_other_pictures_is_an_error(trained, tiny_config, tmp_path):
    shutil.copytree(trained, tmp_path / "color")
    config = tmp_path / "color" / "classifier" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 3}))
    with pytest.raises(ConfigError, match="sees pictures with 3 channels, base.channels is 1; train one for these"):
        load_config(tiny_config("conditional_ddpm", **{"conditional_ddpm.classifier": str(tmp_path / "color")}))


RULES = [
    ({"classifier": "nowhere"}, 'classifier = "nowhere": must be a finished noisy_classifier run'),
    ({"classifier_scale": 2.0}, "classifier_scale = 2.0: has an effect with classifier only"),
]


@pytest.mark.parametrize(("options", "message"), RULES)
def test_rules(options, message, tiny_config):
    path = tiny_config("conditional_ddpm", **{f"conditional_ddpm.{name}": value for name, value in options.items()})
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)


def test_it_draws_no_pictures(tiny_config, capsys):
    options = {"base.eval_steps": 3, "base.eval_features": "none"}
    assert main([str(tiny_config(TASK, **options))]) == 1
    assert "base.eval_steps = 3: this task draws no pictures; set it to null" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"noisy_classifier draws no pictures; give its folder to conditional_ddpm"):
        NoisyClassifierTrainer(NoisyClassifierConfig(), None).sample([], None)


def test_it_goes_on_from_a_pretrained_classifier(trained, run_in_process, tiny_config, capsys):
    pretrained = {f"{TASK}.model_config": None, f"{TASK}.pretrained_model_name_or_path": str(trained / "classifier")}
    folder = run_in_process(task=TASK, **pretrained)
    assert json.loads((folder / "classifier" / "config.json").read_text())["out_channels"] == 10


@pytest.mark.parametrize("task", ["conditional_ddpm", TASK])
def test_labels_beyond_num_classes(task, tmp_path, tiny_config, capsys):
    from PIL import Image

    rows = []
    for number in range(8):
        Image.new("L", (16, 16), 30 * number).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "label": number % 4}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    data = {"base.dataset": None, "base.train_data_dir": str(tmp_path), "base.max_train_samples": None}
    path = tiny_config(task, **data, **{f"{task}.num_classes": 3, "base.output_dir": str(tmp_path / "run")})
    assert main([str(path)]) == 1
    message = f"{task}.num_classes = 3: the data set has the label 3; it must be at least 4"
    assert message in capsys.readouterr().err
