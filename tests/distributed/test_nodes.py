"""Two nodes on one machine: ranks with a folder each, and two torchrun agents that meet on loopback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
from marks import slow
from processes import launch, start, wait_for
from run_folders import final_state, forget_after, hidden, logged_steps, losses, steps_of
from safetensors.torch import load_file, save_file

from datasets_lib.errors import UserError
from datasets_lib.file_hashes import sha256
from train import main
from trainers.engine.checkpoint.manifest import list_checkpoints, verify
from trainers.engine.distributed import collectives
from trainers.engine.distributed.shared_folders import Folders, find_folders
from trainers.engine.run.run_folder import lock_folder

COMMON = [
    "configs/tests/ddpm.json", "base.resolution=24", "base.random_flip=true", "base.max_train_steps=8",
    "base.checkpointing_steps=2",
]  # fmt: skip
LATEST, ACCUMULATED = "base.resume_from_checkpoint=latest", "base.gradient_accumulation_steps=2"
NAMES = ("first", "second")  # of hosts, and of their folders


def begin(root, *options, command=COMMON, **faults):
    """Starts two ranks on hosts of these names, each with its folder; their output is in root/log."""
    own = [[f"base.output_dir={root}/{name}"] for name in NAMES]
    faults = {"hosts": NAMES, "by_rank": own, "note_errors": f"{root}/error"} | faults
    return start(*command, *options, processes=2, faults=faults, out=root / "log")


def run(root, *options, code=0, **kept):
    """What the two ranks printed."""
    found, text = begin(root, *options, **kept).wait(300), (root / "log").read_text()
    assert (found != 0) == (code != 0), text
    return text


def error_of_both(root, *options, **kept):
    """The error that both ranks ended with."""
    run(root, *options, code=1, **kept)
    first, second = [(root / f"error-{rank}").read_text() for rank in (0, 1)]
    assert first == second
    return first


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed run: one process, one folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert launch(*COMMON, ACCUMULATED, "base.max_train_steps=12", f"base.output_dir={folder}").returncode == 0
    return folder


def until(last, folder):
    return {step: loss for step, loss in losses(folder).items() if step <= last}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A run with a folder each, and what it printed."""
    root = tmp_path_factory.mktemp("both")
    return root, run(root)


@pytest.fixture
def again(both, tmp_path):
    """A copy of that run's folders, to go on from."""
    for name in NAMES:
        shutil.copytree(both[0] / name, tmp_path / name)
    return tmp_path


def test_each_folder_holds_every_checkpoint(both, whole):
    root, text = both
    for name in NAMES:
        assert steps_of(root / name) == [8, 6, 4, 2]
        for step, folder in list_checkpoints(root / name):
            verify(folder)
            assert final_state(root / name, step) == final_state(whole, step)
    assert losses(root / "first") == until(8, whole)
    assert {path.name for path in (root / "second").iterdir()} == {".lock", *(f"checkpoint-{n}" for n in (2, 4, 6, 8))}
    assert f"output           first:{root}/first: checkpoints, logs, pictures, pipeline\n" in text
    assert f"output elsewhere second:{root}/second: checkpoints\n" in text
    assert f"The pipeline is in first:{root}/first. To load and sample it:" in text
    assert f'from_pretrained("{root}/first")' in text
    assert {path.name for path in whole.iterdir()} - {path.name for path in (root / "first").iterdir()} == {
        "checkpoint-10",
        "checkpoint-12",
    }


@pytest.mark.slow
def test_shards_are_gathered_for_each_folder(tmp_path):
    assert "FSDP2, 1/2 of the network in each process" in run(tmp_path, fsdp={})
    for step in (2, 4, 6, 8):
        verify(tmp_path / "second" / f"checkpoint-{step}")
        assert final_state(tmp_path / "first", step) == final_state(tmp_path / "second", step)


def test_one_node_goes_on_from_the_second_folder(again, whole):
    forget_after(again / "first", 4)  # so that nothing is read there
    shutil.rmtree(again / "second" / "checkpoint-8")
    shutil.rmtree(again / "second" / "checkpoint-6")
    assert main([*COMMON, ACCUMULATED, LATEST, f"base.output_dir={again}/second"]) == 0
    assert losses(again / "second") == {step: loss for step, loss in until(8, whole).items() if step > 4}
    assert final_state(again / "second", 8) == final_state(whole, 8)


def test_old_checkpoints_go_in_every_folder(tmp_path):
    run(tmp_path, "base.checkpoints_total_limit=2")
    assert [steps_of(tmp_path / name) for name in NAMES] == [[8, 6], [8, 6]]


def test_old_checkpoints_of_a_finished_run_go_in_every_folder(again):
    assert "the run is finished already" in run(again, LATEST, "base.checkpoints_total_limit=3")
    assert [steps_of(again / name) for name in NAMES] == [[8, 6, 4], [8, 6, 4]]


@pytest.mark.parametrize("rank", [slow(0), 1])
def test_a_write_that_fails_in_one_folder(tmp_path, rank):
    error = error_of_both(tmp_path, "base.max_train_steps=40", fail_write=[4, rank])
    name = NAMES[rank]
    assert f"on {name}: checkpoint-4 could not be written to {tmp_path}/{name}: [Errno 28] No space left" in error
    assert "older checkpoints are intact; make room and continue" in error
    for each in NAMES:
        assert steps_of(tmp_path / each) == [2]
        assert hidden(tmp_path / each) == [".lock"]


def test_a_name_that_one_folder_cannot_give(tmp_path):
    """The other one has given it already: that checkpoint does not count, and the ones before are kept for it."""
    error = error_of_both(tmp_path, "base.checkpoints_total_limit=1", fail_rename=[4, 1])
    assert f"on second: checkpoint-4 could not be written to {tmp_path}/second: [Errno 5] Input/output error" in error
    assert [steps_of(tmp_path / name) for name in NAMES] == [[4, 2], [2]]
    assert [hidden(tmp_path / name) for name in NAMES] == [[".lock"], [".lock"]]


def test_only_what_all_folders_have_is_gone_on_from(again, whole):
    """One is missing, one is damaged, one is another run's; the next is taken, and later ones set aside in both."""
    shutil.rmtree(again / "second" / "checkpoint-8")
    (again / "first" / "checkpoint-6" / "state.json").unlink()
    change(again / "second" / "checkpoint-4")
    text = run(again, LATEST)
    first, second = [f"{name}:{again}/{name}" for name in NAMES]
    assert f"WARNING: skipping checkpoint-8: it is missing in {second}\n" in text
    assert f"to continue from checkpoint-8, copy it from {first} to {second}, or start on first alone\n" in text
    assert f"skipping a damaged checkpoint: on first: {again}/first/checkpoint-6: state.json is missing" in text
    assert f"to continue from checkpoint-6, copy it from {second} to {first}, or start on second alone\n" in text
    assert f"WARNING: skipping checkpoint-4: it is not the same in {first} and {second}\n" in text
    assert "resumed at 2" in text
    assert losses(again / "first") == until(8, whole)
    for name, aside in zip(NAMES, ("468", "46"), strict=True):
        assert final_state(again / name, 8) == final_state(whole, 8)
        assert sorted(path.name[-1] for path in (again / name).glob("set-aside-*-checkpoint-*")) == list(aside)


def change(folder):
    """Makes it an intact checkpoint of other numbers."""
    path = folder / "optimizer.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[path.name] = [path.stat().st_size, sha256(path)]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_that_not_all_folders_have(again):
    """It is never a start at step 0."""
    first, second = [f"{name}:{again}/{name}" for name in NAMES]
    change(again / "second" / "checkpoint-4")
    text = error_of_both(again, "base.resume_from_checkpoint=checkpoint-4")
    assert text == f"resume_from_checkpoint = checkpoint-4: {first} and {second} hold different ones; copy one over"
    shutil.rmtree(again / "second")
    text = error_of_both(again, "base.resume_from_checkpoint=checkpoint-8")
    assert "on second: resume_from_checkpoint = checkpoint-8: no such folder; checkpoints in" in text
    text = error_of_both(again, LATEST)
    advice = f"to continue from checkpoint-8, copy it from {first} to {second}, or start on first alone"
    assert f"no checkpoint is intact and the same in {first} and {second}; {advice}" in text
    assert steps_of(again / "first") == [8, 6, 4, 2]


def test_each_folder_has_its_lock(tmp_path):
    (tmp_path / "second").mkdir()
    with lock_folder(tmp_path / "second"):
        error = error_of_both(tmp_path)
    assert f"on second: base.output_dir = {tmp_path}/second: in use by pid " in error
    assert not list(tmp_path.rglob(".probe-*"))


def test_a_dry_run_wants_one_folder(tmp_path):
    text = run(tmp_path, "--dry-run", code=1)  # only the first process says what a dry run failed of
    assert f"--dry-run: the processes have 2 output folders (first:{tmp_path}/.first-dry-run, second:" in text
    assert "give all of them one for it, or run it on one host" in text
    assert not list(tmp_path.rglob("*checkpoint*")) + list(tmp_path.rglob(".lock"))


def test_several_processes_in_each_folder():
    found = Folders(SimpleNamespace(process_index=1), ("a", "a", "b", "b"), ("/x", "/link", "/x", "/x"), (0, 0, 2, 2))
    assert (found.several, found.mains, found.places) == (True, [0, 2], ["a:/x", "b:/x"])
    assert (found.number, found.sharing, found.is_main) == (0, [0, 1], False)
    last = replace(found, accelerator=SimpleNamespace(process_index=2))
    assert (last.number, last.sharing, last.is_main) == (1, [2, 3], True)
    assert not replace(found, owners=(0, 0, 0, 0)).several


def test_what_one_process_sends_of_its_errors(monkeypatch):
    """A bug may hold what cannot be sent; a library's full disk is a message, with the host's name."""
    sent = []
    monkeypatch.setattr(
        collectives, "broadcast_object_list", lambda answer, from_process: sent.append(answer) or answer
    )
    process = SimpleNamespace(process_index=0)
    with pytest.raises(ZeroDivisionError):
        collectives.run_on_ranks(process, [0], lambda: 1 / 0)
    with pytest.raises(OSError, match=r"on a: \[Errno 2\] No such file") as caught:
        collectives.run_on_ranks(process, [0], lambda: os.stat("/none"), "on a: ")
    assert [str(error) for _, error in sent] == [
        "process 0 failed: ZeroDivisionError('division by zero')",
        "on a: [Errno 2] No such file or directory: '/none'",
    ]
    assert isinstance(caught.value, UserError)


def test_who_sees_what_makes_no_sense(tmp_path, monkeypatch):
    """Not one folder, and not one each: the second host sees what the first one wrote, and not the other way round."""
    for answer, text in (
        (
            [(0,), (0, 1)],
            "= /second: process 1 on second sees there what the processes .0, 1. wrote, and process 0 on first",
        ),
        ([(0,), ()], "= /second: what process 1 on second wrote there is gone at once; wait for another run"),
    ):
        gathered = iter([[(host, f"/{host}", ".probe-1") for host in NAMES], answer])
        monkeypatch.setattr(
            "trainers.engine.distributed.shared_folders.gather_object", lambda _, gathered=gathered: next(gathered)
        )
        with pytest.raises(OSError, match=text):
            find_folders(SimpleNamespace(process_index=0), tmp_path, "base.output_dir")
    assert list(tmp_path.iterdir()) == []


ELASTIC = ["base.global_batch_size=8", LATEST]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def agent(root, name, port, *options, nodes="1:2", **faults):
    """One node's torchrun, its output in root/<name>.log; the first one holds the rendezvous and is the main node."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc_per_node", "1"]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "test"]
    launcher += ["--rdzv_conf", "last_call_timeout=8", "--local_addr", "127.0.0.1", "--max_restarts", "3"]
    place = {"faults": faults, "out": root / f"{name}.log", "env": {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}}
    process = start(*COMMON, *ELASTIC, *options, launcher=launcher, forked=False, **place)
    wait_for(lambda: listens(port), process)
    return process


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def lose(agent):
    """The node is gone, with all that ran on it."""
    for process in [*psutil.Process(agent.pid).children(recursive=True), agent]:
        process.kill()
    agent.wait()


def notes_of(root):
    return sorted(json.loads(line) for path in root.glob("slots-*") for line in path.read_text().splitlines())


def slots_of(root):
    """{step: the slots of the last time that it was trained}"""
    last = {}
    for _, begun, step, slots in notes_of(root):
        before, found = last.get(step, ("", []))
        last[step] = (begun, (found if begun == before else []) + slots)
    return {step: sorted(slots) for step, (_, slots) in last.items()}


def check_whole(folder, root, whole):
    """Eight steps as undisturbed: the same numbers, and each example trained on once in all that counts."""
    assert losses(folder) == until(8, whole)
    assert final_state(folder, 8) == final_state(whole, 8)
    assert slots_of(root) == {step: list(range(8 * step, 8 * step + 8)) for step in range(8)}


@pytest.mark.slow  # test_faults.py kills one by default
def test_a_rank_is_lost_in_a_save(whole, tmp_path):
    """The other one seals its copy alone, and its host goes on from there alone, as an agent would start it."""
    noted = {"note_slots": f"{tmp_path}/slots"}
    run(tmp_path, *ELASTIC, code=1, kill_in_save=[4, 1], slow_write=2, slow_steps=0.5, **noted)
    assert [steps_of(tmp_path / name) for name in NAMES] == [[4, 2], [2]]
    assert 4 < max(logged_steps(tmp_path / "first")) < 8
    alone = [*COMMON, *ELASTIC, f"base.output_dir={tmp_path}/first"]
    assert start(*alone, faults=noted, out=tmp_path / "log").wait(300) == 0
    assert "resumed at 4" in (tmp_path / "log").read_text()
    check_whole(tmp_path / "first", tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("folders", [1, 2])
def test_a_node_is_lost(folders, whole, tmp_path, capsys):
    """The agent that is left goes on alone from the newest checkpoint; then one node goes on for more steps."""
    places, port = [tmp_path / name for name in (NAMES if folders == 2 else ("run", "run"))], free_port()
    faults = {"slow_steps": 0.3, "note_slots": f"{tmp_path}/slots"}
    first, second = [
        agent(tmp_path, name, port, f"base.output_dir={place}", **faults)
        for name, place in zip(NAMES, places, strict=True)
    ]
    wait_for(lambda: 5 in logged_steps(places[0]), first)
    lost = time.time()
    lose(second)
    assert first.wait(300) == 0
    again = next(when for when, begun, *_ in notes_of(tmp_path) if begun.endswith("x 1"))
    with capsys.disabled():
        print(f"\n{folders} folders: the first step {again - lost:.1f} s after the loss, load {os.getloadavg()[0]:.1f}")
    log = (tmp_path / "first.log").read_text()
    assert "engine           DDP; 2 processes on 2 nodes, gloo\n" in log
    assert "global batch     8 = 4 x 2 micro-batches x 1 processes\n" in log
    check_whole(places[0], tmp_path, whole)
    if folders == 2:
        assert steps_of(places[1])[0] in (2, 4)
    more = [f"base.output_dir={places[0]}", "base.max_train_steps=12", *ELASTIC]
    assert launch(*COMMON, *more).returncode == 0
    assert losses(places[0]) == losses(whole)
    assert final_state(places[0], 12) == final_state(whole, 12)


@pytest.mark.slow
def test_a_node_comes_back(whole, tmp_path):
    """The worker that is left saves at a TERM of its agent, and both go on from there."""
    options, port = [f"base.output_dir={tmp_path}/run"], free_port()
    faults, log = {"slow_steps": 2, "note_slots": f"{tmp_path}/slots"}, tmp_path / "first.log"
    first, second = [agent(tmp_path, name, port, *options, **faults) for name in NAMES]
    wait_for(lambda: 3 in logged_steps(tmp_path / "run"), first)
    lose(second)
    wait_for(lambda: "2 micro-batches x 1 processes" in log.read_text(), first)
    second = agent(tmp_path, "second", port, *options, **faults)
    assert [first.wait(300), second.wait(300)] == [0, 0]
    assert log.read_text().count("1 micro-batches x 2 processes") == 2
    assert "ended by SIGTERM after step" in log.read_text()
    check_whole(tmp_path / "run", tmp_path, whole)


def accelerated(root, name, port, *options):
    """One node's `accelerate launch` with the file for two nodes, as far as a CPU allows."""
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "configs/accelerate/two_nodes.yaml",
    ]
    launcher += ["--num_processes", "2", "--machine_rank", str(NAMES.index(name))]
    launcher += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    return start(*COMMON, *options, launcher=launcher, out=root / f"{name}.log", forked=False)


@pytest.mark.slow
@pytest.mark.parametrize("launched", [partial(agent, nodes="2"), accelerated])
def test_two_nodes_are_as_two_processes(launched, whole, tmp_path):
    """With a fixed number of nodes, in one folder."""
    port, place = free_port(), f"base.output_dir={tmp_path}/run"
    agents = [launched(tmp_path, name, port, place) for name in NAMES]
    assert [each.wait(300) for each in agents] == [0, 0]
    for text in ((tmp_path / f"{name}.log").read_text() for name in NAMES):  # each node says it
        assert "2 processes on 2 nodes, gloo\n" in text
        assert f"output           {tmp_path}/run\n" in text
    assert run_of_two(tmp_path) == {path.name for path in (tmp_path / "run").iterdir()}
    for folder in ("run", "two"):
        assert losses(tmp_path / folder) == until(8, whole)
        assert final_state(tmp_path / folder, 8) == final_state(whole, 8)


def run_of_two(root):
    """The files of a run of two processes that one agent started."""
    assert launch(*COMMON, f"base.output_dir={root}/two", processes=2).returncode == 0
    return {path.name for path in (root / "two").iterdir()}
