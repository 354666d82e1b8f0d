"""Resumes a run that was cut at a checkpoint, and compares it with one that was not."""

from __future__ import annotations

import shutil
from pathlib import Path

from run_folders import final_state, forget_after, losses, read_metrics

from train import train
from trainers.engine.config.config import load_config

RANDOM = {"base.random_flip": True, "base.resolution": 24}


def check_resume(tiny_config, options, changed=None, at=4, task="ddpm"):
    """Trains, cuts at a checkpoint, resumes with the `changed` options, compares with the run that was not cut."""
    whole = train(load_config(tiny_config(task, "whole", **options, **{"base.checkpointing_steps": 2})))
    cut = Path(shutil.copytree(whole, whole.with_name("cut")))
    forget_after(cut, at)
    resumed = {**options, "base.checkpointing_steps": 5, "base.resume_from_checkpoint": "latest", **(changed or {})}
    train(load_config(tiny_config(task, "cut", **resumed)))
    assert losses(cut) == losses(whole)
    assert [line["lr"] for line in read_metrics(cut, prefix="lr")] == [
        line["lr"] for line in read_metrics(whole, prefix="lr")
    ]
    assert final_state(cut) == final_state(whole)
    return whole, cut
