"""Metrics in the loop, and the scripts that draw from a run and measure what they drew."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from features import Features
from PIL import Image
from processes import launch
from run_folders import read_metrics
from torch import nn

from scripts import evaluate, sample, sweep
from train import main
from trainers.engine.checkpoint.manifest import list_checkpoints
from trainers.engine.config.config import ConfigError, load_config
from trainers.inference.saved_run import load_trainer, open_run

TASK = "conditional_ddpm"
EVALUATION = {"base.eval_steps": 3, "base.eval_num_samples": 20, "base.validation_split": 0.02}
MEMORISATION = {"nearest_distance", "nearest_distance_held_out", "nearest_distance_held_out_5th_percentile", "copies"}
METRICS = {"class_accuracy", "worst_class_accuracy", "class_accuracy_held_out", "class_diversity", *MEMORISATION}
FEATURE_METRICS = {"fid", "kid", "precision", "recall"}


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "features.pt"
    torch.jit.script(Features()).save(path)
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = [f"base.output_dir={folder}", "base.validation_split=0.02", "base.checkpointing_steps=3"]
    assert main(["configs/tests/conditional_ddpm.json", *options]) == 0
    return folder


# --- in the loop


def evaluations(folder):
    measured = ("eval/seconds", "eval/peak_memory_gib")
    return [{k: v for k, v in line.items() if k not in measured} for line in read_metrics(folder, prefix="eval/")]


def test_metrics_in_the_loop(run_in_process, features):
    folder = run_in_process(task=TASK, **EVALUATION, **{"base.eval_features": features})
    lines = read_metrics(folder, prefix="eval/")
    assert [line["step"] for line in lines] == [3, 6]
    assert set(lines[0]) == {
        "step",
        "eval/seconds",
        "eval/peak_memory_gib",
        *(f"eval/{name}" for name in METRICS | FEATURE_METRICS),
    }
    assert lines[0]["eval/fid"] > 0
    plain = run_in_process("plain", task="ddpm", **EVALUATION, **{"base.eval_features": "none"})
    names = {"diversity", "seconds", "peak_memory_gib", *MEMORISATION}  # without classes
    assert set(read_metrics(plain, prefix="eval/")[0]) == {"step", *(f"eval/{name}" for name in names)}


def test_evaluating_changes_nothing(run_in_process, features):
    with_metrics = run_in_process("with", task=TASK, **EVALUATION, **{"base.eval_features": features})
    without = run_in_process("without", task=TASK, **{"base.validation_split": 0.02})
    found = [json.loads((folder / "checkpoint-6" / "manifest.json").read_text()) for folder in (with_metrics, without)]
    assert found[0]["optimizer.safetensors"] == found[1]["optimizer.safetensors"]


def test_metrics_of_two_processes_are_those_of_one(tmp_path, features):
    """Every process draws and describes its share; 25 pictures over 2 processes leave one over."""
    options = [
        "base.eval_steps=3",
        "base.eval_num_samples=25",
        f"base.eval_features={features}",
        "base.validation_split=0.02",
    ]
    found = []
    for processes, size in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        split = [f"base.output_dir={folder}", f"base.train_batch_size={size}", "base.max_train_steps=3"]
        done = launch(
            f"configs/tests/{TASK}.json",
            *options,
            *split,
            f"{TASK}.model_config={undropped(tmp_path)}",
            "--trust-code",
            processes=processes,
        )
        assert done.returncode == 0, done.stderr
        found.append(evaluations(folder)[0])
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def undropped(folder):
    """The tiny network without dropout, which is keyed by micro-batch."""
    settings = json.loads(Path("configs/tests/models/unet2d.json").read_text()) | {"dropout": 0.0}
    (folder / "network.json").write_text(json.dumps(settings))
    return folder / "network.json"


def test_an_evaluation_that_was_interrupted_is_made_up(tiny_config, monkeypatch):
    options = {**EVALUATION, "base.eval_features": "none", "base.checkpointing_steps": 3, "base.valid_steps": 3}
    assert main([str(tiny_config(TASK, "whole", **options))]) == 0

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainers.engine.validation.evaluation.Evaluation.metrics", interrupt)
        assert main([str(tiny_config(TASK, "cut", **options))]) == 130
    path = tiny_config(TASK, "cut", **options, **{"base.resume_from_checkpoint": "latest"})
    assert main([str(path)]) == 0
    folder = path.with_name("cut")
    assert evaluations(folder) == evaluations(folder.with_name("whole"))
    assert [line["step"] for line in read_metrics(folder, prefix="valid/")] == [3, 6]


RULES = [
    ({"base.eval_num_samples": 50}, "base.eval_num_samples = 50: has an effect with eval_steps only"),
    ({"base.eval_steps": 3, "base.eval_num_samples": 3}, "base.eval_num_samples = 3: must be an integer of at least 5"),
    ({"base.eval_steps": 3, "base.eval_features": "x.pt"}, 'base.eval_features = "x.pt": no such file; allowed:'),
    ({"base.eval_steps": 3, "base.eval_classifier": "x"}, 'base.eval_classifier = "x": must be a finished noisy_'),
]


@pytest.mark.parametrize(("options", "message"), RULES)
def test_rules(options, message, tiny_config):
    with pytest.raises(ConfigError) as caught:
        load_config(tiny_config(TASK, **options))
    assert message in str(caught.value)


# --- scripts/sample.py


def call(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    script.main()


def pictures(folder):
    found = sorted((folder / "samples").rglob("*.png"), key=lambda path: path.name)
    return {str(path.relative_to(folder / "samples")): Image.open(path).tobytes() for path in found}


def test_pictures_do_not_depend_on_the_batch_size(trained, tmp_path, monkeypatch):
    for size in (1, 4, 64):
        call(
            monkeypatch,
            sample,
            trained,
            "--number",
            7,
            "--classes",
            "3,5",
            "--batch-size",
            size,
            "--output-dir",
            tmp_path / str(size),
        )
    one, four, all_at_once = (pictures(tmp_path / size) for size in ("1", "4", "64"))
    assert list(one) == [f"{(3, 5)[n % 2]}/{n:05d}.png" for n in range(7)]
    for found in (four, all_at_once):  # the last bit of a sum may differ, which may move a pixel by one of 255
        for name, pixels in one.items():
            difference = (
                torch.frombuffer(bytearray(pixels), dtype=torch.uint8).int()
                - torch.frombuffer(bytearray(found[name]), dtype=torch.uint8).int()
            )
            assert difference.abs().max() <= 1
    call(
        monkeypatch, sample, trained, "--number", 7, "--classes", "3,5", "--seed", 1, "--output-dir", tmp_path / "other"
    )
    assert all(pixels != one[name] for name, pixels in pictures(tmp_path / "other").items())


def test_sampled_pictures_are_those_of_the_pipeline(trained, tmp_path, monkeypatch):
    """The seed's first pictures of class 3 with averaged weights, drawn by the finished pipeline."""
    from trainers.common.class_pipeline import ClassConditionalPipeline
    from trainers.engine.run.randomness import SlotRandom

    options = ["--classes", "3", "--steps", 5, "--sampler", "ddim", "--guidance", 2.5, "--number", 3, "--seed", 4]
    call(monkeypatch, sample, trained, *options, "--output-dir", tmp_path)
    generators = SlotRandom(4, torch.arange(3), "sample").generators()
    pipeline = ClassConditionalPipeline.from_pretrained(trained)
    drawn = pipeline(
        [3, 3, 3], guidance_scale=2.5, num_inference_steps=5, sampler="ddim", generator=generators, output_type="pt"
    ).images
    found = torch.stack(
        [torch.frombuffer(bytearray(p), dtype=torch.uint8).reshape(1, 16, 16) for p in pictures(tmp_path).values()]
    )
    assert (found / 255 - drawn).abs().max() <= 1.01 / 255
    settings = json.loads((tmp_path / "samples.json").read_text())
    assert (settings["seed"], settings[TASK]["guidance_scale"], settings[TASK]["sampler"]) == (4, 2.5, "ddim")


def test_raw_and_averaged_weights_of_any_checkpoint(trained):
    first, last = trained / "checkpoint-3", trained / "checkpoint-6"
    found = {
        (path.name, weights): load_trainer(open_run(path), weights=weights).modules["unet"].conv_in.weight.clone()
        for path in (trained, first, last)
        for weights in ("raw", "ema", None)
    }
    assert torch.equal(found["run", "raw"], found["checkpoint-6", "raw"])
    assert torch.equal(found["run", None], found["checkpoint-6", "ema"])
    different = [
        found[key] for key in (("checkpoint-3", "raw"), ("checkpoint-3", "ema"), ("run", "raw"), ("run", "ema"))
    ]
    assert all(not torch.equal(a, b) for n, a in enumerate(different) for b in different[n + 1 :])


def test_a_pipeline_without_checkpoints(trained, tmp_path, monkeypatch):
    """What a hub would hold: names of classes and weights come from the pipeline."""
    alone = tmp_path / "alone"
    shutil.copytree(trained, alone, ignore=shutil.ignore_patterns("checkpoint-*"))
    call(monkeypatch, sample, alone, "--number", 4, "--classes", "3", "--output-dir", tmp_path / "alone-pictures")
    call(monkeypatch, sample, trained, "--number", 4, "--classes", "3", "--output-dir", tmp_path / "pictures")
    assert pictures(tmp_path / "alone-pictures") == pictures(tmp_path / "pictures")
    with pytest.raises(ValueError, match="has no checkpoints, and its pipeline holds the ema weights only"):
        load_trainer(open_run(alone), weights="raw")


def test_the_denoising_is_animated(trained, tmp_path, monkeypatch):
    call(
        monkeypatch,
        sample,
        trained,
        "--number",
        4,
        "--classes",
        "1,2",
        "--steps",
        4,
        "--batch-size",
        3,
        "--gif",
        "--output-dir",
        tmp_path,
    )
    with Image.open(tmp_path / "denoising.gif") as animation, Image.open(tmp_path / "samples.png") as grid:
        assert (animation.n_frames, animation.size) == (4, grid.size)
        animation.seek(3)
        last, expected = animation.convert("L"), grid.convert("L")
    difference = (
        torch.frombuffer(bytearray(last.tobytes()), dtype=torch.uint8).int()
        - torch.frombuffer(bytearray(expected.tobytes()), dtype=torch.uint8).int()
    )
    assert difference.abs().max() <= 2  # a palette has 256 colours


def test_every_task_that_draws_can_be_sampled(run_in_process, tmp_path, monkeypatch):
    folder = run_in_process(task="ddpm")
    call(monkeypatch, sample, folder, "--number", 3, "--steps", 2)
    assert len(pictures(folder / "samples" / "seed-0")) == 3


def test_files_of_others_are_left_alone(trained, tmp_path, monkeypatch):
    """Pictures of an earlier call are replaced as a whole; a folder with anything else is refused."""
    call(monkeypatch, sample, trained, "--number", 7, "--output-dir", tmp_path / "out")
    call(monkeypatch, sample, trained, "--number", 2, "--classes", "3", "--output-dir", tmp_path / "out")
    assert list(pictures(tmp_path / "out")) == ["3/00000.png", "3/00001.png"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"--output-dir .*other: holds other files; choose a new folder"):
        call(monkeypatch, sample, trained, "--number", 2, "--output-dir", tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").exists()


def test_what_was_sampled_can_be_evaluated(trained, tmp_path, monkeypatch):
    call(monkeypatch, sample, trained, "--number", 20, "--gif", "--steps", 2, "--output-dir", tmp_path / "out")
    folder = tmp_path / "out" / "samples"
    call(monkeypatch, evaluate, folder, "--real", folder, "--features", "none", "--output-dir", tmp_path / "found")
    found = json.loads((tmp_path / "found" / "metrics.json").read_text())
    assert (found["pictures"], found["class_accuracy"], len(found["accuracy_by_class"])) == (20, 1.0, 10)


def test_a_run_can_be_sampled_on_another_machine(run_in_process, tmp_path, monkeypatch):
    """The files that its config names are gone: the network's shape is in the checkpoint and in the pipeline."""
    shutil.copy("configs/tests/models/unet2d.json", tmp_path / "network.json")
    folder = run_in_process(task=TASK, **{f"{TASK}.model_config": str(tmp_path / "network.json")})
    (tmp_path / "network.json").unlink()
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, sample, folder, "--number", 2, "--classes", "3", "--output-dir", tmp_path / "a")
    shutil.rmtree(folder / "checkpoint-6")
    call(monkeypatch, sample, folder, "--number", 2, "--classes", "3", "--output-dir", tmp_path / "b")
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")


def test_flags_and_overrides_are_checked_together(trained, run_in_process, tmp_path, monkeypatch):
    classifier = run_in_process("classifier", task="noisy_classifier")
    options = [
        f"{TASK}.classifier_scale=4",
        "--classifier",
        classifier,
        "--number",
        2,
        "--output-dir",
        tmp_path / "out",
    ]
    call(monkeypatch, sample, trained, *options)
    assert json.loads((tmp_path / "out/samples.json").read_text())[TASK]["classifier_scale"] == 4


def test_no_steps_to_animate(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "trainers.conditional_ddpm.ConditionalDDPMTrainer.draw", lambda self, predict, rng: torch.zeros(10, 1, 16, 16)
    )
    with pytest.raises(SystemExit, match="--gif: this task's sampler shows no steps"):
        call(monkeypatch, sample, trained, "--number", 10, "--gif", "--output-dir", tmp_path / "out")


@pytest.mark.parametrize("number", ["0", "-1"])
def test_numbers_below_one(number, trained, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, sample, trained, "--batch-size", number)
    assert f"argument --batch-size: {number}: must be at least 1" in capsys.readouterr().err


WRONG = [
    (["RUN", "--device", "gpu"], "device = gpu: cannot be used ("),
    (["nowhere"], "nowhere: is no checkpoint, and holds no run"),
    (["RUN", "--classes", "eleven"], "conditional_ddpm.valid_classes: 'eleven' is no class; allowed: 0 to 9, or 0, 1"),
    (["RUN", "--steps", "30"], "conditional_ddpm.ddpm_num_inference_steps = 30: must be at most ddpm_num_steps = 20"),
    (["RUN", "--sampler", "heun"], "must be one of ddpm, ddim, dpmsolver++"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_mistakes_on_the_command_line(arguments, message, trained, monkeypatch):
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, sample, *[trained if a == "RUN" else a for a in arguments])
    assert str(caught.value).startswith("error: ")
    assert message in str(caught.value)


def test_what_a_task_does_not_have(run_in_process, monkeypatch):
    folder = run_in_process(task="ddpm", **{"ddpm.use_ema": False})
    for arguments, message in (
        (["--guidance", "2"], "--guidance 2: task ddpm has no option guidance_scale"),
        (["--weights", "ema"], "has no averaged weights, its run had use_ema: false; ask for raw"),
    ):
        with pytest.raises(SystemExit, match="error: .*" + message):
            call(monkeypatch, sample, folder, *arguments)
    classifier = run_in_process("classifier", task="noisy_classifier")
    with pytest.raises(SystemExit, match="task noisy_classifier draws no pictures"):
        call(monkeypatch, sample, classifier)


def test_a_damaged_checkpoint_is_not_loaded(trained, tmp_path):
    shutil.copytree(trained / "checkpoint-6", tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "unet" / "config.json").write_text("{}")
    assert list_checkpoints(tmp_path)
    with pytest.raises(ValueError, match="is missing or not what was written"):
        open_run(tmp_path)


# --- scripts/sweep.py


def test_a_sweep(trained, tmp_path, monkeypatch, capsys):
    options = ["--number", 20, "--steps", 2, "--output", tmp_path / "table"]
    call(monkeypatch, sweep, trained, "--vary", "guidance=1,2", *options)
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [(row["value"], row["weights"]) for row in rows] == [("1", "ema"), ("1", "raw"), ("2", "ema"), ("2", "raw")]
    table = (tmp_path / "table.md").read_text()
    assert table.splitlines()[2].startswith(f"| 1 | ema | {rows[0]['class_accuracy']:.3f} |")
    assert capsys.readouterr().out == table
    assert Image.open(tmp_path / "table.png").size[0] > 500
    call(monkeypatch, sweep, trained, "--vary", "checkpoint", "--weights", "raw", *options)
    assert [row["value"] for row in json.loads((tmp_path / "table.json").read_text())] == ["3", "6"]


def test_mistakes_of_a_sweep(trained, run_in_process, tmp_path, monkeypatch):
    plain = run_in_process("plain", task="ddpm")
    for path, vary, message in (
        (trained, "seed=1", "--vary seed=1: must be guidance=, classifier_scale= or steps="),
        (trained, "guidance=", "--vary guidance=: must be"),
        (trained / "checkpoint-3", "checkpoint", "or checkpoint for a run with checkpoints"),
        (trained, "steps=2,30", "ddpm_num_inference_steps = 30: must be at most"),
        (plain, "steps=2", "has no classes; only pictures drawn by class can be recognised"),
    ):
        with pytest.raises(SystemExit, match="error: ") as caught:
            call(monkeypatch, sweep, path, "--vary", vary, "--output", tmp_path / "table")
        assert message in str(caught.value)
    assert not (tmp_path / "table.json").exists()


# --- scripts/evaluate.py


def test_a_run_is_evaluated(trained, tmp_path, features, monkeypatch, capsys):
    call(
        monkeypatch, evaluate, trained, "--number", 30, "--features", features, "--trust-code", "--output-dir", tmp_path
    )
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert set(found) == METRICS | FEATURE_METRICS | {"pictures", "real_pictures", "accuracy_by_class"}
    assert (found["pictures"], list(found["accuracy_by_class"])) == (30, [str(digit) for digit in range(10)])
    assert Image.open(tmp_path / "nearest.png").size[1] == 2 * (64 + 4) + 8  # drawn above, training below


class AlwaysThree(nn.Module):
    """A classifier of pictures in [-1, 1] with one channel that sees a 3 in each of them."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[1] == 1
        assert images.min() >= -1
        return nn.functional.one_hot(torch.full((len(images),), 3), 10).float()


def test_a_classifier_of_ones_own(trained, run_in_process, tmp_path, monkeypatch):
    torch.jit.script(AlwaysThree()).save(tmp_path / "three.pt")
    options = ["--number", 20, "--features", "none", "--output-dir", tmp_path]
    call(monkeypatch, evaluate, trained, *options, "--judge", tmp_path / "three.pt", "--trust-code")
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert (found["class_accuracy"], found["accuracy_by_class"]["3"]) == (0.1, 1.0)
    assert found["class_accuracy_held_out"] == pytest.approx(0.1, abs=0.05)
    loop = {**EVALUATION, "base.eval_features": "none", "base.eval_classifier": str(tmp_path / "three.pt")}
    folder = run_in_process(task=TASK, **loop)
    assert [line["eval/class_accuracy"] for line in evaluations(folder)] == [0.1, 0.1]
    classifier = run_in_process("classifier", task="noisy_classifier")
    call(monkeypatch, evaluate, trained, *options, "--judge", classifier)
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert again["accuracy_by_class"] != found["accuracy_by_class"]


def test_folders_are_evaluated(tmp_path, features, monkeypatch):
    """Folders with the same pictures: nothing is between them, and every picture is a copy."""
    generator = torch.Generator().manual_seed(0)
    for folder in ("drawn", "real", "held_out"):
        for number in range(24):
            path = tmp_path / folder / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (torch.rand(20, 24, 3, generator=generator) * 60 + 150 * (number % 2)).byte()
            Image.fromarray(pixels.numpy()).save(path)
    arguments = [
        "--features",
        features,
        "--trust-code",
        "--held-out",
        tmp_path / "held_out",
        "--output-dir",
        tmp_path / "out",
    ]
    call(monkeypatch, evaluate, tmp_path / "drawn", "--real", tmp_path / "drawn", *arguments)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["fid"] == pytest.approx(0, abs=1e-4)
    assert (found["precision"], found["recall"], found["copies"], found["class_accuracy"]) == (1, 1, 1, 1)
    call(monkeypatch, evaluate, tmp_path / "drawn", "--real", tmp_path / "real", *arguments)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["nearest_distance"] > 0
    assert (found["class_accuracy"], found["accuracy_by_class"]) == (1.0, {"a": 1.0, "b": 1.0})
    (tmp_path / "held_out" / "b").rename(tmp_path / "held_out" / "c")
    with pytest.raises(SystemExit, match="held_out and .*: have other classes; name their sub-folders alike"):
        call(monkeypatch, evaluate, tmp_path / "drawn", "--real", tmp_path / "real", *arguments)
    (tmp_path / "real" / "b").rename(tmp_path / "real" / "c")
    with pytest.raises(SystemExit, match="drawn and .*: have other classes; name their sub-folders alike"):
        call(monkeypatch, evaluate, tmp_path / "drawn", "--real", tmp_path / "real", *arguments)


def test_mistakes_of_an_evaluation(trained, monkeypatch, tmp_path):
    for arguments, message in (
        ([trained, "--features", "x.pt"], "--features x.pt: no such file; allowed: inception"),
        ([trained, "--judge", "x"], "--judge x: must be a finished noisy_classifier run"),
        ([trained / "unet", "--features", "none"], "is no checkpoint, and holds no run"),
        ([tmp_path, "--real", tmp_path, "--features", "none"], "there are no images in"),
        ([trained, "--held-out", tmp_path, "--features", "none"], "--held-out: has an effect with --real only"),
        (
            [tmp_path, "--real", tmp_path, "--features", "none", "--guidance", 7],
            "--guidance: has no effect with --real",
        ),
        ([trained, "--device", "gpu", "--features", "none"], "device = gpu: cannot be used ("),
    ):
        with pytest.raises(SystemExit, match="error: ") as caught:
            call(monkeypatch, evaluate, *arguments)
        assert message in str(caught.value)
