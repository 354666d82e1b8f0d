"""One process against several, which are forked here and launched as users do with --slow. Each has one thread."""

from __future__ import annotations

import shutil

import pytest
from marks import slow
from processes import launch
from repository import tiny
from run_folders import final_state, forget_after, losses, read_metrics

from trainers import TRAINERS

STEPS, HALF = 12, 6
COMMON = [
    "base.resolution=24", "base.random_flip=true", "base.max_train_samples=25", "base.validation_split=0.02",
    f"base.checkpointing_steps={HALF}", f"base.valid_steps={HALF}", "base.logger=tensorboard", f"base.max_train_steps={STEPS}",
]  # fmt: skip
TWO, ONE = ["base.train_batch_size=4"], ["base.train_batch_size=4", "base.gradient_accumulation_steps=2"]


def run(folder, *options, processes, task="ddpm"):
    schedule = [f"{task}.lr_scheduler=cosine", f"{task}.lr_warmup_steps=2"]
    arguments = [tiny(task), f"base.output_dir={folder}", *COMMON, *schedule, *options]
    done = launch(*arguments, processes=processes)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one") / "run", *ONE, processes=1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two") / "run", *TWO, processes=2)


def test_two_micro_batches_on_one_process_are_one_on_each_of_two(one, two):
    assert losses(one[0]) == losses(two[0])
    assert final_state(one[0], STEPS) == final_state(two[0], STEPS)
    rates = [[line["lr"] for line in read_metrics(folder, prefix="lr")] for folder, _ in (one, two)]
    assert rates[0] == rates[1]
    assert rates[0][:3] == [0, 5e-4, 1e-3]


def test_validation_is_shared_and_says_the_same(one, two):
    metrics = [read_metrics(folder, prefix="valid") for folder, _ in (one, two)]
    assert len(metrics[0]) == 2
    for single, shared in zip(*metrics, strict=True):
        for name in ("valid/seconds", "valid/peak_memory_gib"):
            assert single.pop(name) > 0 < shared.pop(name)
        assert single == pytest.approx(shared, rel=1e-6)
    pictures = [(folder / "samples" / f"samples-step-{STEPS:06}.png").read_bytes() for folder, _ in (one, two)]
    assert pictures[0] == pictures[1]


def test_only_the_main_process_writes_and_prints(one, two):
    names = [
        {p.name for p in folder.rglob("*") if p.is_file() and "tfevents" not in p.name} for folder, _ in (one, two)
    ]
    assert names[0] == names[1]
    assert len(list((two[0] / "logs").rglob("*tfevents*"))) == 1
    assert two[1].stdout.count("The pipeline is in") == 1
    assert "8 = 4 x 1 micro-batches x 2 processes" in two[1].stdout


@pytest.mark.parametrize(("source", "processes", "options"), [("one", 2, TWO), ("two", 2, TWO), ("two", 1, ONE)])
def test_resume_on_another_number_of_processes(source, processes, options, one, two, tmp_path):
    begun = tmp_path / "run"
    shutil.copytree({"one": one, "two": two}[source][0], begun)
    forget_after(begun, HALF)
    run(begun, *options, "base.resume_from_checkpoint=latest", processes=processes)
    assert losses(begun) == losses(one[0])
    assert final_state(begun, STEPS) == final_state(one[0], STEPS)


@pytest.mark.parametrize("splits", [[(4, 2), (1, 8)], slow([(2, 4)])])
def test_another_split_of_the_global_batch(splits, run_in_process, network_without_dropout):
    options = {"ddpm.model_config": network_without_dropout, "base.random_flip": True, "base.max_train_samples": 25}
    runs = [
        run_in_process(
            f"{size}x{steps}", **options, **{"base.train_batch_size": size, "base.gradient_accumulation_steps": steps}
        )
        for size, steps in [(8, 1), *splits]
    ]
    reference, *others = [[float.fromhex(value) for value in losses(folder).values()] for folder in runs]
    for other in others:
        assert other == pytest.approx(reference, rel=1e-5)


def test_a_mistake_in_the_configuration_is_printed_once():
    done = launch("configs/tests/ddpm.json", "base.seed=-1", "ddpm.rank=4", processes=2)
    assert done.returncode != 0
    assert done.stderr.count("problems in the configuration") == 1
    assert done.stderr.count("ddpm.rank = 4: unknown option") == 1
    assert 'File "' not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("task", TRAINERS)
def test_every_task_resumes_exactly_in_new_processes(task, processes, tmp_path):
    """In the middle of an epoch, with accumulation, data workers, crops, flips and dropout."""
    options = ["base.train_batch_size=2", "base.gradient_accumulation_steps=2", "base.dataloader_num_workers=2"]
    options += ["base.image_cache_mb=0"]
    whole, _ = run(tmp_path / "whole", *options, processes=processes, task=task)
    shutil.copytree(whole, tmp_path / "cut")
    forget_after(tmp_path / "cut", HALF)
    changed = ["base.resume_from_checkpoint=latest", "base.image_cache_mb=512", "base.valid_steps=7"]
    run(tmp_path / "cut", *options, *changed, processes=processes, task=task)
    assert losses(tmp_path / "cut") == losses(whole)
    assert final_state(tmp_path / "cut", STEPS) == final_state(whole, STEPS)
