"""Task lcm_lora: the equations of arXiv 2310.04378 and diffusers' own schedulers, teacher and student, the file."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import tiny_models
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler
from marks import slow
from processes import launch
from run_folders import losses

from train import main
from trainers.base import RunInfo
from trainers.common.diffusion.consistency import ConsistencyObjective, Networks, guided
from trainers.common.diffusion.objective import Timesteps
from trainers.common.lora.adapters import lora_scaled
from trainers.common.text_to_image.prompts import EMBEDS
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.encoders.stages import FrozenEncoders
from trainers.engine.run.randomness import SlotRandom
from trainers.engine.validation import validation
from trainers.engine.validation.sampling import evaluation_mode
from trainers.inference.saved_run import load_trainer, open_run
from trainers.lcm_lora import LCMLoRAConfig, LCMLoRATrainer

CPU = torch.device("cpu")
TYPES = ["epsilon", "sample", "v_prediction"]
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROMPTS = ["a photo of a cat", "a handwritten three"]


def objective(prediction_type="epsilon", steps=50, w_min=2.0, w_max=14.0, huber_c=None):
    scheduler = LCMScheduler(**NOISE, prediction_type=prediction_type, original_inference_steps=steps)
    return ConsistencyObjective(scheduler, w_min, w_max, huber_c)


def rng_of(count):
    return SlotRandom(0, torch.arange(count))


def noisy_of(count, seed=0):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


# --- the equations


def test_boundary_scalings():
    """c_skip = s^2 / (t'^2 + s^2), c_out = t' / sqrt(t'^2 + s^2) with s = 0.5 and t' = 10 t: 1 and 0 at t = 0."""
    t = torch.tensor([0, 1, 19, 999])
    c_skip, c_out = objective().scheduler.get_scalings_for_boundary_condition_discrete(t)
    scaled = 10 * t.double()
    torch.testing.assert_close(c_skip.double(), 0.25 / (scaled**2 + 0.25), rtol=1e-6, atol=0)
    torch.testing.assert_close(c_out.double(), scaled / (scaled**2 + 0.25).sqrt(), rtol=1e-6, atol=0)
    assert (c_skip[0], c_out[0]) == (1, 0)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_at_time_0_what_comes_in_comes_out(prediction_type):
    noisy, t = noisy_of(2), torch.tensor([0, 0])
    found = objective(prediction_type).consistent(lambda noisy, t: 3 * noisy + 1, noisy, t)
    assert torch.equal(found, noisy)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_prediction_is_split_into_picture_and_noise(prediction_type):
    clean, noise, t = noisy_of(3), noisy_of(3, 1), torch.tensor([0, 500, 999])
    ours = objective(prediction_type)
    noisy = ours.scheduler.add_noise(clean, noise, t)
    told = {"epsilon": noise, "sample": clean, "v_prediction": ours.scheduler.get_velocity(clean, noise, t)}
    found = ours.split(told[prediction_type], noisy, t)
    torch.testing.assert_close(found[0], clean, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], noise, rtol=0, atol=2e-5)


def diffusers_step(prediction, noisy, t, prediction_type, steps=50):
    """One step of DDIM without noise, example by example."""
    settings = {"prediction_type": prediction_type, "clip_sample": False, "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler(**NOISE, **settings, set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    assert set(t.tolist()) <= set(scheduler.timesteps.tolist())
    rows = zip(prediction.split(1), t, noisy.split(1), strict=True)
    return torch.cat([scheduler.step(row, time, x).prev_sample for row, time, x in rows])


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("steps", [50, 20])
def test_a_step_of_the_solver_is_that_of_diffusers(prediction_type, steps):
    ours = objective(prediction_type, steps)
    t = torch.tensor([1, 2, 13, steps]) * (1000 // steps) - 1
    prediction, noisy = noisy_of(4), noisy_of(4, 1)
    found = ours.ddim_step(prediction, noisy, t, (t - 1000 // steps).clamp(min=0))
    expected = diffusers_step(prediction, noisy, t, prediction_type, steps)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_guidance():
    conditional, unconditional, w = noisy_of(3), noisy_of(3, 1), torch.tensor([0.0, 1.0, 6.5])
    found = guided(conditional, unconditional, w)
    assert torch.equal(found[0], conditional[0])
    torch.testing.assert_close(found[1], 2 * conditional[1] - unconditional[1])
    torch.testing.assert_close(found[2], unconditional[2] + 7.5 * (conditional[2] - unconditional[2]))


@pytest.mark.parametrize("huber_c", [None, 0.001, 0.01])
def test_the_distance(huber_c):
    error = torch.tensor([0.0, 1e-4, -0.3, 20.0])
    expected = error.double() ** 2 if huber_c is None else (error.double() ** 2 + huber_c**2).sqrt() - huber_c
    torch.testing.assert_close(objective(huber_c=huber_c).penalty(error).double(), expected, rtol=1e-5, atol=1e-9)


def test_the_draws():
    """Each of the solver's timesteps, and guidance in its range; within a part only its own."""
    seen = []
    ours, clean = objective(steps=8, w_min=1.0, w_max=3.0), torch.zeros(400, 1, 1, 1)

    def teacher(noisy, t):
        seen.append(t)
        return torch.ones_like(noisy), torch.zeros_like(noisy)  # guided: 1 + w

    stepped = []
    ours.ddim_step = lambda prediction, noisy, t, earlier: stepped.append((prediction, earlier)) or noisy
    ours.loss(Networks(lambda noisy, t: noisy, teacher), clean, rng_of(400))
    assert set(seen[0].tolist()) == {125 * n - 1 for n in range(1, 9)}
    guidance, earlier = stepped[0]
    assert torch.equal(earlier, (seen[0] - 125).clamp(min=0))
    assert 2 <= guidance.min() < 2.05
    assert 3.95 < guidance.max() < 4
    ours.starts = Timesteps(0, 8).parts(4)[1]
    ours.loss(Networks(lambda noisy, t: noisy, teacher), clean, rng_of(400))
    assert set(seen[1].tolist()) == {374, 499}


def test_nothing_is_left_to_learn_where_all_lines_lead_to_one_picture():
    """Teacher and student that know the only picture there is: DDIM stays on the line to it, whatever its length."""
    clean = noisy_of(1).expand(40, 4, 8, 8)
    ours = objective("sample")
    ours.starts = Timesteps(0, 50).parts(2)[1]
    told = Networks(lambda noisy, t: clean, lambda noisy, t: (clean, clean))
    assert ours.loss(told, clean, rng_of(40)).max() < 1e-9
    wrong = Networks(lambda noisy, t: clean + t.reshape(-1, 1, 1, 1) / 1000, told.teacher)
    expected = torch.full((40,), 0.02**2)  # a step is 20 of 1000
    torch.testing.assert_close(ours.loss(wrong, clean, rng_of(40)), expected, rtol=1e-2, atol=0)


# --- teacher and student


def make(family="sd1", dtype=torch.float32, **options):
    """A trainer on a tiny pipeline whose adapter does something."""
    options = {"pretrained_model_name_or_path": str(tiny_models.model(family)), "rank": 4, **options}
    base = BaseConfig(resolution=32, num_epochs=1, dataset="digits")
    trainer = LCMLoRATrainer(LCMLoRAConfig(**options), base)
    trainer.run = RunInfo(device=CPU, weight_dtype=dtype)
    torch.manual_seed(0)
    trainer.setup()
    trainer.modules = trainer.unwrapped = trainer.init_modules()
    trainer.encoded = FrozenEncoders(trainer.encoders(), CPU).encoded
    for name, parameter in trainer.raw("unet").named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return trainer


def batch_of(count):
    moments = {"mean": noisy_of(count), "logvar": noisy_of(count, 1)}
    return {**moments, "caption": [PROMPTS[n % 2] for n in range(count)], "slot": torch.arange(count)}


def asked_of(pipeline, captions):
    """Embeddings and added conditions of captions and of no text, as the pipeline asks."""
    settings = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    found = pipeline.encode_prompt(captions, **settings)
    if "XL" not in type(pipeline).__name__:
        return (found[0], None), (found[1], None)
    ids = torch.tensor([[32, 32, 0, 0, 32, 32]] * len(captions))
    pooled = [{"text_embeds": rows, "time_ids": ids} for rows in found[2:]]
    return (found[0], pooled[0]), (found[1], pooled[1])


@pytest.mark.parametrize(
    ("family", "loss_type"), [("sd1", "l2"), ("sd2", "huber"), ("sdxl", "huber"), slow("sdxl", "l2")]
)
def test_the_loss_by_hand(family, loss_type):
    """Equations 9, 12, 16 and 17 with diffusers' pipeline, its DDIM and its LCM, example by example."""
    trainer, batch = make(family, loss_type=loss_type), batch_of(5)
    loss, _ = trainer.compute_loss(batch, rng_of(5), 0)
    rng, pipeline = rng_of(5), DiffusionPipeline.from_pretrained(tiny_models.model(family))
    latents = batch["mean"] + (batch["logvar"] / 2).exp() * rng.normal("latent", (4, 8, 8))
    clean, noise = latents * pipeline.vae.config.scaling_factor, rng.normal("noise", (4, 8, 8))
    t, w = 20 * rng.integers("timestep", 50) + 19, 5 + 10 * rng.uniform("guidance")
    earlier = (t - 20).clamp(min=0)
    prediction_type = pipeline.scheduler.config.prediction_type
    lcm = LCMScheduler.from_config(pipeline.scheduler.config)
    noisy = lcm.add_noise(clean, noise, t)
    (embeds, added), (none, none_added) = asked_of(pipeline, batch["caption"])

    def student(x, t):
        prediction = trainer.raw("unet")(x, t, embeds, added_cond_kwargs=added).sample
        return torch.cat([denoised(*row) for row in zip(prediction.split(1), t, x.split(1), strict=True)])

    def denoised(prediction, t, x):
        scheduler = LCMScheduler.from_config(lcm.config)
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(0)
        return scheduler.step(prediction, t, x).denoised

    with torch.no_grad():
        conditional = pipeline.unet(noisy, t, embeds, added_cond_kwargs=added).sample
        unconditional = pipeline.unet(noisy, t, none, added_cond_kwargs=none_added).sample
        w = w.reshape(-1, 1, 1, 1)
        stepped = diffusers_step((1 + w) * conditional - w * unconditional, noisy, t, prediction_type)
        error = student(noisy, t) - student(stepped, earlier)
    expected = (error.square() + 1e-6).sqrt() - 1e-3 if loss_type == "huber" else error.square()
    torch.testing.assert_close(loss.detach(), expected.mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.5}])
def test_the_teacher_is_the_base_bit_for_bit(options):
    trainer, base = make(**options), DiffusionPipeline.from_pretrained(tiny_models.model("sd1")).unet
    trainer.raw("unet").train()
    condition, noisy, t = trainer.embed(PROMPTS), noisy_of(2), torch.tensor([19, 999])
    networks = trainer._asking(condition)
    with torch.no_grad():
        conditional, unconditional = networks.teacher(noisy, t)
        both = torch.cat([condition[EMBEDS], trainer.empty()[EMBEDS].expand(2, -1, -1)])
        expected = base(torch.cat([noisy, noisy]), torch.cat([t, t]), both).sample.chunk(2)
        student = networks.student(noisy, t)
    assert torch.equal(conditional, expected[0])
    assert torch.equal(unconditional, expected[1])
    assert (student - conditional).abs().max() > 1e-3
    assert not torch.equal(conditional, unconditional)


def test_only_the_student_has_a_gradient(monkeypatch):
    """The gradient is that of the distance to a target which is a constant."""
    trainer, batch = make(), batch_of(3)
    targets, consistent = [], ConsistencyObjective.consistent
    monkeypatch.setattr(ConsistencyObjective, "consistent", lambda *a: targets.append(consistent(*a)) or targets[-1])
    trainer.compute_loss(batch, rng_of(3), 0)[0].backward()
    target, student = targets
    assert not target.requires_grad
    parameters = dict(trainer.raw("unet").named_parameters())
    found = {name: p.grad for name, p in parameters.items()}
    assert {name for name, grad in found.items() if grad is not None} == {name for name in parameters if "lora" in name}
    error = consistent(trainer.learned.objective, *asked_for(trainer, batch)) - target
    trainer.raw("unet").zero_grad()
    trainer.learned.objective.penalty(error).mean().backward()
    for name, grad in found.items():
        assert grad is None or torch.allclose(parameters[name].grad, grad, rtol=1e-5, atol=1e-8), name
    assert student.requires_grad


def asked_for(trainer, batch):
    """Student, noisy latents and timesteps of rng_of(3)'s draws."""
    rng = rng_of(3)
    clean, t = trainer.latents.draw(batch, rng), 20 * rng.integers("timestep", 50) + 19
    noisy = trainer.learned.sampler.add_noise(clean, rng.normal("noise", (4, 8, 8)), t)
    return trainer._asking(trainer.embed(batch["caption"])).student, noisy, t


def test_the_adapter_is_on_again_where_the_teacher_fails(monkeypatch):
    trainer = make()
    before = [p.requires_grad for p in trainer.raw("unet").parameters()]
    networks = trainer._asking(trainer.embed(PROMPTS))
    monkeypatch.setattr(trainer, "_network", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        networks.teacher(noisy_of(2), torch.tensor([19, 19]))
    assert [p.requires_grad for p in trainer.raw("unet").parameters()] == before
    with torch.no_grad(), lora_scaled([trainer.raw("unet")], 1.0):
        on = trainer.raw("unet")(noisy_of(1), 19, trainer.embed(PROMPTS[:1])[EMBEDS]).sample
    with torch.no_grad():
        assert torch.equal(trainer.raw("unet")(noisy_of(1), 19, trainer.embed(PROMPTS[:1])[EMBEDS]).sample, on)


def test_a_step_waits_for_no_device(monkeypatch):
    """No module of ours, and no scheduler, reads a tensor's value in a step, which on a GPU would wait for it."""
    trainer, batch, found = make(caption_dropout=0.5), batch_of(2), []
    trainer.compute_loss(batch, rng_of(2), 0)  # texts are encoded at first use
    for method in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, method)

        def reading(self, *arguments, original=original, **options):
            caller = sys._getframe(1).f_globals["__name__"]
            if caller.startswith(("trainers.", "diffusers.schedulers.")):
                found.append(caller)
            return original(self, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, method, reading)
    trainer.compute_loss(batch, rng_of(2), 0)[0].backward()
    assert found == []


def test_validation_in_quarters_of_the_time():
    """The plain square, whatever the run's distance, at the solver's steps in each quarter."""
    trainer, batch = make(num_ddim_timesteps=20, huber_c=0.5), batch_of(4)
    with evaluation_mode(trainer):
        found = trainer.validation_metrics(batch, rng_of(4))
        rng = rng_of(4)
        clean, networks = trainer.latents.draw(batch, rng), trainer._asking(trainer.embed(batch["caption"]))
        third = Timesteps(0, 20).parts(4)[2]
        square = ConsistencyObjective(trainer.learned.sampler, 5.0, 15.0, starts=third)
        expected = square.loss(networks, clean, rng, prefix="quarter_2_")
    torch.testing.assert_close(found["loss_quarter_3"], expected, rtol=1e-5, atol=0)
    quarters = torch.stack([found[f"loss_quarter_{n}"] for n in (1, 2, 3, 4)])
    torch.testing.assert_close(found["loss"], quarters.mean(0))


# --- runs


@pytest.mark.parametrize("family", ["sd1", slow("sd2"), slow("sdxl")])
def test_the_pipeline_with_the_file_draws_the_validations_picture(run_in_process, monkeypatch, family):
    drawn, original = [], validation.draw_samples
    monkeypatch.setattr(validation, "draw_samples", lambda *args: drawn.append(original(*args)) or drawn[-1])
    options = {"validation_prompts": PROMPTS, "pretrained_model_name_or_path": str(tiny_models.model(family))}
    folder = run_in_process("run", "lcm_lora", **{f"lcm_lora.{name}": value for name, value in options.items()})
    pipeline = DiffusionPipeline.from_pretrained(tiny_models.model(family))
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=20)
    base = drawn_by_slots(pipeline)
    pipeline.load_lora_weights(folder)
    found = drawn_by_slots(pipeline)
    averaged = drawn[1]
    torch.testing.assert_close(found, averaged["samples"], rtol=0, atol=5e-5)
    torch.testing.assert_close(base, averaged["base_and_lora"][..., :32], rtol=0, atol=2e-5)
    assert (found - base).abs().max() > 1e-3
    loaded = LCMLoRATrainer.load_pipeline(folder)
    torch.testing.assert_close(drawn_by_slots(loaded), found, rtol=0, atol=1e-5)


def drawn_by_slots(pipeline):
    """Pictures of PROMPTS with the noise that validations use, in two steps without guidance."""
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 32, "width": 32}
    if "XL" in type(pipeline).__name__:
        settings |= {"original_size": (32, 32), "target_size": (32, 32)}
    pipeline.set_progress_bar_config(disable=True)
    generator = SlotRandom(0, torch.arange(2), "sample").generators()
    return pipeline(PROMPTS, generator=generator, output_type="pt", **settings).images


def test_the_lines_that_the_run_ends_with_draw(run_in_process, monkeypatch, tmp_path):
    folder = run_in_process("run", "lcm_lora", **{"lcm_lora.validation_prompts": []})
    trainer = load_trainer(open_run(folder))
    lines = trainer.usage_of(folder).replace("outputs/tests", str(tiny_models.FOLDER))
    monkeypatch.chdir(tmp_path)
    exec(lines, scope := {})
    assert (tmp_path / "sample.png").is_file()
    assert scope["pipeline"].scheduler.config.original_inference_steps == 20


@pytest.mark.slow
def test_two_processes_are_two_micro_batches(tiny_config, tmp_path):
    """The adapter is switched off and on around the teacher's forward of the prepared network in every step."""
    options = {"lcm_lora.validation_prompts": [], "base.train_batch_size": 2, "base.max_train_steps": 4}
    config = tiny_config("lcm_lora", **options)
    two = launch(config, f"base.output_dir={tmp_path / 'two'}", processes=2)
    assert two.returncode == 0, two.stderr
    one = launch(config, f"base.output_dir={tmp_path / 'one'}", "base.gradient_accumulation_steps=2")
    assert one.returncode == 0, one.stderr
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


def test_gradient_checkpointing_changes_no_loss(run_in_process):
    """What is computed again in the backward pass has the adapter on."""
    off = {"lcm_lora.lora_dropout": 0.0, "lcm_lora.validation_prompts": [], "base.max_train_steps": 3}
    plain = run_in_process("plain", "lcm_lora", **off)
    saving = run_in_process("saving", "lcm_lora", **off, **{"base.gradient_checkpointing": True})
    numbers = [[float.fromhex(value) for value in losses(folder).values()] for folder in (plain, saving)]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-4)


# --- mistakes

MISTAKES = [
    ({"snr_gamma": 5.0}, "lcm_lora.snr_gamma = 5.0: has an effect with the loss of task lora only"),
    ({"prediction_type": "epsilon"}, "prediction_type = \"epsilon\": has an effect with the loss of task lora only"),
    ({"noise_offset": 0.1}, "noise_offset = 0.1: has an effect with the loss of task lora only"),
    ({"timestep_range": [0, 500]}, "timestep_range = [0, 500]: has an effect with the loss of task lora only"),
    ({"w_min": 4.0}, "lcm_lora.w_min = 4.0: must be at most w_max = 3"),
    ({"w_min": -1.0}, "lcm_lora.w_min = -1.0: must be a number of at least 0"),
    ({"num_inference_steps": 30}, "num_inference_steps = 30: must be at most num_ddim_timesteps = 20"),
    ({"loss_type": "l2", "huber_c": 0.1}, "huber_c = 0.1: has an effect with loss_type: huber only"),
    ({"target_modules": []}, "must name at least one module, or be null"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[next(iter(case[0])) for case in MISTAKES])
def test_mistakes_in_the_config(options, message, tiny_config, capsys):
    options = {f"lcm_lora.{name}": value for name, value in options.items()}
    assert main([str(tiny_config("lcm_lora", **options)), "--print-config"]) == 2
    assert message in capsys.readouterr().err


def test_another_sampler_may_take_more_steps(tiny_config):
    options = {"lcm_lora.sampler": "ddim", "lcm_lora.num_inference_steps": 30}
    assert main([str(tiny_config("lcm_lora", **options)), "--print-config"]) == 0


def test_mistakes_that_show_later(tiny_config, tmp_path, capsys):
    for number, nearest in ((2000, 1000), (60, 50), (300, 250)):
        assert main([str(tiny_config("lcm_lora", **{"lcm_lora.num_ddim_timesteps": number}))]) == 1
        expected = f"lcm_lora.num_ddim_timesteps = {number}: must divide the base's 1000 timesteps; take {nearest}"
        assert expected in capsys.readouterr().err
    shutil.copytree(tiny_models.model("sd1"), tmp_path / "flow")
    flow = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    (tmp_path / "flow" / "scheduler" / "scheduler_config.json").write_text(json.dumps(flow))
    options = {"lcm_lora.pretrained_model_name_or_path": str(tmp_path / "flow")}
    assert main([str(tiny_config("lcm_lora", **options))]) == 1
    error = capsys.readouterr().err
    assert "prediction_type = flow_prediction: must be one of epsilon, sample, v_prediction" in error
    assert "Traceback" not in error
