"""What a run is told that it leaves on the table."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from trainers.engine.tracking import advice

CPU = torch.device("cpu")


def note(precision="no", main=True):
    accelerator, base = SimpleNamespace(device=CPU, is_main_process=main), SimpleNamespace(mixed_precision=precision)
    return advice.precision_note(accelerator, base)


@pytest.mark.parametrize(("half", "told"), [(0.05, True), (0.09, False), (0.2, False)])
def test_bf16_is_advised_where_it_is_faster(monkeypatch, half, told):
    """The fastest of each dtype counts: here float32 takes 0.1 s, but for one round that was disturbed."""
    rounds = iter([0.1, half, 0.4, half, 0.1, half, 0.1, 9 * half, 0.1, half])
    asked = []
    monkeypatch.setattr(advice, "_seconds", lambda images, weight: (asked.append(weight.dtype), next(rounds))[1])
    advice.bf16_speedup.cache_clear()
    try:
        expected = ["a convolution in bf16 is 2.0 times faster here than in float32: base.mixed_precision=bf16"]
        assert note() == (expected if told else [])
        assert asked == [torch.float32, torch.bfloat16] * 5
        assert note("bf16") == note(main=False) == []
    finally:
        advice.bf16_speedup.cache_clear()


def test_it_is_measured_here_and_draws_nothing():
    advice.bf16_speedup.cache_clear()
    before = torch.get_rng_state()
    assert 0.02 < advice.bf16_speedup(CPU) < 50
    assert torch.equal(torch.get_rng_state(), before)
