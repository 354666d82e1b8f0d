"""Inversion and what lies between two noises, between two LoRAs, and between two pictures: scripts/morph.py."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from marks import slow
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file
from tiny_models import model

from scripts import morph as script
from scripts import sample
from trainers.common.diffusion.sampling import denoise
from trainers.common.lora.files import save_lora
from trainers.engine.config.errors import Interrupted
from trainers.inference import animation, single_picture
from trainers.inference.fitting import fit, size_between, unfit
from trainers.inference.inversion import ddim_schedulers, invert, picture_latents, slerp, with_statistics_between
from trainers.inference.lora_pipeline import load_pipeline
from trainers.inference.morphing import Morph, SharedAttention, check_morph, evenly_distant
from trainers.inference.picture_files import read_settings

PROMPTS = ("a photo of a cat", "a photo of a dog")
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
UNET, TEXT = ["to_q", "to_k", "to_v", "conv1"], ["q_proj", "fc1"]


def make_lora(folder, seed, family="sd1", text=False, **options):
    """A random LoRA, as if it had been trained."""
    torch.manual_seed(seed)
    pipeline, networks = load_pipeline(model(family)), {}
    for name in ("unet", "text_encoder") if text else ("unet",):
        networks[name] = getattr(pipeline, name).requires_grad_(False)
        targets = UNET if name == "unet" else TEXT
        networks[name].add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options))
        for key, parameter in networks[name].named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.2)
    folder.mkdir(exist_ok=True)
    return save_lora(folder, networks, {})


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """loras(family) -> two files; those of sd1 change the text encoder, too."""
    made = {}

    def make(family="sd1"):
        if family not in made:
            top = tmp_path_factory.mktemp(family)
            made[family] = [make_lora(top / str(seed), seed, family, text=family == "sd1") for seed in (1, 2)]
        return made[family]

    return make


def morph_of(loras, family="sd1", steps=4, attention=0.6, adain=True):
    torch.manual_seed(0)
    found = Morph(load_pipeline(model(family)), loras, PROMPTS, steps, attention, adain)
    found.pictures = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4), (32, 32), mode="bicubic") * 2 - 1
    found.invert(found.pictures)
    return found


def alone(lora, family="sd1", steps=4):
    """A pipeline with one LoRA, which never saw another one, and DDIM."""
    pipeline = load_pipeline(model(family))
    pipeline.load_lora_weights(lora.parent, adapter_name="only")
    pipeline.scheduler = ddim_schedulers(pipeline.scheduler, steps)[0]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- inversion


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_schedulers_go_the_same_way_forth_and_back(family):
    own = load_pipeline(model(family)).scheduler
    forward, back = ddim_schedulers(own, 10)
    assert forward.timesteps.tolist() == back.timesteps.flip(0).tolist() == [901 - 100 * n for n in range(10)]
    assert torch.equal(forward.alphas_cumprod, own.alphas_cumprod)
    assert forward.config.prediction_type == back.config.prediction_type == own.config.prediction_type
    assert forward.final_alpha_cumprod == back.initial_alpha_cumprod
    assert not any(settings.clip_sample for settings in (forward.config, back.config))
    assert not forward.config.thresholding


def test_steps_that_the_timesteps_do_not_hold():
    trailing = diffusers.DDIMScheduler(timestep_spacing="trailing")
    for scheduler, steps in ((diffusers.DDIMScheduler(steps_offset=1), 1000), (trailing, 61), (trailing, 1001)):
        with pytest.raises(ValueError, match=f"steps = {steps}: .*give 1 to 999"):
            ddim_schedulers(scheduler, steps)
    forward, back = ddim_schedulers(diffusers.PNDMScheduler(timestep_spacing="linspace"), 999)
    assert torch.equal(forward.timesteps, back.timesteps.flip(0))


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
)
def test_a_flow_is_not_inverted(scheduler):
    with pytest.raises(ValueError, match="the base's scheduler is of a flow .*DDIM inversion needs epsilon"):
        ddim_schedulers(scheduler, 10)


@pytest.mark.parametrize(("predicts", "bound"), [("epsilon", 1.6), ("v_prediction", 4.0)])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_inversion_of_a_gaussian(predicts, bound, spacing):
    """Where data is normal (m, s), the exact noise is known: the way keeps (x - a m) / sqrt(a^2 s^2 + 1 - a^2).

    The relative error of what comes back is at most bound / steps, and that of the noise 2 / steps.
    """
    m, s, errors = 0.3, 0.6, []
    for steps in (25, 50, 100):
        forward, back = ddim_schedulers(
            diffusers.DDIMScheduler(**NOISE, timestep_spacing=spacing, prediction_type=predicts), steps
        )
        squares = forward.alphas_cumprod.double()

        def predict(x, timestep, squares=squares):
            a, sigma = squares[timestep].sqrt(), (1 - squares[timestep]).sqrt()
            noise = sigma * (x - a * m) / (a**2 * s**2 + sigma**2)
            return noise if predicts == "epsilon" else a * noise - sigma * (x - sigma * noise) / a

        x = m + s * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        noise = invert(predict, back, x)
        last = squares[forward.timesteps[0]]
        exact = last.sqrt() * m + (last * s**2 + 1 - last).sqrt() * (x - m) / s
        assert (noise - exact).norm() < 2 / steps * exact.norm()
        errors.append((denoise(predict, forward, noise, steps, []) - x).norm() / x.norm())
        assert errors[-1] < bound / steps
    assert errors[1] < 0.55 * errors[0]
    assert errors[2] < 0.55 * errors[1]


@pytest.mark.parametrize(
    ("family", "bound", "numbers"), [slow("sd1", 20.0, (40, 80)), ("sd2", 3.0, (10, 20))]
)  # fmt: skip
def test_inversion_and_sampling_give_latents_back(loras, family, bound, numbers):
    """With guidance 1 and a picture's LoRA; the relative error is at most bound / steps.

    The bound of noise prediction is loose: a random network errs about noise that sampling divides by a = 0.07.
    """
    errors, latents = [], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for steps in numbers:
        morph = Morph(load_pipeline(model(family)), loras(family), PROMPTS, steps, 0.0, False)
        morph.mix(0)
        with torch.no_grad():
            noise = invert(morph.predict(0), morph.inverse, latents)
            found = denoise(morph.predict(0), morph.sampler, noise, steps, [])
        errors.append(((found - latents).norm() / latents.norm()).item())
        assert errors[-1] < bound / steps
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_latents_are_the_scaled_mode(family):
    vae = load_pipeline(model(family)).vae
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        mode = vae.encode(pictures).latent_dist.mode()
    assert torch.equal(picture_latents(vae, pictures), mode * vae.config.scaling_factor)


def test_each_picture_is_inverted_with_its_own_adapter_alone(loras):
    pipeline, seen = load_pipeline(model("sd1")), []
    morph = Morph(pipeline, loras(), PROMPTS, 3, 0.0, False)

    def look(unet, *_):
        layers = [module for module in unet.modules() if isinstance(module, LoraLayer)]
        assert len(layers) > 10
        seen.append({(*layer.active_adapters, layer.disable_adapters) for layer in layers})

    hook = pipeline.unet.register_forward_pre_hook(look)
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    morph.invert(pictures)
    hook.remove()
    assert seen == [{("lora_0", False)}] * 3 + [{("lora_1", False)}] * 3
    for number, lora in enumerate(loras()):
        single = alone(lora, steps=3)
        options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        embeds = single.encode_prompt(PROMPTS[number], **options)[0]
        assert torch.equal(morph.asked[number]["prompt_embeds"], embeds)

        @torch.no_grad()
        def predict(noisy, timestep, unet=single.unet, embeds=embeds):
            return unet(noisy, timestep, embeds).sample

        wanted = invert(predict, morph.inverse, picture_latents(single.vae, pictures[number : number + 1]))
        torch.testing.assert_close(morph.noises[number], wanted, rtol=0, atol=1e-6)
    assert (morph.noises[0] - morph.noises[1]).abs().max() > 0.1


# --- between two noises


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_slerp_is_its_definition(weight):
    a, b = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angle = math.acos((a * b).sum() / a.norm() / b.norm())
    wanted = (math.sin((1 - weight) * angle) * a + math.sin(weight * angle) * b) / math.sin(angle)
    torch.testing.assert_close(slerp(a, b, weight), wanted, rtol=0, atol=1e-12)
    half = slerp(a.bfloat16(), b.bfloat16(), weight)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), wanted, rtol=2**-7, atol=0.03)  # of bf16's 8 bits


def test_slerp_stays_on_the_sphere_where_a_line_does_not():
    a = torch.tensor([1.0, 0.0, 0.0])
    for degrees in (1e-3, 10.0, 90.0, 179.0):
        b = torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), 0.0])
        assert slerp(a, b, 0.5).norm().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slerp_of_parallel_and_opposite_vectors(dtype):
    a = torch.tensor([1.0, -2.0, 3.0]).to(dtype)
    assert torch.equal(slerp(a, a, 0.3), a)
    assert torch.equal(slerp(a, 3 * a, 0.5), 2 * a)
    assert torch.equal(slerp(torch.zeros_like(a), a, 0.5), a / 2)
    for factor in (-1, -2):
        with pytest.raises(ValueError, match="opposite directions: between them no way is the shortest"):
            slerp(a, factor * a, 0.5)


def test_statistics_lie_between():
    a = torch.randn(1, 4, 8, 8, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5, 3.0])[:, None, None] + 1
    b = torch.randn(1, 4, 8, 8, dtype=torch.float64) - 2
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    found = with_statistics_between(x, a, b, 0.25)
    for statistic in (torch.mean, torch.std):
        wanted = 0.75 * statistic(a, (2, 3)) + 0.25 * statistic(b, (2, 3))
        torch.testing.assert_close(statistic(found, (2, 3)), wanted)
    own, other = (rows.flatten(2) for rows in (x, found))
    for channel in range(4):  # nothing but scale and shift of each channel has changed
        assert torch.corrcoef(torch.stack([own[0, channel], other[0, channel]]))[0, 1] == pytest.approx(1)


@pytest.mark.parametrize("adain", [False, True])
def test_the_noise_between(loras, adain):
    morph = morph_of(loras(), adain=adain)
    first, last = morph.noises
    assert torch.equal(morph.noise(0.0), first)
    assert torch.equal(morph.noise(1.0), last)
    wanted = slerp(first, last, 0.3)
    wanted = with_statistics_between(wanted, first, last, 0.3) if adain else wanted
    torch.testing.assert_close(morph.noise(0.3), wanted, rtol=0, atol=1e-5)


# --- between two LoRAs


def weights_with(loras, shares, of_factors=False):
    """The UNet's weights with alpha / r B A of files, each by its share; with `of_factors` the wrong way."""
    state = load_pipeline(model("sd1")).unet.state_dict()
    files = [load_file(lora) for lora in loras]
    for key in [key for key in files[0] if key.startswith("unet.") and "lora_A" in key]:
        pairs = [(file[key.replace("lora_A", "lora_B")].flatten(1), file[key].flatten(1)) for file in files]
        if of_factors:
            up, down = (sum(s * pair[n] for s, pair in zip(shares, pairs, strict=True)) for n in (0, 1))
            product = up @ down
        else:
            product = sum(share * up @ down for share, (up, down) in zip(shares, pairs, strict=True))
        name = key.removeprefix("unet.").replace(".lora_A", "")
        state[name] = state[name] + product.reshape(state[name].shape)
    return state


@torch.no_grad()
def asked(unet):
    generator = torch.Generator().manual_seed(3)
    noisy, embeds = (torch.randn(1, *shape, generator=generator) for shape in ((4, 8, 8), (16, 32)))
    return unet(noisy, 500, embeds).sample


@pytest.mark.parametrize("weight", [slow(0.0), slow(0.25), 0.5, slow(1.0)])
def test_differences_are_mixed(loras, weight):
    """At 0.5 the difference of each weight is the mean of both LoRAs' differences, computed from the files."""
    morph = Morph(load_pipeline(model("sd1")), loras(), PROMPTS, 2, 0.0, False)
    morph.mix(weight)
    found, plain = asked(morph.unet), load_pipeline(model("sd1")).unet
    shares = (1 - weight, weight)
    plain.load_state_dict(weights_with(loras(), shares))
    torch.testing.assert_close(found, asked(plain), rtol=0, atol=1e-5)
    if weight in (0, 1):
        assert torch.equal(found, asked(alone(loras()[int(weight)]).unet))
    else:
        plain.load_state_dict(weights_with(loras(), shares, of_factors=True))
        assert (found - asked(plain)).abs().max() > 1e-2


def test_a_dora_is_not_mixed(loras, tmp_path):
    dora = make_lora(tmp_path / "dora", 3, use_dora=True)
    with pytest.raises(
        ValueError, match="is a DoRA, whose weights are no sum that can be mixed; train without use_dora"
    ):
        Morph(load_pipeline(model("sd1")), (loras()[0], dora), PROMPTS, 2, 0.0, False)


# --- frames


@pytest.mark.parametrize(
    ("family", "attention", "adain"),
    [("sd1", 0.6, True), slow("sdxl", 0.0, False), slow("sd1", 0.0, False), slow("sdxl", 0.6, True)],
)
def test_the_ends_are_the_reconstructions(loras, family, attention, adain):
    """What diffusers' pipeline draws from the noise, with one LoRA and without guidance."""
    morph = morph_of(loras(family), family, attention=attention, adain=adain)
    frames = morph.frames([0.0, 0.5, 1.0])
    assert frames.shape == (3, 3, 32, 32)
    for number, lora in enumerate(loras(family)):
        pipeline = alone(lora, family)
        options = {"guidance_scale": 1.0, "num_inference_steps": 4, "output_type": "pt"}
        wanted = pipeline(PROMPTS[number], latents=morph.noises[number], **options).images
        torch.testing.assert_close(frames[[0, 2]][number], wanted[0], rtol=0, atol=1e-5)
        assert (frames[1] - wanted[0]).abs().max() > 1e-2


class OwnAttention:
    """Attention written out, whose keys and values are kept (`mixed` None) or mixed from two that were."""

    def __init__(self, up):
        self.up, self.mixed, self.kept = up, None, []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        query = attn.to_q(hidden_states)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        key, value = attn.to_k(source), attn.to_v(source)
        if self.up and encoder_hidden_states is None and self.mixed is None:
            self.kept.append((key, value))
        elif self.up and encoder_hidden_states is None:
            (key_a, value_a), (key_b, value_b) = self.kept
            key = (1 - self.mixed) * key_a + self.mixed * key_b
            value = (1 - self.mixed) * value_a + self.mixed * value_b
        query, key, value = map(attn.head_to_batch_dim, (query, key, value))
        return attn.to_out[0](attn.batch_to_head_dim(attn.get_attention_scores(query, key) @ value))


def test_keys_and_values_of_self_attention_in_up_blocks_are_mixed(loras):
    morph = Morph(load_pipeline(model("sd1")), loras(), PROMPTS, 2, 1.0, False)
    inputs = torch.randn(3, 1, 4, 8, 8)
    timestep, weights, found = torch.tensor(500), (0.0, 1.0, 0.25), []
    with torch.no_grad():
        for x, weight in zip(inputs, weights, strict=True):
            morph.mix(weight)
            with morph.shared.at(weight):
                found.append(morph.predict(weight)(x, timestep))
        untouched = morph.predict(0.25)(inputs[2], timestep)
        processors = {name: OwnAttention(name.startswith("up_blocks")) for name in morph.unet.attn_processors}
        morph.unet.set_attn_processor(dict(processors))
        for x, weight, result in zip(inputs, weights, found, strict=True):
            morph.mix(weight)
            for processor in processors.values():
                processor.mixed = None if weight in (0, 1) else weight
            torch.testing.assert_close(morph.predict(weight)(x, timestep), result, rtol=0, atol=1e-5)
    assert (untouched - found[2]).abs().max() > 1e-3
    assert not any(layer._forward_hooks for layer in morph.shared.layers)


@pytest.mark.parametrize(("attention", "steps"), [slow(0.0, 0), (0.5, 2), slow(0.75, 4), slow(1.0, 5)])
def test_attention_is_shared_in_the_first_steps(loras, monkeypatch, attention, steps):
    used, at = [], SharedAttention.at
    monkeypatch.setattr(SharedAttention, "at", lambda self, weight: (used.append(weight), at(self, weight))[1])
    morph_of(loras(), steps=5, attention=attention).frames([0.0, 0.5, 1.0])
    assert used == [0.0, 1.0, 0.5] * steps


def test_bases_that_do_not_fit(loras):
    pipeline = load_pipeline(model("sd1"))
    bare = SimpleNamespace(unet=torch.nn.Linear(1, 1), vae=pipeline.vae)
    bare.unet.config = SimpleNamespace(in_channels=4)
    with pytest.raises(ValueError, match="no self-attention in its up blocks; give --attention 0"):
        check_morph(bare, [], 0.6)
    check_morph(bare, [], 0.0)
    pipeline.unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match="the base's UNet reads 9 channels; inpainting bases do not fit"):
        Morph(pipeline, loras(), PROMPTS, 2, 0.0, False)


def test_frames_are_spaced_evenly():
    """Along x(w) = w^2, measured at 101 weights, the way from 0 to 1 is cut at the square roots."""
    weights = np.linspace(0, 1, 101)
    found = evenly_distant(weights.tolist(), np.diff(weights**2).tolist())
    np.testing.assert_allclose(found, np.sqrt(weights), atol=5e-3)
    assert found[0] == 0
    assert found[-1] == 1
    assert evenly_distant([0.0, 0.5, 1.0], [2.0, 2.0]) == [0.0, 0.5, 1.0]
    assert evenly_distant([0.0, 0.5, 1.0], [3.0, 1.0])[1] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="all frames look the same; the two pictures must differ"):
        evenly_distant([0.0, 0.5, 1.0], [0.0, 0.0])


# --- pictures of any aspect


@pytest.mark.parametrize(
    ("width", "height", "size"), [(40, 20, (16, 32)), (15, 45, (32, 11)), (8, 8, (32, 32)), (200, 1, (1, 32))]
)
def test_pictures_are_fitted_not_squashed(width, height, size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    fitted = fit(picture, 32)
    assert fitted.size == size
    assert fitted.pixels.shape == (3, 32, 32)
    back = script.as_pil(unfit(fitted.pixels / 2 + 0.5, fitted.size))
    assert back.tobytes() == picture.resize(size[::-1], Image.Resampling.LANCZOS).tobytes()
    square = np.array(fitted.square)
    top, left = (32 - size[0]) // 2, (32 - size[1]) // 2
    assert np.array_equal(square[0, left : left + size[1]], np.array(back)[0])  # the edges go on
    assert np.array_equal(square[top : top + size[0], 31], np.array(back)[:, -1])


def test_sizes_between():
    assert size_between((16, 32), (32, 10), 0.0) == (16, 32)
    assert size_between((16, 32), (32, 10), 0.5) == (24, 21)
    assert size_between((16, 32), (32, 10), 1.0) == (32, 10)


# --- animations


def frames_of(width, height):
    return [Image.new("RGB", (width, height), (40 * number,) * 3) for number in range(4)]


def test_a_gif_holds_its_ends_and_says_its_text(tmp_path):
    animation.write_gif(frames_of(7, 5), tmp_path / "a.gif", "a café")
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (4, (7, 5), 0)
        assert image.info["comment"].decode() == "a café"
        durations = []
        for number in range(4):
            image.seek(number)
            durations.append(image.info["duration"])
    assert durations == [1000, 100, 100, 1000]


def test_an_mp4_by_imageio(tmp_path, monkeypatch):
    written = []
    imageio = SimpleNamespace(mimwrite=lambda path, frames, **options: written.append((path, frames, options)))
    monkeypatch.setitem(sys.modules, "imageio", imageio)
    monkeypatch.setattr(animation, "find_spec", lambda name: name.startswith("imageio"))
    assert animation.write_mp4(frames_of(7, 5), tmp_path / "a.mp4", "text")
    [(path, frames, options)] = written
    assert path == tmp_path / "a.mp4"
    assert [frame.shape for frame in frames] == [(6, 8, 3)] * 4  # H.264 needs even sides
    assert options["fps"] == animation.FRAMES_PER_SECOND
    assert "comment=text" in options["output_params"]


def test_a_contact_sheet_of_large_pictures_is_small():
    pictures = [Image.new("RGB", (1000, 500), "red")] * 4
    sheet = animation.contact_sheet(pictures, 2, ["a"] * 4)
    assert 2 * 256 < sheet.width < 2 * 256 + 20
    assert sheet.getpixel((20, 20)) == (255, 0, 0)


# --- the script


@pytest.fixture
def pictures(tmp_path):
    """A wide picture and a tall one."""
    for name, size in (("wide", (40, 20)), ("tall", (20, 40))):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(tmp_path / f"{name}.png")
    return tmp_path / "wide.png", tmp_path / "tall.png"


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["morph.py", *map(str, arguments)])
    script.main()


FEW = ["--frames", 3, "--steps", 2, "--device", "cpu"]
TRAINING = ["base.max_train_steps=2", "base.checkpointing_steps=2", "lora.rank=2", "base.logger=none",
            "lora.validation_prompts=[]"]  # fmt: skip


def test_loras_are_trained_and_found_again(tmp_path, pictures, monkeypatch, capsys):
    monkeypatch.setattr(animation, "find_spec", lambda name: None)
    call(
        monkeypatch, model("sd1"), *pictures, "--output-dir", tmp_path / "out", "--prompt", "a: photo", *FEW, *TRAINING
    )
    printed = capsys.readouterr().out
    assert "no morph.mp4: imageio with imageio-ffmpeg is not installed" in printed
    assert "3 frames (first and last: " in printed
    written = {"frames", "morph.gif", "morph.json", "morph.png", ".diffloop.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written
    sizes = [Image.open(tmp_path / "out" / "frames" / f"0000{number}.png").size for number in range(3)]
    assert sizes == [(32, 16), (24, 24), (16, 32)]
    assert Image.open(tmp_path / "out" / "morph.gif").size == (32, 32)

    settings = json.loads(Image.open(tmp_path / "out" / "morph.gif").info["comment"])
    sheet = read_settings(tmp_path / "out" / "morph.png")
    assert sheet == json.loads((tmp_path / "out" / "morph.json").read_text()) == settings | {"file": "morph.png"}
    for number, end in ((0, 0), (2, 1)):
        drawn = np.array(Image.open(tmp_path / "out" / "frames" / f"0000{number}.png")) / 255
        wanted = np.array(Image.open(pictures[end]).resize(drawn.shape[1::-1], Image.Resampling.LANCZOS)) / 255
        assert settings["psnr_of_ends"][end] == pytest.approx(-10 * np.log10(np.mean((drawn - wanted) ** 2)), abs=0.05)
    frame = read_settings(tmp_path / "out" / "frames" / "00001.png")
    assert frame == settings | {"file": "frames/00001.png", "frame": 1, "weight": 0.5}
    text = Image.open(tmp_path / "out" / "frames" / "00001.png").text["parameters"]
    names = [Path(settings["pinned"][name]).name for name in ("lora_a", "lora_b")]
    assert text.startswith(
        f"a: photo <lora:{names[0]}:0.5> <lora:{names[1]}:0.5>\nSteps: 2, Sampler: DDIM, CFG scale: 1"
    )
    assert "Size: 24x24, " in text
    assert settings["pictures"] == [*map(str, pictures)]
    assert settings["prompts"] == ["a: photo"] * 2
    found = sorted(map(str, tmp_path.glob("lora-*")))
    loras = [settings["pinned"][name] for name in ("lora_a", "lora_b")]
    assert sorted(loras) == found
    assert [folder.split("-")[-2] for folder in found] == ["tall", "wide"]
    inside = Image.open(next((tmp_path / found[1] / "picture").iterdir()))
    assert inside.tobytes() == fit(Image.open(pictures[0]), 32).square.tobytes()

    call(
        monkeypatch,
        model("sd1"),
        *pictures,
        "--output-dir",
        tmp_path / "again",
        "--prompt",
        "a: photo",
        *FEW,
        *TRAINING,
    )
    assert capsys.readouterr().out.count("the run is finished already") == 2
    assert sorted(map(str, tmp_path.glob("lora-*"))) == found
    for number in range(3):
        first, second = (Image.open(tmp_path / name / "frames" / f"0000{number}.png") for name in ("out", "again"))
        assert first.tobytes() == second.tobytes()

    given = ["--lora-a", loras[0], "--prompt", "a: photo", "--prompt-b", "another", *FEW, *TRAINING]
    call(monkeypatch, model("sd1"), *pictures, "--output-dir", tmp_path / "other", *given)
    assert len(list(tmp_path.glob("lora-*"))) == 3  # another prompt of the last picture


def test_a_lora_of_another_base_is_not_found(tmp_path, pictures, loras, monkeypatch):
    """A base that was trained on in its folder is another one."""
    shutil.copytree(model("sd1"), tmp_path / "base")
    words = [tmp_path / "base", *pictures, "--output-dir", tmp_path / "out", "--lora-a", loras()[0], *FEW, *TRAINING]
    call(monkeypatch, *words)
    assert len(list(tmp_path.glob("lora-*"))) == 1
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "base" / "unet")
    with torch.no_grad():
        unet.conv_in.weight.mul_(1.1)
    unet.save_pretrained(tmp_path / "base" / "unet")
    call(monkeypatch, *words)
    assert len(list(tmp_path.glob("lora-*"))) == 2


def test_the_autoencoder_stays_in_float32():
    pipeline = load_pipeline(model("sd1"), {"default": torch.bfloat16, "vae": torch.float32})
    assert {pipeline.unet.dtype, pipeline.text_encoder.dtype} == {torch.bfloat16}
    assert pipeline.vae.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
def test_given_loras_and_rescheduling(tmp_path, pictures, loras, monkeypatch, dtype):
    given = ["--lora-a", loras()[0], "--lora-b", loras()[1].parent, "--dtype", dtype, "--frames", 5, "--steps", 2]
    call(monkeypatch, model("sd1"), *pictures, "--output-dir", tmp_path / "plain", *given)
    call(
        monkeypatch,
        model("sd1"),
        *pictures,
        "--output-dir",
        tmp_path / "even",
        *given,
        "--reschedule",
        "ms_ssim",
        "--no-adain",
    )
    weights = {name: read_settings(tmp_path / name / "morph.png")["weights"] for name in ("plain", "even")}
    assert weights["plain"] == [0, 0.25, 0.5, 0.75, 1]
    assert weights["even"] == sorted(weights["even"]) != weights["plain"]
    assert (weights["even"][0], weights["even"][-1]) == (0, 1)


@pytest.mark.parametrize("file", [slow("morph.png"), "frames/00003.png"])
def test_a_picture_is_drawn_again(tmp_path, pictures, loras, monkeypatch, capsys, file):
    """With the weights that rescheduling found, and the LoRA that was trained, neither of which is done once more."""
    lora = shutil.copy(loras()[1], tmp_path / "b.safetensors")
    given = ["--lora-b", lora, "--frames", 5, "--steps", 2, "--reschedule", "ms_ssim", *TRAINING]
    call(monkeypatch, model("sd1"), *pictures, "--output-dir", tmp_path / "out", *given)
    for name in ("train", "load_perceptual"):
        owner = single_picture if name == "train" else script
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("was called"))
    path = tmp_path / "out" / file
    monkeypatch.setattr(sys, "argv", ["sample.py", "--again", str(path)])
    sample.main()
    drawn = path.with_stem(f"{path.stem}-again")
    assert capsys.readouterr().out.endswith(f"the same pixels: {drawn}\n")
    assert Image.open(drawn).tobytes() == Image.open(path).tobytes()
    first, second = read_settings(path), read_settings(drawn)
    assert first == second
    assert len(set(first["weights"])) == 5
    assert first["weights"][1] != 0.25
    shutil.copy(loras()[0], lora)
    with pytest.raises(SystemExit, match=r"was made from another .*; put that file back"):
        sample.main()


def test_mistakes_are_messages(tmp_path, pictures, loras, monkeypatch):
    both = ["--lora-a", loras()[0], "--lora-b", loras()[1]]
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    (tmp_path / "text.png").write_text("no picture")
    lines = [
        ((), ["--frames", "2"], "--frames 2: leaves none between the two ends; give at least 3"),
        ((), ["--attention", "1.5"], "--attention 1.5: must be a fraction of the steps, from 0 to 1"),
        ((), ["--seed", "0"], "--seed, --config and overrides are for training, and both LoRAs are given"),
        ((), ["lora.rank=2"], "--seed, --config and overrides are for training"),
        ((), ["--config", "a.yaml"], "--seed, --config and overrides are for training"),
        ((), ["--steps", "1000"], "steps = 1000: give 1 to 999"),
        ((), ["--reschedule", "psnr"], "--reschedule psnr: must be one of: lpips"),
        ((), ["--reschedule", "lpips:none.pth"], "--reschedule lpips:none.pth: no file none.pth"),
        ((), ["--device", "nowhere"], "device = nowhere: cannot be used"),
        ((), ["--lora-a", tmp_path / "none"], "no file .*none; give a LoRA"),
        (("output", "there"), [], "--output-dir .*there: holds other files; choose a new folder"),
        (("first", "none.png"), [], "none.png: there is no such picture"),
        (("last", "text.png"), [], "text.png: cannot be read as a picture"),
        (("base", "there"), [], "BASE = .*there: has no unet, vae, text_encoder, tokenizer; a Stable Diffusion"),
        (("base", "none"), [], "BASE = .*none: there is no such folder, and hub names read owner/name"),
    ]
    for changed, options, message in lines:
        places = {
            "base": model("sd1"),
            "first": pictures[0],
            "last": pictures[1],
            "option": "--output-dir",
            "output": tmp_path / "out",
        }
        places |= {changed[0]: tmp_path / changed[1]} if changed else {}
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            call(monkeypatch, *places.values(), *both, *options)
    training = [model("sd1"), *pictures, "--output-dir", tmp_path / "out", *FEW]
    dora, other = make_lora(tmp_path / "dora", 3, use_dora=True), loras("sdxl")[0]
    for options, message in (
        (["--lora-a", dora], "is a DoRA, whose weights are no sum"),
        (["--lora-a", other], "take the base that it was trained on"),
        (["--attention", "0.1"], "--attention 0.1: is none of 2 steps; raise it, or give 0"),
        (["lora.use_dora=true"], "lora.use_dora: the weights of a DoRA are no sum that can be mixed; leave it out"),
        (["base.caption=else"], "base.caption=else: scripts/morph.py sets it from its own options; leave it out"),
        (["lora.pretrained_model_name_or_path=x"], "lora.pretrained_model_name_or_path=x: scripts/morph.py sets it"),
        (["lora.rnak=2"], "lora.rnak = 2: unknown option; did you mean lora.rank"),
        (["--config", tmp_path / "none.yaml"], "config file .*none.yaml does not exist"),
    ):
        with pytest.raises(SystemExit, match=rf"(?s)error: .*{message}"):
            call(monkeypatch, *training, *options)
    assert {path.name for path in tmp_path.iterdir()} == {"there", "text.png", "wide.png", "tall.png", "dora"}


def test_a_distance_that_cannot_be_had_and_a_signal_while_training(tmp_path, pictures, monkeypatch, capsys):
    def unreachable(spec, side):
        raise ValueError("weights cannot be downloaded")

    def interrupted(run):
        raise Interrupted("saved at step 1", 143)

    monkeypatch.setattr(script, "load_perceptual", unreachable)
    monkeypatch.setattr(single_picture, "train", interrupted)
    training = [model("sd1"), *pictures, "--output-dir", tmp_path / "out", *FEW]
    with pytest.raises(SystemExit, match="error: --reschedule lpips: weights cannot be downloaded"):
        call(monkeypatch, *training, "--reschedule", "lpips")
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, *training)
    assert caught.value.code == 143
    assert "saved at step 1" in capsys.readouterr().err
