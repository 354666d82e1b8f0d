"""Losses and gradients that are not finite: skipped everywhere, counted, written down, replayed, and the end of a run."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from marks import slow
from PIL import Image
from processes import environment, launch
from repository import ROOT
from run_folders import final_state, losses, read_metrics
from safetensors.torch import load_file
from script_calls import run_script

from datasets_lib.images.image_dataset import ImageDataset
from scripts import replay
from scripts.replay import find_slots
from scripts.replay import replay as replay_step
from train import main
from trainers.base import Trainer, TrainerConfig
from trainers.engine.checkpoint.snapshot import find_not_finite
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import RunConfig, find_trainer, load_config
from trainers.engine.data.batches import EpochOrder
from trainers.engine.optim import optimizer as optimization
from trainers.engine.optim.nonfinite import SCALE_HALVINGS, NonFiniteSteps
from trainers.engine.optim.sanity_checks import SanityChecks
from trainers.engine.run.clock import Clock
from trainers.engine.run.context import RunContext
from trainers.engine.run.signals import DIVERGED, StopSignals


@pytest.fixture
def break_loss(monkeypatch):
    """break_loss(change): compute_loss returns change(loss, step) in training."""
    trainer_class = find_trainer("ddpm")
    original = trainer_class.compute_loss

    def install(change):
        def broken(self, batch, rng, step):
            loss, values = original(self, batch, rng, step)
            return (change(loss, step) if self.training else loss), values

        monkeypatch.setattr(trainer_class, "compute_loss", broken)

    return install


def infinite_with_finite_gradients(loss, step):
    """What a masked loss can be: the gradient alone would not show it."""
    return loss + math.inf if step == 3 else loss


BROKEN = {
    "NaN": lambda loss, step: loss * math.nan if step == 3 else loss,
    "infinite": lambda loss, step: loss / 0 if step == 3 else loss,
    "infinite, the gradient is not": infinite_with_finite_gradients,
    "the gradient alone": lambda loss, step: loss + (loss - loss.detach()).abs().sqrt() if step == 3 else loss,
}


def test_an_infinite_loss_can_have_a_finite_gradient():
    weight = torch.ones(1, requires_grad=True)
    loss = infinite_with_finite_gradients(weight.sum(), 3)
    loss.backward()
    assert loss.isinf()
    assert weight.grad.isfinite()


@pytest.mark.parametrize("kind", [slow(kind) if kind == "infinite" else kind for kind in BROKEN])
def test_a_step_that_is_not_finite_is_skipped_and_written_down(kind, break_loss, run_in_process):
    break_loss(BROKEN[kind])
    folder = run_in_process(**{"base.checkpointing_steps": 1, "base.gradient_accumulation_steps": 2})
    assert [line["skipped"] for line in read_metrics(folder, prefix="loss")] == [0, 0, 0, 1, 0, 0]
    [line] = map(json.loads, (folder / "skipped_steps.jsonl").read_text().splitlines())
    norm = line.pop("grad_norm/unet")
    assert norm in ("nan", "inf")
    assert line == {"step": 4, "slots": [24, 32], "micro_batch_size": 4, "seed": 0}
    states = [final_state(folder, step) for step in range(1, 7)]
    assert states[2] == states[3]  # weights, averages and moments stayed where they were
    assert states[3] != states[4]
    for path in folder.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_after_many_steps_in_a_row_the_run_stops(break_loss, tiny_config, capsys):
    break_loss(lambda loss, step: loss * math.nan if step >= 2 else loss)
    options = {"base.max_skipped_steps": 3, "base.max_train_steps": 20, "base.checkpointing_steps": 2}
    path = tiny_config(name="my run", **options)
    folder = path.with_suffix("")
    assert main([str(path)]) == 1
    error = capsys.readouterr().err
    assert (
        "the loss or a gradient was not finite in 3 steps in a row, up to step 5 (base.max_skipped_steps = 3)" in error
    )
    assert f"python scripts/replay.py '{folder}' 5" in error
    assert [json.loads(line)["step"] for line in (folder / "skipped_steps.jsonl").read_text().splitlines()] == [3, 4, 5]
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert final_state(folder, 2) == final_state(folder, 4)
    assert not (folder / "model_index.json").exists()
    # a run that goes on from a checkpoint within the row counts on
    assert main([str(tiny_config(**options, **{"base.resume_from_checkpoint": "latest"}))]) == 1
    assert "not finite in 3 steps in a row, up to step 5" in capsys.readouterr().err
    assert [json.loads(line)["step"] for line in (folder / "skipped_steps.jsonl").read_text().splitlines()] == [3, 4, 5]


def test_a_run_that_skips_every_step_fails(break_loss, tiny_config, capsys):
    break_loss(lambda loss, step: loss * math.nan)
    path = tiny_config()
    assert main([str(path)]) == 1
    assert "not finite in 6 steps in a row, up to step 6" in capsys.readouterr().err
    assert not (path.with_suffix("") / "model_index.json").exists()
    assert not list(path.with_suffix("").glob("checkpoint-*"))  # a resume must not take it for a finished run


def test_what_is_not_finite_is_never_saved(tiny_config, monkeypatch, capsys):
    original = optimization.optimizer_step

    def overflowing(accelerator, optimizer, *rest):
        result = original(accelerator, optimizer, *rest)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].fill_(math.inf)
        return result

    monkeypatch.setattr(optimization, "optimizer_step", overflowing)
    path = tiny_config(**{"base.checkpointing_steps": 1})
    assert main([str(path)]) == 1
    assert (
        "checkpoint-1 is not written: weight unet.conv_in.weight is not finite; continue from the checkpoint before"
        in capsys.readouterr().err
    )
    assert not list(path.with_suffix("").glob("checkpoint-*"))


def test_a_mask_of_infinities_is_no_divergence():
    network = torch.nn.Linear(2, 2)
    network.register_buffer("mask", torch.full((2,), -math.inf))
    network.register_buffer("table", torch.zeros(2, dtype=torch.complex64))
    optimizer = torch.optim.AdamW(network.parameters())
    assert find_not_finite({"net": network}, None, optimizer) is None
    network(torch.ones(2)).sum().backward()
    optimizer.step()
    assert find_not_finite({"net": network}, None, optimizer) is None
    optimizer.state[network.bias]["exp_avg"][:] = 3e38  # finite, unlike their sum
    assert find_not_finite({"net": network}, None, optimizer) is None
    optimizer.state[network.bias]["exp_avg"][0] = math.nan
    assert find_not_finite({"net": network}, None, optimizer) == "exp_avg of net.bias"


def test_all_ranks_skip_what_one_found(tmp_path):
    """NaN in the loss of one rank only, whose gradients are finite before they are averaged."""
    (tmp_path / "uneven.py").write_text(
        "import os, math\nfrom trainers.ddpm import DDPMTrainer\n"
        "class Uneven(DDPMTrainer):\n"
        "    def compute_loss(self, batch, rng, step):\n"
        "        loss, values = super().compute_loss(batch, rng, step)\n"
        "        return loss + (math.inf if step == 2 and os.environ['RANK'] == '1' else 0), values\n"
    )
    options = [f"base.output_dir={tmp_path}/run", "base.trainer_class=uneven:Uneven", "base.checkpointing_steps=1"]
    done = launch("configs/tests/ddpm.json", *options, processes=2, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert [line["skipped"] for line in read_metrics(tmp_path / "run", prefix="loss")] == [0, 0, 1, 0, 0, 0]
    assert final_state(tmp_path / "run", 2) == final_state(tmp_path / "run", 3)


def test_replay_draws_the_same_batch(run_in_process):
    """The step after a checkpoint: the loss of the run bit for bit, with flips, crops, noise and dropout."""
    options = {"base.checkpointing_steps": 2, "base.random_flip": True, "base.resolution": 24}
    folder = run_in_process(**options, **{"base.gradient_accumulation_steps": 2})
    for step in (1, 3, 5):
        Accelerator().free_memory()
        found = replay_step(load_config(folder / "config.yaml"), folder, step)
        one, two = (torch.tensor(loss) for loss in found["losses"])
        assert ((one + two) / 2).item().hex() == losses(folder)[step]
        assert found["pictures"].shape == (8, 1, 24, 24)


def test_replay_names_what_is_broken(run_in_process, monkeypatch, capsys):
    original = ImageDataset.get

    def broken(self, index, generator):
        example = original(self, index, generator)
        if index == 7:
            example["image"][0, 3, 3] = math.nan
        return example

    with monkeypatch.context() as patch:
        patch.setattr(ImageDataset, "get", broken)
        folder = run_in_process(
            **{"base.max_train_steps": 10, "base.image_cache_mb": 0}
        )  # what is decoded has no `get`
        [line] = map(json.loads, (folder / "skipped_steps.jsonl").read_text().splitlines())
        step, first, end = line["step"], *line["slots"]
        capsys.readouterr()
        found = replay_step(load_config(folder / "config.yaml"), folder, step)
    out = capsys.readouterr().out
    assert f"step {step}: slots {first} to {end - 1}, weights of the start" in out
    assert math.isnan(found["losses"][0])
    [slot] = [slot for slot in range(first, end) if EpochOrder(40, 0).index(slot) == 7]
    assert re.findall(r"slot (\d+): row \d+ of .*, pixels nan to nan, NOT FINITE", out) == [str(slot)]
    run_script(replay, folder, step)  # without the broken picture: the same slots, all finite
    out = capsys.readouterr().out
    assert f"slots {first} to {end - 1}" in out
    assert "NOT FINITE" not in out
    assert Image.open(folder / f"replay-step-{step}.png").size[0] > 16


@pytest.mark.slow
def test_replay_as_a_command(run_in_process):
    folder = run_in_process()
    command = [sys.executable, "scripts/replay.py", str(folder), "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment(None))
    assert done.returncode == 0, done.stderr
    assert "step 5: slots 16 to 19" in done.stdout
    assert Image.open(folder / "replay-step-5.png").size[0] > 16


def test_replay_says_what_it_cannot_do(tmp_path, run_in_process):
    with pytest.raises(SystemExit, match="error: .*config.yaml does not exist"):
        run_script(replay, tmp_path, 3)
    folder = run_in_process()
    with pytest.raises(ValueError, match="step 7 is not one of its steps, 1 to 6"):
        find_slots(folder, 7, 4)
    (folder / "checkpoint-6").rename(folder / "elsewhere")
    (folder / "skipped_steps.jsonl").write_text('{"step": 2, "slo')  # torn by a kill
    with pytest.raises(ValueError, match="step 2 was not skipped, and there is no checkpoint to count"):
        find_slots(folder, 2, 4)


@pytest.fixture
def watched(monkeypatch):
    """A NonFiniteSteps that has an fp16 scaler."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    stopping = StopSignals(1800.0)

    def make(tmp_path):
        base = BaseConfig(output_dir=str(tmp_path), max_skipped_steps=2)
        ctx = RunContext(accelerator, RunConfig("ddpm", base, TrainerConfig(), Trainer), None, None, stopping)
        ctx.clock = Clock(8, 1, 1, 1, max_train_steps=9)
        return NonFiniteSteps(ctx), stopping

    return make


def test_overflows_of_the_scaler_are_told_apart(watched, tmp_path):
    divergence, stopping = watched(tmp_path)
    norms = {"grad_norm/net": torch.tensor(math.inf)}
    divergence.poison_if_nonfinite(torch.ones(()))
    assert divergence.after_step(0, torch.zeros(()), norms) == {"skipped": 0, "scaler_skipped": 1}
    assert divergence.skipped_in_a_row == 0
    assert not divergence.file.exists()
    divergence.poison_if_nonfinite(torch.tensor(math.nan))
    assert divergence.after_step(1, torch.zeros(()), norms) == {"skipped": 1, "scaler_skipped": 0}
    assert divergence.file.exists()
    assert stopping.asked == 0


def test_overflows_that_never_end_stop_the_run(watched, tmp_path):
    divergence, stopping = watched(tmp_path)
    for step in range(2 + SCALE_HALVINGS):
        assert stopping.asked == 0
        divergence.poison_if_nonfinite(torch.ones(()))
        divergence.after_step(step, torch.zeros(()), {"grad_norm/net": torch.tensor(math.inf)})
    assert stopping.asked == DIVERGED
    assert f"fp16 gradients overflowed in {2 + SCALE_HALVINGS} steps in a row, whatever the loss scale" in stopping.text


def test_checking_a_finite_loss_changes_no_bit(watched, tmp_path):
    divergence, _ = watched(tmp_path)
    weight = torch.rand(5, requires_grad=True)
    [plain] = torch.autograd.grad(weight.square().sum() / 3, weight)
    [checked] = torch.autograd.grad(divergence.poison_if_nonfinite(weight.square().sum() / 3), weight)
    assert torch.equal(plain, checked)


def test_a_run_in_which_nothing_moves_is_told(run_in_process, capsys):
    run_in_process(**{"ddpm.learning_rate": 1e-30, "ddpm.adam_weight_decay": 0.0, "base.max_train_steps": 12})
    out = capsys.readouterr().out
    assert out.count("WARNING: no trained parameter moved in 10 steps: look at learning_rate (now 1e-30)") == 1
    run_in_process("moves")
    assert "WARNING" not in capsys.readouterr().out


def test_a_last_rate_that_is_not_what_was_asked_for_is_told(run_in_process, monkeypatch, capsys):
    monkeypatch.setattr(optimization, "set_learning_rates", lambda optimizer, factor: {"lr": 1e-3})
    run_in_process(**{"ddpm.lr_scheduler": "linear", "ddpm.lr_warmup_steps": 0})
    assert (
        "WARNING: the last learning rate of unet was 0.001; the configuration asks for 0.000166667"
        in capsys.readouterr().out
    )


def test_two_ranks_that_draw_the_same_are_told(tmp_path):
    (tmp_path / "alike.py").write_text(
        "import torch\nfrom trainers.ddpm import DDPMTrainer\n"
        "class Alike(DDPMTrainer):\n"
        "    def compute_loss(self, batch, rng, step):\n"
        "        torch.manual_seed(step)\n"
        "        return super().compute_loss(batch, rng, step)\n"
    )
    options = [f"base.output_dir={tmp_path}/run", "base.trainer_class=alike:Alike"]
    done = launch("configs/tests/ddpm.json", *options, processes=2, env={"PYTHONPATH": str(tmp_path)})
    assert done.stdout.count("WARNING: two processes drew the same random numbers in the network in step 1") == 1
    assert "drew the same examples" not in done.stdout


def test_the_watches_change_no_draw(run_in_process, monkeypatch):
    with_watches = run_in_process("with")
    monkeypatch.setattr(SanityChecks, "after_step", lambda *arguments: None)
    assert losses(run_in_process("without")) == losses(with_watches)
