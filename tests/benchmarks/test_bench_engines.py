"""What scripts/benchmarks/bench.py engines counts in real steps, and the closed forms of docs/distributed.md."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scripts.benchmarks import engines, measured
from scripts.benchmarks.watching import activations
from trainers.common.model_files import Grid
from trainers.common.unet2d import build_unet2d
from trainers.engine.distributed.fsdp import UNET_BLOCKS

OPTIONS = ("ddpm", "2", "base.train_batch_size=4")
# bytes of each trained weight in each of two processes: weights, gradients, moments, averages, DDP's buckets
HELD = {
    "one process": (4, 4, 8, 4, 0),
    "DDP": (4, 4, 8, 4, 0),
    "FSDP2": (2, 2, 4, 2, 0),
    "ZeRO-2": (4 + 2, 2, 4, 2, 0),
    "ZeRO-3": (2 + 2, 2, 4, 2, 0),
}


@pytest.fixture(scope="module")
def network():
    return build_unet2d("unet_digits", None, Grid(1, 16))


def kept_by(module, *inputs):
    found = {}
    with activations(module, found):
        module(*inputs)
    return found["activations"]


def test_what_autograd_keeps_of_linear_layers():
    linears = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 16))
    assert kept_by(linears, torch.zeros(3, 4)) == 3 * 4 * (4 + 8)  # the input and the sigmoid's output


def check(engine, found, network):
    trained = sum(parameter.numel() for parameter in network.parameters())
    blocks = [module for module in network.modules() if type(module).__name__ in UNET_BLOCKS]
    gathered = trained + sum(parameter.numel() for block in blocks for parameter in block.parameters())
    messages = {  # of whole tensors
        "one process": {},
        "DDP": {"all_reduce": 4 * trained},
        "FSDP2": {"all_gather": 4 * gathered, "reduce_scatter": 4 * trained},  # what is in no block stays gathered
        "ZeRO-2": {"all_reduce": 4 * trained, "all_gather": 4 * trained},
        "ZeRO-3": {"all_gather": 2 * 4 * trained, "reduce_scatter": 4 * trained},
    }
    kinds = ("weights", "gradients", "moments", "averages", "ddp_buckets")
    expected = {kind: size * trained for kind, size in zip(kinds, HELD[engine], strict=True)}
    assert found["held"] == pytest.approx(expected, rel=1e-3)  # FSDP2 fills up what does not divide
    large = {kind: size for kind, size in found["messages"].items() if size > engines.FEW_BYTES}
    assert large == pytest.approx(messages[engine], rel=3e-3)  # ZeRO-3 keeps the smallest weights whole
    alone = kept_by(network, torch.zeros(4, 1, 16, 16), torch.zeros(4))
    assert found["activations"] == pytest.approx(
        alone, rel=0.06 if engine == "ZeRO-3" else 1e-3
    )  # its linears keep less
    if engines.own_loopback():  # gloo reduces whole tensors if a part is asked for
        factors = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 2}
        sent = sum(factors[kind] * size for kind, size in large.items())
        assert found["wire"] == pytest.approx(sent, rel=0.06)


def test_what_one_process_holds(tmp_path, network):
    found = measured.measure(str(tmp_path), "one process", *OPTIONS)
    check("one process", found | {"wire": 0.0}, network)
    assert found["batch"] == 4
    assert measured.restart(str(tmp_path), "one process", *OPTIONS) > 0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["DDP", "FSDP2", "ZeRO-2", "ZeRO-3"])
def test_what_two_processes_hold_and_send(engine, tmp_path, network):
    check(engine, engines.launched("measure", tmp_path, engine, *OPTIONS), network)


def test_a_row():
    runs = [
        {"held": {"weights": 2**21}, "activations": 2**20, "messages": {"all_reduce": 2**22, "all_gather": 16},
         "wire": wire, "step_seconds": seconds, "restart_seconds": 9.0}
        for wire, seconds in ((2**22, 0.1), (2**24, 0.3), (2**23, 0.2))
    ]  # fmt: skip
    assert engines.row(2, runs) == {
        "weights_mib": 2.0, "activations_mib": 1.0, "messages_mib": {"all_reduce": 4.0}, "sent_on_the_wire_mib": 4.0,
        "ms_per_step": 200.0, "seconds_from_restart_to_step": 9.0, "single_runs": [100.0, 300.0, 200.0],
    }  # fmt: skip
