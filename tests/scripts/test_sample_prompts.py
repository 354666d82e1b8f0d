"""scripts/sample.py with prompts: runs and pipelines of Stable Diffusion, LoRAs, masks, and pictures drawn again."""

from __future__ import annotations

import json
import re
import shutil
import sys

import diffusers
import numpy as np
import pytest
import torch
from marks import slow
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import lora_file, model

from scripts import merge_lora, sample
from train import main
from trainers.common.diffusion.consistency import lcm_scheduler
from trainers.engine.run.randomness import SlotRandom
from trainers.engine.validation.grids import labelled_grid
from trainers.engine.validation.sampling import evaluation_mode
from trainers.inference.lora_pipeline import parse_lora
from trainers.inference.picture_files import read_settings, save_picture
from trainers.inference.prompted_drawing import for_pipelines
from trainers.inference.prompts import row_names
from trainers.inference.saved_run import load_trainer, open_run

CAT, DOG = "a photo of a cat", "a photo of a dog"
BOTH = ["--prompt", CAT, "--prompt", DOG]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of task lora whose text encoder has an adapter, too."""
    model("sd1")
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = [f"base.output_dir={folder}", "lora.validation_prompts=[]", "base.checkpointing_steps=3"]
    assert main(["configs/tests/lora.json", *options]) == 0
    return folder


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    made = [tmp_path_factory.mktemp("lora") for _ in range(3)]
    return [lora_file(made[0]), lora_file(made[1], seed=1, r=2), lora_file(made[2], seed=2, use_dora=True)]


@pytest.fixture
def call(monkeypatch, tmp_path):
    """call(*arguments, to="out") draws into a folder, and returns its pictures as arrays by the file's name."""

    def draw(*arguments, to="out"):
        folder = tmp_path / to
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments), "--output-dir", str(folder)])
        sample.main()
        found = sorted(folder.rglob("*.png"))
        return {str(path.relative_to(folder)): np.asarray(Image.open(path)).astype(int) for path in found}

    return draw


def once_more(monkeypatch, path):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--again", str(path)])
    sample.main()
    return path.with_stem(f"{path.stem}-again")


def drawn_by(pipeline, prompts, seed=0, **options):
    """What the pipeline draws from the script's generators: [N, H, W, 3] of 0 to 255."""
    pipeline.set_progress_bar_config(disable=True)
    generators = SlotRandom(seed, torch.arange(len(prompts)), "sample").generators()
    settings = {"num_inference_steps": 2, "guidance_scale": 7.5} | options
    images = pipeline(prompts, generator=generators, output_type="pt", **settings).images
    return (images * 255).round().permute(0, 2, 3, 1).int().numpy()


def close(found, expected):
    """The last bit of a sum may move a pixel by one of 255."""
    return np.abs(np.asarray(found) - expected).max() <= 1


def pipeline_of(folder):
    return diffusers.DiffusionPipeline.from_pretrained(folder)


# --- runs, and the pipelines that they make


@pytest.mark.parametrize("checkpoint", [None, "checkpoint-3"])
def test_a_run_draws_what_its_trainer_draws(trained, call, checkpoint):
    path = trained / (checkpoint or "")
    found = call(path, *BOTH, "--guidance-rescale", 0.5, "--seed", 3, "lora.lora_scale=0.7")
    trainer = load_trainer(open_run(path), ["lora.lora_scale=0.7", "lora.guidance_rescale=0.5"])
    with evaluation_mode(trainer):
        requests = [{"prompt": CAT}, {"prompt": DOG}]
        expected = trainer.sample(requests, SlotRandom(3, torch.arange(2), "sample"))["samples"]
    expected = (expected * 255).round().permute(0, 2, 3, 1).int().numpy()
    assert close([found["samples/00000.png"], found["samples/00001.png"]], expected)


def test_a_finished_run_is_its_base_with_its_file(trained, call):
    found = call(trained, *BOTH)
    pipeline = pipeline_of(model("sd1"))
    pipeline.load_lora_weights(trained)
    assert close([found["samples/00000.png"], found["samples/00001.png"]], drawn_by(pipeline, [CAT, DOG]))
    as_a_file = call(model("sd1"), *BOTH, "--steps", 2, "--lora", trained, to="file")
    assert close(found["samples.png"], as_a_file["samples.png"])


@pytest.mark.parametrize("objective", ["ddpm", slow("rectified_flow")])
def test_a_run_of_a_whole_unet(run_in_process, call, objective):
    options = {"text_to_image.objective": objective}
    options |= {"text_to_image.noise_offset": 0.0} if objective == "rectified_flow" else {}
    folder = run_in_process("run", "text_to_image", **options)
    sampler = "euler" if objective == "rectified_flow" else "ddim"
    found = call(folder, "--prompt", CAT, "--sampler", sampler, "--steps", 3)
    trainer = load_trainer(
        open_run(folder), [f"text_to_image.sampler={sampler}", "text_to_image.num_inference_steps=3"]
    )
    with evaluation_mode(trainer):
        expected = trainer.sample([{"prompt": CAT}], SlotRandom(0, torch.arange(1), "sample"))["samples"]
    expected = (expected * 255).round().permute(0, 2, 3, 1).int().numpy()
    assert close(found["samples/00000.png"], expected[0])
    (folder / "config.yaml").rename(folder / "hidden.yaml")  # as a pipeline that is no run
    alone = call(folder, "--prompt", CAT, "--sampler", sampler, "--steps", 3, "--guidance", 7.5, to="alone")
    assert close(alone["samples/00000.png"], found["samples/00000.png"])


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_pipeline_and_its_options(call, family):
    options = ["--steps", 3, "--guidance", 4, "--guidance-rescale", 0.6, "--sampler", "ddim"]
    found = call(model(family), *BOTH, *options, "--negative-prompt", DOG, "--clip-skip", 1)
    pipeline = pipeline_of(model(family))
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    if family != "sdxl":
        object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    asked = {"num_inference_steps": 3, "guidance_scale": 4.0, "guidance_rescale": 0.6, "negative_prompt": [DOG] * 2}
    expected = drawn_by(pipeline, [CAT, DOG], **asked, clip_skip=1)
    assert close([found["samples/00000.png"], found["samples/00001.png"]], expected)
    assert not close(expected, drawn_by(pipeline, [CAT, DOG], **asked))


def test_clip_skip_leaves_out_layers(call):
    """A text encoder that has one layer less gives the same; of what is not asked for, diffusers leaves out none."""
    found = call(model("sd1"), "--prompt", CAT, "--steps", 2, "--guidance", 1, "--clip-skip", 1)
    pipeline = pipeline_of(model("sd1"))
    pipeline.text_encoder.encoder.layers = pipeline.text_encoder.encoder.layers[:-1]
    assert close(found["samples/00000.png"], drawn_by(pipeline, [CAT], guidance_scale=1.0)[0])


def test_pictures_do_not_depend_on_the_batch_size(trained, call):
    one, all_at_once = (call(trained, *BOTH, "--number", 5, "--batch-size", size, to=str(size)) for size in (1, 5))
    assert one.keys() == all_at_once.keys() == {"samples.png", *(f"samples/{n:05d}.png" for n in range(5))}
    assert all(close(one[name], all_at_once[name]) for name in one)
    assert not close(one["samples/00000.png"], one["samples/00002.png"])  # another noise


def test_prompts_of_a_file(trained, call, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{CAT}\n\n  {DOG}\n")
    assert call(trained, "--prompts", tmp_path / "prompts.txt").keys() == call(trained, *BOTH, to="b").keys()
    settings = read_settings(tmp_path / "out" / "samples" / "00001.png")
    assert str(tmp_path / "prompts.txt") in settings["files"]


@pytest.mark.parametrize("inpainted", [False, True])
def test_the_denoising_is_animated(trained, call, tmp_path, monkeypatch, inpainted):
    kept, draw = [], sample.sample
    monkeypatch.setattr(sample, "sample", lambda *given: kept.append(draw(*given)) or kept[0])
    options = painted(tmp_path)[1] if inpainted else []
    found = call(trained, *BOTH, *options, "--gif", "--sampler", "ddim", "--steps", 4, "--batch-size", 1)
    with Image.open(tmp_path / "out" / "denoising.gif") as animation:
        assert animation.n_frames == 4
    frames = (kept[0][1] * 255).round().permute(0, 1, 3, 4, 2).int().numpy()
    assert frames.shape[:2] == (4, 2)
    assert close(frames[-1], [found["samples/00000.png"], found["samples/00001.png"]])
    assert not close(frames[0], frames[-1])
    assert json.loads((tmp_path / "out" / "denoising.json").read_text())["command"][0] == "sample"


# --- LoRAs


def test_several_loras_are_the_merged_pipeline(call, loras, tmp_path, monkeypatch):
    weights = ["--lora", f"{loras[0]}:0.8", "--lora", f"{loras[1]}:-0.5"]
    found = call(model("sd1"), *BOTH, "--steps", 2, *weights)
    monkeypatch.setattr(sys, "argv", ["merge_lora.py", str(model("sd1")), str(tmp_path / "merged"), *weights])
    merge_lora.main()
    expected = drawn_by(pipeline_of(tmp_path / "merged"), [CAT, DOG])
    assert close([found["samples/00000.png"], found["samples/00001.png"]], expected)
    assert not close(expected, drawn_by(pipeline_of(model("sd1")), [CAT, DOG]))


def test_another_lora_on_a_run(trained, call, loras):
    found = call(trained, *BOTH, "--lora", f"{loras[0]}:0.6")
    pipeline = pipeline_of(model("sd1"))
    pipeline.load_lora_weights(trained, adapter_name="own")
    pipeline.load_lora_weights(loras[0].parent, adapter_name="other")
    pipeline.set_adapters(["own", "other"], [1.0, 0.6])
    assert close([found["samples/00000.png"], found["samples/00001.png"]], drawn_by(pipeline, [CAT, DOG]))


def test_a_sweep_over_scales(call, loras):
    """A DoRA at 0 is not the base: it has to be taken out."""
    options = ["--steps", 2, "--lora", f"{loras[0]}:0.5", "--lora", loras[2], "--lora-scales", "1,0,0.5"]
    found = call(model("sd1"), *BOTH, *options)
    base = call(model("sd1"), *BOTH, "--steps", 2, to="base")
    alone = call(model("sd1"), *BOTH, *options[:-2], to="alone")
    half = call(model("sd1"), *BOTH, "--steps", 2, "--lora", f"{loras[0]}:0.25", "--lora", f"{loras[2]}:0.5", to="half")
    for scale, expected in (("0", base), ("1", alone), ("0.5", half)):
        for number in ("00000", "00001"):
            assert (found[f"scale_{scale}/{number}.png"] == expected[f"samples/{number}.png"]).all()
    assert not close(found["scale_0/00000.png"], found["scale_1/00000.png"])
    grid = found["lora_scales.png"]  # names, then three columns of 128 pixels; the order is that of the command
    assert grid.shape[1] == 128 + 2 + 3 * 130 + 2
    for column, scale in enumerate(("1", "0", "0.5")):
        for row, number in enumerate(("00000", "00001")):
            top, left = grid.shape[0] - (2 - row) * 130, 130 + 2 + column * 130
            cell = grid[top : top + 128, left : left + 128]
            assert (cell[::4, ::4] == found[f"scale_{scale}/{number}.png"]).all()


def test_a_weight_of_a_single_lora_names_the_column(trained, call):
    found = call(trained, "--prompt", CAT, "--lora-scales", "0,1", "lora.lora_scale=0.5")
    assert {"weight_0.png", "weight_0.5.png", "weight_0/00000.png", "lora_scales.png"} <= found.keys()


def test_a_grid_of_one(call, loras):
    options = ["--prompt", CAT, "--steps", 1, "--lora", f"{loras[0]}:-0.5", "--lora-scales"]
    one = call(model("sd1"), *options, "0.5")
    assert (one["lora_scales.png"][-130:-2, 132:-2][::4, ::4] == one["weight_-0.25/00000.png"]).all()
    assert {"weight_0.png", "weight_-0.5.png"} <= call(model("sd1"), *options, "0,1", to="two").keys()


def test_labels_of_a_grid():
    pictures = {name: torch.full((2, 3, 128, 128), value) for name, value in (("one", 0.25), ("two", 0.5))}
    grid = labelled_grid(pictures, ["first row", "second"])
    top = grid.shape[1] - 2 * 130 - 2
    assert grid.shape == (3, top + 262, 130 + 262)
    for row in range(2):
        for column, value in enumerate((0.25, 0.5)):
            cell = grid[:, top + 2 + 130 * row :, 132 + 130 * column :][:, :128, :128]
            assert (cell == value).all()
    written = (grid < 0.2).any(0)  # black on white
    assert [written[:top, 132 + 130 * n : 260 + 130 * n].any().item() for n in range(2)] == [True, True]
    assert [written[top + 130 * n :, :130][:130].any().item() for n in range(2)] == [True, True]
    assert not written[:top, :130].any()
    other = labelled_grid({"one": pictures["one"], "six": pictures["two"]}, ["first row", "second"])
    assert ((grid != other).any(0).nonzero()[:, 1] >= 260).all()  # the second column's name alone


def test_names_of_rows():
    requests = [{"prompt": prompt} for prompt in (CAT, DOG, CAT)]
    assert row_names(requests, 4) == [f"{CAT} (seed 4, number 0)", DOG, f"{CAT} (seed 4, number 2)"]
    assert row_names(requests[:1] * 2, 4) == ["seed 4, number 0", "seed 4, number 1"]


# --- inpainting


def painted(folder, size=(40, 32)):
    """A picture with colours in it, and a mask whose right half is white."""
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :] = 255
    Image.fromarray(pixels).save(folder / "image.png")
    Image.fromarray(mask).save(folder / "mask.png")
    return pixels, ["--image", folder / "image.png", "--mask", folder / "mask.png"]


@pytest.mark.parametrize("size", [(40, 32), (37, 30)])
def test_inpainting_leaves_the_rest(trained, call, tmp_path, size):
    pixels, options = painted(tmp_path, size)
    found = call(trained, *BOTH, *options, "--strength", 0.9)
    half = size[0] // 2
    for number in ("00000", "00001"):
        picture = found[f"samples/{number}.png"]
        assert picture.shape == pixels.shape
        assert (picture[:, :half] == pixels[:, :half]).all()
        assert np.abs(picture[:, half:] - pixels[:, half:]).mean() > 10


def test_a_mask_on_a_transparent_layer(trained, call, tmp_path):
    """White paint on nothing: only what is painted is drawn anew."""
    pixels, (_, image, _, mask) = painted(tmp_path)
    layer = np.zeros((32, 40, 4), np.uint8)
    layer[:12, :12] = 255
    Image.fromarray(layer).save(mask)
    found = call(trained, "--prompt", CAT, "--image", image, "--mask", mask)["samples/00000.png"]
    changed = (found != pixels).any(2)
    assert changed[:12, :12].mean() > 0.9
    assert not changed[12:].any()
    assert not changed[:, 12:].any()


def test_inpainting_by_a_flow(run_in_process, call, tmp_path):
    """The Euler method of flows has scale_noise, (1 - s) x + s noise, where the pipeline asks for add_noise."""
    options = {"text_to_image.objective": "rectified_flow", "text_to_image.noise_offset": 0.0}
    folder = run_in_process("run", "text_to_image", **options)
    pixels, options = painted(tmp_path)
    found = call(folder, "--prompt", CAT, *options, "--sampler", "euler", "--strength", 0.9)["samples/00000.png"]
    assert (found[:, :20] == pixels[:, :20]).all()
    assert np.abs(found[:, 20:] - pixels[:, 20:]).mean() > 10
    sampler = for_pipelines(diffusers.FlowMatchEulerDiscreteScheduler())
    sampler.set_timesteps(4)
    x, noise = torch.randn(2, 1, 4, 8, 8)
    for timestep, sigma in zip(sampler.timesteps, sampler.sigmas[:-1], strict=True):
        torch.testing.assert_close(sampler.add_noise(x, noise, timestep[None]), (1 - sigma) * x + sigma * noise)


def test_inpainting_is_the_pipelines(call, tmp_path, loras):
    _, options = painted(tmp_path)
    one, both = (
        call(model("sdxl"), *BOTH, *options, "--steps", 3, "--strength", 0.7, "--batch-size", size, to=str(size))
        for size in (1, 2)
    )
    assert all(close(one[name], both[name]) for name in one)
    pipeline = diffusers.AutoPipelineForInpainting.from_pipe(pipeline_of(model("sdxl")))
    image, mask = Image.open(tmp_path / "image.png"), Image.open(tmp_path / "mask.png")
    asked = {"image": [image] * 2, "mask_image": [mask] * 2, "strength": 0.7, "height": 32, "width": 40}
    expected = drawn_by(pipeline, [CAT, DOG], num_inference_steps=3, **asked)
    assert close([one["samples/00000.png"][:, 20:], one["samples/00001.png"][:, 20:]], expected[:, :, 20:])


def test_a_pipeline_for_inpainting(call, tmp_path):
    """Nine channels: the picture without what is masked, and the mask, beside the noise."""
    settings = dict(pipeline_of(model("sd1")).unet.config) | {"in_channels": 9}
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_config(settings)
    made = diffusers.StableDiffusionInpaintPipeline.from_pretrained(model("sd1"), unet=unet)
    made.save_pretrained(tmp_path / "nine")
    pixels, options = painted(tmp_path)
    found = call(tmp_path / "nine", "--prompt", CAT, "--steps", 2, *options)["samples/00000.png"]
    image, mask = Image.open(tmp_path / "image.png"), Image.open(tmp_path / "mask.png")
    expected = drawn_by(made, [CAT], image=[image], mask_image=[mask], height=32, width=40)[0]
    assert close(found[:, 20:], expected[:, 20:])
    assert (found[:, :20] == pixels[:, :20]).all()
    with pytest.raises(SystemExit, match="the pipeline is for inpainting; give --image and --mask"):
        call(tmp_path / "nine", "--prompt", CAT, to="none")


# --- again


@pytest.mark.parametrize("file", ["weight_0.5/00003.png", slow("weight_1.png"), slow("lora_scales.png")])
def test_a_picture_is_drawn_again(trained, call, tmp_path, monkeypatch, capsys, file):
    found = call(trained, *BOTH, "--number", 5, "--batch-size", 2, "--lora-scales", "0.5,1", "--seed", 7)
    path = once_more(monkeypatch, tmp_path / "out" / file)
    assert (np.asarray(Image.open(path)) == found[file]).all()
    assert capsys.readouterr().out.endswith(f"the same pixels: {path}\n")
    assert read_settings(path) == read_settings(tmp_path / "out" / file)
    assert json.loads(path.with_suffix(".json").read_text()) == read_settings(path)


def test_the_checkpoint_is_remembered(trained, call, tmp_path, monkeypatch):
    """The run has a newer one by now."""
    last = trained / "checkpoint-6"
    last.rename(tmp_path / "later")
    try:
        found = call(trained, "--prompt", CAT)
    finally:
        (tmp_path / "later").rename(last)
    path = once_more(monkeypatch, tmp_path / "out" / "samples" / "00000.png")
    assert (np.asarray(Image.open(path)) == found["samples/00000.png"]).all()
    assert (call(trained, "--prompt", CAT, to="now")["samples/00000.png"] != found["samples/00000.png"]).any()


@pytest.mark.parametrize("task", [slow("ddpm"), "conditional_ddpm", "vae"])
def test_pictures_of_other_tasks_again(run_in_process, call, tmp_path, monkeypatch, task):
    folder = run_in_process(task=task, **{"base.validation_split": 0.02})
    found = call(folder, "--number", 5, "--batch-size", 2, "--seed", 2)
    number = sorted(name for name in found if name.endswith("00003.png"))[0]
    grid = sorted(name for name in found if "/" not in name)[0]
    for file in (number, grid):
        path = once_more(monkeypatch, tmp_path / "out" / file)
        assert (np.asarray(Image.open(path)) == found[file]).all()


def test_pictures_that_cannot_be_drawn_again(call, loras, tmp_path, monkeypatch):
    lora = lora_file(tmp_path)
    call(model("sd1"), "--prompt", CAT, "--steps", 1, "--lora", lora)
    path = tmp_path / "out" / "samples" / "00000.png"
    settings = read_settings(path)
    content = lora.read_bytes()

    lora.write_bytes(loras[1].read_bytes())
    with pytest.raises(SystemExit, match=f"error: {path}: was made from another {lora}; put that file back"):
        once_more(monkeypatch, path)
    lora.unlink()
    with pytest.raises(SystemExit, match=f"was made from {lora}, which is not there; run from the same folder"):
        once_more(monkeypatch, path)
    lora.write_bytes(content)

    save_picture(Image.new("RGB", (32, 32)), path, settings)
    with pytest.raises(
        SystemExit, match=r"00000-again.png: differs from .* by up to \d+ of 255; it was made on cpu with"
    ):
        once_more(monkeypatch, path)
    save_picture(Image.new("RGB", (3, 3)), path, settings)
    with pytest.raises(SystemExit, match="has another size than"):
        once_more(monkeypatch, path)
    save_picture(Image.new("RGB", (3, 3)), path, settings | {"command": ["os", "x"]})
    with pytest.raises(
        SystemExit,
        match="has other settings than those of this version's sample, style_transfer, morph; it cannot be repeated",
    ):
        once_more(monkeypatch, path)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(SystemExit, match="does not say how it was made"):
        once_more(monkeypatch, tmp_path / "text.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 0}, "other settings than those"),
        ({"command": []}, "other settings than those"),
        ({"command": 5}, "other settings than those"),
        (
            {
                "command": ["morph"],
                "pinned": {"lora_a": 0, "lora_b": 0, "weights": 0, "seed": 0, "config": 0, "overrides": 5},
            },
            "other settings than those",
        ),
        ({"files": None}, "other settings than those"),
        ({"file": "/etc/x.png"}, "other settings than those"),
        ({"file": "../x.png"}, "other settings than those"),
        ({"pinned": {"only": 0, "path": "run", "device": "cpu"}}, "other settings than those"),
        (
            {"command": ["sample", "run", "base.trainer_class=os:x"]},
            "its command sets base.trainer_class, which --again does not; draw it yourself",
        ),
        ({"command": ["sample", "run", "base.dataset=os:x"]}, "its command sets base.dataset"),
    ],
)
def test_pictures_from_elsewhere(tmp_path, monkeypatch, changes, message):
    """Settings of a PNG are not trusted to choose code, or where something is read or written."""
    settings = {"command": ["sample", "run"], "files": {}, "device": "cpu", "versions": {}, "threads": 1}
    settings |= {"file": "samples/00000.png", "pinned": {"only": 0, "path": "run"}}
    save_picture(Image.new("RGB", (3, 3)), tmp_path / "a.png", settings | changes)
    with pytest.raises(SystemExit, match=f"error: {tmp_path}/a.png: .*{message}"):
        once_more(monkeypatch, tmp_path / "a.png")
    save_picture(Image.new("RGB", (3, 3)), tmp_path / "a.png", [1])
    with pytest.raises(SystemExit, match="does not say how it was made"):
        once_more(monkeypatch, tmp_path / "a.png")


def test_as_many_threads_as_before(call, tmp_path, monkeypatch):
    """Another number of threads may sum in another order."""
    call(model("sd1"), "--prompt", CAT, "--steps", 1)
    path = tmp_path / "out" / "samples" / "00000.png"
    before, asked = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    save_picture(Image.open(path), path, read_settings(path) | {"threads": 3})
    once_more(monkeypatch, path)
    assert asked == [3]
    assert torch.get_num_threads() == before


def test_prompts_with_a_byte_order_mark(call, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{CAT}\n\n", encoding="utf-8-sig")
    found = call(model("sd1"), "--prompts", tmp_path / "prompts.txt", "--steps", 1)
    assert (found["samples/00000.png"] == call(model("sd1"), "--prompt", CAT, "--steps", 1)["samples/00000.png"]).all()


def test_lcms_sampler_for_a_pipeline(call, tmp_path):
    """With the teacher's steps that the LoRA was distilled with, or 50; and a LoRA of a style beside it."""
    other = tmp_path / "style"
    other.mkdir()
    lora, style = lora_file(tmp_path), lora_file(other, seed=1)
    words = [
        "--prompt",
        CAT,
        "--steps",
        3,
        "--guidance",
        1,
        "--sampler",
        "lcm",
        "--lora",
        lora,
        "--lora",
        f"{style}:0.5",
    ]
    for steps, number in ((None, 50), (20, 20)):
        if steps:
            with safe_open(lora, framework="pt") as file:
                about = file.metadata() | {"num_ddim_timesteps": str(steps)}
            save_file(load_file(lora), lora, about)
        pipeline = pipeline_of(model("sd1"))
        settings = pipeline.scheduler.config
        pipeline.scheduler = diffusers.LCMScheduler.from_config(settings, original_inference_steps=number)
        for name, file in (("a", lora), ("b", style)):
            pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
        pipeline.set_adapters(["a", "b"], [1.0, 0.5])
        found = call(model("sd1"), *words, to=str(number))["samples/00000.png"]
        assert close(found, drawn_by(pipeline, [CAT], num_inference_steps=3, guidance_scale=1.0)[0])


def test_lcms_sampler_keeps_what_a_file_leaves_out():
    """diffusers would fill in LCM's own betas, which are others."""
    sparse = diffusers.DDIMScheduler.from_config({"_class_name": "DDIMScheduler", "clip_sample": True})
    found = lcm_scheduler(sparse, 20)
    assert torch.equal(found.alphas_cumprod, sparse.alphas_cumprod)
    assert not torch.equal(diffusers.LCMScheduler.from_config(sparse.config).alphas_cumprod, sparse.alphas_cumprod)
    assert (found.config.original_inference_steps, found.config.clip_sample) == (20, False)


def test_a_lora_whose_name_has_a_colon(tmp_path):
    (tmp_path / "style").mkdir()
    file = tmp_path / "style:2.safetensors"
    file.touch()
    assert parse_lora(str(file)) == (file, 1.0)
    assert parse_lora(f"{file}:0.5") == (file, 0.5)


def test_dropout_of_a_file_does_not_act(call, tmp_path):
    lora = lora_file(tmp_path, lora_dropout=0.9)
    one, two = (call(model("sd1"), "--prompt", CAT, "--steps", 1, "--lora", lora, to=name) for name in "ab")
    assert (one["samples/00000.png"] == two["samples/00000.png"]).all()
    pipeline = pipeline_of(model("sd1"))
    pipeline.load_lora_weights(lora.parent)
    pipeline.unet.eval()
    assert close(one["samples/00000.png"], drawn_by(pipeline, [CAT], num_inference_steps=1)[0])


# --- mistakes

WRONG = [
    (["BASE"], "is a pipeline; say what to draw with --prompt or --prompts"),
    (["nobody/nothing", "--prompt", "x"], "nobody/nothing: no DiffusionPipeline in safetensors format could be read; give a"),
    (["BASE", "--prompts", "none.txt"], "--prompts none.txt: there is no such file"),
    (["BASE", "--prompts", "EMPTY"], "holds no prompt; write one per line"),
    (["BASE", "--prompt", "x", "lora.rank=3"], "lora.rank=3: is an option of a run, and BASE is a pipeline"),
    (["BASE", "--prompt", "x", "--classes", "3"], "--classes 3: is an option of runs, and BASE is a pipeline"),
    (["BASE", "--prompt", "x", "--weights", "ema"], "--weights ema: is an option of runs"),
    (["BASE", "--prompt", "x", "--steps", "0"], "--steps 0: must be an integer of at least 1"),
    (["BASE", "--prompt", "x", "--sampler", "heun"], "--sampler heun: must be one of ddpm, ddim, dpmsolver++, euler"),
    (["BASE", "--prompt", "x", "--lora", "none.safetensors"], "no file none.safetensors; give a LoRA as .safetensors"),
    (["BASE", "--prompt", "x", "--lora-scales", "0,1"], "--lora-scales: there is no LoRA; give one with --lora"),
    (["RUN"], "has no validation_prompts; say what to draw with --prompt or --prompts"),
    (["RUN", "--lora-scales", "0,a"], "--lora-scales 0,a: must be different numbers, such as 0,0.5,1"),
    (["RUN", "--lora-scales", "1,1"], "--lora-scales 1,1: must be different numbers"),
    (["RUN", "--lora-scales", "0,nan"], "--lora-scales 0,nan: must be different numbers"),
    (["RUN", "--lora-scales", "0,1", "--gif"], "--gif: shows one scale; leave out --lora-scales"),
    (["BASE", "--prompt", "x", "--lora", "LORA:0", "--lora-scales", "0.5,1"], "weight 0, weight 0: the columns are alike"),
    (["BASE", "--prompt", "x", "--lora", "LORA", "--lora-scales", "1,1.0000001"], "weight 1, weight 1: the columns are"),
    (["BASE", "--prompt", "x", "--lora", "LORA:1e30"], "the pictures are not finite; the LoRAs' weights are too large"),
    (["BASE", "--prompt", "x", "--lora", "RENAMED"], "renamed.lora: the name of a LoRA must end in .safetensors"),
    (["BASE", "--prompt", "x", "--guidance", "1", "--guidance-rescale", "0.5"], "--guidance-rescale 0.5: has no effect with"),
    (["BASE", "--prompts", "LATIN"], "latin.txt: is not text in UTF-8"),
    (["BASE", "--prompt", "x", "--image", "IMAGE", "--mask", "BLACK"], "--mask: nothing in it is white, so nothing would"),
    (["RUN", "--clip-skip", "2"], "--clip-skip 2: the text encoder has 2 layers; give at most 1"),
    (["RUN", "--negative-prompt", "x", "--guidance", "1"], "--negative-prompt: has no effect with guidance 1; give"),
    (["RUN", "--classes", "3"], "--classes 3: task lora has no option valid_classes"),
    (["RUN", "--strength", "0.5"], "--strength 0.5: has an effect with --image and --mask only"),
    (["RUN", "--image", "IMAGE"], "--image and --mask: inpainting needs both"),
    (["RUN", "--image", "none.png", "--mask", "MASK"], "none.png: there is no such picture"),
    (["RUN", "--image", "EMPTY", "--mask", "MASK"], "cannot be read as a picture (cannot identify image file"),
    (["RUN", "--image", "IMAGE", "--mask", "OTHER"], "--mask: has 3 x 5 pixels, and --image 40 x 32; give one of the same"),
    (["RUN", "--image", "IMAGE", "--mask", "MASK", "--strength", "1.5"], "--strength 1.5: must be above 0 and at most 1"),
    (["RUN", "--image", "IMAGE", "--mask", "MASK", "--strength", "0.4"], "--strength 0.4: leaves none of 2 steps; raise"),
    (["RUN", "--image", "IMAGE", "--mask", "MASK", "--guidance-rescale", "0.5"], "inpainting has it for SDXL only; set 0"),
    (["DDPM", "--prompt", "x"], "--prompt: task ddpm draws no prompts"),
    (["DDPM", "--lora", "x"], "--lora: task ddpm draws no prompts"),
]  # fmt: skip


@pytest.fixture(scope="module")
def places(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    painted(folder)
    Image.new("L", (3, 5)).save(folder / "other.png")
    (folder / "empty").touch()
    (folder / "latin.txt").write_bytes("a café".encode("latin-1"))
    Image.new("L", (40, 32)).save(folder / "black.png")
    lora = lora_file(folder)
    shutil.copy(lora, folder / "renamed.lora")
    assert main(["configs/tests/ddpm.json", f"base.output_dir={folder / 'ddpm'}"]) == 0
    found = {"RUN": trained, "BASE": model("sd1"), "DDPM": folder / "ddpm", "EMPTY": folder / "empty"}
    found |= {
        "LORA": lora,
        "RENAMED": folder / "renamed.lora",
        "LATIN": folder / "latin.txt",
        "BLACK": folder / "black.png",
    }
    return found | {"IMAGE": folder / "image.png", "MASK": folder / "mask.png", "OTHER": folder / "other.png"}


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_mistakes(arguments, message, places, call, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as caught:
        call(*[re.sub("^LORA", str(places["LORA"]), str(places.get(word, word))) for word in arguments])
    assert str(caught.value).startswith("error: ")
    assert message.replace("BASE", str(places["BASE"])) in str(caught.value)


@pytest.mark.parametrize("arguments", [[], ["--again", "a.png", "run"], ["--again", "a.png", "--seed", "1"]])
def test_a_run_or_a_picture(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
    with pytest.raises(SystemExit):
        sample.main()
    assert "give a run or a pipeline, or --again FILE.png alone" in capsys.readouterr().err
