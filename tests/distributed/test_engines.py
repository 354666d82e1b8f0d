"""FSDP2 and DeepSpeed on two CPU processes against one process and DDP: every promise, by checkpoints that all share.

accelerate runs FSDP on GPUs alone; tests/helpers/faulty.py makes it run here. Every process has one thread.
"""

from __future__ import annotations

import functools
import math
import os
import re
import shutil
import signal

import pytest
import torch
from marks import slow
from processes import Forked, start, wait_for
from repository import tiny
from run_folders import final_state, forget_after, logged_steps, read_metrics
from safetensors.torch import load_file

from trainers import TRAINERS
from trainers.engine.checkpoint.manifest import list_checkpoints, verify
from trainers.engine.config.config import find_trainer

STEPS, HALF = 8, 4  # in the middle of an epoch of three
COMMON = [
    "base.resolution=24", "base.random_flip=true", "base.max_train_samples=25", "base.validation_split=0.02",
    f"base.checkpointing_steps={HALF}", f"base.valid_steps={HALF}", f"base.max_train_steps={STEPS}", "base.train_batch_size=4",
]  # fmt: skip
ONE = ["base.gradient_accumulation_steps=2"]  # as many examples as on two processes
ZERO_3 = {"stage": 3, "stage3_param_persistence_threshold": 100}  # by default all of a small network stays whole
KEEPS_NOTHING = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
ENGINES = {
    "one process": (1, {}),
    "DDP": (2, {}),
    "FSDP2": (2, {"fsdp": {}}),
    "ZeRO-2": (2, {"deepspeed": {"stage": 2}}),
    "ZeRO-3": (2, {"deepspeed": ZERO_3}),
    "divided at once": (2, {"deepspeed": ZERO_3 | KEEPS_NOTHING}),  # as large networks are
    "offload": (2, {"deepspeed": ZERO_3 | OFFLOAD}),
}
DIVIDED = ["FSDP2", "ZeRO-2", "ZeRO-3"]


def but_one(always):
    """The engines that divide, all but one of them among the slow tests."""
    return [engine if engine == always else slow(engine) for engine in DIVIDED]


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
    """whole(engine) is a run without interruption, made when it is first asked for: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    return functools.cache(lambda engine: run(folder / engine.replace(" ", "-"), engine))


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


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("one process", "one process"),
        slow("DDP", "DDP; 2 processes on 1 node, gloo"),
        ("FSDP2", "FSDP2, 1/2 of the network in each process, gathered by Attention, ResnetBlock2D; 2 processes on 1 node, gloo"),
        ("ZeRO-2", "DeepSpeed ZeRO-2, 1/2 of gradients and optimizer state in each process; 2 processes on 1 node, gloo"),
        slow("ZeRO-3", "DeepSpeed ZeRO-3, 1/2 of weights, gradients and optimizer state in each process; 2 processes on 1 node, gloo"),
        slow("offload", "DeepSpeed ZeRO-3, 1/2 of weights, gradients and optimizer state in each process, optimizer and weights in main memory; 2 processes on 1 node, gloo"),
    ],
)  # fmt: skip
def test_the_engine_is_named(engine, name, whole):
    _, text = whole(engine)
    assert f"  engine           {name}\n" in text
    assert "  network unet     41,609 parameters trained, 0 frozen\n" in text


@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-2", *map(slow, ("DDP", "ZeRO-3", "divided at once", "offload"))])
def test_a_run_is_that_of_one_process(engine, whole):
    """Losses, norms, rates and validations; the finished pipeline has the same files, keys, shapes and dtypes."""
    one, other = whole("one process")[0], whole(engine)[0]
    assert numbers(other) == pytest.approx(numbers(one), rel=1e-5)
    assert numbers(other, "valid/loss").keys() == {(HALF, "valid/loss"), (STEPS, "valid/loss")}
    assert files(other) == files(one)
    for file in (name for name in files(one) if name.endswith(".safetensors")):
        assert difference(other, one, file) < 1e-4
    for file in ("unet/config.json", f"checkpoint-{STEPS}/unet_ema/config.json", "model_index.json"):
        assert (other / file).read_text() == (one / file).read_text()


ALWAYS = {("ZeRO-2", "ZeRO-2"), ("FSDP2", "one process")}


@pytest.mark.parametrize(
    ("engine", "then"),
    [(engine, then) if (engine, then) in ALWAYS else slow(engine, then) for engine in ENGINES for then in ENGINES],
)
def test_a_checkpoint_is_resumed_on_another_engine(engine, then, whole, tmp_path):
    """On the same one bit for bit, else up to the order of sums."""
    shutil.copytree(whole(engine)[0], tmp_path / "run")
    forget_after(tmp_path / "run", HALF)
    _, text = run(tmp_path / "run", then, LATEST)
    assert f"resumed at {HALF}" in text
    assert numbers(tmp_path / "run") == pytest.approx(numbers(whole(then)[0]), rel=1e-5)
    if engine == then:
        assert final_state(tmp_path / "run", STEPS) == final_state(whole(then)[0], STEPS)
        assert numbers(tmp_path / "run") == numbers(whole(then)[0])
    assert difference(tmp_path / "run", whole(then)[0], "unet/diffusion_pytorch_model.safetensors") < 1e-4


@pytest.mark.parametrize("engine", [slow("DDP"), *but_one("FSDP2")])
def test_the_pipeline_of_a_finished_run_is_written_again(engine, whole, tmp_path):
    folder, weights = shutil.copytree(whole(engine)[0], tmp_path / "run"), "unet/diffusion_pytorch_model.safetensors"
    (folder / weights).unlink()
    _, text = run(folder, engine, LATEST)
    assert "the run is finished already" in text
    assert difference(folder, whole(engine)[0], weights) == 0


@pytest.mark.slow  # test_faults.py kills ranks of DDP by default
@pytest.mark.parametrize("engine", DIVIDED)
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_is_killed_in_a_save(rank, engine, whole, tmp_path):
    folder = tmp_path / "run"
    process, own = ENGINES[engine]
    faults = own | {"slow_write": 2, "kill_in_save": [HALF, rank]}
    arguments = [tiny("ddpm"), f"base.output_dir={folder}", *COMMON, "base.checkpointing_steps=2"]
    assert start(*arguments, processes=process, faults=faults).wait(300) != 0
    sealed = list_checkpoints(folder)
    assert [step for step, _ in sealed] in ([2], [HALF, 2])
    for _, path in sealed:
        verify(path)
    run(folder, engine, LATEST)
    assert final_state(folder, STEPS) == final_state(whole(engine)[0], STEPS)
    assert not list(folder.glob(".tmp-*"))


@pytest.mark.parametrize("engine", but_one("ZeRO-2"))
def test_one_rank_gets_term(engine, whole, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = [tiny("ddpm"), f"base.output_dir={folder}", *COMMON]
    process = Forked(arguments, 2, ENGINES[engine][1] | {"slow_steps": 0.3}, out=log)  # torchrun would hide its ranks
    wait_for(lambda: 2 in logged_steps(folder), process)
    os.kill(process.ranks[1].pid, signal.SIGTERM)
    assert process.wait(300) == 143
    [(step, sealed), *_] = list_checkpoints(folder)
    verify(sealed)
    assert step < STEPS
    assert f"ended by SIGTERM after step {step}; checkpoint-{step} is written" in log.read_text()
    run(folder, engine, LATEST)
    assert final_state(folder, STEPS) == final_state(whole(engine)[0], STEPS)


@pytest.mark.slow  # test_divergence.py does so with DDP by default
@pytest.mark.parametrize("engine", DIVIDED)
def test_what_is_not_finite_on_one_rank_is_skipped_and_not_saved(engine, tmp_path):
    folder, _ = run(tmp_path / "run", engine, nan_loss_at=[3, 1])
    skipped = {step: value for (step, _), value in numbers(folder, "skipped").items()}
    assert skipped == {step: float(step == 3) for step in range(1, STEPS + 1)}
    assert math.isfinite(numbers(folder, "loss")[STEPS, "loss"])
    _, text = run(tmp_path / "broken", engine, code=1, break_weight_at=[HALF, 1])
    assert re.search(rf"checkpoint-{HALF} is not written: weight unet\.\S+ is not finite; continue from", text)
    assert not list((tmp_path / "broken").glob("checkpoint-*"))


def test_what_fsdp2_cannot_shard(tmp_path):
    _, text = run(tmp_path / "two", "FSDP2", task="vae", code=1)
    assert "error: FSDP2 shards one network, and this run trains 2 (vae, discriminator); launch with DDP" in text
    arguments = [tiny("ddpm"), f"base.output_dir={tmp_path}/missing", *COMMON]
    faults, log = {"fsdp": {"transformer_cls_names_to_wrap": ["DiTBlock"]}}, tmp_path / "log"
    assert start(*arguments, processes=2, faults=faults, out=log).wait(300) == 1
    assert "fsdp_transformer_layer_cls_to_wrap names DiTBlock, and network unet has none; leave the" in log.read_text()
    assert "Traceback" not in text + log.read_text()


def test_what_deepspeed_cannot_train(tmp_path):
    _, text = run(tmp_path / "two", "ZeRO-2", task="vae", code=1)
    assert "error: DeepSpeed trains one network, and this run has 2 (vae, discriminator); launch with DDP" in text
    assert "Traceback" not in text


@pytest.mark.slow  # test_distributed.py accumulates with DDP by default
@pytest.mark.parametrize("engine", DIVIDED)
def test_accumulation_is_that_of_ddp(engine, network_without_dropout, tmp_path):
    """Two micro-batches of two on each of two processes."""
    options = ["base.train_batch_size=2", "base.gradient_accumulation_steps=2", "base.max_train_steps=6"]
    options += [f"ddpm.model_config={network_without_dropout}", "ddpm.max_grad_norm=0.05"]
    runs = [run(tmp_path / each, each, *options)[0] for each in ("DDP", engine)]
    assert min(numbers(runs[0], "grad_norm").values()) > 0.05  # every step is clipped
    assert numbers(runs[1]) == pytest.approx(numbers(runs[0]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [*DIVIDED, "divided at once"])
def test_a_dora_reads_weights_outside_of_their_module(engine, tmp_path):
    options = ["base.resolution=32", "lora.use_dora=true", "lora.train_text_encoder=false", "lora.learning_rate=1e-3"]
    options += ["base.max_train_steps=4", "lora.valid_batch_size=2", "base.validation_split=null"]
    runs = [run(tmp_path / each.split()[0], each, *options, task="lora")[0] for each in ("DDP", engine)]
    assert numbers(runs[1]) == pytest.approx(numbers(runs[0]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "near"),
    # autocast keeps norms in float32, FSDP2 does not; ZeRO-3 puts a linear of its own in torch's place
    [("ZeRO-2", 1e-5), ("ZeRO-3", 2e-3), ("FSDP2", 2e-3)],
)
def test_an_adapter_on_a_half_precision_base(engine, near, tmp_path):
    """The frozen weights are in bf16, what is trained in float32: FSDP2 holds both in one group.

    The text encoder and the autoencoder are whole in each process: they are not prepared.
    """
    options = ["lora.train_text_encoder=false", "lora.learning_rate=1e-3", "base.mixed_precision=bf16"]
    runs = {
        each: run(tmp_path / each, each, *options, "base.resolution=32", task="lora")[0] for each in ("DDP", engine)
    }
    losses = {each: list(numbers(folder, "loss").values()) for each, folder in runs.items()}
    assert losses[engine] == pytest.approx(losses["DDP"], rel=near)
    saved = load_file(runs[engine] / f"checkpoint-{STEPS}" / "unet" / "trainable.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert all(".lora_" in key for key in saved)
    assert difference(runs[engine], runs["DDP"], "pytorch_lora_weights.safetensors") < 2e-2


ADVERSARIAL = ("adversarial_start_step", "discriminator_layers", "discriminator_channels", "r1_weight", "lecam_weight")
OF_VAE = find_trainer("vae").Config.__dataclass_fields__
SINGLE = {
    "vae": [
        "vae.adversarial_loss=null",
        "vae.learning_rate=1e-3",
        *(f"vae.{name}={OF_VAE[name].default}" for name in ADVERSARIAL),
    ],
    "lora": ["lora.train_text_encoder=false", "lora.learning_rate=1e-3"],
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", DIVIDED)
@pytest.mark.parametrize("task", TRAINERS)
def test_every_task_with_one_network(task, engine, tmp_path):
    options = ["base.resolution=32", *SINGLE.get(task, [])]
    runs = {each: run(tmp_path / each, each, *options, task=task)[0] for each in ("DDP", engine)}
    assert files(runs[engine]) == files(runs["DDP"])
    # after a few steps Adam has made noise of a few sums as large as the rate; each first loss is before any step
    assert numbers(runs[engine])[1, "loss"] == pytest.approx(numbers(runs["DDP"])[1, "loss"], rel=1e-6)
    uninterrupted = final_state(runs[engine], STEPS)
    forget_after(runs[engine], HALF)
    run(runs[engine], engine, *options, LATEST, task=task)
    assert final_state(runs[engine], STEPS) == uninterrupted
