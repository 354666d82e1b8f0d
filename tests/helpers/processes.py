"""Runs in processes of their own: launched as users do, or forked from a process that has imported everything.

A process imports for ten times as long as a tiny run takes. Tests of launchers, signals and the interpreter's end
launch; those that only need ranks fork them. With --slow all are launched.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faulty
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["faulty", "train", "trainers.ddpm", "trainers.vae", "trainers.sd_lora", "trainers.text_to_image",
     "trainers.engine.checkpoint.saver", "trainers.engine.validation.evaluation", "trainers.engine.tracking.tracker",
     "trainers.common.autoencoder.loss", "sklearn.datasets", "torchvision.utils", "huggingface_hub", "peft", "deepspeed",
     "deepspeed.runtime.zero.muon.muon_optimizer",  # imports torch's compiler, which ZeRO would do in every rank
     "transformers.models.clip.modeling_clip", "diffusers.optimization",
     "diffusers.pipelines.ddpm.pipeline_ddpm", "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl"]
)  # fmt: skip

launch_all = False  # set by conftest.py


def start(*arguments, processes=1, launcher=None, faults=None, env=None, out=None, err=None, forked=True):
    """The Popen of train.py, or what is like it, with faults (tests/helpers/faulty.py) and its output in files.

    `launcher` goes in front of the script; otherwise it is torchrun where processes > 1.
    """
    if forked and not launch_all:
        return Forked(arguments, processes, faults, env, out, err)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    script = ["tests/helpers/faulty.py", json.dumps(faults)] if faults else ["train.py"]
    command = [*(launcher or ([sys.executable] if processes == 1 else torchrun)), *script, *map(str, arguments)]
    with open(out or os.devnull, "a") as stdout, open(err or out or os.devnull, "a") as stderr:
        return subprocess.Popen(command, env=environment(env), cwd=ROOT, stdout=stdout, stderr=stderr)


def environment(changed):
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **(changed or {})}


def launch(*arguments, processes=1, env=None, timeout=300):
    """The CompletedProcess of train.py."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        run = start(*arguments, processes=processes, env=env, out=out, err=err)
        try:
            code = run.wait(timeout)
        except subprocess.TimeoutExpired:
            run.kill()
            raise
        return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())


def wait_for(condition, process=None, seconds=300):
    """What `condition()` returns when it is true; fails where the process ends before, or after some time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        assert process is None or process.poll() is None, "the process has ended"
        time.sleep(0.02)
    raise AssertionError("waited in vain")


class Forked:
    """The ranks of a run, with what the tests use of Popen."""

    def __init__(self, arguments, processes=1, faults=None, env=None, out=None, err=None):
        files = out or os.devnull, err or out or os.devnull
        for path in files:
            open(path, "a").close()  # a rank may be killed before it opens them
        shared = environment(env)
        if processes > 1:  # the ranks meet in a store of ours, as in torchrun's: nobody else can take its port
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "WORLD_SIZE": str(processes)}
            shared |= {"LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)]
        given = list(map(str, arguments)), faults or {}, multiprocessing.get_start_method()
        self.ranks = [SERVER.Process(target=_run, args=(*given, shared | values, *files)) for values in own]
        for rank in self.ranks:
            rank.start()
        self.pid = self.ranks[0].pid

    def wait(self, timeout=None):
        """An exit code that is not 0, where there is one. When a rank fails, the others get TERM, as from torchrun."""
        end = None if timeout is None else time.monotonic() + timeout
        while None in (codes := [rank.exitcode for rank in self.ranks]):
            if any(codes):
                self._each("terminate")
            running = [rank.sentinel for rank, code in zip(self.ranks, codes, strict=True) if code is None]
            if not multiprocessing.connection.wait(running, end and max(end - time.monotonic(), 0)):
                raise subprocess.TimeoutExpired("a forked run", timeout)
        return next(filter(None, codes), 0)

    def poll(self):
        return None if any(rank.exitcode is None for rank in self.ranks) else self.wait()

    def kill(self):
        self._each("kill")

    def _each(self, action):
        for rank in self.ranks:
            getattr(rank, action)()


def _run(arguments, faults, start_method, environment, out, err):
    os.chdir(ROOT)
    multiprocessing.set_start_method(start_method, force=True)  # of data workers, which would start like this process
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    for number, path in ((1, out), (2, err)):
        with open(path, "a") as file:
            os.dup2(file.fileno(), number)
    sys.exit(faulty.run(faults, arguments))
