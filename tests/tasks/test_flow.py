"""Rectified flow: closed forms of its objective, its samplers, and the tasks that train with it."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler
from resuming import check_resume
from run_folders import losses

from trainers.common.class_pipeline import ClassConditionalPipeline, Guidance, denoise
from trainers.common.diffusion.objective import RectifiedFlow
from trainers.common.diffusion.pixel_diffusion import PixelDiffusionConfig
from trainers.common.diffusion.sampling import build_sampler
from trainers.engine.config.config import ConfigError, load_config
from trainers.engine.run.randomness import SlotRandom
from trainers.inference.saved_run import load_trainer, open_run

FLOW = {"objective": "rectified_flow", "time_shift": 2.0, "time_distribution": "logit_normal"}


def flow(shift=1.0, logit=None, steps=1000):
    return RectifiedFlow(FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=shift), logit)


def test_loss_against_the_closed_form():
    clean, slots, seen = torch.rand(6, 2, 4, 4) * 2 - 1, torch.arange(6), {}

    def predict(noisy, timesteps):
        seen.update(noisy=noisy, timesteps=timesteps)
        return torch.full_like(noisy, 0.25)

    loss = flow().loss(predict, clean, SlotRandom(0, slots))
    rng = SlotRandom(0, slots)
    noise, times = rng.normal("noise", (2, 4, 4)), rng.uniform("time")
    t = times[:, None, None, None]
    torch.testing.assert_close(seen["noisy"], (1 - t) * clean + t * noise)
    torch.testing.assert_close(seen["timesteps"], 1000 * times)
    torch.testing.assert_close(loss, (0.25 - (noise - clean)).square().mean((1, 2, 3)))


def test_noising_is_that_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    clean, noise = torch.rand(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    timesteps = scheduler.timesteps[[0, 100, 500, 999]]
    t = (timesteps / 1000)[:, None, None, None]
    torch.testing.assert_close(scheduler.scale_noise(clean, timesteps, noise), (1 - t) * clean + t * noise)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_of_both_distributions_against_quantiles(shift):
    """The shift is monotonous, so quantiles move with it; 200,000 draws, within 4 standard errors."""
    slots, parts = torch.arange(200_000), torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = {None: parts, (-0.5, 0.8): torch.sigmoid(-0.5 + 0.8 * normal.icdf(parts))}
    for logit, quantiles in expected.items():
        times = flow(shift, logit).times(SlotRandom(0, slots))
        assert times.shape == (200_000,)
        assert 0 <= times.min() <= times.max() < 1
        found = torch.stack([(times <= shift * q / (1 + (shift - 1) * q)).float().mean() for q in quantiles])
        torch.testing.assert_close(found, parts, rtol=0, atol=4 * 0.5 / 200_000**0.5)


@pytest.mark.parametrize("sampler", ["euler", "dpmsolver++"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_perfect_velocity_leads_to_the_picture(sampler, shift):
    """Along a straight line every solver is exact: our velocity and times mean what diffusers' schedulers expect."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    clean, noise = torch.rand(3, 1, 4, 4) * 2 - 1, torch.randn(3, 1, 4, 4)
    seen = []

    def predict(noisy, timestep):
        t = float(timestep) / 1000
        seen.append((noisy - ((1 - t) * clean + t * noise)).abs().max().item())
        return noise - clean

    drawn = denoise(predict, build_sampler(sampler, scheduler), noise, 10, [torch.Generator()] * 3)
    torch.testing.assert_close(drawn, clean, rtol=0, atol=5e-3)
    assert len(seen) == 10
    # the times that the network is told are those of the pictures; dpmsolver++ takes pure noise for time 0.999 and rounds
    # down to whole timesteps, which is two of a thousand at the most
    assert max(seen) < (1e-5 if sampler == "euler" else 2e-3 * (noise - clean).abs().max().item())


def test_samplers_that_a_flow_does_not_have():
    with pytest.raises(ValueError, match=r"sampler = ddim: a flow has euler or dpmsolver\+\+"):
        build_sampler("ddim", FlowMatchEulerDiscreteScheduler())


def options(task, **more):
    return {f"{task}.{name}": value for name, value in (FLOW | more).items()}


def test_a_flow_without_classes_trains_and_its_pipeline_draws_the_same(run_in_process):
    folder = run_in_process("run", "ddpm", **options("ddpm"))
    pipeline = DDPMPipeline.from_pretrained(folder)
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    assert pipeline.scheduler.config.shift == 2.0
    trainer = load_trainer(open_run(folder), device="cpu")
    drawn = trainer.sample([{}] * 3, SlotRandom(0, torch.arange(3)))["samples"]
    generators = SlotRandom(0, torch.arange(3)).generators()
    images = pipeline(3, generators, num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(images, drawn, rtol=1e-4, atol=1e-5)
    assert f'from_pretrained("{folder}")\npipeline(num_inference_steps=2)' in trainer.usage_of(folder)


@pytest.mark.parametrize("sampler", [None, "dpmsolver++"])
def test_a_flow_with_classes_and_guidance(sampler, run_in_process):
    task = "conditional_ddpm"
    more = {"sampler": sampler, "guidance_interval": [0.1, 3.0]}
    folder = run_in_process("run", task, **options(task, **more))
    pipeline = ClassConditionalPipeline.from_pretrained(folder)
    assert pipeline.config.sampler == (sampler or "euler")
    trainer = load_trainer(open_run(folder), device="cpu")
    drawn = trainer.sample([{"label": 3}, {"label": 4}], SlotRandom(0, torch.arange(2)))["samples"]
    generators = SlotRandom(0, torch.arange(2)).generators()
    arguments = {"num_inference_steps": 2, "generator": generators, "output_type": "pt"}
    images = pipeline([3, 4], Guidance(1.5, interval=(0.1, 3.0)), **arguments).images
    torch.testing.assert_close(images, drawn, rtol=1e-4, atol=1e-5)


def test_a_flow_resumes_exactly(tiny_config):
    check_resume(tiny_config, options("ddpm"))


def test_the_objective_is_part_of_the_training(run_in_process):
    reference, other = [losses(run_in_process(n, "ddpm", **o)) for n, o in (("a", {}), ("b", options("ddpm")))]
    assert reference != other


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective": "rectified_flow", "snr_gamma": 5.0}, "snr_gamma = 5.0: has an effect with objective: ddpm only"),
        (
            {"objective": "rectified_flow", "prediction_type": "sample"},
            "prediction_type = sample: has an effect with objective: ddpm only",
        ),
        ({"time_shift": 3.0}, "time_shift = 3.0: has an effect with objective: rectified_flow only"),
        (
            {"objective": "rectified_flow", "time_logit_std": 2.0},
            "time_logit_std = 2.0: has an effect with time_distribution: logit_normal only",
        ),
        (
            {"objective": "rectified_flow", "sampler": "ddim"},
            "sampler = ddim: must be euler, dpmsolver++ or null with objective: rectified_flow",
        ),
        ({"sampler": "euler"}, "sampler = euler: must be ddpm, ddim, dpmsolver++ or null with objective: ddpm"),
    ],
)
def test_options_without_effect(given, message, tiny_config):
    with pytest.raises(ConfigError) as caught:
        load_config(tiny_config("ddpm", **{f"ddpm.{name}": value for name, value in given.items()}))
    assert f"ddpm.{message}" in str(caught.value).replace('"', "")


def test_a_classifier_cannot_guide_a_flow(tiny_config):
    task = "conditional_ddpm"
    with pytest.raises(ConfigError, match="has seen another noise than a flow's; leave it null"):
        load_config(tiny_config(task, **options(task, classifier="outputs/none")))
    assert PixelDiffusionConfig(objective="rectified_flow").chosen_sampler == "euler"
    assert PixelDiffusionConfig().chosen_sampler == "ddpm"
