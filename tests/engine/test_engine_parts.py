"""Parts of the engine on their own: frozen stages, the meter, export, the run folder, fp16's scaler."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from trainers.base import Encoder, TrainerConfig
from trainers.engine.checkpoint.snapshot import trained_state
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.distributed.launch import numerics
from trainers.engine.distributed.sharding import Part
from trainers.engine.encoders.stages import FrozenEncoders
from trainers.engine.optim.networks import filled
from trainers.engine.optim.optimizer import build_optimizer, optimizer_step
from trainers.engine.run.clock import Clock
from trainers.engine.run.run_folder import cut_lines, publish_pipeline
from trainers.engine.tracking.meters import Meter, Speed
from trainers.engine.validation.sampling import evaluation_mode

CPU = torch.device("cpu")


def doubling(built, writes=("latent",)):
    def build():
        built.append(1)
        return nn.Linear(2, 2)

    return Encoder("image", ("latent",), build, lambda module, x: {name: 2 * torch.as_tensor(x) for name in writes})


def test_frozen_stages_are_built_once_and_when_needed():
    built = []
    stages = FrozenEncoders({"vae": doubling(built)}, CPU)
    assert built == []
    batch = {"image": torch.ones(3, 2, requires_grad=True), "slot": torch.arange(3)}
    encoded = stages.encode(batch)
    assert torch.equal(encoded["latent"], torch.full((3, 2), 2.0))
    assert not encoded["latent"].requires_grad
    assert "latent" not in batch
    stages.encode(batch)
    assert torch.equal(stages.encoded("vae", torch.ones(2))["latent"], torch.full((1, 2), 2.0))
    assert built == [1]
    module = stages._built["vae"]
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


def test_a_released_encoder_is_built_again_where_it_is_needed():
    built = []
    stages = FrozenEncoders({"vae": doubling(built)}, CPU)
    stages.run("vae", torch.ones(1))
    stages.release("vae")
    stages.release("vae")  # nothing is there any more
    assert stages._built == {}
    stages.run("vae", torch.ones(1))
    assert built == [1, 1]


def test_errors_of_frozen_stages():
    stages = FrozenEncoders({"vae": doubling([])}, CPU)
    with pytest.raises(ValueError, match="encoder vae reads 'image'; the data set has caption"):
        stages.encode({"caption": ["a"]})
    stages.encoders["vae"].optional = True
    assert stages.encode({"caption": ["a"]}) == {"caption": ["a"]}
    with pytest.raises(ValueError, match=r"encoder vae wrote \['mean'\]; its `writes` says \['latent'\]"):
        FrozenEncoders({"vae": doubling([], writes=("mean",))}, CPU).encode({"image": torch.ones(1)})


def test_the_meter_leaves_out_what_is_not_finite():
    meter = Meter(Accelerator(cpu=True))
    for value in (1.0, math.nan, 3.0, math.inf):
        meter.add({"loss": torch.tensor(value)})
    meter.add({"rare": torch.tensor(math.nan)})
    means = meter.means()
    assert means["loss"] == 2.0
    assert math.isnan(means["rare"])
    assert meter.means() == {}


def test_the_meter_reads_now_and_then_and_copies_what_it_takes(monkeypatch):
    monkeypatch.setattr("trainers.engine.tracking.meters.UNREAD_CALLS", 3)
    meter, value = Meter(Accelerator(cpu=True)), torch.tensor(0.0)
    for number in range(8):
        value.fill_(number)
        meter.add({"loss": value, "norm": 2 * value})
        assert len(meter.unread) == (number + 1) % 3
    assert meter.means() == {"loss": 3.5, "norm": 7.0}


def test_an_open_window_is_saved_and_taken_up():
    accelerator = Accelerator(cpu=True)
    whole, first, second = Meter(accelerator), Meter(accelerator), Meter(accelerator)
    values = list(torch.rand(5))
    for value in values:
        whole.add({"loss": value})
    for value in values[:3]:
        first.add({"loss": value})
    second.load(first.state())
    for value in values[3:]:
        second.add({"loss": value})
    assert second.means() == whole.means()
    second.load({})
    assert second.state() == {}
    two_processes = {"names": ["loss"], "windows": [[[1.0, 1.0]], [[3.0, 1.0]]]}
    second.load(two_processes)
    assert second.means() == {"loss": 2.0}


def test_speed_does_not_count_pauses(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 6.0, 6.0])
    monkeypatch.setattr("trainers.engine.tracking.meters.time.perf_counter", lambda: next(now))
    speed = Speed()
    speed.examples += 30
    with speed.paused():
        pass
    assert speed.metrics() == {"examples_per_second": 30 / (6 - 3)}


def test_tied_weights_are_saved_by_all_of_their_names_and_frozen_ones_by_none():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    network[1].weight = network[0].weight
    network[2].weight.requires_grad_(False)
    state = trained_state(network)
    assert all(isinstance(state[name], Part) for name in ("0.weight", "1.weight"))
    assert state["1.weight"].parameter is network[0].weight
    assert state.keys() == network.state_dict().keys() - {"2.weight"}


def test_a_copy_is_filled_with_other_numbers():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    weights = {
        name: torch.full_like(tensor, 2) for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }
    copied = filled(network, weights).eval()
    assert torch.equal(copied(torch.zeros(1, 2)), torch.full((1, 2), 2.0))  # (2 - 2) / sqrt(2) * 2 + 2
    assert not torch.equal(network[0].weight, copied[0].weight)
    assert network.training
    assert not copied.training


def test_evaluation_mode_puts_every_module_back():
    class Fake:
        modules = {"net": nn.Sequential(nn.Dropout(), nn.Dropout())}  # noqa: RUF012
        training = True

    fake = Fake()
    fake.modules["net"][0].eval()

    def fail_inside():
        with evaluation_mode(fake):
            assert not fake.training
            assert not any(module.training for module in fake.modules["net"].modules())
            assert not torch.is_grad_enabled()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert fake.training
    assert [module.training for module in fake.modules["net"].modules()] == [True, False, True]


def test_numerics_are_put_back():
    with numerics(BaseConfig(allow_tf32=True, deterministic=True)):
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_pipeline_replaces_the_one_before(tmp_path):
    for version in ("old", "new"):
        staging = tmp_path / "staging"
        (staging / "unet").mkdir(parents=True)
        (staging / "unet" / version).write_text(version)
        (staging / "model_index.json").write_text(version)
        assert publish_pipeline(staging, tmp_path) == ["model_index.json", "unet"]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "model_index.json",
        "unet",
        "unet/new",
    ]
    assert (tmp_path / "model_index.json").read_text() == "new"


def test_metrics_are_cut_after_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_lines(path, 3)
    path.write_text('{"step": 2}\n{"step": 3}\n{"step": 4}\n{"step": 3, "to')
    cut_lines(path, 3)
    assert path.read_text() == '{"step": 2}\n{"step": 3}\n'


def test_fp16_overflow_skips_the_step_and_lowers_the_scale():
    """The scaler of fp16 runs on CPU tensors too: gradients are unscaled once, an overflow changes no weight."""
    parameter = nn.Parameter(torch.ones(4))
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    groups = [{"name": "net", "params": [parameter], "lr": 0.1}]
    optimizer = accelerator.prepare(build_optimizer(groups, TrainerConfig(), Clock(1, 1, 1, 1, max_train_steps=1), CPU))

    def step(factor):
        accelerator.scaler.scale((parameter * factor).sum()).backward()
        return optimizer_step(accelerator, optimizer, 1.0)

    applied, norms = step(3.0)
    assert (applied.item(), norms["grad_norm/net"].item()) == (1.0, pytest.approx(6.0))
    moved = parameter.detach().clone()
    assert torch.allclose(moved, torch.full((4,), 0.9 * 1.0 + 0.0, dtype=torch.float32), atol=2e-3)
    applied, _ = step(math.inf)
    assert applied.item() == 0.0
    assert torch.equal(parameter.detach(), moved)
    assert accelerator.scaler.get_scale() == 512.0
