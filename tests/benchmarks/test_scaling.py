"""The model of a step on many processes: closed forms by hand, and counts without memory beside those of real passes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from repository import ROOT
from torch import Size, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scripts.benchmarks import engines, measured, predictions, scaling
from scripts.benchmarks.counting import Network, Passes, bytes_of, count, passes_of, saving, units_of, zeros
from scripts.benchmarks.predictions import CASES
from scripts.benchmarks.scaling import Collective, Hardware, exchanged, held, part, step
from trainers.common.diffusion.dit_transformer import build_dit
from trainers.common.model_files import Grid
from trainers.common.unet2d import build_unet2d

PASSES = Passes(100, 200, 90, 1000, 300, 400, 50)
# 4 numbers in no block, blocks of 30 and 70
SMALL = Network([[Size([4])], [Size([5, 6])], [Size([7, 10])]], 3, {"no": PASSES})


def total(engine, processes, width=4, **more):
    return sum(held(engine, SMALL, processes, width, **more).values())


def test_bytes_in_each_process():
    for engine in ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3"):
        assert total(engine, 1) == 104 * (4 + 4 + 8 + 4)
    assert held("DDP", SMALL, 64, 4) == {
        "weights": 416, "gradients": 416, "moments": 832, "averages": 416, "gradients in flight": 416, "gathered weights": 0,
    }  # fmt: skip
    # 1 of 4, 6 of 5 x 6 (3 rows of 2 processes, 2 of 4), 10 of 7 x 10
    assert [part(SMALL.units, processes) for processes in (2, 4, 8)] == [2 + 18 + 40, 1 + 12 + 20, 1 + 6 + 10]
    assert held("FSDP2", SMALL, 4, 2) == {
        "weights": 4 * 33, "gradients": 4 * 33, "moments": 8 * 33, "averages": 4 * 33,
        "gradients in flight": (2 + 4) * 70, "gathered weights": 2 * (4 + 2 * 70),
    }  # fmt: skip
    assert held("FSDP2", SMALL, 4, 2, micro_batches=2)["gradients"] == 4 * 104
    assert held("ZeRO-2", SMALL, 4, 4)["weights"] == 4 * 26 + 4 * 104
    assert total("ZeRO-2", 4) == 4 * 104 + 26 * (4 + 4 + 8 + 4) + 4 * 104
    assert total("ZeRO-3", 4) == 26 * (4 + 4 + 4 + 8 + 4) + 4 * 104 + 4 * 104
    with pytest.raises(ValueError, match="engine DP: must be DDP, FSDP2, ZeRO-2 or ZeRO-3"):
        held("DP", SMALL, 2, 4)


def sent(engine, processes, factors=scaling.RING, **more):
    return sum(each.sent(processes, factors) for each in exchanged(engine, SMALL, processes, 4, **more))


def test_bytes_that_each_process_sends():
    assert sent("DDP", 1) == 0
    assert sent("DDP", 4) == sent("DDP", 4, micro_batches=3) == 2 * 3 / 4 * 4 * 104
    whole, blocks = 4 * 4 * 33, 4 * 4 * 32  # with what fills up
    assert sent("FSDP2", 4) == 3 / 4 * (whole + blocks + whole)
    assert sent("FSDP2", 4, scaling.GLOO) == 3 / 4 * (whole + blocks + 2 * whole)
    assert sent("FSDP2", 4, micro_batches=3) == 3 / 4 * (3 * (whole + blocks) + whole)
    assert sent("ZeRO-2", 4) == 3 / 4 * (2 + 1) * 4 * 104
    assert sent("ZeRO-3", 4) == 3 / 4 * (1 + 1 + 1) * 4 * 104
    halves = sum(each.sent(4) for each in exchanged("FSDP2", SMALL, 4, 2))
    assert halves == 3 / 4 * (whole / 2 + blocks / 2 + whole)
    assert [each.count for each in exchanged("FSDP2", SMALL, 4, 4, micro_batches=2)] == [6, 4, 3]


def test_seconds_of_messages():
    hardware = Hardware(
        nvlink_gb_per_second=100,
        network_gb_per_second=5,
        bandwidth_reached=0.5,
        node_latency_us=1,
        network_latency_us=10,
    )
    reduced, gathered = Collective("all_reduce", "backward", 2, 10**9), Collective("all_gather", "forward", 3, 10**9)
    assert hardware.seconds(reduced, 8) == pytest.approx(2 * 2 * 3e-6 + 2 * 7 / 8 / 50)
    # on 4 nodes the 8 cards of each are slower than NVLink: 40 GB/s, half of which is reached
    assert hardware.seconds(reduced, 32) == pytest.approx(2 * 2 * (3e-6 + 2 * 10e-6) + 2 * 31 / 32 / 20)
    assert hardware.seconds(gathered, 32) == pytest.approx(3 * (28e-6 + 3 * 10e-6) + 31 / 32 / 20)


def test_what_hides_behind_the_passes():
    hardware = Hardware(flops_per_second=100, utilisation=0.5, overlap=0.5, memory_gb_per_second=72e-9)
    messages = [Collective("all_gather", "forward", 4, 0), Collective("reduce_scatter", "backward", 5, 0)]
    seconds = {"all_gather": 1.0, "reduce_scatter": 10.0}
    found = step({"forward": 100, "backward": 200}, 3, messages, lambda each: seconds[each.kind], hardware)
    assert (found.compute, found.update, found.communication) == (6.0, 3.0, 11.0)
    assert found.exposed == max(1 - 0.5 * 2, 1 / 4) + max(10 - 0.5 * 4, 10 / 5)  # one message hides behind nothing
    assert found.seconds == 6 + 3 + 8.25
    late = step({"forward": 100}, 0, [Collective("all_gather", "update", 1, 0)], lambda each: 7.0, hardware)
    assert late.exposed == 7


def test_passes_of_a_step():
    assert scaling.flops_of(PASSES, 2, False) == {"forward": 200, "backward": 400}
    assert scaling.flops_of(PASSES, 2, True) == {"forward": 200, "backward": 580}
    assert scaling.activations(PASSES, 2, False) == 2050
    assert scaling.activations(PASSES, 2, True) == 2 * 700 + 50


def test_assumptions_can_be_changed():
    assert scaling.assumptions(["overlap=0.5", "memory_gb=141"]) == Hardware(overlap=0.5, memory_gb=141)
    with pytest.raises(
        ValueError, match="--assume speed=1: speed is unknown; must be one of flops_per_second, utilisa"
    ):
        scaling.assumptions(["speed=1"])
    for wrong in ("overlap", "overlap=much", "overlap=0"):
        with pytest.raises(ValueError, match=f"--assume {wrong}: must be NAME=VALUE with a number above 0"):
            scaling.assumptions([wrong])


class Linears(nn.Module):
    """A linear layer outside of blocks and one that is a block."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.block = nn.Linear(4, 8), nn.Linear(8, 16), lambda module, *inputs: module(*inputs)

    def enable_gradient_checkpointing(self, function):
        self.block = function

    def forward(self, sample):
        return SimpleNamespace(sample=self.block(self.second, self.first(sample).sigmoid()))


def test_linear_layers_by_hand():
    found = passes_of(Linears(), lambda size: {"sample": torch.zeros(size, 4)}, "no")
    first, second = 2 * 4 * 8, 2 * 8 * 16
    assert found == Passes(
        forward_flops=first + second,
        backward_flops=first + 2 * second,  # nothing asks for the gradient of the input
        again_flops=second,
        kept=4 * (4 + 8),  # the input and the sigmoid's output, which is the second layer's input
        outside=4 * (4 + 8),
        block=0,
        copies=0,
    )


GRID = Grid(1, 16)
TINY = {
    "unet": (lambda: build_unet2d("configs/tests/models/unet2d.json", None, GRID), zeros(sample=(1, 16, 16))),
    "dit": (
        lambda: build_dit("configs/tests/models/dit_transformer.json", None, GRID, 10),
        zeros(hidden_states=(1, 16, 16), class_labels=()),
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_activations_without_memory_are_those_of_real_passes(name):
    build, inputs = TINY[name]
    counted = count(build, inputs, ("no",), cuda=False)
    network = build().train()
    kept = {}
    with saving(network, kept):
        network(**inputs(5))
    assert bytes_of(kept) == scaling.activations(counted.passes["no"], 5, False) > 10_000
    network.enable_gradient_checkpointing()  # by torch, as base.gradient_checkpointing does
    kept = {}
    with saving(network, kept):
        network(**inputs(5))
    found = counted.passes["no"]
    assert bytes_of(kept) == 5 * found.outside + found.copies
    assert found.outside + found.block < found.kept
    assert counted.parameters == sum(p.numel() for p in network.parameters())
    assert 0 < found.again_flops <= found.forward_flops < found.backward_flops


def test_half_precision_needs_less_and_autocast_copies_of_weights():
    found = count(*TINY["dit"], ("no", "autocast", "bf16"), cuda=False).passes
    assert found["bf16"].kept < 0.6 * found["no"].kept
    assert found["no"].copies == found["bf16"].copies == 0 < found["autocast"].copies
    on_cuda = count(*TINY["dit"], ("autocast",), cuda=True).passes["autocast"]
    assert on_cuda.kept > found["autocast"].kept  # its norms are in float32


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("SD 1.5, 512 px", 859_520_964), ("SDXL, 1024 px", 2_567_463_684), ("DiT 2B, 512 px", 1_983_682_576)],
)
def test_large_networks_have_the_shapes_they_are_known_by(name, parameters):
    with FakeTensorMode():
        units = units_of(CASES[name].build())
    assert sum(shape.numel() for unit in units for shape in unit) == parameters
    assert name != "DiT 2B, 512 px" or 1.9e9 < parameters < 2.2e9


def test_the_engine_to_take():
    def rows(*rates):
        return [{"fits": fits, "images_per_second": rate} for fits, rate in rates]

    fast = rows(("no", 200.0), ("yes", 92.0), ("yes", 100.0))
    assert predictions.taken(fast) is fast[1]  # within a tenth of the fastest
    slow = rows(("yes", 80.0), ("yes", 100.0))
    assert predictions.taken(slow) is slow[1]
    assert predictions.taken(rows(("no", 1.0))) is None


def test_a_row_of_predictions():
    case = predictions.Case(None, None, 4, True)
    network = SMALL._replace(passes={"autocast": PASSES, "bf16": PASSES})
    row = predictions.predicted("DDP", case, network, 8, Hardware())
    assert row["memory_gb"] == pytest.approx((104 * 24 + 4 * 700 + 50) / 1e9)
    assert (row["fits"], row["global_batch"]) == ("yes", 32)
    assert row["images_per_second"] == pytest.approx(32_000 / row["ms_per_step"])
    assert row["ms_per_step"] == pytest.approx(row["ms_in_passes"] + row["in_the_update"] + row["waiting"])
    assert 0 < row["efficiency"] < 1
    assert predictions.predicted("DDP", case, network, 8, Hardware(memory_gb=1e-6))["fits"] == "no"
    assert predictions.described(Hardware()).startswith(
        "assumed flops per second 9.89e+14, utilisation 0.35, memory gb 80,"
    )


def check(engine, found, task="ddpm"):
    network = count(*engines.NETWORKS[task], ("no",), cuda=False)
    row = engines.bytes_of(engine, network, [found])
    pairs = {name: pair for name, pair in row.items() if isinstance(pair, tuple) and pair[0] != "-"}
    assert len(pairs) >= 5
    for name, (here, calculated) in pairs.items():
        tolerance = (
            0.06 if (engine, name) == ("ZeRO-3", "activations_mib") else 1e-3
        )  # it keeps some inputs in its own way
        assert here == pytest.approx(calculated, rel=tolerance), name
    assert row["in_messages"] == pytest.approx(row["calculated"], rel=3e-3)
    return row


def test_what_one_process_holds(tmp_path):
    found = measured.measure(str(tmp_path), "one process", "ddpm", "2", "base.train_batch_size=4")
    row = check("one process", found)
    assert row["sent_on_the_wire_mib"] == row["on_a_ring"] == 0
    assert measured.restart(str(tmp_path), "one process", "ddpm", "2", "base.train_batch_size=4") > 0
    times = engines.times_of("one process", SMALL, [found | {"restart_seconds": 1.0}], [found], [])
    assert times["ms_per_step"] > 0
    assert times["predicted"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["DDP", "FSDP2", "ZeRO-2", "ZeRO-3"])
def test_what_two_processes_hold_and_send(engine, tmp_path):
    found = engines.launched("measure", tmp_path, engine, "ddpm", 2, "base.train_batch_size=4")
    row = check(engine, found)
    if engines.own_loopback():
        assert row["sent_on_the_wire_mib"] == pytest.approx(row["calculated"], rel=0.05)
    links = engines.launched("links", tmp_path, "DDP", 3)
    assert links.keys() == {"all_reduce", "all_gather", "reduce_scatter"}
    assert all(seconds > 0 for seconds, _ in links.values())


def test_a_step_of_two_processes_is_one_and_its_messages():
    runs, alone = [{"step_seconds": 0.4, "restart_seconds": 9.0}], [{"step_seconds": 0.2}]
    links = [{"all_reduce": [0.01, 1e-4]}, {"all_reduce": [0.03, 3e-4]}, {"all_reduce": [0.02, 2e-4]}]
    row = engines.times_of("DDP", SMALL, runs, alone, links)
    [message] = exchanged("DDP", SMALL, 2, 4)
    predicted = 0.2 + message.count * 0.02 + 416 * 2e-4
    assert row["predicted"] == pytest.approx(1000 * predicted)
    assert row["predicted_over_measured"] == pytest.approx(predicted / 0.4)
    assert math.isclose(row["ms_per_step"], 400)


def test_the_document_has_places_for_the_tables():
    page = (ROOT / "docs/distributed.md").read_text()
    for table in ("engines", "steps", "predictions", "memory"):
        assert f"<!-- {table} -->\n" in page
        assert f"<!-- end of {table} -->" in page
