"""scripts/style_transfer.py: Canny's edges against closed forms, and pictures against diffusers' pipelines."""

from __future__ import annotations

import math
import shutil
import sys

import diffusers
import numpy as np
import pytest
import torch
from marks import slow
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import ndimage
from tiny_models import lora_file, model

from scripts import merge_lora, sample, style_transfer
from trainers.common.lora.tensors import read_about
from trainers.engine.run.randomness import SlotRandom
from trainers.inference.canny import canny
from trainers.inference.picture_files import read_settings

CAT = "a photo of a cat"

# --- edges


def step(size=40, at=17, low=60.0, high=160.0):
    picture = np.full((size, size), low)
    picture[:, at:] = high
    return picture


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0])
def test_a_step_is_one_line_beside_it(turns, sigma):
    found = np.rot90(canny(np.rot90(step(), turns), sigma, 1, 2), -turns)
    columns = np.flatnonzero(found.any(0))
    assert len(columns) == 1
    assert columns[0] in (16, 17)
    assert found[:, columns[0]].all()


def test_the_gradient_of_a_step():
    """4 h (g(0) + g(1)), with g the Gaussian's share of a pixel: what is above `high` is no edge, what is below is one."""
    weights = np.exp(-0.5 * np.arange(-4, 5) ** 2)
    shares = weights / weights.sum()
    length = 4 * 100 * (shares[4] + shares[5])
    assert canny(step(), 1.0, 1, length * 0.9999).any()
    assert not canny(step(), 1.0, 1, length * 1.0001).any()


def test_thresholds_are_those_of_steps_of_25_and_50():
    assert not canny(step(low=100, high=149)).any()
    assert canny(step(low=100, high=151)).any()
    joined = np.vstack([step(low=100, high=148), step(low=100, high=160)])  # weak below strong: kept
    assert canny(joined).any(1).all()
    faint = np.vstack([step(low=100, high=124), step(low=100, high=160)])  # below both
    assert not canny(faint)[:36].any()


@pytest.mark.parametrize("radius", [8, 15.5, 25])
def test_a_disc_is_a_ring(radius):
    y, x = np.mgrid[:64, :64] - 31.5
    distance = np.hypot(x, y)
    found = canny(255 * np.clip(radius + 0.5 - distance, 0, 1))
    assert np.abs(distance[found] - radius).max() <= 1
    _, parts = ndimage.label(found, np.ones((3, 3)))
    assert parts == 1  # closed: it holds what is inside of it
    filled = ndimage.binary_fill_holes(found)
    assert filled.sum() == pytest.approx(math.pi * radius**2, abs=2 * math.pi * radius)
    assert found.sum() <= 8 * radius  # as thin as a circle of neighbouring pixels can be drawn


def test_nothing_to_see():
    assert not canny(np.full((10, 12), 77.0)).any()
    ramp = np.tile(np.arange(0, 250, 5.0), (20, 1))  # a gradient everywhere, longest nowhere
    assert not canny(ramp)[:, 8:-8].any()


# --- sizes


@pytest.mark.parametrize(
    ("size", "multiple", "max_side", "expected"),
    [
        ((640, 480), 8, 768, (640, 480)),
        ((4000, 3000), 8, 768, (768, 576)),
        ((3000, 4000), 8, 770, (576, 768)),
        ((500, 333), 8, 768, (496, 336)),
        ((1000, 10), 8, 512, (512, 8)),
    ],
)
def test_the_aspect_is_kept(size, multiple, max_side, expected):
    fitted = style_transfer.fitted(Image.new("RGB", size), multiple, max_side)
    assert fitted.size == expected


def test_nothing_is_squashed():
    """A disc stays one."""
    y, x = np.mgrid[:300, :445]
    disc = (np.hypot(x - 222, y - 150) < 90).astype(np.uint8) * 255
    fitted = np.asarray(style_transfer.fitted(Image.fromarray(disc).convert("RGB"), 8, 205).convert("L")) > 127
    assert fitted.shape == (136, 200)
    height, width = (np.ptp(np.flatnonzero(fitted.any(axis))) + 1 for axis in (1, 0))
    assert abs(height - width) <= 1


# --- pictures


@pytest.fixture(scope="module")
def controlnets(tmp_path_factory):
    """controlnets(family) -> the folder of a ControlNet that acts: its last layers start at zero."""
    made = {}

    def make(family):
        if family not in made:
            unet = diffusers.UNet2DConditionModel.from_pretrained(model(family) / "unet")
            controlnet = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 32))
            torch.manual_seed(0)
            zeros = [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]
            for layer in [*zeros, controlnet.controlnet_cond_embedding.conv_out]:
                torch.nn.init.normal_(layer.weight, std=0.3)
            made[family] = tmp_path_factory.mktemp(family) / "controlnet"
            controlnet.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with two pictures of different aspect, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    y, x = np.mgrid[:32, :48]
    disc = np.where(np.hypot(x - 24, y - 16) < 10, 230, 40).astype(np.uint8)
    Image.fromarray(np.stack([disc, disc, 255 - disc], 2)).save(folder / "disc.png")
    Image.fromarray(step(32).astype(np.uint8)).resize((32, 64)).save(folder / "step.jpg")
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def call(monkeypatch, tmp_path, controlnets):
    """call(family, *arguments, to="out") redraws into a folder, and returns the pictures by name."""

    def redraw(family, *arguments, to="out"):
        words = [model(family), *arguments, "--controlnet", controlnets(family), "--steps", 3, "--prompt", CAT]
        monkeypatch.setattr(sys, "argv", ["style_transfer.py", *map(str, words), "--output-dir", str(tmp_path / to)])
        style_transfer.main()
        found = sorted((tmp_path / to).rglob("*.png"))
        return {str(path.relative_to(tmp_path / to)): np.asarray(Image.open(path)).astype(int) for path in found}

    return redraw


OPTIONS = ["--strength", 0.7, "--guidance", 3, "--control-scale", 0.6, "--negative-prompt", "a dog", "--seed", 4]


@pytest.mark.parametrize("family", ["sd1", slow("sdxl")])
def test_pictures_are_the_pipelines(call, controlnets, pictures, tmp_path, family):
    lora = lora_file(tmp_path, family)
    found = call(family, pictures, *OPTIONS, "--lora", f"{lora}:0.8", "--save-edges")
    assert list(found) == ["disc.png", "edges/disc.png", "edges/step.png", "step.png"]
    text = Image.open(tmp_path / "out" / "disc.png").text["parameters"]
    assert text.startswith(f"{CAT} <lora:{tmp_path.name}:0.8>\nNegative prompt: a dog\nSteps: 3, Sampler: ")
    assert f", CFG scale: 3, Seed: 4, Size: 48x32, Model: {model(family).name}, Denoising strength: 0.7, " in text
    assert "parameters" not in Image.open(tmp_path / "out" / "edges" / "disc.png").text
    name = {"sd1": "StableDiffusion", "sdxl": "StableDiffusionXL"}[family]
    kind = getattr(diffusers, f"{name}ControlNetImg2ImgPipeline")
    controlnet = diffusers.ControlNetModel.from_pretrained(controlnets(family))
    pipeline = kind.from_pretrained(model(family), controlnet=controlnet)
    pipeline.load_lora_weights(tmp_path, adapter_name="a")
    pipeline.set_adapters(["a"], [0.8])
    pipeline.set_progress_bar_config(disable=True)
    for number, file in enumerate(("disc.png", "step.jpg")):
        image, stem = Image.open(pictures / file).convert("RGB"), file.split(".")[0]
        edges = canny(np.asarray(image.convert("L")))
        assert (found[f"edges/{stem}.png"] == edges[..., None] * 255).all()
        drawn = pipeline(
            CAT,
            negative_prompt="a dog",
            image=image,
            control_image=Image.fromarray(edges.astype(np.uint8) * 255).convert("RGB"),
            height=image.height,
            width=image.width,
            strength=0.7,
            guidance_scale=3.0,
            controlnet_conditioning_scale=0.6,
            num_inference_steps=3,
            generator=SlotRandom(4, torch.tensor([number]), "sample").generators()[0],
            output_type="np",
        ).images[0]
        assert found[f"{stem}.png"].shape == (image.height, image.width, 3)
        assert np.abs(found[f"{stem}.png"] - drawn * 255).max() <= 1


def test_a_lora_trained_with_clip_skip(call, pictures, tmp_path, monkeypatch):
    """As with a text encoder that lacks its last layer, for the negative prompt, too."""
    plain = lora_file(tmp_path)
    skipped = tmp_path / "skipped.safetensors"
    save_file(load_file(plain), skipped, metadata=read_about(plain) | {"clip_skip": "1"})
    found = call("sd1", pictures / "disc.png", *OPTIONS, "--lora", skipped)["disc.png"]
    whole = call("sd1", pictures / "disc.png", *OPTIONS, "--lora", plain, to="whole")["disc.png"]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model("sd1"))
    encoder = getattr(pipeline.text_encoder, "text_model", pipeline.text_encoder).encoder
    encoder.layers, pipeline.text_encoder.config.num_hidden_layers = encoder.layers[:-1], 1
    pipeline.save_pretrained(tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "tokenizer")
    shutil.copytree(model("sd1") / "tokenizer", tmp_path / "base" / "tokenizer")
    monkeypatch.setattr(sys.modules[__name__], "model", lambda family: tmp_path / "base")
    cut = call("sd1", pictures / "disc.png", *OPTIONS, "--lora", plain, to="cut")["disc.png"]
    assert np.abs(found - cut).max() <= 1
    assert np.abs(found - whole).max() > 1


def test_every_option_acts(call, pictures, monkeypatch):
    others = (("--strength", 1), ("--guidance", 4), ("--control-scale", 0), ("--negative-prompt", "x"), ("--seed", 5))
    before = call("sd1", pictures / "disc.png", *OPTIONS)
    original = style_transfer.parse
    for name, value in (*others, ("--steps", 4)):
        last = [name, str(value)]  # it counts
        monkeypatch.setattr(style_transfer, "parse", lambda given, last=last: original([*given, *last]))
        assert (call("sd1", pictures / "disc.png", *OPTIONS, to=name)["disc.png"] != before["disc.png"]).any(), name


def test_several_loras_are_the_merged_pipeline(call, pictures, tmp_path, monkeypatch):
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir(), second.mkdir()
    loras = ["--lora", f"{lora_file(first)}:0.8", "--lora", f"{lora_file(second, seed=1)}:-0.4"]
    found = call("sd1", pictures / "disc.png", *loras)
    monkeypatch.setattr(sys, "argv", ["merge_lora.py", str(model("sd1")), str(tmp_path / "merged"), *loras])
    merge_lora.main()
    monkeypatch.setattr(sys.modules[__name__], "model", lambda family: tmp_path / "merged")
    assert np.abs(call("sd1", pictures / "disc.png", to="merged-out")["disc.png"] - found["disc.png"]).max() <= 1


def test_without_loras_at_weight_0(call, pictures, tmp_path):
    """A DoRA would act."""
    lora = lora_file(tmp_path, use_dora=True)
    found = [
        call("sd1", pictures / "disc.png", *words, to=str(n)) for n, words in enumerate(([], ["--lora", f"{lora}:0"]))
    ]
    assert (found[0]["disc.png"] == found[1]["disc.png"]).all()


def test_large_pictures_are_made_smaller(call, tmp_path):
    Image.new("RGB", (100, 50), "red").save(tmp_path / "wide.png")
    found = call("sd1", tmp_path / "wide.png", "--max-side", 40)
    assert found["wide.png"].shape == (20, 40, 3)


def test_pictures_of_one_name(call, pictures, tmp_path):
    shutil.copy(pictures / "disc.png", tmp_path / "disc.png")
    found = call("sd1", pictures / "disc.png", tmp_path / "disc.png")
    assert list(found) == ["00000-disc.png", "00001-disc.png"]
    assert (found["00000-disc.png"] != found["00001-disc.png"]).any()  # another noise


@pytest.mark.parametrize("file", ["step.png", "edges/disc.png"])
def test_a_picture_is_drawn_again(call, pictures, tmp_path, monkeypatch, capsys, file):
    found = call("sd1", pictures, *OPTIONS, "--save-edges", "--lora", lora_file(tmp_path))
    path = tmp_path / "out" / file
    assert read_settings(path)["size"] == ([32, 64] if "step" in file else [48, 32])
    monkeypatch.setattr(sys, "argv", ["sample.py", "--again", str(path)])
    sample.main()
    again = path.with_stem(f"{path.stem}-again")
    assert capsys.readouterr().out.endswith(f"the same pixels: {again}\n")
    assert (np.asarray(Image.open(again)) == found[file]).all()


def test_a_picture_again_where_its_folder_has_grown(call, pictures, tmp_path, monkeypatch):
    """Numbers and names of the files are others then; the noise is that of the picture's own number."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("m.png", "n.png"):
        shutil.copy(pictures / "disc.png", folder / name)
    found = call("sd1", folder)
    assert (found["m.png"] != found["n.png"]).any()
    shutil.copy(pictures / "step.jpg", folder / "a.jpg")
    shutil.copy(pictures / "step.jpg", folder / "n.jpg")
    monkeypatch.setattr(sys, "argv", ["sample.py", "--again", str(tmp_path / "out" / "n.png")])
    sample.main()
    assert (np.asarray(Image.open(tmp_path / "out" / "n-again.png")) == found["n.png"]).all()


def test_the_settings_say_every_option(call, pictures, tmp_path):
    call("sd1", pictures / "disc.png", "--strength", 0.5)
    options = read_settings(tmp_path / "out" / "disc.png")["options"]
    expected = {"strength": 0.5, "guidance": 7.5, "control_scale": 0.8, "seed": 0, "steps": 3, "prompt": CAT}
    assert options.items() >= expected.items()


@pytest.mark.parametrize("mode", ["RGBA", slow("L"), "I;16", slow("P")])
def test_any_kind_of_picture(call, tmp_path, mode):
    grey = Image.fromarray(np.linspace(0, 255, 32 * 48).reshape(32, 48).astype(np.uint8))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    (deep if mode == "I;16" else grey.convert(mode)).save(tmp_path / "a.png")
    plain = grey.convert("RGB")
    plain.save(tmp_path / "plain.png")
    found = call("sd1", tmp_path / "a.png")["a.png"]
    assert (found == call("sd1", tmp_path / "plain.png", to="plain")["plain.png"]).all()


def test_another_sampler(call, controlnets, pictures):
    found = call("sd1", pictures / "disc.png", "--sampler", "lcm", "--guidance", 1, "--strength", 0.7)
    pipeline = diffusers.StableDiffusionControlNetImg2ImgPipeline.from_pretrained(
        model("sd1"), controlnet=diffusers.ControlNetModel.from_pretrained(controlnets("sd1"))
    )
    pipeline.scheduler = diffusers.LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    image = Image.open(pictures / "disc.png").convert("RGB")
    edges = style_transfer.edges_of(image)
    drawn = pipeline(
        CAT,
        image=image,
        control_image=edges,
        height=32,
        width=48,
        strength=0.7,
        guidance_scale=1.0,
        controlnet_conditioning_scale=0.8,
        num_inference_steps=3,
        generator=SlotRandom(0, torch.tensor([0]), "sample").generators()[0],
        output_type="np",
    ).images[0]
    assert np.abs(found["disc.png"] - drawn * 255).max() <= 1


WRONG = [
    (["none.png"], "none.png: is no picture, and no folder with any (.avif, .avifs, .bmp"),
    (["NOTES"], "notes.txt: cannot be read as a picture (cannot identify image file"),
    (["DISC", "--strength", "0"], "--strength 0: must be above 0 and at most 1"),
    (["DISC", "--strength", "0.3"], "--strength 0.3: leaves none of 3 steps; raise it or --steps"),
    (["DISC", "--guidance", "-1"], "--guidance -1: must be at least 0"),
    (["DISC", "--control-scale", "nan"], "--control-scale nan: must be at least 0"),
    (["DISC", "--guidance", "1", "--negative-prompt", "x"], "--negative-prompt: has no effect with guidance 1"),
    (["DISC", "--max-side", "3"], "--max-side 3: must be at least 4"),
    (["LINE", "--max-side", "100"], "--max-side 100: leaves too little of a picture of 1000 x 10 pixels; raise it"),
    (["DISC", "--lora", "OTHER"], "changes unet.down_blocks"),
    (["DISC", "--lora", "none.safetensors"], "no file none.safetensors; give a LoRA as .safetensors"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_mistakes(arguments, message, call, pictures, tmp_path):
    places = {"DISC": pictures / "disc.png", "NOTES": pictures / "notes.txt", "LINE": tmp_path / "line.png"}
    Image.new("RGB", (1000, 10)).save(places["LINE"])
    places["OTHER"] = lora_file(tmp_path, "sdxl")
    with pytest.raises(SystemExit) as caught:
        call("sd1", *[places.get(word, word) for word in arguments])
    assert str(caught.value).startswith("error: ")
    assert message in str(caught.value)


def test_controlnets_that_do_not_fit(pictures, controlnets, tmp_path, monkeypatch):
    def redraw(controlnet):
        words = [model("sd1"), pictures / "disc.png", "--controlnet", controlnet, "--prompt", CAT]
        monkeypatch.setattr(sys, "argv", ["style_transfer.py", *map(str, words), "--output-dir", str(tmp_path / "out")])
        style_transfer.main()

    with pytest.raises(
        SystemExit, match="controlnet: has cross_attention_dim = 64, BASE 32; give one for the same family"
    ):
        redraw(controlnets("sdxl"))
    with pytest.raises(SystemExit, match=f"--controlnet {tmp_path}: cannot be read as a ControlNet"):
        redraw(tmp_path)
    with pytest.raises(SystemExit, match="cannot be read as a ControlNet .it is a UNet2DConditionModel"):
        redraw(model("sd1") / "unet")
    shutil.copytree(model("sd1"), tmp_path / "nine")
    unet = diffusers.UNet2DConditionModel.from_pretrained(model("sd1") / "unet", in_channels=9, low_cpu_mem_usage=False,
                                                          ignore_mismatched_sizes=True)  # fmt: skip
    unet.save_pretrained(tmp_path / "nine" / "unet")
    monkeypatch.setattr(sys.modules[__name__], "model", lambda family: tmp_path / "nine")
    with pytest.raises(SystemExit, match="nine: is a base for inpainting; give an ordinary one"):
        redraw(controlnets("sd1"))
