"""Noising, targets and SNR weights against closed forms and diffusers' schedulers, for every prediction type."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from trainers.common.objective import DDPMObjective
from trainers.engine.randomness import SlotRandom

TYPES = ["epsilon", "sample", "v_prediction"]


def scheduler(prediction_type="epsilon", **options):
    return DDPMScheduler(num_train_timesteps=100, prediction_type=prediction_type, **options)


def closed_form(prediction_type, clean, noise, alpha_bar):
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    target = {"epsilon": noise, "sample": clean, "v_prediction": a * noise - s * clean}[prediction_type]
    return a * clean + s * noise, target


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_loss_against_the_closed_form(prediction_type, snr_gamma):
    objective = DDPMObjective(scheduler(prediction_type), snr_gamma)
    clean = torch.rand(6, 2, 4, 4) * 2 - 1
    seen = {}

    def predict(noisy, timesteps):
        seen.update(noisy=noisy, timesteps=timesteps)
        return torch.full_like(noisy, 0.25)

    loss = objective.loss(predict, clean, SlotRandom(0, torch.arange(6)))
    rng = SlotRandom(0, torch.arange(6))
    noise, timesteps = rng.normal("noise", (2, 4, 4)), rng.integers("timestep", 100)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 100, dtype=torch.float64), 0)[timesteps][
        :, None, None, None
    ]
    noisy, target = closed_form(prediction_type, clean.double(), noise.double(), alpha_bar)
    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    w = snr.clamp(max=snr_gamma or float("inf"))
    weight = {"sample": w, "epsilon": w / snr, "v_prediction": w / (snr + 1)}[prediction_type]
    expected = (0.25 - target).square().mean((1, 2, 3)) * (weight if snr_gamma else 1)
    assert torch.equal(seen["timesteps"], timesteps)
    torch.testing.assert_close(seen["noisy"].double(), noisy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_perfect_prediction_recovers_the_image_and_has_no_loss(prediction_type):
    """diffusers' own step, told the target, must give back the clean image: our targets mean what it expects."""
    ours = scheduler(prediction_type, clip_sample=False)
    objective = DDPMObjective(ours)
    clean, noise = torch.rand(5, 1, 4, 4) * 2 - 1, torch.randn(5, 1, 4, 4)
    for timestep in (0, 30, 99):
        timesteps = torch.full((5,), timestep)
        noisy = ours.add_noise(clean, noise, timesteps)
        target = objective.target(clean, noise, timesteps)
        step = ours.step(target, timestep, noisy, generator=torch.Generator())
        torch.testing.assert_close(step.pred_original_sample, clean, rtol=1e-3, atol=1e-3)
    target = {}

    def perfect(noisy, timesteps):
        rng = SlotRandom(0, torch.arange(5))
        target["value"] = objective.target(clean, rng.normal("noise", (1, 4, 4)), timesteps)
        return target["value"]

    assert objective.loss(perfect, clean, SlotRandom(0, torch.arange(5))).abs().max() == 0


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_zero_terminal_snr(beta_schedule, prediction_type):
    rescaled = scheduler(prediction_type, beta_schedule=beta_schedule, rescale_betas_zero_snr=True)
    objective = DDPMObjective(rescaled, snr_gamma=5.0)
    last = torch.tensor([99])
    clean, noise = torch.rand(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    assert rescaled.alphas_cumprod[99] < 1e-7
    torch.testing.assert_close(rescaled.add_noise(clean, noise, last), noise, rtol=1e-3, atol=1e-3)
    assert objective.weight(torch.arange(100)).isfinite().all()
    if prediction_type == "v_prediction":
        torch.testing.assert_close(objective.target(clean, noise, last), -clean, rtol=1e-3, atol=1e-3)


def test_half_precision_predictions_are_compared_in_float32():
    objective = DDPMObjective(scheduler())
    loss = objective.loss(lambda noisy, t: noisy.bfloat16(), torch.zeros(2, 1, 4, 4), SlotRandom(0, torch.arange(2)))
    assert loss.dtype == torch.float32


def test_unknown_prediction_type():
    bad = scheduler()
    bad.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="prediction_type = flow: must be one of epsilon, sample, v_prediction"):
        DDPMObjective(bad).target(torch.zeros(1), torch.zeros(1), torch.tensor([0]))
