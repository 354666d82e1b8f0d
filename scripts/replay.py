"""Replays one step of a run, such as one that was skipped: scripts/replay.py RUN STEP

STEP counts as metrics.jsonl does. Uses the run's examples, augmentation, noise and dropout, with the weights of the
newest checkpoint before the step, or the initial ones. Prints each micro-batch with its loss and gradient norm, names
the examples of those that are not finite, and saves the pictures as RUN/replay-step-N.png. Changes nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import datasets_lib
from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from trainers.common.diffusion.sampling import to_unit_range
from trainers.engine.checkpoint.load import put_weights, read_weights
from trainers.engine.checkpoint.manifest import list_checkpoints, verify
from trainers.engine.checkpoint.state_file import read_state_file
from trainers.engine.config.config import RunConfig, load_config
from trainers.engine.config.trust import RUN_CONFIG, add_trust_argument
from trainers.engine.data.batches import order_of
from trainers.engine.data.prefetch import to_device
from trainers.engine.data.workers import SlotExamples
from trainers.engine.distributed import launch
from trainers.engine.encoders.stages import build_encoders
from trainers.engine.optim.networks import build_trainer, init_networks, prepare_networks
from trainers.engine.optim.optimizer import build_optimizer
from trainers.engine.run.clock import Clock
from trainers.engine.run.context import DataSets
from trainers.engine.run.files import new_file
from trainers.engine.run.randomness import SlotRandom, seed_network
from trainers.engine.run.run_folder import SKIPPED_STEPS, read_lines
from trainers.inference.command import command, path_argument

MOST_SLOTS = 1 << 24  # of a step


def find_slots(folder: Path, step: int, micro_batch_size: int) -> tuple[range, int]:
    """Returns a step's slots and micro-batch size, from skipped_steps.jsonl or else from a checkpoint's state."""
    for line in read_lines(folder / SKIPPED_STEPS):
        if line["step"] == step:
            return _slots_of(line, folder)
    states = [read_state_file(path) for _, path in list_checkpoints(folder)]
    if not states:
        raise InputError(f"{folder}: step {step} was not skipped, and there is no checkpoint to count its slots from")
    nearest = min(states, key=lambda state: (state["step"] >= step, abs(state["step"] - step)))
    if not 1 <= step <= nearest["total_steps"]:
        raise InputError(f"{folder}: step {step} is not one of its steps, 1 to {nearest['total_steps']}")
    size = nearest["global_batch_size"]
    first = nearest["slot"] + (step - 1 - nearest["step"]) * size
    return range(first, first + size), micro_batch_size


def _slots_of(line: dict[str, Any], folder: Path) -> tuple[range, int]:
    """Returns the slots and the micro-batch size of a skipped step; ValueError for a line that no run wrote."""
    match line:
        case {"slots": [int(first), int(end)], "micro_batch_size": int(size)} if 0 < size <= end - first <= MOST_SLOTS:
            return range(first, end), size
    raise InputError(f"{folder / SKIPPED_STEPS}: {shown(line)}: is not a line that a run writes; remove it")


def replay(run: RunConfig, folder: Path, step: int) -> dict[str, Any]:
    """Prints the step's micro-batches; returns their losses, and its pictures [B, C, H, W] or None for latents."""
    base = run.base
    slots, size = find_slots(folder, step, base.train_batch_size)
    base.train_batch_size, base.global_batch_size, base.gradient_accumulation_steps = size, None, 1
    accelerator = launch.start_accelerator(base)
    train_set = datasets_lib.build(base, "train")
    order, examples = order_of(train_set, len(slots), base), SlotExamples(train_set, base.seed, augment=True)

    clock = Clock.of_run(base, len(train_set), accelerator, train_set.bucket_of)
    trainer = build_trainer(accelerator, run, clock, DataSets(train_set, None))
    networks = init_networks(trainer)
    optimizer = build_optimizer(trainer.param_groups(networks), run.config, clock, accelerator.device)
    prepare_networks(accelerator, trainer, networks, optimizer, base)
    encoders = build_encoders(trainer)
    before = next((path for done, path in list_checkpoints(folder) if done < step), None)
    if before is not None:
        verify(before)
        put_weights(read_weights(before, networks), networks)
    print(f"step {step}: slots {slots.start} to {slots.stop - 1}, weights of {before.name if before else 'the start'}")

    losses, pictures = [], []
    keys = [[(slot, order.index(slot)) for slot in slots[n : n + size]] for n in range(0, len(slots), size)]
    batches = to_device((examples.batch(each) for each in keys), examples.finish, accelerator.device)
    for number, batch in enumerate(batches):
        pictures += [batch["image"].cpu()] if "image" in batch else []
        seed_network(base.seed, step - 1, number, accelerator.device)
        loss, _ = trainer.compute_loss(encoders.encode(batch), SlotRandom(base.seed, batch["slot"]), step - 1)
        loss.backward()
        gradients = [p.grad for network in networks.values() for p in network.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"  micro-batch {number}: loss {loss.item():.6g}, gradient norm {norm.item():.6g}")
        if not (loss.isfinite() and norm.isfinite()):
            describe(train_set, keys[number], batch)
    return {"losses": losses, "pictures": torch.cat(pictures) if pictures else None}


def describe(train_set: Any, keys: list[tuple[int, int]], batch: dict[str, Any]) -> None:
    kind, column = ("pixels", "image") if "image" in batch else ("latents", "mean")
    for (slot, index), values in zip(keys, batch[column], strict=True):
        finite = "" if values.isfinite().all() else ", NOT FINITE"
        print(
            f"    slot {slot}: {shown(train_set.name(index))}, {kind} {values.min():.3g} to {values.max():.3g}{finite}"
        )


@command
def main() -> None:
    from torchvision.utils import save_image

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=path_argument, help="the run's folder")
    parser.add_argument("step", type=int, help="as metrics.jsonl counts, from 1")
    add_trust_argument(parser)
    options = parser.parse_args()
    run = load_config(options.run / RUN_CONFIG, trust_code=options.trust_code)
    found = replay(run, options.run, options.step)
    if found["pictures"] is not None:
        path = options.run / f"replay-step-{options.step}.png"
        with new_file(path) as file:
            save_image(to_unit_range(found["pictures"]), file, "PNG")
        print(f"pictures: {path}")


if __name__ == "__main__":
    main()
