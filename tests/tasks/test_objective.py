"""Noising, targets and SNR weights against closed forms and diffusers' schedulers, for every prediction type."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from trainers.common.diffusion.objective import DDPMObjective, RectifiedFlow, Timesteps
from trainers.engine.run.randomness import SlotRandom

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


class Recorded:
    """A network that answers with a constant and remembers what it saw."""

    def __init__(self, answer=0.25):
        self.answer, self.seen = answer, []

    def __call__(self, noisy, timesteps):
        self.seen.append((noisy, timesteps))
        return torch.full_like(noisy, self.answer)


def draws(count, shape, prefix=""):
    """What an objective draws for slots 0 to count - 1."""
    rng = SlotRandom(0, torch.arange(count))
    noise, timesteps = rng.normal(f"{prefix}noise", shape), rng.integers(f"{prefix}timestep", 100)
    return rng, noise, timesteps, (1 - torch.linspace(1e-4, 0.02, 100)).cumprod(0)[timesteps][:, None, None, None]


def loss_of(clean, predict, prefix="", mask=None, **options):
    objective = DDPMObjective(options.pop("scheduler", scheduler()), **options)
    return objective.loss(predict, clean, SlotRandom(0, torch.arange(len(clean))), mask, prefix)


def test_noise_offset_is_part_of_the_target():
    clean, predict = torch.rand(6, 3, 4, 4), Recorded()
    loss = loss_of(clean, predict, noise_offset=0.5)
    rng, noise, _, alpha_bar = draws(6, (3, 4, 4))
    moved = noise + 0.5 * rng.normal("noise_offset", (3,))[:, :, None, None]
    torch.testing.assert_close(predict.seen[0][0], alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * moved)
    torch.testing.assert_close(loss, (0.25 - moved).square().mean((1, 2, 3)))
    assert moved.mean((2, 3)).std() > 1.5 * noise.mean((2, 3)).std()


def test_input_perturbation_is_not_part_of_the_target():
    clean, predict = torch.rand(6, 3, 4, 4), Recorded()
    loss = loss_of(clean, predict, input_perturbation=0.1)
    rng, noise, _, alpha_bar = draws(6, (3, 4, 4))
    more = noise + 0.1 * rng.normal("input_perturbation", (3, 4, 4))
    torch.testing.assert_close(predict.seen[0][0], alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * more)
    torch.testing.assert_close(loss, (0.25 - noise).square().mean((1, 2, 3)))


def test_huber_is_a_square_near_zero_and_straight_far_away():
    objective = DDPMObjective(scheduler(), huber_c=0.1)
    small, large = torch.tensor([1e-3, 2e-3]), torch.tensor([100.0, 101.0])
    torch.testing.assert_close(objective.penalty(small.double()), small.double().square(), rtol=1e-3, atol=0)
    assert objective.penalty(large).diff().item() == pytest.approx(2 * 0.1, rel=1e-3)
    clean = torch.rand(6, 3, 4, 4)
    error = 0.25 - draws(6, (3, 4, 4))[1].double()
    expected = (0.2 * ((error.square() + 0.01).sqrt() - 0.1)).mean((1, 2, 3))
    torch.testing.assert_close(loss_of(clean, Recorded(), huber_c=0.1).double(), expected, rtol=1e-5, atol=1e-6)


def test_dream_against_diffusers():
    from types import SimpleNamespace

    from diffusers.training_utils import compute_dream_and_update_latents

    ours, clean = scheduler(), torch.rand(6, 3, 4, 4)
    predict = Recorded()
    loss = loss_of(clean, predict, dream_detail_preservation=1.5)
    _, noise, timesteps, _ = draws(6, (3, 4, 4))
    noisy = ours.add_noise(clean, noise, timesteps)
    network = lambda x, t, text: SimpleNamespace(sample=torch.full_like(x, 0.25))  # noqa: E731
    seen, target = compute_dream_and_update_latents(network, ours, timesteps, noise, noisy, noise, None, 1.5)
    torch.testing.assert_close(predict.seen[0][0], noisy)
    torch.testing.assert_close(predict.seen[1][0], seen)
    torch.testing.assert_close(loss, (0.25 - target).square().mean((1, 2, 3)))


def test_dream_asks_for_its_guess_without_gradients():
    weight = torch.ones((), requires_grad=True)
    calls = []

    def predict(noisy, timesteps):
        calls.append(torch.is_grad_enabled())
        return weight * noisy

    loss_of(torch.rand(2, 1, 4, 4), predict, dream_detail_preservation=1.0).sum().backward()
    assert calls == [False, True]
    assert weight.grad != 0


def test_a_mask_weighs_pixels():
    clean, predict = torch.rand(3, 2, 4, 4), Recorded()
    mask = torch.zeros(3, 1, 4, 4)
    mask[0], mask[1, :, :2] = 1.0, 0.5
    loss = loss_of(clean, predict, mask=mask)
    error = (0.25 - draws(3, (2, 4, 4))[1]).square()
    torch.testing.assert_close(loss[0], error[0].mean())
    torch.testing.assert_close(loss[1], error[1, :, :2].mean())
    assert loss[2] == 0  # nothing to learn from


def test_a_prefix_names_other_draws():
    clean = torch.rand(4, 1, 4, 4)
    own, other = loss_of(clean, Recorded()), loss_of(clean, Recorded(), prefix="class_")
    torch.testing.assert_close(other, (0.25 - draws(4, (1, 4, 4), "class_")[1]).square().mean((1, 2, 3)))
    assert not torch.equal(own, other)


def counts(timesteps, count=60_000):
    rng = SlotRandom(0, torch.arange(count))
    return timesteps.draw(rng, "timestep").bincount(minlength=100) / count


def test_a_range_of_timesteps_is_uniform():
    found = counts(Timesteps(20, 60))
    assert found[:20].sum() == found[60:].sum() == 0
    assert found[20:60].min() > 0.8 / 40
    assert found[20:60].max() < 1.2 / 40


def test_biased_timesteps_are_drawn_in_proportion_to_their_weights():
    weights = torch.ones(100)
    weights[75:] = 3.0
    found = counts(Timesteps(0, 100, weights))
    expected = weights / weights.sum()
    assert found[75:].sum().item() == pytest.approx(expected[75:].sum().item(), abs=0.01)
    torch.testing.assert_close(found, expected, rtol=0.25, atol=0)


@pytest.mark.parametrize("timesteps", [Timesteps(0, 100), Timesteps(10, 50), Timesteps(0, 100, torch.arange(100.0))])
def test_quarters_of_the_time(timesteps):
    width = (timesteps.high - timesteps.low) // 4
    for number, part in enumerate(timesteps.parts(4)):
        found = counts(part, 20_000)
        first = timesteps.low + number * width
        assert found[:first].sum() == found[first + width :].sum() == 0
        assert found[first : first + width].min() > 0.7 / width


def test_quarters_of_a_flow():
    for number in range(4):
        flow = RectifiedFlow(FlowMatchEulerDiscreteScheduler(shift=3.0), part=(number, 4))
        times = flow.times(SlotRandom(0, torch.arange(2000)))
        assert number / 4 <= times.min() < number / 4 + 0.01
        assert (number + 1) / 4 - 0.01 < times.max() <= (number + 1) / 4


def test_zero_terminal_snr_has_no_signal_and_a_finite_loss():
    ours = scheduler("v_prediction", rescale_betas_zero_snr=True)
    clean, predict = torch.rand(3, 1, 4, 4), Recorded()
    loss = loss_of(clean, predict, scheduler=ours, snr_gamma=5.0, timesteps=Timesteps(99, 100))
    noise = SlotRandom(0, torch.arange(3)).normal("noise", (1, 4, 4))
    torch.testing.assert_close(predict.seen[0][0], noise, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.get_velocity(clean, noise, torch.full((3,), 99)), -clean, rtol=0, atol=1e-6)
    assert loss.tolist() == [0.0, 0.0, 0.0]  # min-SNR: nothing can be learned there
    plain = loss_of(clean, Recorded(), scheduler=ours, timesteps=Timesteps(99, 100))
    torch.testing.assert_close(plain, (0.25 + clean).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)
