"""`--dry-run`: what it prints against a real run, what it says where something does not fit, and what stays of it."""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from processes import launch
from run_folders import read_metrics

from train import main
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import find_trainer, load_config
from trainers.engine.dry_run import plan
from trainers.engine.dry_run import sandbox as dry_runs
from trainers.engine.dry_run.plan import DryRun, Plan
from trainers.engine.dry_run.report import duration
from trainers.engine.dry_run.suggestions import disk_suggestions, memory_suggestions, out_of_resources
from trainers.engine.run.clock import Clock
from trainers.engine.tracking import meters
from trainers.engine.tracking.meters import take_peak_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CADENCES = {
    "base.max_train_steps": 20,
    "base.checkpointing_steps": 6,
    "base.checkpoints_total_limit": 2,
    "base.valid_steps": 9,
    "base.validation_split": 0.02,
    "base.save_model_steps": 8,
}


@pytest.fixture
def dry_run(tiny_config, capsys):
    """run(name, task, **options) -> (exit code, what was printed, what went to the error stream)."""

    def run(name="run", task="ddpm", **values):
        path = tiny_config(task, name, **values)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        capsys.readouterr()
        code = main([str(path), "--dry-run"])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path):
    yield
    assert [path.name for path in tmp_path.rglob("*dry-run*")] == []


def number(pattern, text):
    return int(re.search(pattern, text)[1].replace(",", ""))


def bytes_in(folder):
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_the_report_against_a_real_run(dry_run, run_in_process):
    folder = run_in_process(**CADENCES)
    before = {name: (folder / name).stat().st_mtime_ns for name in bytes_in(folder)}
    code, printed, errors = dry_run(**CADENCES, **{"base.resume_from_checkpoint": "latest"})
    assert code == 0
    assert printed.endswith("\nIt fits.\n")
    assert "dry run: the run's last 7 steps, one validation, one save; nothing of it stays\n" in errors
    assert "The pipeline is in" not in printed  # of a folder that is gone
    assert {name: (folder / name).stat().st_mtime_ns for name in bytes_in(folder)} == before

    counts = {what: len(read_metrics(folder, prefix=f"{what}/seconds")) for what in ("save", "valid", "export")}
    assert counts == {"save": 4, "valid": 3, "export": 3}
    for what, phrase in {"save": "saves", "valid": "validations", "export": "exports"}.items():
        assert re.search(rf"^  {phrase} +{counts[what]} x \d+\.\d+ s = ", printed, re.MULTILINE)
    assert re.search(r"^  steps +20 x \d+\.\d{3} s = \d", printed, re.MULTILINE)
    assert re.search(
        r"^Speed: \d+\.\d examples/s \(5 steps of 4 examples, after 2 to warm up\)$", printed, re.MULTILINE
    )
    phases = re.findall(r"^  (\w+) +(\d+\.\d\d) GiB$", printed, re.MULTILINE)
    assert [name for name, _ in phases] == ["start", "steps", "save", "validation", "export"]
    assert all(0.1 < float(peak) < 100 for _, peak in phases)

    checkpoint = bytes_in(folder / "checkpoint-20")
    found = number(r"2 of 4 checkpoints x ([\d,]+) bytes", printed)
    assert found == pytest.approx(sum(checkpoint.values()), abs=500)  # state.json names the folder and the cadences
    pipeline = sum(
        size for name, size in bytes_in(folder).items() if name.startswith(("model_index", "unet/", "sched"))
    )
    assert number(r"pipeline +([\d,]+) bytes", printed) == pipeline
    assert number(r"needed at once +([\d,]+)", printed) == 3 * found + 2 * pipeline + 2**20


def test_the_parts_add_up_and_only_parts_of_loops_are_run(dry_run, monkeypatch):
    """Twenty sampler's steps: five are run for the raw and the averaged weights, with all the pictures."""
    trainer_class, drawn = find_trainer("ddpm"), []
    original = trainer_class.sample

    def sample(self, requests, rng):
        steps, progress = [], self.progress
        self.progress = lambda items: (steps.append(1) or item for item in progress(items))
        images = original(self, requests, rng)
        drawn.append((len(requests), len(steps)))
        return images

    monkeypatch.setattr(trainer_class, "sample", sample)
    options = {"ddpm.ddpm_num_inference_steps": 20, "base.validation_split": 0.5, "base.max_train_samples": None}
    code, printed, _ = dry_run(**options, **{"base.max_train_steps": 50})
    assert (code, drawn) == (0, [(4, 5)] * 2)
    total, *parts = re.findall(r"(?:^Time: |= |^  [a-z ]+ )((?:\d+ min )?\d+(?:\.\d)?) s", printed, re.MULTILINE)
    minutes, _, seconds = total.rpartition(" min ")
    assert sum(map(float, parts)) == pytest.approx(60 * int(minutes or 0) + int(seconds), abs=1)
    assert "898 held-out examples and a sampler's steps at the pace of the few" in printed
    assert "(1,797 pictures)" in printed


def test_validations_without_pictures(dry_run):
    code, printed, _ = dry_run(task="noisy_classifier", **{"base.validation_split": 0.5})
    assert code == 0
    assert "898 held-out examples at the pace of the few" in printed
    assert "sampler" not in printed


def test_a_run_that_is_shorter_than_a_dry_run(dry_run):
    code, printed, _ = dry_run(**{"base.max_train_steps": 3})
    assert code == 0
    assert re.search(r"^  steps +3 x ", printed, re.MULTILINE)
    assert "(1 step of 4 examples, after 2 to warm up)" in printed
    _, printed, _ = dry_run(**{"base.max_train_steps": 1})
    assert "(1 step of 4 examples, after 0 to warm up)" in printed


def test_the_real_cadences_are_counted():
    base = BaseConfig(max_train_steps=20, checkpointing_steps=6, valid_epochs=1, eval_steps=10, save_model_epochs=2)
    clock = Clock(10, 2, 1, 1, max_train_steps=20)
    assert Plan.of(clock, base) == Plan(clock, saves=4, validations=4, evaluations=2, exports=2)


def test_the_last_steps_are_run_on_examples_of_the_largest_bucket(dry_run, tmp_path, monkeypatch):
    from trainers.common.text_to_image.stable_diffusion import StableDiffusionTrainer

    shapes, steps, compute = [], [], StableDiffusionTrainer.compute_loss

    def watched(self, batch, rng, step):
        if self.training:
            shapes.append(tuple(batch["mean"].shape[-2:]))
            steps.append(step)
        return compute(self, batch, rng, step)

    monkeypatch.setattr(StableDiffusionTrainer, "compute_loss", watched)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index, size in enumerate([(30, 50)] * 9 + [(40, 40)] * 3 + [(50, 30)] * 9):
        Image.fromarray(np.full((*size, 3), index, dtype=np.uint8)).save(pictures / f"{index}.png")
    options = {"base.dataset": None, "base.train_data_dir": str(pictures), "base.buckets": True, "base.bucket_step": 8}
    code, printed, _ = dry_run(task="text_to_image", **options, **{"base.max_train_steps": 30})
    assert code == 0
    [(height, width)] = set(shapes)
    assert height == width
    assert steps == list(range(23, 30))
    assert "(of 32 x 32 pixels, the largest of 3 sizes)" in printed


def test_caches_count_for_what_the_run_will_have_to_encode(dry_run, run_in_process):
    options = {
        "base.center_crop": True,
        "lora.cache_latents": "disk",
        "lora.train_text_encoder": False,
        "lora.learning_rate": 1e-3,
        "lora.cache_text": "memory",
        "base.max_train_steps": 8,
    }
    _, printed, _ = dry_run(task="lora", **options)
    assert "(1.429 times the values encoded here)" in printed  # 40 pictures, of which 28 are enough for 7 steps
    cache = number(r"caches +([\d,]+) bytes", printed)
    folder = run_in_process(task="lora", **options)
    real = sum(bytes_in(folder.parent / "encoder-cache").values())
    assert cache == pytest.approx(real, rel=0.2)  # headers
    _, printed, _ = dry_run(task="lora", **options, **{"base.resume_from_checkpoint": "latest"})
    assert "cache of image" not in printed  # all is there now
    assert "cache of caption" in printed  # in memory: again in each run


def out_of_memory(phase):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError(f"CUDA out of memory in {phase}. Tried to allocate 20.00 MiB.\nmore lines")

    return fail


def test_out_of_memory_in_a_step(dry_run, monkeypatch):
    monkeypatch.setattr(find_trainer("ddpm"), "compute_loss", out_of_memory("a step"))
    monkeypatch.setattr("trainers.engine.dry_run.suggestions.has_bf16", lambda device: True)
    code, printed, errors = dry_run()
    assert code == 1
    assert "Traceback" not in errors
    assert printed.split("\n\n")[-1].splitlines() == [
        "It does not fit: too little memory of the device in phase steps: CUDA out of memory in a step. Tried to "
        "allocate 20.00 MiB.",
        "To change, what costs least first:",
        "  base.mixed_precision=bf16  activations of 2 bytes instead of 4, computed in hardware",
        "  base.gradient_checkpointing=true  activations are computed twice instead of kept; slower steps",
        "  base.train_batch_size=2 base.gradient_accumulation_steps=2  1/2 of the examples at once, the same global batch; "
        "slower steps",
    ]
    assert re.findall(r"^  (\w+) +\d+\.\d\d GiB$", printed, re.MULTILINE) == ["start"]


def test_out_of_memory_in_a_validation_asks_for_fewer_pictures_first(dry_run, monkeypatch):
    monkeypatch.setattr(find_trainer("ddpm"), "sample", out_of_memory("a validation"))
    code, printed, _ = dry_run()
    assert code == 1
    assert "in phase validation: CUDA out of memory in a validation." in printed
    assert "first:\n  ddpm.valid_batch_size=2  half the pictures" in printed


def test_without_an_option_that_helps(tiny_config):
    run = load_config(
        tiny_config(**{"base.train_batch_size": 1, "base.gradient_checkpointing": True, "base.mixed_precision": "bf16"})
    )
    assert memory_suggestions(run, "steps", CPU) == []


def test_all_remedies_in_the_order_of_their_cost(tiny_config, monkeypatch):
    monkeypatch.setattr("trainers.engine.dry_run.suggestions.has_bf16", lambda device: True)
    options = {"lora.train_text_encoder": False, "lora.learning_rate": 1e-3, "base.center_crop": True}

    def changes(**more):
        run = load_config(tiny_config("lora", **options | more))
        return [
            " ".join(f"{k}={v}" for k, v in each.changes.items()) for each in memory_suggestions(run, "steps", CUDA)
        ]

    everything = [
        "lora.cache_latents=disk",
        "lora.cache_text=disk",
        "base.mixed_precision=bf16",
        "base.gradient_checkpointing=true",
        "base.train_batch_size=2 base.gradient_accumulation_steps=2",
        "lora.offload_ema=true",
    ]
    assert changes() == everything
    assert changes(**{"base.center_crop": False})[0] == "lora.cache_text=disk"  # a crop at random cannot be kept
    assert changes(**{"lora.cache_latents": "memory", "lora.cache_text": "disk"}) == everything[2:]
    less = {"base.mixed_precision": "bf16", "base.gradient_checkpointing": True, "lora.use_ema": False}
    assert changes(**less) == [*everything[:2], everything[4]]
    assert changes(**{"base.global_batch_size": 8, "base.train_batch_size": 1})[4:] == ["lora.offload_ema=true"]
    third = changes(**{"base.global_batch_size": 9, "base.train_batch_size": 9})
    assert "base.train_batch_size=3" in third


def test_each_advice_is_one_that_the_configuration_takes(tiny_config):
    path = tiny_config(**{"base.train_batch_size": 6})
    for remedy in memory_suggestions(load_config(path), "validation", CUDA):
        changed = load_config(path, [f"{key}={value}" for key, value in remedy.changes.items()])
        assert changed.as_dict() != load_config(path).as_dict()


def test_a_host_without_memory(dry_run, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(find_trainer("ddpm"), "compute_loss", fail)
    code, printed, _ = dry_run()
    assert code == 1
    assert "It does not fit: too little main memory in phase steps: [enforce fail at" in printed
    assert out_of_resources(MemoryError()).text == "MemoryError"
    assert out_of_resources(OSError(12, "Cannot allocate memory")).of == "host"
    assert out_of_resources(RuntimeError("another")) is None
    assert out_of_resources(OSError("another")) is None


def test_other_errors_stay_what_they_are(dry_run, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("a bug")

    code, _, errors = dry_run(**{"ddpm.learning_rate": {"vae": 0.1}})
    assert code == 1
    assert "needs one rate for each of the networks unet" in errors
    monkeypatch.setattr(find_trainer("ddpm"), "compute_loss", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        dry_run()


@pytest.mark.parametrize(
    ("checkpoints", "limit", "advice"),
    [
        (7.5, None, None),
        (5.0, None, "  base.checkpoints_total_limit=3  2,0"),
        (2.7, 3, "  base.checkpoints_total_limit=1  2,0"),
        (1.2, None, "  base.checkpoints_total_limit=1  only the newest checkpoint is kept\n  base.output_dir=FOLDER"),
        (1.2, 1, "  base.output_dir=FOLDER  one on another disk"),
    ],
)
def test_disk_remedies(tiny_config, checkpoints, limit, advice):
    """Five saves of 1,000 bytes, beside 500 for all else."""
    run = load_config(tiny_config(**{"base.checkpoints_total_limit": limit}))
    kept = limit or 5
    at_once = min(5, kept + 1)
    free = int(checkpoints * 1000)
    disk = {"checkpoint": 1000, "kept": kept, "at_once": at_once, "needed": at_once * 1000 + 500, "free": free}
    if advice is None:
        assert disk["needed"] <= disk["free"]
    else:
        assert "\n".join(f"  {remedy}" for remedy in disk_suggestions(run, disk)).startswith(
            advice.replace("2,0", "2,000")
        )


def with_free_bytes(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_a_disk_that_holds_some_of_the_checkpoints(dry_run, monkeypatch):
    options = {"base.max_train_steps": 20, "base.checkpointing_steps": 4}
    _, printed, _ = dry_run(**options)
    checkpoint = number(r"5 of 5 checkpoints x ([\d,]+) bytes", printed)
    pipeline = number(r"pipeline +([\d,]+) bytes", printed)
    free = 3 * checkpoint + 2**20 + pipeline  # beside one checkpoint and the pipeline, which the dry run has written
    with_free_bytes(monkeypatch, free)
    code, printed, _ = dry_run(**options)
    assert code == 1
    assert "It does not fit: too little room on the disk: " in printed
    assert "To change, what costs least first:\n  base.checkpoints_total_limit=3  " in printed
    code, printed, _ = dry_run(**options, **{"base.checkpoints_total_limit": 3})
    assert (code, printed.splitlines()[-1]) == (0, "It fits.")


def test_a_disk_that_does_not_hold_one(dry_run, monkeypatch):
    with_free_bytes(monkeypatch, 10)
    code, printed, _ = dry_run(**{"base.checkpoints_total_limit": 1})
    assert code == 1
    assert "too little room on the disk: checkpoint-6 does not fit in" in printed
    assert printed.splitlines()[-1] == "  base.output_dir=FOLDER  one on another disk"


def test_an_interrupt_leaves_nothing(dry_run, monkeypatch, tmp_path):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    trainer_class, compute = find_trainer("ddpm"), find_trainer("ddpm").compute_loss

    def signalled(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return compute(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_class, "sample", interrupt)
        assert dry_run()[0] == 130
    assert list(tmp_path.iterdir()) == [tmp_path / "run.json"]
    monkeypatch.setattr(trainer_class, "compute_loss", signalled)
    code, printed, errors = dry_run()
    assert (code, printed) == (130, "")
    assert "the dry run was interrupted" in errors
    assert "resume_from_checkpoint" not in errors
    assert list(tmp_path.iterdir()) == [tmp_path / "run.json"]


def test_the_folder_of_a_killed_dry_run_goes_and_that_of_a_living_one_stays(dry_run, tmp_path, monkeypatch):
    left = tmp_path / ".run-dry-run"
    left.mkdir()
    (left / "metrics.jsonl").touch()
    assert dry_run()[0] == 0

    def in_use(folder):
        raise ValueError("in use")

    left.mkdir()
    monkeypatch.setattr(dry_runs, "lock_folder", in_use)  # a lock keeps out other processes only
    with pytest.raises(ValueError, match="in use"):
        dry_run()
    left.rmdir()  # fails where it is not there


def test_a_run_in_the_folder_is_not_touched_and_not_counted(dry_run, run_in_process):
    """After the quickstart its estimate is that of a new run, which says what the run itself would be told."""
    folder = run_in_process(**CADENCES)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}
    code, printed, errors = dry_run(**CADENCES, **{"base.resume_from_checkpoint": None})
    assert code == 0
    assert re.search(r"^  steps +20 x ", printed, re.MULTILINE)
    assert re.search(r"^Time: .*, from step 0$", printed, re.MULTILINE)
    assert f"NOTE: the run itself would be refused: base.output_dir = {folder}: holds a run" in errors
    assert "continue with base.resume_from_checkpoint=latest" in errors
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]} == before
    assert "would be refused" not in dry_run("another", **CADENCES)[2]


def test_what_the_run_would_refuse_is_refused(dry_run, tmp_path, monkeypatch):
    for name in ("a file", "a file/run"):
        (tmp_path / "a file").touch()
        code, printed, errors = dry_run("other", **{"base.output_dir": str(tmp_path / name)})
        assert (code, printed) == (1, "")
        assert f"{name}: cannot be written ({tmp_path / 'a file'} is not a folder); choose another folder" in errors
    with monkeypatch.context() as patch:
        patch.setattr("trainers.engine.run.run_folder.os.access", lambda *_: False)  # tests may be run by root
        code, printed, errors = dry_run("third")
        assert f"cannot be written ({tmp_path} may not be written); choose another folder" in errors


def test_what_an_error_names_is_gone(dry_run, tmp_path):
    code, _, errors = dry_run(**{"ddpm.learning_rate": 1e30, "base.max_skipped_steps": 1, "base.max_train_steps": 20})
    assert code == 1
    assert f"That was in the dry run: {tmp_path / '.run-dry-run'} is gone with it" in errors


def test_a_long_name(dry_run):
    assert dry_run("n" * 240)[0] == 0


def test_it_makes_no_folder_above(dry_run, tmp_path):
    assert dry_run(**{"base.output_dir": str(tmp_path / "a" / "b" / "run")})[0] == 0
    assert not (tmp_path / "a").exists()


def test_loops_are_cut_short_and_the_rest_is_added_up(monkeypatch):
    clock = iter(range(0, 1000))
    monkeypatch.setattr(plan, "_now", lambda: next(clock))
    short = DryRun(None, None)
    assert list(short.limited(range(20), "valid: sampling")) == [0, 1, 2, 3, 4]
    # looks at the clock after the first and the last one
    assert short.skipped == {"valid": pytest.approx(1 / 4 * 15)}
    assert short.samples
    assert list(short.limited(range(3), "eval: sampling")) == [0, 1, 2]
    assert short.skipped == {"valid": pytest.approx(1 / 4 * 15), "eval": 0}
    short.scale["valid: examples"] = 10
    assert list(short.limited((each for each in "abcdefg"), "valid: examples")) == list("abcdefg")
    assert short.skipped == {"valid": pytest.approx(1 / 4 * 15 + 9), "eval": 0}
    assert list(short.limited((each for each in "ab"), "valid: another")) == ["a", "b"]
    assert list(short.limited(range(0), "export: none")) == []
    assert short.skipped == {"valid": pytest.approx(1 / 4 * 15 + 9), "eval": 0, "export": 0}


def test_peak_memory_is_of_the_time_since_the_last_look():
    take_peak_memory(CPU)
    before = take_peak_memory(CPU)
    with mmap.mmap(-1, 2**28) as block:  # malloc might give memory that is there already
        for page in range(0, 2**28, mmap.PAGESIZE):
            block[page] = 1
    after, later = take_peak_memory(CPU), take_peak_memory(CPU)
    assert after == pytest.approx(before + 0.25, abs=0.1)
    assert later < after - 0.1


def test_peak_memory_where_it_cannot_be_forgotten(monkeypatch, tmp_path):
    monkeypatch.setattr(meters, "PROCESS", tmp_path)
    assert 0.05 < take_peak_memory(CPU) <= take_peak_memory(CPU)
    (tmp_path / "status").write_text("Name: x\n")
    assert take_peak_memory(CPU) > 0.05


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.6, "5 s"), (60, "1 min 0 s"), (3599.6, "1 h 0 min"), (9000, "2 h 30 min"), (95, "1 min 35 s")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.slow
def test_two_processes_print_once(tiny_config, tmp_path):
    path = tiny_config(**{"base.validation_split": 0.02, "base.max_train_steps": 12})
    done = launch(path, "--dry-run", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("It fits.") == done.stdout.count("Peak memory") == 1
    assert done.stderr.count("dry run: ") == 1
    assert "5 steps of 8 examples" in done.stdout
    assert {each.name for each in tmp_path.iterdir()} == {"config.json"}
    assert json.loads(path.read_text())["base"]["output_dir"] == str(tmp_path / "config")


def test_an_evaluation_is_scaled_by_its_pictures(dry_run):
    options = {"base.eval_steps": 3, "base.eval_features": "none", "base.eval_num_samples": 40}
    code, printed, _ = dry_run(task="conditional_ddpm", **options)
    assert code == 0
    assert re.search(
        r"^  evaluations +2 x .*\(5 times that of 8 pictures, so rather too much\)$", printed, re.MULTILINE
    )
    assert re.search(r"^  evaluation +\d+\.\d\d GiB$", printed, re.MULTILINE)


def test_a_task_that_draws_held_out_examples_and_measures_the_training_set(dry_run, monkeypatch):
    trainer_class, measured = find_trainer("vae"), []
    statistics = trainer_class.data_statistics

    def data_statistics(self, batch, rng):
        measured.extend(batch["slot"].tolist())
        return statistics(self, batch, rng)

    monkeypatch.setattr(trainer_class, "data_statistics", data_statistics)
    code, printed, _ = dry_run(task="vae", **{"base.validation_split": 0.5, "base.max_train_samples": 700})
    assert code == 0, printed
    assert len(measured) < 100  # of 700


def few_digits():
    from datasets_lib.sources.digits import build

    base = BaseConfig(dataset="digits", resolution=8, channels=1, max_train_samples=40, num_epochs=1, image_cache_mb=1)
    whole = build(base, "train")
    return whole, whole.only([3, 30])


def test_a_data_set_with_some_of_its_examples():
    from datasets_lib.sources.class_images import PriorDataset

    whole, few = few_digits()
    for index, place in enumerate([3, 30]):
        assert torch.equal(few.get(index, None)["image"], whole.get(place, None)["image"])
        assert few.get(index, None)["label"] == whole.get(place, None)["label"]
        assert few.image_keys(index) == whole.image_keys(place)
    assert (len(few), len(whole), few.image_count(), few.bucket_of(1)) == (2, 40, 2, 0)
    assert few.pictures.cache_bytes == 2**20 * 2 // 40  # decoded ahead where the whole would be
    few.prepare(show_progress=False)
    assert few.pictures.decoded is not None
    assert whole.pictures.decoded is None

    prior = PriorDataset(whole, few_digits()[0]).only([5, 6, 7])
    assert [prior.image_count(column) for column in prior.picture_columns] == [3, 3]
    assert torch.equal(prior.get(2, None)["image"], whole.get(7, None)["image"])
