"""Tasks lora and text_to_image on tiny Stable Diffusion 1, 2 and XL: against diffusers' own pipelines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from marks import slow
from processes import launch
from run_folders import losses, read_metrics
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from train import main
from trainers.base import RunInfo
from trainers.common.text_to_image.base_model import BaseModel
from trainers.common.text_to_image.prompts import EMBEDS, POOLED, Prompts, size_conditions
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.encoders.stages import FrozenEncoders
from trainers.engine.run.randomness import SlotRandom
from trainers.engine.validation import validation
from trainers.engine.validation.sampling import evaluation_mode
from trainers.inference.saved_run import load_trainer, open_run
from trainers.sd_lora import LoRAConfig, LoRATrainer
from trainers.text_to_image import TextToImageConfig, TextToImageTrainer

FAMILIES = ["sd1", "sd2", "sdxl"]
CPU = torch.device("cpu")
TRAINERS = {"lora": (LoRATrainer, LoRAConfig), "text_to_image": (TextToImageTrainer, TextToImageConfig)}


def make(task="text_to_image", family="sd1", base=None, dtype=torch.float32, **options):
    """A trainer on a tiny pipeline, ready to compute losses and to draw."""
    trainer_class, config = TRAINERS[task]
    options = {"pretrained_model_name_or_path": str(tiny_models.model(family)), "num_inference_steps": 3} | options
    base = BaseConfig(resolution=32, num_epochs=1, dataset="digits", **(base or {}))
    trainer = trainer_class(config(**options), base)
    trainer.run = RunInfo(device=CPU, weight_dtype=dtype)
    torch.manual_seed(0)
    trainer.setup()
    trainer.modules = trainer.unwrapped = trainer.init_modules()
    trainer.encoded = FrozenEncoders(trainer.encoders(), CPU).encoded
    return trainer


def pipeline_of(folder, **options):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, **options)


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def draw(trainer, requests):
    with evaluation_mode(trainer):
        return trainer.draw(requests, generators(len(requests)))


def drawn_by(pipeline, prompts, negative=None, **options):
    """[N, 3, 32, 32] in [0, 1] of a pipeline of diffusers."""
    negative = [negative] * len(prompts) if isinstance(negative, str) else negative
    settings = {"num_inference_steps": 3, "guidance_scale": 7.5, "height": 32, "width": 32} | options
    if "XL" in type(pipeline).__name__:
        settings |= {"original_size": (32, 32), "target_size": (32, 32)}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompts, negative_prompt=negative, generator=generators(len(prompts)), output_type="pt", **settings
    ).images


# --- pictures and texts, against the pipelines

PROMPTS = ["a photo of a cat", "a handwritten three"]


UNGUIDED, RESCALED = {"guidance_scale": 1.0}, {"negative_prompt": "a dog", "guidance_rescale": 0.7}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(("sd1", {}), ("sd2", {}), ("sdxl", {}), ("sd1", RESCALED), ("sdxl", UNGUIDED)),
        *(slow("sd1", UNGUIDED), slow("sd2", UNGUIDED), slow("sd2", RESCALED), slow("sdxl", RESCALED)),
    ],
)
def test_pictures_are_those_of_the_pipeline(family, options):
    trainer = make(family=family, **options)
    pictures = draw(trainer, [{"prompt": prompt} for prompt in PROMPTS])
    asked = {"guidance_scale": options.get("guidance_scale", 7.5), "negative": options.get("negative_prompt")}
    expected = drawn_by(
        pipeline_of(tiny_models.model(family)), PROMPTS, guidance_rescale=options.get("guidance_rescale", 0.0), **asked
    )
    assert pictures.shape == (2, 3, 32, 32)
    torch.testing.assert_close(pictures, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddim", "DDIMScheduler"),
        ("ddpm", "DDPMScheduler"),
        ("dpmsolver++", "DPMSolverMultistepScheduler"),
        ("euler", "EulerDiscreteScheduler"),
    ],
)
def test_samplers_are_diffusers(name, kind):
    import diffusers

    trainer, pipeline = make(sampler=name), pipeline_of(tiny_models.model("sd1"))
    pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, clip_sample=False)
    pictures = draw(trainer, [{"prompt": PROMPTS[0]}])
    torch.testing.assert_close(pictures, drawn_by(pipeline, PROMPTS[:1]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_the_pipeline(family):
    prompts = Prompts(BaseModel("option", str(tiny_models.model(family))), CPU, torch.float32)
    encoder = prompts.encoder(None, (), "")
    with torch.no_grad():
        found = encoder.encode(encoder.build(), PROMPTS)
    pipeline = pipeline_of(tiny_models.model(family))
    expected = pipeline.encode_prompt(PROMPTS, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False)
    torch.testing.assert_close(found[EMBEDS], expected[0])
    if family == "sdxl":
        torch.testing.assert_close(found[POOLED], expected[2])
        sizes = torch.tensor([[48, 40]]), torch.tensor([[3, 4]])
        wanted = pipeline._get_add_time_ids((48, 40), (3, 4), (32, 32), torch.int64, tiny_models.TEXT_WIDTH)
        assert torch.equal(size_conditions(*sizes, (32, 32)), wanted)


def test_a_picture_does_not_depend_on_its_batch():
    trainer = make()
    both = draw(trainer, [{"prompt": prompt} for prompt in PROMPTS])
    alone = draw(trainer, [{"prompt": PROMPTS[0]}])
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-5)


def test_the_empty_condition():
    assert make(family="sdxl").empty()[EMBEDS].abs().sum() == 0  # as its pipeline does it
    trainer = make(family="sd1")
    assert torch.equal(trainer.empty()[EMBEDS], trainer.encoded("text", "")[EMBEDS])
    assert trainer.empty()[EMBEDS].abs().sum() > 0


# --- losses


def batch_of(count, **columns):
    """Latents and captions of a batch."""
    generator = torch.Generator().manual_seed(0)
    moments = {name: torch.randn(count, 4, 8, 8, generator=generator) for name in ("mean", "logvar")}
    return {**moments, "caption": [PROMPTS[0]] * count, "slot": torch.arange(count), **columns}


def rng_of(count):
    return SlotRandom(0, torch.arange(count))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_scheduler_and_the_network(family):
    trainer, batch = make(family=family), batch_of(3)
    sizes = {"original_size": torch.tensor([[40, 50]] * 3), "crop_top_left": torch.tensor([[1, 2]] * 3)}
    loss, _ = trainer.compute_loss({**batch, **sizes}, rng_of(3), 0)
    rng, pipeline = rng_of(3), pipeline_of(tiny_models.model(family))
    posterior = batch["mean"] + (batch["logvar"] / 2).exp() * rng.normal("latent", (4, 8, 8))
    clean, noise = posterior * pipeline.vae.config.scaling_factor, rng.normal("noise", (4, 8, 8))
    timesteps = rng.integers("timestep", 1000)
    scheduler = trainer.learned.scheduler
    torch.testing.assert_close(scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    text = pipeline.encode_prompt(
        [PROMPTS[0]] * 3, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    added = None
    if family == "sdxl":
        added = {"text_embeds": text[2], "time_ids": torch.tensor([[40, 50, 1, 2, 32, 32]] * 3)}
    noisy = scheduler.add_noise(clean, noise, timesteps)
    prediction = pipeline.unet(noisy, timesteps, text[0], added_cond_kwargs=added).sample
    target = scheduler.get_velocity(clean, noise, timesteps) if family == "sd2" else noise
    torch.testing.assert_close(loss, (prediction - target).square().mean(), rtol=1e-5, atol=0)


def test_captions_are_hidden_per_example_in_training_only():
    trainer, batch, asked = make(caption_dropout=0.3), batch_of(400), []
    trainer._network = lambda noisy, timesteps, condition: asked.append(condition[EMBEDS]) or noisy
    trainer.compute_loss(batch, rng_of(400), 0)
    empty, full = trainer.empty()[EMBEDS], trainer.embed(PROMPTS[:1])[EMBEDS]
    hidden = (asked[0] == empty).flatten(1).all(1)
    assert hidden.float().mean() == pytest.approx(0.3, abs=0.06)
    assert (asked[0][~hidden] == full).all()
    trainer.training = False
    trainer.compute_loss(batch, rng_of(400), 0)
    assert (asked[1] == full).all()


def test_prior_preservation_is_the_sum_of_two_losses():
    trainer = make(base={"class_data_dir": "x", "class_caption": PROMPTS[1]}, prior_loss_weight=0.7)
    own, other = batch_of(3), batch_of(3)
    prior = {"class_mean": other["mean"] + 1, "class_logvar": other["logvar"], "class_caption": [PROMPTS[1]] * 3}
    loss, values = trainer.compute_loss({**own, **prior}, rng_of(3), 0)
    alone, _ = trainer.compute_loss(own, rng_of(3), 0)
    rng = rng_of(3)
    clean = (prior["class_mean"] + (prior["class_logvar"] / 2).exp() * rng.normal("class_latent", (4, 8, 8))) * 0.18215
    noise, timesteps = rng.normal("class_noise", (4, 8, 8)), rng.integers("class_timestep", 1000)
    condition = {EMBEDS: trainer.embed([PROMPTS[1]] * 3)[EMBEDS]}
    prediction = trainer._network(trainer.learned.scheduler.add_noise(clean, noise, timesteps), timesteps, condition)
    expected = (prediction - noise).square().mean()
    torch.testing.assert_close(values["prior_loss"], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, alone + 0.7 * expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(values["instance_loss"], alone, rtol=1e-6, atol=0)
    trainer.training = False
    assert torch.equal(trainer.compute_loss({**own, **prior}, rng_of(3), 0)[0], alone)


def test_a_mask_is_averaged_to_the_size_of_the_latents():
    trainer = make()
    mask = torch.zeros(2, 1, 32, 32)
    mask[0, :, :16] = 1.0
    mask[1, :, :2] = 1.0  # half of the first row of latents
    small = trainer._mask({"mask": mask}, torch.zeros(2, 4, 8, 8))
    assert torch.equal(small[0, 0], torch.tensor([[1.0]] * 4 + [[0.0]] * 4).expand(8, 8))
    assert torch.equal(small[1, 0, :2], torch.tensor([[0.5], [0.0]]).expand(2, 8))
    batch = batch_of(2, mask=mask)
    loss, _ = trainer.compute_loss(batch, rng_of(2), 0)
    rng = rng_of(2)
    clean = trainer.latents.draw(batch, rng)
    noise, timesteps = rng.normal("noise", (4, 8, 8)), rng.integers("timestep", 1000)
    noisy = trainer.learned.scheduler.add_noise(clean, noise, timesteps)
    prediction = trainer._network(noisy, timesteps, trainer.embed(batch["caption"]))
    error = (prediction - noise).square()
    expected = (error[0, :, :4].mean() + error[1, :, :1].mean()) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_the_validation_loss_in_quarters_of_the_time(monkeypatch):
    trainer, seen = make(snr_gamma=5.0, noise_offset=0.5), []
    network = trainer._network
    monkeypatch.setattr(trainer, "_network", lambda *asked: seen.append(asked[1]) or network(*asked))
    with evaluation_mode(trainer):
        found = trainer.validation_metrics(batch_of(50), rng_of(50))
    assert [(250 * n <= t.min()) and (t.max() < 250 * (n + 1)) for n, t in enumerate(seen)] == [True] * 4
    quarters = torch.stack([found[f"loss_quarter_{n}"] for n in (1, 2, 3, 4)])
    assert quarters.shape == (4, 50)
    torch.testing.assert_close(found["loss"], quarters.mean(0))


# --- adapters


def test_only_adapters_are_trained_and_the_base_stays_as_it_is(run_in_process):
    folder = run_in_process("run", "lora")
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"unet", "text_encoder"}
    before = pipeline_of(tiny_models.model("sd1")).unet.state_dict()
    trainer = load_trainer(open_run(folder))
    after = {name.replace(".base_layer", ""): w for name, w in trainer.raw("unet").state_dict().items()}
    for name, weights in before.items():
        assert torch.equal(after[name], weights)
    trained = [p for network in trainer.unwrapped.values() for p in network.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(tensor.numel() for tensor in tensors.values())
    assert any(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora_B" in name or ".up" in name)


@pytest.mark.parametrize("family", [slow("sd1"), slow("sd2"), "sdxl"])
def test_the_pipeline_with_the_file_draws_the_validations_picture(run_in_process, monkeypatch, family):
    """Alpha differs from the rank, the text encoders have adapters, and the averaged weights are what is exported."""
    drawn = []
    original = validation.draw_samples
    monkeypatch.setattr(validation, "draw_samples", lambda *args: drawn.append(original(*args)) or drawn[-1])
    rates = {"unet": 1e-2, "text_encoder": 1e-3} | ({"text_encoder_2": 1e-3} if family == "sdxl" else {})
    folder = run_in_process(
        "run",
        "lora",
        **{
            "lora.pretrained_model_name_or_path": str(tiny_models.model(family)),
            "lora.learning_rate": rates,
            "lora.validation_prompts": PROMPTS,
            "lora.use_dora": family == "sd2",
            "lora.use_rslora": family == "sdxl",
        },
    )
    raw, averaged = drawn
    pipeline = pipeline_of(tiny_models.model(family))
    base = drawn_by_slots(pipeline, folder)
    pipeline.load_lora_weights(folder)
    found = drawn_by_slots(pipeline, folder)
    torch.testing.assert_close(found, averaged["samples"], rtol=0, atol=5e-5)
    torch.testing.assert_close(base, averaged["base_and_lora"][..., :32], rtol=0, atol=2e-5)
    assert torch.equal(averaged["base_and_lora"][..., 32:], averaged["samples"])
    assert (found - base).abs().max() > 1e-3
    assert (raw["samples"] - averaged["samples"]).abs().max() > 1e-4
    loaded = LoRATrainer.load_pipeline(folder)
    torch.testing.assert_close(drawn_by_slots(loaded, folder), found, rtol=0, atol=1e-5)


def drawn_by_slots(pipeline, folder):
    """Pictures of the run's prompts with the noise that its validations use."""
    rng = SlotRandom(0, torch.arange(2), "sample")
    settings = {"num_inference_steps": 2, "guidance_scale": 7.5, "height": 32, "width": 32}
    if "XL" in type(pipeline).__name__:
        settings |= {"original_size": (32, 32), "target_size": (32, 32)}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPTS, generator=rng.generators(), output_type="pt", **settings).images


def test_the_file_says_what_it_is(run_in_process):
    folder = run_in_process("run", "lora", **{"base.trigger_word": "sks"})
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        about = file.metadata()
    wanted = {
        "rank": "4",
        "alpha": "8",
        "trigger_word": "sks",
        "base_model": "sd1-2",
        "resolution": "32",
        "prediction_type": "epsilon",
    }
    assert {name: about[name] for name in wanted} == wanted
    assert about["diffloop_version"]
    settings = json.loads(about["lora_adapter_metadata"])
    assert settings["unet.r"] == settings["unet.lora_alpha"] == 4  # alpha / r is in the B matrices


def test_at_scale_0_the_base_comes_back_bit_for_bit(run_in_process):
    folder = run_in_process("run", "lora")
    trainer = load_trainer(open_run(folder), ["lora.lora_scale=0"])
    requests = [{"prompt": PROMPTS[0], "number": 0}]
    with evaluation_mode(trainer):
        found = trainer.sample(requests, SlotRandom(0, torch.arange(1)))["samples"]
        half = load_trainer(open_run(folder), ["lora.lora_scale=0.5"]).sample(requests, SlotRandom(0, torch.arange(1)))
        whole = load_trainer(open_run(folder)).sample(requests, SlotRandom(0, torch.arange(1)))
    base = make("text_to_image", num_inference_steps=2)
    with evaluation_mode(base):
        expected = base.sample(requests, SlotRandom(0, torch.arange(1)))["samples"]
    assert torch.equal(found, expected)
    assert 0 < (half["samples"] - expected).norm() < (whole["samples"] - expected).norm()


def test_adapters_move_in_bf16(run_in_process):
    """Weights in bf16 would not: an update of 1e-4 is below their last bit."""
    options = {"base.mixed_precision": "bf16", "lora.train_text_encoder": False, "lora.learning_rate": 1e-4}
    folder = run_in_process("run", "lora", **options, **{"lora.use_ema": False, "lora.lora_dropout": 0.0})
    trained = load_file(folder / "checkpoint-6" / "unet" / "trainable.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    trainer = make("lora", dtype=torch.bfloat16, rank=4, lora_alpha=8)
    assert {p.dtype for p in trainer.raw("unet").parameters() if not p.requires_grad} == {torch.bfloat16}
    start = {n: p for n, p in trainer.raw("unet").named_parameters() if p.requires_grad}
    assert trained.keys() == start.keys()
    for name, tensor in trained.items():
        assert 1e-5 < (tensor - start[name]).abs().max() < 1e-3, name


def test_gradients_are_clipped(run_in_process, monkeypatch):
    from trainers.engine.optim import optimizer as optimization

    after, clip = [], optimization._clip

    def spy(parameters, max_grad_norm):
        before = clip(parameters, max_grad_norm)
        after.append((before, torch.nn.utils.get_total_norm([p.grad for p in parameters])))
        return before

    monkeypatch.setattr(optimization, "_clip", spy)
    folder = run_in_process("run", "lora", **{"lora.max_grad_norm": 1e-3})
    assert len(after) == 12  # two networks, six steps
    for before, clipped in after:
        assert before > 1e-3
        assert clipped.item() == pytest.approx(1e-3, rel=1e-3)
    logged = [line["grad_norm/unet"] for line in read_metrics(folder, prefix="grad_norm")]
    assert logged == pytest.approx([before.item() for before, _ in after[::2]])


def test_a_checkpoint_holds_only_what_is_trained(run_in_process):
    folder = run_in_process("run", "lora")
    adapter = (folder / "pytorch_lora_weights.safetensors").stat().st_size
    checkpoint = sum(path.stat().st_size for path in (folder / "checkpoint-6").rglob("*.safetensors"))
    base = (tiny_models.model("sd1") / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert checkpoint < 4.5 * adapter  # weights, averages, two moments; and the longer headers of a tiny network
    assert checkpoint < base


@pytest.mark.slow
def test_a_checkpoint_of_stable_diffusions_shape():
    """Weights and two moments of a rank-8 adapter, and never the 860 million weights of the UNet."""
    from diffusers import UNet2DConditionModel

    from trainers.common.lora.adapters import add_lora
    from trainers.engine.checkpoint.snapshot import snapshot

    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).to(torch.bfloat16)
    settings = {"r": 8, "lora_alpha": 8, "init_lora_weights": "gaussian"}
    add_lora("option", unet, ["to_k", "to_q", "to_v", "to_out.0"], settings)
    trained = [p for p in unet.parameters() if p.requires_grad]
    adapter = sum(p.nbytes for p in trained)
    assert adapter == 4 * 1_594_368
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = SimpleNamespace(networks={"unet": unet}, ema=None, optimizer=optimizer)
    taken = snapshot(state, {"step": 1}, True, {})
    assert 3 * adapter < taken.num_bytes < 3.01 * adapter


def test_going_on_from_a_file(run_in_process, monkeypatch):
    first = run_in_process("first", "lora", **{"lora.use_ema": False})
    begun = []
    original = LoRATrainer.build_networks

    def build(self):
        networks = original(self)
        begun.append({n: p.clone() for n, p in networks["unet"].named_parameters() if p.requires_grad})
        return networks

    monkeypatch.setattr(LoRATrainer, "build_networks", build)
    run_in_process("second", "lora", **{"lora.lora_weights": str(first)})
    trained = load_file(first / "checkpoint-6" / "unet" / "trainable.safetensors")
    for name, tensor in begun[0].items():
        torch.testing.assert_close(tensor.detach(), trained[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("targets", "count"), [(["to_q"], 4), (["to_q", "to_k"], 8), (r".*attn2\.to_[qv]", 4), (["conv1"], 4)]
)
def test_targets_by_ending_and_by_pattern(targets, count):
    unet = make("lora", target_modules=targets).raw("unet")
    found = [name for name, p in unet.named_parameters() if p.requires_grad and "lora_A" in name]
    total = [n for n, m in pipeline_of(tiny_models.model("sd1")).unet.named_modules() if _matches(n, targets)]
    assert len(found) == len(total) > 0


def _matches(name, targets):
    import re

    return bool(re.fullmatch(targets, name)) if isinstance(targets, str) else name.split(".")[-1] in targets


def test_the_scale_of_an_adapter():
    for options, scaling in (
        ({"rank": 4}, 1.0),
        ({"rank": 4, "lora_alpha": 8}, 2.0),
        ({"rank": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
    ):
        unet = make("lora", **options).raw("unet")
        assert {m.scaling["default"] for m in unet.modules() if hasattr(m, "scaling")} == {scaling}


@pytest.mark.slow  # test_lcm_lora.py does so with adapters by default
def test_gradient_checkpointing_changes_no_loss(run_in_process):
    plain = run_in_process("plain", "lora", **{"lora.lora_dropout": 0.0})
    saving = run_in_process("saving", "lora", **{"lora.lora_dropout": 0.0, "base.gradient_checkpointing": True})
    numbers = [[float.fromhex(value) for value in losses(folder).values()] for folder in (plain, saving)]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-5)


@pytest.mark.slow
def test_text_encoders_of_xl_on_two_processes(tiny_config, tmp_path):
    """Every adapter has a gradient; of the first text encoder's last layer nothing is read."""
    rates = {"unet": 1e-3, "text_encoder": 1e-3, "text_encoder_2": 1e-3}
    config = tiny_config(
        "lora",
        **{
            "lora.pretrained_model_name_or_path": str(tiny_models.model("sdxl")),
            "lora.learning_rate": rates,
            "lora.validation_prompts": PROMPTS,
            "lora.clip_score_model": str(tiny_models.model("clip")),  # scored by the main process alone
            "base.train_batch_size": 2,
        },
    )
    two = launch(config, f"base.output_dir={tmp_path / 'two'}", processes=2)
    assert two.returncode == 0, two.stderr
    one = launch(config, f"base.output_dir={tmp_path / 'one'}", "base.gradient_accumulation_steps=2")
    assert one.returncode == 0, one.stderr
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    trained = load_file(tmp_path / "one" / "checkpoint-6" / "optimizer.safetensors")
    moments = {name: tensor for name, tensor in trained.items() if name.endswith(".exp_avg_sq")}
    assert len(moments) == len([name for name in trained if name.endswith(".step")])
    assert all(tensor.abs().max() > 0 for tensor in moments.values())
    assert not any(
        "text_encoder.encoder.layers.1." in name or "encoder.text_model.encoder.layers.1." in name
        for name in moments
        if name.startswith("text_encoder.")
    )


# --- the whole UNet


def test_averages_in_main_memory_are_the_same(run_in_process):
    runs = [run_in_process(str(off), "text_to_image", **{"text_to_image.offload_ema": off}) for off in (False, True)]
    first, second = (load_file(run / "unet" / "diffusion_pytorch_model.safetensors") for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def from_scratch(tmp_path):
    """Options of a UNet with another shape than the base model's."""
    settings = json.loads((tiny_models.model("sd1") / "unet" / "config.json").read_text())
    settings = {k: v for k, v in settings.items() if k not in ("cross_attention_dim", "_name_or_path")}
    (tmp_path / "unet.json").write_text(json.dumps(settings | {"block_out_channels": [8, 16]}))
    return {"text_to_image.model_config": str(tmp_path / "unet.json")}


@pytest.mark.parametrize("objective", ["ddpm", "rectified_flow"])
def test_from_scratch_the_result_is_a_whole_pipeline(run_in_process, monkeypatch, from_scratch, objective):
    drawn = []
    original = validation.draw_samples
    monkeypatch.setattr(validation, "draw_samples", lambda *args: drawn.append(original(*args)) or drawn[-1])
    options = {"text_to_image.validation_prompts": PROMPTS, "text_to_image.objective": objective}
    if objective == "rectified_flow":
        options |= {"text_to_image.noise_offset": 0.0, "text_to_image.time_shift": 2.0}
    folder = run_in_process("run", "text_to_image", **options, **from_scratch)
    pipeline = pipeline_of(folder)
    assert pipeline.unet.config.block_out_channels == [8, 16]
    assert pipeline.unet.config.cross_attention_dim == tiny_models.TEXT_WIDTH
    torch.testing.assert_close(drawn_by_slots(pipeline, folder), drawn[1]["samples"], rtol=0, atol=5e-5)
    trainer = load_trainer(open_run(folder))
    shutil.rmtree(folder / "checkpoint-6")
    finished = load_trainer(open_run(folder))  # of the pipeline alone
    weights = [each.raw("unet").state_dict() for each in (trainer, finished)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_changed_prediction_type_is_saved(run_in_process):
    options = {"text_to_image.prediction_type": "v_prediction", "text_to_image.rescale_betas_zero_snr": True}
    folder = run_in_process("run", "text_to_image", **options)
    scheduler = pipeline_of(folder).scheduler
    assert type(scheduler).__name__ == "DDIMScheduler"  # PNDM does not know of zero terminal SNR
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.alphas_cumprod[-1] == 0


# --- scores, notes, mistakes


def test_clip_score_against_its_definition(run_in_process):
    from transformers import CLIPModel, CLIPProcessor

    from trainers.common.text_to_image.clip_score import ClipScore

    folder = tiny_models.model("clip")
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = ClipScore("option", str(folder), CPU)(pictures, PROMPTS)
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=PROMPTS, images=list((pictures * 255).round().byte()), return_tensors="pt", padding=True)
    output = model(**inputs)
    expected = 100 * nn.functional.cosine_similarity(output.image_embeds, output.text_embeds).mean()
    assert found == pytest.approx(max(expected.item(), 0.0), abs=1e-3)
    run = run_in_process("run", "lora", **{"lora.clip_score_model": str(folder)})
    assert {"valid/clip_score", "valid_ema/clip_score"} <= read_metrics(run, prefix="valid")[-1].keys()


def test_captions_that_are_too_long_are_counted():
    prompts = Prompts(BaseModel("option", str(tiny_models.model("sd1"))), CPU, torch.float32)
    long = " ".join(["cat"] * 20)
    lost, end = prompts.truncated(["a cat", long, long, long + " dog"])
    assert lost == 2  # of different ones
    assert end == " ".join(["cat"] * 6)  # 14 fit beside the marks of beginning and end
    pictures = type("Data", (), {"captions": lambda self: [long], "caption_note": None})()
    [note] = make().notes(pictures)
    found = f"1 captions are longer than the text encoder's 16 tokens: the first loses {end!r}"
    assert note == f"{found}; text_to_image.max_caption_tokens: 150 or 225 keeps more"
    endless = type("Data", (), {"captions": lambda self: ["cat " * 10_000], "caption_note": None})()
    [note] = make().notes(endless)
    assert f"the first loses {('cat ' * 20) + ' ...'!r}; text_to_image" in note


def test_a_base_whose_scaling_factor_is_null(tmp_path):
    folder = shutil.copytree(tiny_models.model("sd1"), tmp_path / "base")
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": None}))
    with pytest.raises(ValueError, match="its autoencoder's scaling_factor is null; write it in its config"):
        make(pretrained_model_name_or_path=str(folder))


def test_data_without_captions_is_told(run_in_process, capsys):
    run_in_process("run", "lora", **{"base.caption": ""})
    assert "NOTE: no captions found" in capsys.readouterr().out


def test_the_base_is_downloaded_without_its_safety_checker(monkeypatch):
    from diffusers import DiffusionPipeline

    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return tiny_models.model("sd1")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    found = BaseModel("option", "owner/name", revision="main", variant="fp16")
    assert found.folder == tiny_models.model("sd1")
    assert asked == {
        "name": "owner/name", "revision": "main", "variant": "fp16", "use_safetensors": True,
        "safety_checker": None, "feature_extractor": None, "image_encoder": None,
    }  # fmt: skip


MISTAKES = [
    ("lora", {"lora.pretrained_model_name_or_path": None}, "must be the folder, single file or hub name of a Stab"),
    ("lora", {"lora.pretrained_model_name_or_path": "configs"}, "has no unet, vae, text_encoder, tokenizer; a Stable"),
    ("lora", {"base.channels": 1}, "sees pictures with 3 channels, and base.channels is 1"),
    ("lora", {"lora.huber_c": 0.2}, "huber_c = 0.2: has an effect with loss_type: huber only"),
    (
        "lora",
        {"lora.rescale_betas_zero_snr": True, "lora.prediction_type": "epsilon"},
        "needs prediction_type: v_prediction; noise says nothing at SNR 0",
    ),
    (
        "lora",
        {"lora.dream_detail_preservation": 1.0, "lora.prediction_type": "v_prediction"},
        "is defined for prediction_type: epsilon only",
    ),
    ("lora", {"lora.timestep_range": [5, 5]}, "must be [low, high] with 0 <= low < high"),
    ("lora", {"lora.timestep_bias_multiplier": 2.0}, "has an effect with a timestep_bias_strategy only"),
    ("lora", {"lora.timestep_bias_portion": 0.5}, "has an effect with timestep_bias_strategy: earlier or later only"),
    ("lora", {"lora.timestep_bias_begin": 5}, "has an effect with timestep_bias_strategy: range only"),
    ("lora", {"lora.timestep_bias_strategy": "later"}, "with a timestep_bias_multiplier other than 1 only"),
    (
        "lora",
        {"lora.timestep_bias_strategy": "range", "lora.timestep_bias_multiplier": 2.0, "lora.timestep_bias_begin": 1000},
        "must be below timestep_bias_end = 1000",
    ),
    ("lora", {"lora.prior_loss_weight": 0.5}, "has an effect with base.class_data_dir only"),
    ("lora", {"lora.cache_latents": "disk"}, "keeps one crop of each picture: set base.center_crop: true"),
    ("lora", {"lora.cache_text": "disk"}, "keeps text embeddings, which train_text_encoder changes"),
    (
        "text_to_image",
        {"text_to_image.cache_text": "disk", "base.shuffle_tags": True},
        "keeps one order of the tags: set base.shuffle_tags: false",
    ),
    ("lora", {"lora.guidance_scale": 1.0, "lora.guidance_rescale": 0.5}, "with a guidance_scale above 1 only"),
    ("lora", {"lora.lora_weights": "nowhere"}, "there is no such file or folder"),
    ("lora", {"lora.target_modules": "(unclosed"}, "is no pattern (a regular expression that matches modules' names)"),
    ("lora", {"lora.pretrained_model_name_or_path": "train.py"}, "must be .safetensors, found .py"),
    ("lora", {"lora.revision": "main"}, "has an effect with a name on the hub only, and this is on disk"),
    ("lora", {"lora.negative_prompt": "blurry", "lora.guidance_scale": 1.0}, "with a guidance_scale above 1 only"),
    (
        "lora",
        {"lora.validation_prompts": [], "lora.clip_score_model": "x"},
        "has an effect with pictures, and validation_prompts is empty only",
    ),
    ("lora", {"base.encoder_cache_dir": "x"}, "encoder_cache_dir = \"x\": has an effect with cache_latents or cache_text"),
    ("ddpm", {"base.trigger_word": "sks"}, "trigger_word = \"sks\": has an effect with a task that reads captions only"),
    ("ddpm", {"base.encoder_cache_dir": "x"}, "encoder_cache_dir = \"x\": has an effect with cache_latents or cache_text"),
    ("lora", {"lora.target_modules": []}, "must name at least one module, or be null"),
    (
        "lora",
        {"lora.train_text_encoder": False, "lora.text_encoder_target_modules": ["q_proj"], "lora.learning_rate": 1.0},
        "text_encoder_target_modules = [\"q_proj\"]: has an effect with train_text_encoder only",
    ),
    (
        "text_to_image",
        {"text_to_image.objective": "rectified_flow"},
        "noise_offset = 0.1: has an effect with objective: ddpm only",
    ),
    ("text_to_image", {"text_to_image.time_shift": 3.0}, "has an effect with objective: rectified_flow only"),
    (
        "text_to_image",
        {"text_to_image.objective": "rectified_flow", "text_to_image.noise_offset": 0.0, "text_to_image.sampler": "ddim"},
        "must be euler, dpmsolver++ or null with objective: rectified_flow",
    ),
    ("text_to_image", {"text_to_image.model_config": "nothing"}, "no file at nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "options", "message"), MISTAKES, ids=[case[2][:40] for case in MISTAKES])
def test_mistakes_in_the_config(task, options, message, tiny_config, capsys):
    assert main([str(tiny_config(task, **options)), "--print-config"]) == 2
    assert message in capsys.readouterr().err


LATER = [
    ("lora", {"lora.pretrained_model_name_or_path": "no/such/folder"}, "there is no such folder, and hub names read"),
    ("lora", {"lora.timestep_range": [0, 2000]}, "timestep_range = [0, 2000]: the base model has 1000 timesteps"),
    ("lora", {"lora.rescale_betas_zero_snr": True}, "needs prediction_type: v_prediction, and the base model predicts ep"),
    (
        "lora",
        {"lora.dream_detail_preservation": 1.0, "lora.pretrained_model_name_or_path": "sd2"},
        "dream_detail_preservation = 1.0: is defined for epsilon, and the base model predicts v_prediction",
    ),
    (
        "lora",
        {"lora.target_modules": ["nothing"]},
        "lora.target_modules = ['nothing']: no adapter can be put there",
    ),
    (
        "lora",
        {
            "lora.timestep_bias_strategy": "range",
            "lora.timestep_bias_multiplier": 2.0,
            "lora.timestep_bias_begin": 2000,
            "lora.timestep_bias_end": 3000,
        },
        "timestep_bias_strategy = range: favours none of the timesteps 0 to 999 over another; change its limits",
    ),
    ("lora", {"lora.clip_score_model": "configs"}, "clip_score_model = configs: no CLIPProcessor could be read; give a local"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "options", "message"), LATER, ids=[case[2][:40] for case in LATER])
def test_mistakes_that_show_later(task, options, message, tiny_config, capsys):
    if options.get("lora.pretrained_model_name_or_path") == "sd2":
        options = {
            **options,
            "lora.pretrained_model_name_or_path": str(tiny_models.model("sd2")),
            "lora.snr_gamma": None,
        }
    assert main([str(tiny_config(task, **options))]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_base_model_with_broken_parts(tmp_path, from_scratch, tiny_config, capsys):
    folder = tmp_path / "base"
    shutil.copytree(tiny_models.model("sd1"), folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    options = {"text_to_image.pretrained_model_name_or_path": str(folder)}
    assert main([str(tiny_config("text_to_image", **options))]) == 1
    assert (
        "unet: no UNet2DConditionModel in safetensors format could be read; give a local folder"
        in capsys.readouterr().err
    )
    path = Path(from_scratch["text_to_image.model_config"])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": 7}))
    assert main([str(tiny_config("text_to_image", "other", **options, **from_scratch))]) == 1
    assert "has cross_attention_dim = 7, and the base model's other parts need 32" in capsys.readouterr().err


def changed_base(tmp_path, part, **changes):
    """A copy of the tiny pipeline with another config of a part."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_models.model("sd1"), folder)
    [path] = (folder / part).glob("*config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


def test_base_models_that_cannot_be_used(tmp_path, tiny_config, capsys):
    from diffusers import UNet2DConditionModel

    folder = changed_base(tmp_path, "scheduler", _class_name="NoSuchScheduler")
    assert main([str(tiny_config("lora", "a", **{"lora.pretrained_model_name_or_path": folder}))]) == 1
    assert "its scheduler is a NoSuchScheduler, which diffusers does not have" in capsys.readouterr().err
    shutil.rmtree(folder)
    folder = changed_base(tmp_path, "unet", in_channels=9)
    settings = json.loads((Path(folder) / "unet" / "config.json").read_text())
    UNet2DConditionModel.from_config(settings).save_pretrained(Path(folder) / "unet")
    assert main([str(tiny_config("lora", "b", **{"lora.pretrained_model_name_or_path": folder}))]) == 1
    assert "its UNet sees 9 channels, and latents have 4; give a text-to-image model" in capsys.readouterr().err


def test_a_variant_is_read_from_all_parts(tmp_path, run_in_process, capsys):
    folder = tmp_path / "base"
    pipeline_of(tiny_models.model("sd1")).to(torch.float16).save_pretrained(folder, variant="fp16")
    options = {"lora.pretrained_model_name_or_path": str(folder), "lora.variant": "fp16"}
    run = run_in_process("run", "lora", **options)
    assert f'from_pretrained("{folder}", variant="fp16")' in capsys.readouterr().out
    assert LoRATrainer.load_pipeline(run).unet is not None


def test_an_autoencoder_on_the_hub_keeps_its_precision(monkeypatch):
    """Its config says that half precision overflows; a file that is silent does not."""
    import diffusers

    from trainers.common.autoencoder import latents

    base = BaseConfig(resolution=32, num_epochs=1, dataset="digits")
    for family, dtype in (("sdxl", torch.float32), ("sd1", torch.bfloat16)):
        folder = tiny_models.model(family) / "vae"
        config = json.loads((folder / "config.json").read_text())
        monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", lambda name, found=config, **options: found)
        space = latents.LatentSpace("option", "owner/name", base, CPU, torch.bfloat16)
        assert space.vae_dtype == dtype


def test_from_scratch_with_the_sizes_of_xl(run_in_process, from_scratch, tmp_path, tiny_config, capsys):
    options = {"text_to_image.pretrained_model_name_or_path": str(tiny_models.model("sdxl"))}
    folder = run_in_process("run", "text_to_image", **options, **from_scratch)
    config = pipeline_of(folder).unet.config
    assert config.addition_embed_type == "text_time"
    assert config.projection_class_embeddings_input_dim == tiny_models.TEXT_WIDTH + 6 * 256
    assert drawn_by_slots(pipeline_of(folder), folder).shape == (2, 3, 32, 32)
    path = Path(from_scratch["text_to_image.model_config"])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"addition_embed_type": "text_time"}))
    assert main([str(tiny_config("text_to_image", "other", **from_scratch))]) == 1
    assert "has addition_embed_type = text_time, and the base model's other parts need None" in capsys.readouterr().err


def test_a_run_that_went_on_from_a_file_resumes_without_it(run_in_process, tmp_path):
    first = run_in_process("first", "lora", **{"lora.use_ema": False})
    options = {"lora.use_ema": False, "lora.lora_weights": str(tmp_path / "copy"), "base.checkpointing_steps": 3}
    shutil.copytree(first, tmp_path / "copy")
    whole = run_in_process("whole", "lora", **options)
    shutil.rmtree(tmp_path / "copy")
    again = run_in_process("again", "lora", **options, **{"base.resume_from_checkpoint": str(whole / "checkpoint-3")})
    assert list(losses(again).items()) == list(losses(whole).items())[3:]
