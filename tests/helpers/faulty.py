"""train.py with faults on purpose: `python tests/helpers/faulty.py '{"fault": argument, ...}' CONFIG [overrides]`."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

WRITERS = (
    "checkpoint/saver.py", "checkpoint/writer.py", "checkpoint/manifest.py", "checkpoint/resume.py", "export/pipeline.py",
    "run/run_folder.py", "distributed/shared_folders.py", "tracking/tracker.py",
)  # fmt: skip


def own_rank():
    return int(os.environ.get("RANK", 0))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fsdp(settings):
    """FSDP2 on CPU processes, where accelerate would run DDP without a word."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    from trainers.engine.distributed import launch

    def sharding(**arguments):
        accelerator = Accelerator(**arguments)
        policy = {"auto_wrap_policy": "transformer_based_wrap", "cpu_ram_efficient_loading": False}
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **policy, **settings)
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        return accelerator

    launch.Accelerator = sharding


def deepspeed(settings):
    """DeepSpeed on CPU processes with these settings of `zero_optimization`.

    Its collectives in shared memory are left out: they would be compiled first.
    """
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["ACCELERATE_USE_CPU"] = "false"
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = json.dumps({"zero_optimization": settings})


def slow_steps(seconds):
    from trainers.engine.optim import optimizer as optimization

    original = optimization.optimizer_step

    def slow(*arguments):
        time.sleep(seconds)
        return original(*arguments)

    optimization.optimizer_step = slow


def slow_write(seconds):
    from trainers.engine.checkpoint import writer

    original = writer.write

    def slow(taken, folder):
        folder.mkdir()
        time.sleep(seconds)
        original(taken, folder)

    writer.write = slow


def fail_write(step_and_rank):
    """The files of this step's checkpoint cannot be written by one rank."""
    from trainers.engine.checkpoint import writer

    (step, rank), original = step_and_rank, writer.write

    def failing(taken, folder):
        original(taken, folder)
        if (taken.step, own_rank()) == (step, rank):
            raise OSError(28, "No space left on device")

    writer.write = failing


def fail_rename(step_and_rank):
    """One rank cannot give this step's checkpoint its name."""
    (step, rank), original = step_and_rank, Path.rename

    def failing(path, target):
        if (Path(target).name, own_rank()) == (f"checkpoint-{step}", rank):
            raise OSError(5, "Input/output error")
        return original(path, target)

    Path.rename = failing


def hosts(names):
    """Each rank is on a host of its own, as far as its name goes."""
    socket.gethostname = lambda: names[own_rank()]


def note_slots(path):
    """Each rank appends [time, first step and processes of this start, step, slots] of every micro-batch to a file."""
    from trainers.engine.data import batches as feeding

    original = feeding.training_batches

    def noting(train_set, clock, *rest):
        with closing(original(train_set, clock, *rest)) as batches:
            for number, batch in enumerate(batches):
                step = clock.origin_step + number // clock.accumulation_steps
                start = f"{clock.origin_step} x {clock.num_processes}"
                with open(f"{path}-{own_rank()}", "a") as file:
                    print(json.dumps([time.time(), start, step, batch["slot"].tolist()]), file=file)
                yield batch

    feeding.training_batches = noting


def note_errors(path):
    """Each rank writes the error that ends it to a file: the launcher ends all when the first one has."""
    import train

    original = train._fail

    def noting(error, code):
        Path(f"{path}-{own_rank()}").write_text(str(error))
        return original(error, code)

    train._fail = noting


def nan_loss_at(step_and_rank):
    """The loss of this step is not a number on one rank."""
    from trainers.engine.optim.nonfinite import NonFiniteSteps

    (step, rank), original, done = step_and_rank, NonFiniteSteps.poison_if_nonfinite, [0]

    def broken(self, loss):
        done[0] += 1
        return original(self, loss * float("nan") if done[0] == step and rank == own_rank() else loss)

    NonFiniteSteps.poison_if_nonfinite = broken


def break_weight_at(step_and_rank):
    """After this step the first weight that the rank has a part of is infinite there."""
    from trainers.engine.distributed.sharding import part_of
    from trainers.engine.optim import optimizer as optimization

    (step, rank), original, done = step_and_rank, optimization.optimizer_step, [0]

    def breaking(accelerator, optimizer, *rest):
        result = original(accelerator, optimizer, *rest)
        done[0] += 1
        if done[0] == step and rank == own_rank():
            parts = [part_of(parameter).tensor for parameter in accelerator._models[0].parameters()]
            next(part for part in parts if part.numel()).fill_(float("inf"))
        return result

    optimization.optimizer_step = breaking


def kill_in_save(step_and_rank):
    """The rank is killed a while after all ranks began the checkpoint of this step."""
    from trainers.engine.checkpoint.saver import Saver

    step, rank = step_and_rank
    original = Saver.begin

    def killing(self, steps_done):
        original(self, steps_done)
        if steps_done == step and rank == own_rank():
            threading.Timer(1.0, die).start()

    Saver.begin = killing


def kill_before_prune(step):
    """Killed once this step's checkpoint has its name, before older ones are removed."""
    from trainers.engine.checkpoint.saver import Saver

    original = Saver._prune

    def killing(self, intact_step):
        if intact_step == step:
            die()
        original(self, intact_step)

    Saver._prune = killing


def kill_at_line(number):
    """Killed before the n-th line that runs in the modules which write files; 0 prints how many there are."""
    seen, counter = [0], itertools.count(1)  # of all threads

    def trace(frame, event, argument):
        if event == "call" and not frame.f_code.co_filename.endswith(WRITERS):
            return None
        if event == "line":
            seen[0] = here = next(counter)
            if here == number:
                die()
        return trace

    sys.settrace(trace)
    threading.settrace(trace)
    return lambda: print(f"{seen[0]} lines")


def kill_workers_at(step):
    """All data workers are killed after this many optimizer steps, as by a lack of memory."""
    import multiprocessing

    from trainers.engine.optim import optimizer as optimization

    original, done = optimization.optimizer_step, [0]

    def killing(*arguments):
        done[0] += 1
        if done[0] == step and own_rank() == 0:
            for worker in multiprocessing.active_children():
                worker.kill()
        return original(*arguments)

    optimization.optimizer_step = killing


def hang_at(step_and_rank):
    """The rank stops for good in this step."""
    from trainers.engine.optim import optimizer as optimization

    (step, rank), original, done = step_and_rank, optimization.optimizer_step, [0]

    def hanging(*arguments):
        done[0] += 1
        if done[0] == step and rank == own_rank():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # so that torchrun needs no half minute to kill it
            time.sleep(3600)
        return original(*arguments)

    optimization.optimizer_step = hanging


def run(faults, arguments):
    """The exit code of train.py with these faults, in this process; `by_rank` are overrides that only one rank gets."""
    import torch

    import train

    torch.set_num_threads(1)
    by_rank = faults.pop("by_rank", None)
    arguments = [*arguments, *(by_rank[own_rank()] if by_rank else [])]
    reports = [globals()[name](argument) for name, argument in faults.items()]
    code = train.main(arguments)
    sys.settrace(None)
    for report in filter(None, reports):
        report()
    return code


if __name__ == "__main__":
    sys.exit(run(json.loads(sys.argv[1]), sys.argv[2:]))
