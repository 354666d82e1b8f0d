"""The note at the start of a run on a device that computes bf16 in hardware, which the run does not use."""

from __future__ import annotations

import pytest
import torch

from trainers.engine.tracking.console import has_bf16

NOTE = "NOTE: this device computes bf16 in hardware: base.mixed_precision=bf16 would use it"


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_which_devices_compute_bf16_in_hardware(monkeypatch, avx512, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert has_bf16(torch.device("cpu")) is (avx512 or amx)
    assert not has_bf16(torch.device("cuda"))
    assert not has_bf16(torch.device("mps"))


@pytest.mark.parametrize(("supported", "precision", "told"), [(1, "no", True), (0, "no", False), (1, "bf16", False)])
def test_bf16_is_named_where_it_is_not_used(run_in_process, monkeypatch, capsys, supported, precision, told):
    monkeypatch.setattr("trainers.engine.tracking.console.has_bf16", lambda device: bool(supported))
    run_in_process(**{"base.mixed_precision": precision, "base.max_train_steps": 1})
    assert (NOTE in capsys.readouterr().out) is told
