"""Reads the LoRA of a checkpoint, which needs neither the base model's weights nor the data."""

from __future__ import annotations

import re
import sys

import torch

from datasets_lib.errors import InputError, UserError
from datasets_lib.foreign import shown
from trainers.base import RunInfo
from trainers.common.lora.header import peft_settings
from trainers.common.lora.lora_file import NETWORKS, LoraFile, check_modules, file_name
from trainers.common.lora.training import AdapterTrainer
from trainers.engine.checkpoint.load import read_tensors
from trainers.inference.saved_run import AVERAGED, RAW, SavedRun, suffix_of

TENSOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)\.default\.weight")


def read_checkpoint_lora(saved: SavedRun, weights: str | None = None) -> LoraFile:
    """Reads a checkpoint's LoRA: averaged weights if there are any, or "raw" or "ema" ones.

    Raises ValueError for a run of another task, and for missing weights.
    """
    checkpoint, kind = saved.checkpoint, saved.trainer_class
    assert checkpoint is not None  # a finished run has a LoRA file
    if not issubclass(kind, AdapterTrainer):
        raise InputError(f"{checkpoint}: is of task {saved.task}, which trains no LoRA; give a run of lora or lcm_lora")
    run = saved.config()
    trainer = kind(run.config, run.base)
    trainer.run = RunInfo(device=torch.device("cpu"), weight_dtype=torch.float32)
    suffix = suffix_of(checkpoint, AVERAGED if run.config.use_ema else RAW, weights)
    adapter, lora = trainer.adapter(), LoraFile({}, {}, trainer.about() | _about_base(trainer))
    for name in NETWORKS:
        folder = checkpoint / f"{name}{suffix}"
        if not folder.is_dir():
            continue
        state = lora.tensors[name] = {}
        for key, value in read_tensors(folder).items():
            match = TENSOR.fullmatch(key)
            if match is None:
                raise InputError(f"{folder}: {shown(key)} is no tensor of a LoRA; the checkpoint is of another run")
            ending = "" if match[2] == "lora_magnitude_vector" else ".weight"
            state[file_name(name, f"{match[1]}.{match[2]}{ending}")] = value
        check_modules(folder, name, state)
        ranks = lora.ranks(name)
        alphas = dict.fromkeys(ranks, float(adapter["lora_alpha"]))
        lora.settings[name] = peft_settings(ranks, alphas, adapter["use_dora"], adapter["use_rslora"])
    if not lora.tensors:
        raise InputError(f"{checkpoint}: holds no LoRA")
    return lora.folded()  # as a run's own files are


def _about_base(trainer: AdapterTrainer) -> dict[str, str]:
    """Returns the header's texts about the base model, or none, and a note, if it is not at hand."""
    try:
        trainer.setup()
        return trainer.about_base()
    except UserError as error:
        print(f"NOTE: the file does not say what its base model predicts: {error}", file=sys.stderr)
        return {}
