"""Runs that are killed, disks that fill up, files that rot: nothing that was sealed is lost, and nothing else is loaded."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate import Accelerator
from marks import slow
from processes import Forked, start, wait_for
from repository import ROOT, tiny
from run_folders import final_state, logged_steps, losses, read_metrics, steps_of

from train import main, train
from trainers.base import Trainer, TrainerConfig
from trainers.engine.checkpoint import load, writer
from trainers.engine.checkpoint.find import find_checkpoint
from trainers.engine.checkpoint.manifest import DamagedCheckpoint, list_checkpoints, verify
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import RunConfig, load_config
from trainers.engine.data import workers
from trainers.engine.distributed.shared_folders import find_folders
from trainers.engine.run.context import RunContext

KILLED = [
    "configs/tests/ddpm.json", "base.max_train_steps=12", "base.checkpointing_steps=2", "base.valid_steps=3",
    "base.checkpoints_total_limit=2", "base.save_model_steps=4", "base.random_flip=true", "base.resolution=24",
    "base.resume_from_checkpoint=latest",
]  # fmt: skip


def run_child(folder, faults=None, kill_after=None):
    """(exit code, seconds, output) of a run that is killed after some seconds, or by its faults, or not at all."""
    log = folder.with_suffix(".log")
    began = time.monotonic()
    run = Forked([*KILLED, f"base.output_dir={folder}"], faults=faults, out=log)
    try:
        run.wait(kill_after)
    except subprocess.TimeoutExpired:
        run.kill()
    return run.wait(), time.monotonic() - began, log.read_text()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, _, _ = run_child(folder)
    assert code == 0
    _, seconds, _ = run_child(folder.with_name("timed"))  # the first one waited for the imports
    _, _, output = run_child(folder.with_name("traced"), {"kill_at_line": 0})
    return folder, seconds, int(output.rpartition(" lines")[0].split()[-1])


@pytest.mark.parametrize("points", [2, slow(6), slow(50)])
def test_kill_9_at_random_points(uninterrupted, tmp_path, points, capsys):
    """Half of the points by time, half at a line of the modules that write files."""
    whole, seconds, lines = uninterrupted
    rng, table = random.Random(points), []
    for number in range(points):
        folder = tmp_path / str(number)
        if number % 2:
            point = {"line": rng.randrange(1, lines - 50)}  # it is some lines shorter where a write is done sooner
            code, _, _ = run_child(folder, {"kill_at_line": point["line"]})
            assert code == -signal.SIGKILL
        else:
            point = {"seconds": round(rng.uniform(0.1, seconds), 2)}
            run_child(folder, kill_after=point["seconds"])
        sealed = list_checkpoints(folder)
        for _, path in sealed:
            verify(path)  # whatever has its name is whole
        newest = sealed[0][0] if sealed else 0
        logged = max(logged_steps(folder), default=0)
        code, _, output = run_child(folder)
        assert code == 0, output
        begun = f"resumed at {newest}" if newest else "starting at step 0"
        assert begun in output
        assert final_state(folder, 12) == final_state(whole, 12)
        assert losses(folder) == losses(whole)
        validations = [[line["step"] for line in read_metrics(path, prefix="valid")] for path in (folder, whole)]
        assert validations[0] == validations[1] == [3, 6, 9, 12]
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())
        table.append(point | {"killed at": logged, "resumed at": newest, "lost": logged - newest})
        shutil.rmtree(folder)
    with capsys.disabled():
        lost = [row["lost"] for row in table]
        print(f"\n{points} kills: 0 unloadable, steps lost {sum(lost) / points:.2f} on average, {max(lost)} at most")
        if points > 10:
            print("\n".join(map(str, table)))
    assert max(lost) <= 4  # checkpoints are two steps apart, and one may be in flight


@pytest.mark.parametrize("step", [slow(6), 12])
def test_kill_9_between_a_seal_and_the_removal_of_older_checkpoints(uninterrupted, tmp_path, step):
    """The run that is resumed removes what exceeds the limit, also if it was finished."""
    whole, folder = uninterrupted[0], tmp_path / "run"
    code, _, _ = run_child(folder, {"kill_before_prune": step})
    assert code == -signal.SIGKILL
    assert steps_of(folder) == [step, step - 2, step - 4]
    code, _, output = run_child(folder)
    assert code == 0, output
    assert f"resumed at {step}" in output
    assert steps_of(folder) == [12, 10]
    assert final_state(folder, 12) == final_state(whole, 12)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.parametrize("rank", [slow(0), 1])
def test_one_rank_of_two_is_killed_in_a_save(tmp_path, rank):
    folder = tmp_path / "run"
    faults = {"slow_write": 2, "kill_in_save": [4, rank]}
    options = [f"base.output_dir={folder}", "base.checkpointing_steps=2"]
    process = start("configs/tests/ddpm.json", *options, processes=2, faults=faults)
    assert process.wait(300) != 0
    sealed = [step for step, _ in list_checkpoints(folder)]
    assert sealed == [2] if rank == 0 else sealed in ([2], [4, 2])  # the writer may finish when the other one is gone
    assert bool(list(folder.glob(".tmp-checkpoint-4-*"))) == (4 not in sealed)
    for _, path in list_checkpoints(folder):
        verify(path)
    again = ["configs/tests/ddpm.json", *options, "base.resume_from_checkpoint=latest"]
    assert main([*again, "base.gradient_accumulation_steps=2"]) == 0
    assert (
        main(["configs/tests/ddpm.json", f"base.output_dir={tmp_path}/whole", "base.gradient_accumulation_steps=2"])
        == 0
    )
    assert final_state(folder) == final_state(tmp_path / "whole")
    assert not list(folder.glob(".tmp-*"))


DAMAGES = {
    "missing": lambda path, rng: path.unlink(),
    "truncated": lambda path, rng: os.truncate(path, rng.randrange(1, path.stat().st_size)),
    "emptied": lambda path, rng: os.truncate(path, 0),
    "bit-flipped": lambda path, rng: flip_a_bit(path, rng),
    "longer": lambda path, rng: path.write_bytes(path.read_bytes() + b"\0"),
    "a folder": lambda path, rng: (path.unlink(), path.mkdir()),
}


def flip_a_bit(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    return train(load_config(tiny("ddpm"), [f"base.output_dir={folder}", "base.checkpointing_steps=3"]))


@pytest.fixture
def two_checkpoints(trained, tmp_path):
    """The folder of a finished run with checkpoints 3 and 6."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_every_file_of_a_checkpoint_in_every_way(two_checkpoints, tmp_path, monkeypatch, capsys):
    """Each is found before a tensor is loaded, and `latest` takes the checkpoint before with a loud line."""
    monkeypatch.setattr(load, "load_file", lambda path: pytest.fail(f"{path} was loaded"))
    accelerator, rng, found = Accelerator(), random.Random(0), 0
    newest, folders = two_checkpoints / "checkpoint-6", find_folders(accelerator, two_checkpoints, "base.output_dir")

    def find(name):
        base = BaseConfig(output_dir=str(two_checkpoints), resume_from_checkpoint=name)
        run = RunConfig("ddpm", base, TrainerConfig(), Trainer)
        return find_checkpoint(RunContext(accelerator, run, folders, held=None, stop=None))

    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(files) == 7
    for file in files:
        for apply in DAMAGES.values():
            shutil.copytree(newest, tmp_path / "intact")
            apply(newest / file, rng)
            with pytest.raises(DamagedCheckpoint):
                verify(newest)
            assert find("latest").name == "checkpoint-3"
            assert "WARNING: skipping a damaged checkpoint" in capsys.readouterr().out
            with pytest.raises(DamagedCheckpoint):
                find("checkpoint-6")
            shutil.rmtree(newest)
            (tmp_path / "intact").rename(newest)
            found += 1
    verify(newest)
    with capsys.disabled():
        print(f"\n{len(files)} files x {len(DAMAGES)} damages: {found} of {found} found")


@pytest.mark.parametrize("bits_of_a_byte", [1, slow(8)])
def test_no_bit_of_a_manifest_can_flip(two_checkpoints, bits_of_a_byte):
    """It has no checksum of its own, so its bits are tried: one of each byte, or all."""
    newest = two_checkpoints / "checkpoint-6"
    for path in list(newest.rglob("*.safetensors")):  # the manifest's own bits are the point; hash little
        path.write_bytes(b"x")
    digest = {
        str(p.relative_to(newest)): [p.stat().st_size, writer.sha256(p)]
        for p in newest.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }
    manifest = newest / "manifest.json"
    manifest.write_text(json.dumps(digest, indent=1))
    verify(newest)
    content = manifest.read_bytes()
    for byte, bit in itertools.product(range(len(content)), range(bits_of_a_byte)):
        flipped = bytearray(content)
        flipped[byte] ^= 1 << (byte + bit) % 8
        manifest.write_bytes(flipped)
        with pytest.raises(DamagedCheckpoint):
            verify(newest)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_pickles_are_refused_and_never_run(two_checkpoints, tmp_path, tiny_config, capsys):
    marker, newest = tmp_path / "ran", two_checkpoints / "checkpoint-6"
    attack = pickle.dumps(Payload(marker))
    (newest / "custom_checkpoint_0.pkl").write_bytes(attack)
    with pytest.raises(
        DamagedCheckpoint, match=r"custom_checkpoint_0.pkl, which diffloop does not write there; it could run code"
    ):
        verify(newest)
    (newest / "custom_checkpoint_0.pkl").unlink()
    weights = newest / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(attack)  # with a manifest that agrees
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["unet/diffusion_pytorch_model.safetensors"] = [len(attack), writer.sha256(weights)]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(two_checkpoints, tmp_path / "again")
    assert main([str(tiny_config(name="again", **{"base.resume_from_checkpoint": "latest"}))]) == 1
    assert "is not a safetensors file" in capsys.readouterr().err
    assert not marker.exists()
    os.system(f"touch {marker}")  # the payload would have worked
    assert marker.exists()


@pytest.mark.parametrize(
    "name", ["custom_checkpoint_0.PKL", ".metadata", "0.distcp", "pickle", "more.json", "link.json"]
)
def test_a_file_that_the_manifest_does_not_name_is_refused(two_checkpoints, name):
    path = two_checkpoints / "checkpoint-6" / "unet" / name
    path.symlink_to("/etc/hostname") if name == "link.json" else path.write_bytes(b"x")
    with pytest.raises(DamagedCheckpoint, match=f"holds unet/{name}, which diffloop does not write there"):
        verify(two_checkpoints / "checkpoint-6")
    path.rename(path.with_name(".DS_Store"))  # systems put such files anywhere
    verify(two_checkpoints / "checkpoint-6")


def test_a_file_that_could_run_code_is_refused_although_the_manifest_names_it(two_checkpoints):
    newest = two_checkpoints / "checkpoint-6"
    (newest / "extra.bin").write_bytes(b"x")
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["extra.bin"] = [1, writer.sha256(newest / "extra.bin")]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match=r"holds extra.bin, which diffloop does not write there"):
        verify(newest)


@pytest.mark.parametrize("name", ["../checkpoint-3/state.json", "/etc/hostname.json"])
def test_a_manifest_stays_in_its_folder(two_checkpoints, name):
    path = two_checkpoints / "checkpoint-6" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: [1, "0"]}))
    with pytest.raises(DamagedCheckpoint, match="which is outside of it"):
        verify(path.parent)


def test_a_manifest_that_names_no_state(two_checkpoints):
    path = two_checkpoints / "checkpoint-6" / "manifest.json"
    (path.parent / "state.json").unlink()
    manifest = json.loads(path.read_text())
    del manifest["state.json"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match=r"its manifest does not name state.json"):
        verify(path.parent)


def test_a_second_run_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path, capsys):
    """The first run has data workers, which outlive it for seconds."""
    folder = tmp_path / "run"
    arguments = ["configs/tests/ddpm.json", f"base.output_dir={folder}", "base.dataloader_num_workers=2"]
    arguments += ["base.image_cache_mb=0"]  # what is in memory needs no workers
    process = start(*arguments, "base.checkpointing_steps=1", faults={"slow_steps": 1})
    wait_for(lambda: list_checkpoints(folder), process)
    assert main([*arguments, "base.resume_from_checkpoint=latest"]) == 1
    error = capsys.readouterr().err
    assert f"in use by pid {process.pid} on " in error
    assert "wait for that run, stop it with kill -TERM, or choose another base.output_dir" in error
    assert process.poll() is None
    process.kill()
    process.wait()
    assert main([*arguments, "base.resume_from_checkpoint=latest"]) == 0


def test_a_folder_that_cannot_be_locked_is_told(tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", fail)
    staged = tmp_path / "run" / ".tmp-checkpoint-9-ab12"
    staged.mkdir(parents=True)
    options = [f"base.output_dir={tmp_path}/run", "base.resume_from_checkpoint=latest"]
    assert main(["configs/tests/ddpm.json", *options]) == 0
    assert staged.exists()  # it may be a living run's
    assert (
        "cannot be locked ([Errno 37] No locks available); make sure that only one run uses it"
        in capsys.readouterr().out
    )


def test_left_over_folders_are_swept_and_nothing_else(two_checkpoints, tiny_config, tmp_path, capsys):
    shutil.copytree(two_checkpoints, tmp_path / "again")
    for name in (".tmp-checkpoint-9-ab12", ".trash-checkpoint-1-cd34", ".tmp-pipeline-ef56", ".tmp-mine", "notes"):
        (tmp_path / "again" / name / "inside").mkdir(parents=True)
    (tmp_path / "again" / ".tmp-checkpoint-8-link").symlink_to(tmp_path)
    assert main([str(tiny_config(name="again", **{"base.resume_from_checkpoint": "latest"}))]) == 0
    assert capsys.readouterr().out.count("left behind by a run that was killed") == 3
    left = sorted(
        path.name for path in (tmp_path / "again").iterdir() if path.name.startswith(".") or path.name == "notes"
    )
    assert left == [".lock", ".tmp-checkpoint-8-link", ".tmp-mine", "notes"]


@pytest.mark.parametrize("limit", [20_000, 250_000])
def test_a_disk_that_is_full_leaves_older_checkpoints_intact(tiny_config, capsys, monkeypatch, limit):
    """With a limit on the size of a file, so that the real writers fail: of weights, and of the optimizer's state."""
    original = writer.write

    def fail_at_6(taken, folder):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit if taken.step == 6 else limits[0], limits[1]))
        try:
            original(taken, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(writer, "write", fail_at_6)
    path = tiny_config(**{"base.checkpointing_steps": 3})
    assert main([str(path)]) == 1
    text = capsys.readouterr().err
    assert "checkpoint-6 could not be written to" in text
    assert "older checkpoints are intact; make room and continue" in text
    folder = path.with_suffix("")
    assert [step for step, _ in list_checkpoints(folder)] == [3]
    verify(folder / "checkpoint-3")
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [".lock"]


def test_space_is_looked_at_before_a_save(tiny_config, capsys, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    path = tiny_config()
    assert main([str(path)]) == 1
    text = capsys.readouterr().err
    assert "checkpoint-6 does not fit in" in text
    needed = int(text.partition("it needs ")[2].partition(" bytes")[0].replace(",", ""))
    monkeypatch.undo()
    folder = path.with_suffix("")
    assert "5,000 were free" in text
    assert main([str(tiny_config(**{"base.resume_from_checkpoint": "latest"}))]) == 0
    written = sum(file.stat().st_size for file in (folder / "checkpoint-6").rglob("*") if file.is_file())
    assert written < needed < written + 2 * writer.SPARE_BYTES


def test_an_old_checkpoint_that_cannot_be_removed_does_not_stop_the_run(tiny_config, capsys, monkeypatch):
    original = shutil.rmtree

    def fail(path, **options):
        if path.name.startswith(".trash-"):
            raise OSError(16, "Device or resource busy")
        original(path, **options)

    monkeypatch.setattr(shutil, "rmtree", fail)
    folder = train(load_config(tiny_config(**{"base.checkpointing_steps": 3, "base.checkpoints_total_limit": 1})))
    assert "WARNING: checkpoint-3 could not be removed" in capsys.readouterr().out
    assert [step for step, _ in list_checkpoints(folder)] == [6]


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError, FileNotFoundError])
def test_a_data_worker_that_dies_while_it_hands_a_tensor_over(error):
    """The connection breaks first, the process is gone a moment later; without a death the error stays what it is."""

    def broken():
        raise error
        yield

    worker = multiprocessing.Process(target=time.sleep, args=(0.3,))
    worker.start()
    assert workers._next_of(broken(), {worker}, 5) is workers.NoBatch.DEAD
    living = multiprocessing.Process(target=time.sleep, args=(30,))
    living.start()
    with pytest.raises(error):
        workers._next_of(broken(), {living}, 5)
    living.kill()


def test_data_workers_that_are_killed(tmp_path):
    """The step is finished without them, the run saved, and what a resume makes of it is exact."""
    folder, options = tmp_path / "run", ["base.random_flip=true", "base.resolution=24", "base.image_cache_mb=0"]
    arguments = ["configs/tests/ddpm.json", *options, f"base.output_dir={folder}"]
    process = start(*arguments, "base.dataloader_num_workers=2", faults={"kill_workers_at": 2}, out=tmp_path / "log")
    assert process.wait(300) == 1
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text
    assert "a data worker of process 0 died (pid " in text
    assert "with exit code -9" in text
    [(step, _)] = list_checkpoints(folder)
    assert 2 <= step < 6
    assert f"checkpoint-{step} is written; continue with base.resume_from_checkpoint=latest" in text
    assert main([*arguments, "base.resume_from_checkpoint=latest"]) == 0
    assert main(["configs/tests/ddpm.json", *options, f"base.output_dir={tmp_path}/whole"]) == 0
    assert final_state(folder) == final_state(tmp_path / "whole")


def test_a_rank_that_hangs(tmp_path):
    """The other one dumps its stack and ends after `collective_timeout`."""
    options = [f"base.output_dir={tmp_path}/run", "base.collective_timeout=8"]
    faults = {"hang_at": [3, 1]}
    process = start("configs/tests/ddpm.json", *options, processes=2, faults=faults, out=tmp_path / "log")
    assert process.wait(300) != 0
    text = (tmp_path / "log").read_text()
    assert text.count("Timeout (0:00:07") == 2  # the dump of each rank, before the collective gives up
    assert 'faulty.py", line' in text.partition("in hanging")[0].splitlines()[-1]  # where the one hangs
    assert "meters.py" in text  # where the other one waits for it
    assert "Timed out waiting 8000ms" in text


def test_workers_that_hang_do_not_keep_the_run_alive(tmp_path):
    """A worker that ignores TERM would be waited for when Python ends."""
    code = (
        "import time\n"
        "class Hanging:\n"
        "    fingerprint = 'x'\n"
        "    def __len__(self): return 8\n"
        "    def get(self, index, generator):\n"
        "        import multiprocessing, torch\n"
        "        if multiprocessing.parent_process(): time.sleep(3600)\n"
        "        return {'image': torch.zeros(1, 16, 16)}\n"
        "def build(args, split): return Hanging()\n"
    )
    (tmp_path / "hanging.py").write_text(code)
    done = subprocess.run(
        [
            sys.executable, "train.py", "configs/tests/ddpm.json", "base.dataset=hanging:build",
            "base.max_train_samples=null", "base.dataloader_num_workers=1", "base.dataloader_timeout=3",
            f"base.output_dir={tmp_path}/run",
        ],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no batch came from the 1 data workers in base.dataloader_timeout = 3 seconds" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_log_that_cannot_be_written(tiny_config, capsys):
    path = tiny_config(**{"base.resume_from_checkpoint": "latest"})
    (path.with_suffix("") / "metrics.jsonl").mkdir(parents=True)
    assert main([str(path)]) == 1
    error = capsys.readouterr().err
    assert "metrics.jsonl" in error
    assert "Traceback" not in error


def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    long = tmp_path.joinpath(*["n" * 200] * 25)  # a path of more than 4,096 bytes
    for place in (tmp_path / "file", tmp_path / "file" / "run", long, Path("/proc/run")):
        assert main(["configs/tests/ddpm.json", f"base.output_dir={place}"]) == 1
        assert f"base.output_dir = {place}: cannot be written" in capsys.readouterr().err
