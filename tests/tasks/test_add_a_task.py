"""docs/add_a_task.md: its super-resolution runs as it stands on the page, and what it says of pretrained weights holds."""

from __future__ import annotations

import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from repository import ROOT
from run_folders import losses, read_metrics

from scripts import evaluate, sample
from train import main
from trainers import TRAINERS
from trainers.base import RunInfo, Trainer
from trainers.common.model_files import Grid
from trainers.common.unet2d import build_unet2d
from trainers.conditional_ddpm import ConditionalDDPMTrainer
from trainers.engine.config.config import ConfigError, load_config
from trainers.engine.encoders.stages import FrozenEncoders
from trainers.engine.validation.means import mean_over
from trainers.engine.validation.sampling import evaluation_requests, with_examples

PAGE = (ROOT / "docs/add_a_task.md").read_text()
LONGEST = 120  # lines of the example
STEPS, HELD_OUT = 6, 18  # a hundredth of the digits


def block(language, content):
    """The one code block of the page that has this content."""
    [found] = [text for text in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if content in text]
    return found


def call(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    script.main()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the page's two files, on the path of imports."""
    folder = tmp_path_factory.mktemp("super_resolution")
    (folder / "super_resolution.py").write_text(block("python", "class SuperResolutionTrainer"))
    (folder / "super_resolution.yaml").write_text(block("yaml", "super_resolution:SuperResolutionTrainer"))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("super_resolution", None)


def options_of(run, **changed):
    options = {
        "base.output_dir": run, "base.max_train_steps": STEPS, "base.valid_steps": 3, "base.validation_split": 0.01,
        "base.max_train_samples": 40, "base.train_batch_size": 4, "base.checkpointing_steps": 3, "base.logger": "none",
        "base.logging_steps": 1, "super_resolution.model_config": "configs/tests/models/unet2d.json",
        "super_resolution.ddpm_num_inference_steps": 2, "super_resolution.valid_batch_size": 5,
    }  # fmt: skip
    return [f"{option}={'null' if value is None else value}" for option, value in (options | changed).items()]


@pytest.fixture(scope="module")
def trained(place):
    """A short run of the page's config with the tiny network."""
    assert main([str(place / "super_resolution.yaml"), *options_of(place / "run")]) == 0
    return place / "run"


def test_the_example_is_short_and_its_config_is_accepted(place):
    assert len((place / "super_resolution.py").read_text().splitlines()) <= LONGEST
    run = load_config(place / "super_resolution.yaml")
    assert run.trainer_class.__name__ == "SuperResolutionTrainer"
    assert "super_resolution" not in TRAINERS
    with pytest.raises(ConfigError, match=r"super_resolution.factor = 3: must divide base.resolution = 16"):
        load_config(place / "super_resolution.yaml", ["super_resolution.factor=3"])


def test_a_config_is_checked_without_diffusers():
    at_top = re.findall(r"^(?:from|import) (\w+)", block("python", "class SuperResolutionTrainer"), re.MULTILINE)
    assert set(at_top) & {"diffusers", "transformers", "peft"} == set()


def test_validations_show_triptychs_and_a_psnr(trained):
    lines = read_metrics(trained, prefix="valid/")
    assert [line["step"] for line in lines] == [3, STEPS]
    for weights in ("valid", "valid_ema"):
        assert 3 < lines[-1][f"{weights}/psnr"] < 40
        assert lines[-1][f"{weights}/psnr_enlarged"] == lines[0]["valid/psnr_enlarged"]  # of the low pictures alone
    pictures = sorted((trained / "samples").iterdir())
    assert [path.name for path in pictures] == [f"triptychs-step-{step:06d}.png" for step in (3, STEPS)]
    zoom, columns, rows = 4, 3, 2  # five pictures of 16 x 48, raw weights' beside averaged ones'
    grid = columns * (3 * 16 * zoom + 2) + 2, rows * (16 * zoom + 2) + 2
    assert Image.open(pictures[0]).size == (2 * grid[0] + 8, grid[1])


def test_it_resumes_exactly(trained, place):
    arguments = [str(place / "super_resolution.yaml"), *options_of(place / "cut")]
    assert main(arguments) == 0
    shutil.rmtree(place / "cut" / f"checkpoint-{STEPS}")
    assert main([*arguments, "base.resume_from_checkpoint=latest"]) == 0
    assert losses(place / "cut") == losses(trained)
    resumed, whole = (
        json.loads((run / f"checkpoint-{STEPS}/manifest.json").read_text()) for run in (place / "cut", trained)
    )
    assert resumed["optimizer.safetensors"] == whole["optimizer.safetensors"]


def test_the_printed_lines_load_and_enlarge(trained, monkeypatch):
    monkeypatch.chdir(trained.parent)  # a card holds the folder's name, and no path of this machine
    usage = re.search(r"```python\n(.*?)```", (trained / "README.md").read_text(), re.DOTALL)[1]
    names = {"low": torch.rand(2, 1, 4, 4)}
    exec(usage, names)
    assert names["pictures"].shape == (2, 1, 16, 16)
    assert 0 <= names["pictures"].min() <= names["pictures"].max() <= 1
    assert names["enlarge"].unet.config.in_channels == 2


def test_scripts_draw_and_measure_it(trained, tmp_path, monkeypatch):
    """From the finished run alone: the held-out pictures, and the PSNR of all of them, with that of the low ones."""
    alone = tmp_path / "alone"
    shutil.copytree(trained, alone, ignore=shutil.ignore_patterns("checkpoint-*"))
    call(monkeypatch, sample, alone, "--number", 2, "--output-dir", tmp_path / "drawn", "--trust-code")
    assert Image.open(tmp_path / "drawn/triptychs/00001.png").size == (48, 16)
    options = ["--features", "none", "--output-dir", tmp_path, "--trust-code"]
    call(monkeypatch, evaluate, alone, *options, "--batch-size", 7)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert set(found) == {"pictures", "psnr", "psnr_enlarged"}
    assert found["pictures"] == HELD_OUT
    assert found["psnr_enlarged"] == pytest.approx(read_metrics(trained, prefix="valid/")[0]["valid/psnr_enlarged"])
    call(monkeypatch, evaluate, alone, *options, "--batch-size", HELD_OUT)
    assert json.loads((tmp_path / "metrics.json").read_text())["psnr"] == pytest.approx(found["psnr"], rel=1e-4)


def test_an_evaluation_draws_the_picture_alone(place):
    from super_resolution import SuperResolutionConfig, SuperResolutionTrainer

    trainer = SuperResolutionTrainer(SuperResolutionConfig(), load_config(place / "super_resolution.yaml").base)
    trainer.run = RunInfo(device=torch.device("cpu"), weight_dtype=torch.float32)
    trainer.modules = {"unet": None}
    trainer.draw = lambda predict, rng: torch.zeros(2, 1, 16, 16)
    requests = [{"image": torch.ones(1, 16, 16)}] * 2
    assert trainer.sample(requests, None)["triptychs"].shape == (2, 1, 16, 48)
    asked = [request | {"evaluation": True} for request in requests]
    drawn = trainer.sample(asked, None)
    assert {name: images.shape for name, images in drawn.items()} == {"samples": (2, 1, 16, 16)}
    assert trainer.sample_metrics(asked, drawn) == {"psnr": pytest.approx(0)}  # black for white
    [evaluated] = evaluation_requests(trainer, 1, [{}, {}])
    assert evaluated == {"example": 0, "evaluation": True}


# --- requests for held-out examples


class Rows:
    """A validation set whose examples know their number."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def get(self, index, generator):
        assert generator is None
        return {"image": torch.full((1, 2, 2), float(index)), "size": index, "seed": 0}


def test_held_out_requests_are_evenly_spread():
    numbers = lambda total, count: [r["example"] for r in Trainer.held_out_requests(Rows(total), count)]  # noqa: E731
    assert numbers(10, 4) == [0, 2, 5, 7]
    assert numbers(3, 3) == numbers(3, 8) == [0, 1, 2]
    assert numbers(0, 4) == Trainer.held_out_requests(None, 4) == []


def test_requests_get_the_columns_of_their_examples_and_stack_them():
    requests = [{"example": 3, "seed": 7}, {"label": 1}]
    asked = with_examples(requests, Rows(5))
    assert asked[0].keys() == {"example", "seed", "image", "size"}
    assert (asked[0]["example"], asked[0]["seed"], asked[0]["size"]) == (3, 7, 3)  # what was asked for stands
    assert asked[1] == {"label": 1}
    assert with_examples(requests, None) is requests
    trainer = SimpleNamespace(device=torch.device("cpu"))
    several = with_examples([{"example": 2}, {"example": 4}], Rows(5))
    assert Trainer.stacked(trainer, several, "size").tolist() == [2, 4]
    assert Trainer.stacked(trainer, several, "image")[:, 0, 0, 0].tolist() == [2.0, 4.0]


# --- pretrained weights whose input channels the task decides


def unet_with(folder, in_channels):
    settings = json.loads((ROOT / "configs/tests/models/unet2d.json").read_text()) | {"in_channels": in_channels}
    UNet2DModel.from_config(settings).save_pretrained(folder / str(in_channels))
    return str(folder / str(in_channels))


def test_pretrained_weights_have_the_channels_that_the_task_decides(tmp_path):
    grid, decided = Grid(1, 16), {"in_channels": 2}
    fitting, other = unet_with(tmp_path, 2), unet_with(tmp_path, 1)
    unet = build_unet2d(None, fitting, grid, decided)
    expected = UNet2DModel.from_pretrained(fitting)
    assert torch.equal(unet.conv_in.weight, expected.conv_in.weight)
    assert unet.config.in_channels == 2
    with pytest.raises(ValueError, match=r"1: has in_channels = 1, and this run needs 2"):
        build_unet2d(None, other, grid, decided)
    with pytest.raises(ValueError, match=r"2: has in_channels = 2, base.channels is 1; make them equal"):
        build_unet2d(None, fitting, grid)  # a task that decides nothing
    with pytest.raises(ValueError, match=r"2: has out_channels = 1, base.channels is 2; make them equal"):
        build_unet2d(None, fitting, Grid(2, 16), decided)


def test_the_example_starts_from_such_weights(place, tmp_path, capsys):
    options = {"super_resolution.model_config": None, "base.max_train_steps": 1, "base.valid_steps": None}
    arguments = [str(place / "super_resolution.yaml"), *options_of(tmp_path / "run", **options)]
    assert main([*arguments, f"super_resolution.pretrained_model_name_or_path={unet_with(tmp_path, 2)}"]) == 0
    arguments[1] = f"base.output_dir={tmp_path / 'other'}"
    assert main([*arguments, f"super_resolution.pretrained_model_name_or_path={unet_with(tmp_path, 1)}"]) == 1
    assert "has in_channels = 1, and this run needs 2" in capsys.readouterr().err


# --- metrics


def test_what_a_task_says_of_its_pictures_is_measured_over_all_of_them(run_in_process, tmp_path, monkeypatch):
    """25 digits in batches of 10, 10 and 5: a mean of the batches' means would be 3.67. JSON has no infinity."""
    folder = run_in_process(task="conditional_ddpm", **{"base.max_train_steps": 1})

    def sample_metrics(self, requests, images):
        assert len(requests) == len(images["samples"]) in (5, 10)
        assert all(request["evaluation"] for request in requests)
        labels = [float(request["label"]) for request in requests]
        return {"asked": sum(labels) / len(labels), "endless": float("inf")}

    monkeypatch.setattr(ConditionalDDPMTrainer, "sample_metrics", sample_metrics)
    options = ["--number", 25, "--batch-size", 10, "--features", "none", "--output-dir", tmp_path]
    call(monkeypatch, evaluate, folder, *options)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert (found["pictures"], found["asked"], found["endless"]) == (25, 4.0, None)
    assert "class_diversity" in found


def test_a_metric_that_is_a_vector_must_name_its_numbers():
    batch, encoders = {"slot": torch.arange(3)}, FrozenEncoders({}, torch.device("cpu"))

    def means(**metrics):
        return mean_over(encoders, [(batch, 1.0)], 0, lambda batch, rng: metrics)

    assert means(**{"psnr/red": torch.tensor([1.0, 2.0, 6.0])}) == {"psnr/red": 3.0}
    message = r"the metric psnr has the shape \[{}\]; it must be \[3\], a number for each example: name the numbers of"
    for shape in ("3, 2", "1", "2", "3, 1", ""):
        values = torch.zeros([int(number) for number in shape.split(", ") if number])
        with pytest.raises(ValueError, match=message.format(shape) + r" a vector one by one, such as psnr/0"):
            means(psnr=values)
