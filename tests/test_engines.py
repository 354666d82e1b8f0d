"""FSDP2 on two CPU processes against one process and DDP: every promise of a run, by checkpoints that all engines share.

accelerate runs FSDP on GPUs alone; tests/faulty.py makes it run here. Every process has one thread.
"""

from __future__ import annotations

import math
import os
import shutil
import signal

import pytest
import torch
from conftest import logged_steps, read_metrics, start, tiny, wait_for
from safetensors.torch import load_file
from test_resume import final_state, forget_after

from trainers import TRAINERS
from trainers.engine.manifest import list_checkpoints, verify

STEPS = 12
COMMON = [
    "base.resolution=24", "base.random_flip=true", "base.max_train_samples=25", "base.validation_split=0.1",
    "base.checkpointing_steps=6", "base.valid_steps=6", f"base.max_train_steps={STEPS}", "base.train_batch_size=4",
]  # fmt: skip
ONE = ["base.gradient_accumulation_steps=2"]  # as many examples as on two processes
ENGINES = {"one process": (1, {}), "DDP": (2, {}), "FSDP2": (2, {"fsdp": {}})}
LATEST = "base.resume_from_checkpoint=latest"


def run(folder, engine, *options, task="ddpm", code=0, **faults):
    """The run's folder and what it printed."""
    processes, own = ENGINES[engine]
    arguments = [tiny(task), f"base.output_dir={folder}", *COMMON, *(ONE if processes == 1 else []), *options]
    process = start(*arguments, processes=processes, faults=own | faults, out=folder.with_suffix(".log"))
    found, text = process.wait(300), folder.with_suffix(".log").read_text()
    assert found == code, text
    return folder, text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of each engine without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return {engine: run(folder / engine.replace(" ", "-"), engine) for engine in ENGINES}


def numbers(folder, prefix=""):
    """Everything that a run logged and that does not depend on the clock."""
    lines = read_metrics(folder)
    timed = ("seconds", "per_second", "memory_gib")
    return {
        (line["step"], key): value
        for line in lines
        for key, value in line.items()
        if key.startswith(prefix) and not key.endswith(timed) and isinstance(value, float)
    }


def difference(folder, other, file):
    ours, theirs = load_file(folder / file), load_file(other / file)
    assert {key: (value.shape, value.dtype) for key, value in ours.items()} == {
        key: (value.shape, value.dtype) for key, value in theirs.items()
    }
    return max((ours[key] - theirs[key]).abs().max().item() for key in ours)


def files(folder):
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "tfevents" not in path.name and ".lock" not in path.name
    )


def test_the_engine_is_named(whole):
    _, text = whole["FSDP2"]
    assert (
        "FSDP2, 1/2 of the network in each process, gathered by Attention, ResnetBlock2D; 2 processes on 1 node, gloo"
        in text
    )
    assert "engine           DDP; 2 processes on 1 node, gloo\n" in whole["DDP"][1]
    assert "engine           one process\n" in whole["one process"][1]


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_a_run_is_that_of_one_process(engine, whole):
    """Losses, norms, rates and validations; the finished pipeline has the same files, keys, shapes and dtypes."""
    one, other = whole["one process"][0], whole[engine][0]
    assert numbers(other) == pytest.approx(numbers(one), rel=1e-5)
    assert numbers(other, "valid/loss").keys() == {(6, "valid/loss"), (12, "valid/loss")}
    assert files(other) == files(one)
    for file in (name for name in files(one) if name.endswith(".safetensors")):
        assert difference(other, one, file) < 1e-4
    for file in ("unet/config.json", "checkpoint-12/unet_ema/config.json", "model_index.json"):
        assert (other / file).read_text() == (one / file).read_text()


@pytest.mark.parametrize(
    ("engine", "then"),
    [
        ("FSDP2", "FSDP2"),
        ("FSDP2", "one process"),
        ("DDP", "FSDP2"),
        pytest.param("FSDP2", "DDP", marks=pytest.mark.slow),
        pytest.param("one process", "FSDP2", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_is_resumed_on_another_engine(engine, then, whole, tmp_path):
    """On the same one bit for bit, else up to the order of sums."""
    shutil.copytree(whole[engine][0], tmp_path / "run")
    forget_after(tmp_path / "run", 6)
    _, text = run(tmp_path / "run", then, LATEST)
    assert "resumed at 6" in text
    assert numbers(tmp_path / "run") == pytest.approx(numbers(whole[then][0]), rel=1e-5)
    if engine == then:
        assert final_state(tmp_path / "run", STEPS) == final_state(whole[then][0], STEPS)
        assert numbers(tmp_path / "run") == numbers(whole[then][0])
    assert difference(tmp_path / "run", whole[then][0], "unet/diffusion_pytorch_model.safetensors") < 1e-4


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_one_rank_is_killed_in_a_save(rank, whole, tmp_path):
    folder = tmp_path / "run"
    process, own = ENGINES["FSDP2"]
    faults = own | {"slow_write": 2, "kill_in_save": [6, rank]}
    arguments = [tiny("ddpm"), f"base.output_dir={folder}", *COMMON, "base.checkpointing_steps=3"]
    assert start(*arguments, processes=process, faults=faults).wait(300) != 0
    sealed = list_checkpoints(folder)
    assert [step for step, _ in sealed] in ([3], [6, 3])
    for _, path in sealed:
        verify(path)
    run(folder, "FSDP2", LATEST)
    assert final_state(folder, STEPS) == final_state(whole["FSDP2"][0], STEPS)
    assert not list(folder.glob(".tmp-*"))


def test_one_rank_gets_term(whole, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = [tiny("ddpm"), f"base.output_dir={folder}", *COMMON]
    process = start(*arguments, processes=2, faults={"fsdp": {}, "slow_steps": 0.3}, out=log)
    wait_for(lambda: 2 in logged_steps(folder), process)
    os.kill(process.ranks[1].pid, signal.SIGTERM)
    assert process.wait(300) == 143
    [(step, sealed), *_] = list_checkpoints(folder)
    verify(sealed)
    assert step < STEPS
    assert f"ended by SIGTERM after step {step}; checkpoint-{step} is written" in log.read_text()
    run(folder, "FSDP2", LATEST)
    assert final_state(folder, STEPS) == final_state(whole["FSDP2"][0], STEPS)


def test_what_is_not_finite_on_one_rank_is_skipped_and_not_saved(tmp_path):
    folder, _ = run(tmp_path / "run", "FSDP2", nan_loss_at=[4, 1])
    skipped = {step: value for (step, _), value in numbers(folder, "skipped").items()}
    assert skipped == {step: float(step == 4) for step in range(1, STEPS + 1)}
    assert math.isfinite(numbers(folder, "loss")[STEPS, "loss"])
    _, text = run(tmp_path / "broken", "FSDP2", code=1, break_weight_at=[3, 1])
    assert "checkpoint-6 is not written: weight unet.conv_in.weight is not finite; continue from" in text
    assert not list((tmp_path / "broken").glob("checkpoint-*"))


def test_what_fsdp2_cannot_shard(tmp_path):
    _, text = run(tmp_path / "two", "FSDP2", task="vae", code=1)
    assert "error: FSDP2 shards one network, and this run trains 2 (vae, discriminator); launch with DDP" in text
    arguments = [tiny("ddpm"), f"base.output_dir={tmp_path}/missing", *COMMON]
    faults, log = {"fsdp": {"transformer_cls_names_to_wrap": ["DiTBlock"]}}, tmp_path / "log"
    assert start(*arguments, processes=2, faults=faults, out=log).wait(300) == 1
    assert "fsdp_transformer_layer_cls_to_wrap names DiTBlock, and network unet has none; leave the" in log.read_text()
    assert "Traceback" not in text + log.read_text()


def test_an_adapter_on_a_half_precision_base(tmp_path):
    """The frozen weights are in bf16, what is trained in float32: FSDP2 holds both in one group."""
    options = ["lora.train_text_encoder=false", "lora.learning_rate=1e-3", "base.mixed_precision=bf16"]
    runs = {
        engine: run(tmp_path / engine, engine, *options, "base.resolution=32", task="lora")[0]
        for engine in ("DDP", "FSDP2")
    }
    losses = {engine: list(numbers(folder, "loss").values()) for engine, folder in runs.items()}
    assert losses["FSDP2"] == pytest.approx(losses["DDP"], rel=2e-3)  # autocast keeps norms in float32, FSDP2 does not
    saved = load_file(runs["FSDP2"] / "checkpoint-12" / "unet" / "trainable.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert all(".lora_" in key for key in saved)
    assert difference(runs["FSDP2"], runs["DDP"], "pytorch_lora_weights.safetensors") < 2e-2


SINGLE = {
    "vae": ["vae.adversarial_loss=null", "vae.learning_rate=1e-3"],
    "lora": ["lora.train_text_encoder=false", "lora.learning_rate=1e-3"],
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TRAINERS)
def test_every_task_with_one_network(task, tmp_path):
    options = ["base.resolution=32", *SINGLE.get(task, [])]
    runs = {engine: run(tmp_path / engine, engine, *options, task=task)[0] for engine in ("DDP", "FSDP2")}
    assert files(runs["FSDP2"]) == files(runs["DDP"])
    # after a few steps Adam has made noise of a few sums as large as the rate; each first loss is before any step
    assert numbers(runs["FSDP2"])[1, "loss"] == pytest.approx(numbers(runs["DDP"])[1, "loss"], rel=1e-6)
    uninterrupted = final_state(runs["FSDP2"], STEPS)
    forget_after(runs["FSDP2"], 6)
    run(runs["FSDP2"], "FSDP2", *options, LATEST, task=task)
    assert final_state(runs["FSDP2"], STEPS) == uninterrupted
