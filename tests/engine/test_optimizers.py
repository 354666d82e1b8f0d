"""The table of optimizers: its rows, the engines that refuse them, the option that it replaced, and one row more."""

from __future__ import annotations

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from run_folders import final_state, losses
from safetensors.torch import load_file
from torch import nn

from train import main
from trainers.base import TrainerConfig
from trainers.engine.checkpoint.config_diff import option_changes
from trainers.engine.config.config import load_config
from trainers.engine.distributed.backends import check_optimizer
from trainers.engine.optim.optimizer import build_optimizer
from trainers.engine.optim.table import ENGINES, OPTIMIZERS, Row
from trainers.engine.run.clock import Clock
from trainers.inference.saved_run import open_run

OPTIONS = {"adam_beta1": 0.8, "adam_beta2": 0.99, "adam_weight_decay": 0.1, "adam_epsilon": 1e-6}
SETTINGS = {"betas": (0.8, 0.99), "weight_decay": 0.1, "eps": 1e-6}


def build(device, **options):
    groups = [{"name": "net", "params": [nn.Parameter(torch.ones(4))], "lr": 0.5}]
    config = TrainerConfig(**options)
    return build_optimizer(groups, config, Clock(100, 4, 1, 1, max_train_steps=1), torch.device(device))


def accelerator(engine):
    """As far as check_optimizer looks at one."""
    if engine.startswith("ZeRO"):
        settings = {"zero_optimization": {"stage": int(engine[-1])}}
        state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=settings))
        return SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=state)
    kind = {"FSDP2": DistributedType.FSDP, "DDP": DistributedType.MULTI_GPU, "one process": DistributedType.NO}[engine]
    return SimpleNamespace(distributed_type=kind)


def adafactor(groups, config, device):
    """Its second moments are factored, so it must see whole weights."""
    return torch.optim.Adafactor(groups, weight_decay=config.adam_weight_decay)


@pytest.fixture
def third_row(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "adafactor", Row(adafactor, ("DDP", "FSDP2")))


def test_adamw_is_the_default_and_fused():
    optimizer = build("cpu", **OPTIONS)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults.items() >= (SETTINGS | {"fused": True}).items()


def test_adamw_8bit_is_that_of_bitsandbytes(monkeypatch):
    fake = SimpleNamespace(AdamW8bit=lambda groups, **settings: ("8 bit", len(groups), settings))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=fake))
    assert build("cuda", optimizer="adamw_8bit", **OPTIONS) == ("8 bit", 1, SETTINGS)
    with pytest.raises(ValueError, match=r"optimizer = adamw_8bit: needs a CUDA device, this run is on cpu; set it to"):
        build("cpu", optimizer="adamw_8bit")


REFUSED = "which divides weights and state over the processes and would compute it otherwise; set it to"


@pytest.mark.parametrize("engine", ["one process", *ENGINES])
def test_engines_refuse_what_they_would_compute_otherwise(engine, third_row):
    check_optimizer(accelerator(engine), TrainerConfig())
    ways_out = {
        "adamw_8bit": {
            "FSDP2": "adamw or adafactor, or launch with DDP", "ZeRO-2": "adamw, or launch with DDP",
            "ZeRO-3": "adamw, or launch with DDP",
        },
        "adafactor": dict.fromkeys(("ZeRO-2", "ZeRO-3"), "adamw, or launch with DDP or FSDP2"),
    }  # fmt: skip
    for name, refused in ways_out.items():
        config = TrainerConfig(optimizer=name)
        if engine not in refused:
            check_optimizer(accelerator(engine), config)
            continue
        with pytest.raises(ValueError, match=f"optimizer = {name}: not supported with {engine}, {REFUSED} ") as caught:
            check_optimizer(accelerator(engine), config)
        assert str(caught.value).endswith(f"set it to {refused[engine]}")


def test_another_row_is_trained_saved_by_name_and_resumed(third_row, run_in_process):
    options = {"ddpm.optimizer": "adafactor", "base.checkpointing_steps": 3}
    whole = run_in_process("whole", **options)
    part = run_in_process("part", **options, **{"base.max_train_steps": 3})
    assert final_state(part, 3) == final_state(whole, 3)
    run_in_process("part", **options, **{"base.resume_from_checkpoint": "latest"})
    assert losses(part) == losses(whole)
    assert final_state(part, 6) == final_state(whole, 6)
    state = load_file(whole / "checkpoint-6" / "optimizer.safetensors")
    assert state["unet.conv_in.weight.step"] == 6
    assert {name.rpartition(".")[2] for name in state} == {"step", "row_var", "col_var", "variance"}


def test_another_optimizer_on_resume_is_refused_unless_it_is_allowed(third_row, run_in_process, tiny_config, capsys):
    folder = run_in_process()
    changed = {"base.resume_from_checkpoint": "latest", "base.max_train_steps": 8, "ddpm.optimizer": "adafactor"}
    assert main([str(tiny_config(name="run", **changed))]) == 1
    assert 'base.allow_changes=[optimizer]:\n  ddpm.optimizer: "adamw" -> "adafactor"' in capsys.readouterr().err
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([str(tiny_config(name="run", **changed, **{"base.allow_changes": ["optimizer"]}))]) == 0
    state = load_file(folder / "checkpoint-8" / "optimizer.safetensors")
    assert state["unet.conv_in.weight.step"] == 2  # it began without state
    assert not any(name.endswith("exp_avg") for name in state)


def test_a_run_of_the_time_before_the_option_goes_on(tiny_config):
    """Its checkpoint and its resolved configuration hold the old option."""
    run = load_config(tiny_config(**{"ddpm.use_8bit_adam": False}))
    assert run.config.optimizer == "adamw"
    saved = run.as_dict()
    del saved["ddpm"]["optimizer"]
    assert list(option_changes(saved | {"ddpm": saved["ddpm"] | {"use_8bit_adam": False}}, run)) == []
    changes = option_changes(saved | {"ddpm": saved["ddpm"] | {"use_8bit_adam": True}}, run)
    assert list(changes) == [("ddpm.optimizer", "adamw_8bit", "adamw")]


@pytest.mark.parametrize("option", [{"optimizer": "adamw_8bit"}, {"use_8bit_adam": True}])
def test_what_was_trained_with_a_package_is_drawn_without_it(option, run_in_process):
    folder = run_in_process(**{"base.max_train_steps": 1})
    shutil.rmtree(folder / "checkpoint-1")
    document = yaml.safe_load((folder / "config.yaml").read_text())
    del document["ddpm"]["optimizer"]
    document["ddpm"] |= option
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    assert open_run(folder).config().config.optimizer == "adamw"
