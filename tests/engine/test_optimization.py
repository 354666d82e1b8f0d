"""Learning rates against torch's and diffusers' schedulers, AdamW, clipping, skipped steps, and the EMA."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from trainers.base import TrainerConfig
from trainers.engine.optim.ema import EMA, ema_decay, move, pieces
from trainers.engine.optim.optimizer import (
    build_optimizer,
    learning_rate_schedule,
    optimizer_step,
    set_learning_rates,
    warmup_steps,
)
from trainers.engine.run.clock import Clock

TOTAL, WARMUP = 200, 20
CLOCK = Clock(100, 4, 2, 1, max_train_steps=TOTAL)
CPU = torch.device("cpu")


def torch_rates(scheduler, optimizer, steps=TOTAL):
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def one_parameter(lr=1.0):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_schedules_that_diffusers_has(name):
    warmup = None if name == "constant" else WARMUP
    cycles = 3 if name == "cosine_with_restarts" else 1
    config = TrainerConfig(lr_scheduler=name, lr_warmup_steps=warmup, lr_num_cycles=cycles)
    optimizer = one_parameter()
    reference = torch_rates(get_scheduler(name, optimizer, None, WARMUP, TOTAL, cycles), optimizer)
    ours = learning_rate_schedule(config, TOTAL)
    assert [ours(step) for step in range(TOTAL)] == pytest.approx(reference, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "first", "after_warmup", "last"),
    [
        ("constant", 1.0, 1.0, 1.0),
        ("constant_with_warmup", 0.0, 1.0, 1.0),
        ("linear", 0.0, 1.0, 1 / 180),
        ("cosine", 0.0, 1.0, (1 + math.cos(math.pi * 179 / 180)) / 2),
        ("cosine_with_min_lr", 0.0, 1.0, 0.1 + 0.9 * (1 + math.cos(math.pi * 179 / 180)) / 2),
        ("cosine_with_restarts", 0.0, 1.0, (1 + math.cos(math.pi * 179 / 180)) / 2),
        ("polynomial", 0.0, 1.0, 1 / 180),
        ("warmup_cosine", 0.1, 1.0, (1 + math.cos(math.pi * 179 / 180)) / 2),
    ],
)
def test_schedules_at_the_first_step_after_warmup_and_at_the_last(name, first, after_warmup, last):
    config = TrainerConfig(lr_scheduler=name, lr_warmup_steps=None if name == "constant" else WARMUP)
    ours = learning_rate_schedule(config, TOTAL)
    assert (ours(0), ours(WARMUP), ours(TOTAL - 1)) == pytest.approx((first, after_warmup, last), abs=2e-7)


@pytest.mark.parametrize(("warmup", "total"), [(None, 200), (None, 107), (20, 200), (50, 200)])
def test_one_cycle_is_torchs(warmup, total):
    optimizer = one_parameter()
    share = 0.3 if warmup is None else warmup / total
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total, pct_start=share)
    reference = torch_rates(one_cycle, optimizer, total - 1)
    ours = learning_rate_schedule(TrainerConfig(lr_scheduler="one_cycle", lr_warmup_steps=warmup), total)
    assert [ours(step) for step in range(total - 1)] == pytest.approx(reference, abs=1e-9)
    assert ours(total - 1) == pytest.approx(1 / 25e4)


def test_warmup_cosine_is_torchs_sequence():
    optimizer = one_parameter()
    lr = torch.optim.lr_scheduler
    parts = [lr.LinearLR(optimizer, 0.1, total_iters=30), lr.CosineAnnealingLR(optimizer, T_max=170)]
    reference = torch_rates(lr.SequentialLR(optimizer, parts, milestones=[30]), optimizer)
    ours = learning_rate_schedule(TrainerConfig(lr_scheduler="warmup_cosine"), TOTAL)  # 15 % of 200 steps
    assert [ours(step) for step in range(TOTAL)] == pytest.approx(reference, abs=1e-9)


def test_own_warmup_of_each_schedule():
    def own(name, total):
        return warmup_steps(TrainerConfig(lr_scheduler=name), total)

    assert [own("constant", 900), own("one_cycle", 900), own("warmup_cosine", 900)] == [0, 270, 135]
    assert [own("cosine", 900), own("cosine", 100_000)] == [90, 500]
    assert warmup_steps(TrainerConfig(lr_warmup_steps=7), 900) == 7


@pytest.mark.parametrize("name", ["one_cycle", "warmup_cosine", "cosine", "linear"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_tiny_runs_have_finite_rates(name, total):
    ours = learning_rate_schedule(TrainerConfig(lr_scheduler=name), total)
    assert all(0 <= ours(step) <= 1 for step in range(total))


def test_scale_lr_and_rates_per_group():
    groups = [{"name": n, "params": [nn.Parameter(torch.ones(2))], "lr": lr} for n, lr in (("a", 0.5), ("b", 0.25))]
    optimizer = build_optimizer(groups, TrainerConfig(scale_lr=True), CLOCK, CPU)
    assert set_learning_rates(optimizer, 0.1) == pytest.approx({"lr": 0.4, "lr/b": 0.2})
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.4, 0.2])


def build(config, *parameters):
    groups = [{"name": f"net{i}", "params": [p], "lr": 0.1} for i, p in enumerate(parameters)]
    accelerator = Accelerator(cpu=True)
    return accelerator, accelerator.prepare(build_optimizer(groups, config, CLOCK, CPU))


def test_adamw_is_torchs():
    ours, reference = (nn.Parameter(torch.ones(50)) for _ in range(2))
    config = TrainerConfig(max_grad_norm=None)
    accelerator, optimizer = build(config, ours)
    plain = torch.optim.AdamW([reference], lr=0.1, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8, foreach=False)
    for step in range(5):
        for parameter in (ours, reference):
            parameter.grad = torch.randn(50, generator=torch.Generator().manual_seed(step))
        optimizer_step(accelerator, optimizer, None)
        plain.step()
    torch.testing.assert_close(ours.data, reference.data, rtol=1e-6, atol=1e-7)


def test_each_group_is_clipped_on_its_own():
    first, second = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    accelerator, optimizer = build(TrainerConfig(), first, second)
    first.grad, second.grad = torch.full((4,), 3.0), torch.full((4,), 0.1)
    seen = {}

    def remember():
        seen.update(first=first.grad.clone(), second=second.grad.clone())

    optimizer.optimizer.register_step_pre_hook(lambda *_: remember())
    applied, norms = optimizer_step(accelerator, optimizer, 1.0)
    assert {name: norm.item() for name, norm in norms.items()} == pytest.approx(
        {"grad_norm/net0": 6, "grad_norm/net1": 0.2}
    )
    assert seen["first"].norm().item() == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(seen["second"], torch.full((4,), 0.1))
    assert applied == 1
    assert first.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    module = nn.Linear(3, 1)
    config = TrainerConfig()
    groups = [{"name": "net", "params": list(module.parameters()), "lr": 0.1}]
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(build_optimizer(groups, config, CLOCK, CPU))
    ema = EMA({"net": module}, config)

    def step(number, factor):
        (module(torch.ones(2, 3)).sum() * factor).backward()
        applied, _ = optimizer_step(accelerator, optimizer, 1.0)
        ema.update(number, applied)
        return applied.item()

    def everything():
        state = [value.clone() for values in optimizer.optimizer.state.values() for value in values.values()]
        return [p.detach().clone() for p in module.parameters()] + list(map(torch.clone, ema.averages.values())) + state

    assert step(0, 1.0) == 1
    assert step(1, 1.0) == 1
    before = everything()
    assert step(2, bad) == 0
    assert all(torch.equal(old, new) for old, new in zip(before, everything(), strict=True))
    assert step(3, 1.0) == 1
    assert not torch.equal(before[0], module.weight)


def test_a_group_without_gradients_is_left_alone():
    first, second = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    accelerator, optimizer = build(TrainerConfig(), first, second)
    first.grad = torch.ones(4)
    applied, norms = optimizer_step(accelerator, optimizer, 1.0)
    assert (applied, norms["grad_norm/net1"]) == (1, 0)
    assert torch.equal(second.data, torch.ones(4))
    assert second not in optimizer.optimizer.state


def test_errors_of_the_optimizer():
    def build_with(parameters, **options):
        return build_optimizer([{"name": "net", "params": parameters, "lr": 1}], TrainerConfig(**options), CLOCK, CPU)

    with pytest.raises(ValueError, match="network net has no trainable parameters"):
        build_with([])
    with pytest.raises(ValueError, match=r"network net trains weights in .*bfloat16.*use float32"):
        build_with([nn.Parameter(torch.ones(1, dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match="needs a CUDA device, this run is on cpu"):
        build_with([nn.Parameter(torch.ones(1))], optimizer="adamw_8bit")


@pytest.mark.parametrize("piece", [1 << 24, 1], ids=["at once", "in pieces"])
@pytest.mark.parametrize("settings", [{}, {"ema_inv_gamma": 5.0, "ema_power": 2 / 3, "ema_max_decay": 0.8}])
def test_ema_is_diffusers(settings, piece, monkeypatch):
    monkeypatch.setattr("trainers.engine.optim.ema.PIECE", piece)
    config = TrainerConfig(**settings)
    module = nn.Linear(4, 4)
    theirs = EMAModel(
        module.parameters(),
        decay=config.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=config.ema_inv_gamma,
        power=config.ema_power,
        foreach=True,
    )
    ours = EMA({"net": module}, config)
    for step in range(30):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        theirs.step(module.parameters())
        ours.update(step, torch.tensor(1.0))
        assert ema_decay(step, config) == theirs.cur_decay_value
    for average, expected in zip(ours.averages.values(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("piece", "lengths"), [(1, [1, 1, 1, 1]), (13, [2, 1, 1]), (14, [2, 2]), (10**6, [4])])
def test_the_average_of_a_gpu_moves_in_pieces(monkeypatch, piece, lengths):
    monkeypatch.setattr("trainers.engine.optim.ema.PIECE", piece)
    shapes = [(3, 4), (1,), (13,), ()]
    averages, weights = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    assert [len(some) for some, _ in pieces(averages, weights)] == lengths
    expected = [torch.lerp(average, weight, 0.25) for average, weight in zip(averages, weights, strict=True)]
    move(averages, weights, torch.tensor(0.25))
    torch.testing.assert_close(averages, expected, rtol=1e-6, atol=1e-6)


def test_ema_is_put_in_place_and_taken_back_even_after_an_error():
    module = nn.Linear(2, 2)
    ema = EMA({"net": module}, TrainerConfig())
    own = module.weight.detach().clone() + 1
    module.weight.data.copy_(own)

    def fail_inside():
        with ema.applied():
            assert torch.equal(module.weight, ema.averages["net.weight"])
            assert not torch.equal(module.weight, own)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert torch.equal(module.weight, own)
