"""What only a card can show: scripts/benchmarks/gpu.py runs these first."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from repository import tiny
from run_folders import final_state, losses, read_metrics

import train
from trainers import TRAINERS
from trainers.engine.data.prefetch import CopyStream, copied_ahead
from trainers.engine.optim import optimizer
from trainers.engine.run.randomness import SlotRandom
from trainers.engine.tracking.console import has_bf16
from trainers.engine.tracking.meters import take_peak_memory

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")


@pytest.mark.parametrize("task", TRAINERS)
def test_a_step_never_waits_for_the_device(task, run_in_process, monkeypatch):
    """From the third step to the last, whose logs and saves do wait."""
    tiny(task)
    original, calls = optimizer.set_learning_rates, [0]

    def watched(*arguments):
        calls[0] += 1
        torch.cuda.set_sync_debug_mode("error" if 3 <= calls[0] < 8 else "default")
        return original(*arguments)

    monkeypatch.setattr(optimizer, "set_learning_rates", watched)
    try:
        run_in_process(
            "run", task, **{"base.max_train_steps": 8, "base.logging_steps": 8, "base.mixed_precision": "bf16"}
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert calls == [8]


def test_draws_are_those_of_the_cpu():
    """Normals up to the last bits of a logarithm and a cosine."""
    slots = torch.tensor([0, 5, 2**40])
    here, there = SlotRandom(3, slots), SlotRandom(3, slots.to(CUDA))
    assert torch.equal(here.integers("t", 1000, (7,)), there.integers("t", 1000, (7,)).cpu())
    assert torch.equal(here.bernoulli("b", 0.3), there.bernoulli("b", 0.3).cpu())
    assert torch.equal(here.uniform("u", (50,)), there.uniform("u", (50,)).cpu())
    assert torch.allclose(here.normal("n", (3, 64, 64)), there.normal("n", (3, 64, 64)).cpu(), rtol=0, atol=2e-6)


def test_batches_copied_ahead_arrive_whole_while_the_device_is_busy():
    """16 MiB each, while each step computes for longer than a copy takes, and frees what it used."""
    batches = ({"image": torch.full((4 << 20,), float(n)), "slot": torch.tensor([n])} for n in range(30))
    ballast = torch.randn(4096, 4096, device=CUDA)
    for number, batch in enumerate(copied_ahead(batches, CopyStream(lambda batch: batch, CUDA))):
        for _ in range(4):
            ballast = (ballast @ ballast).div_(ballast.norm())
        assert batch["image"].is_cuda
        seen = batch["image"].min(), batch["image"].max()
        assert [value.item() for value in seen] == [number, number]
        del batch


def test_the_peak_is_the_cards():
    take_peak_memory(CUDA)
    block = torch.empty(256 << 20, dtype=torch.uint8, device=CUDA)
    del block
    with_block = take_peak_memory(CUDA)
    assert 0.25 <= with_block - take_peak_memory(CUDA) <= 0.26
    assert has_bf16(CUDA)


def test_a_dry_run_says_that_the_card_is_too_small(tiny_config, capsys):
    path = tiny_config(
        "ddpm", "big", **{"ddpm.model_config": None, "base.train_batch_size": 4096, "base.resolution": 64}
    )
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (3 << 30)) / total)
    try:
        assert train.main([str(path), "base.max_train_samples=null", "--dry-run"]) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    printed = capsys.readouterr().out
    assert "It does not fit: too little memory of the device in phase steps: CUDA out of memory" in printed
    assert "base.mixed_precision=bf16" in printed


def test_dropout_draws_the_same_after_a_resume(tiny_config):
    """Its numbers are the device's own."""
    from resuming import check_resume

    check_resume(tiny_config, {"base.deterministic": True, "base.random_flip": True})


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_one_process_over_nccl_trains_as_without(engine, run_in_process, monkeypatch):
    options = {"base.deterministic": True, "base.checkpointing_steps": 3}
    alone = run_in_process("alone", **options)
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launched |= {"MASTER_PORT": str(free.getsockname()[1])}
    if engine == "FSDP2":
        launched |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        }
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    try:
        joined = run_in_process("joined", **options)
        assert "nccl" in torch.distributed.get_backend()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if engine == "DDP":
        assert losses(joined) == losses(alone)
        assert final_state(joined) == final_state(alone)
    else:  # it adds up norms in another order
        ours, theirs = ([float.fromhex(loss) for loss in losses(each).values()] for each in (joined, alone))
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_pictures_and_numbers_of_a_run_are_logged_from_the_card(run_in_process):
    folder = run_in_process(**{"base.max_train_steps": 4})
    assert list((folder / "samples").glob("*.png"))
    assert all(line["peak_memory_gib"] > 0 for line in read_metrics(folder, prefix="peak_memory"))


def test_cublas_is_told_to_be_deterministic(run_in_process):
    run_in_process(**{"base.deterministic": True, "base.max_train_steps": 1})
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_sample_is_that_of_the_cpu(run_in_process, tmp_path):
    """The same seed on both devices: at most 2 of 255 levels apart."""
    import numpy as np
    from PIL import Image
    from script_calls import run_script

    from scripts import sample

    folder, pictures = run_in_process(), []
    for device in ("cpu", "cuda"):
        drawn = tmp_path / device
        run_script(sample, folder, "--output-dir", drawn, "--number", 2, "--device", device, "--seed", 3)
        pictures += [[np.asarray(Image.open(path)).astype(int) for path in sorted(drawn.rglob("*.png"))]]
    assert len(pictures[0]) == len(pictures[1]) >= 2
    assert min(picture.std() for picture in pictures[0]) > 1
    assert max(abs(a - b).max() for a, b in zip(*pictures, strict=True)) <= 2
