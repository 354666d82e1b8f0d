"""Replays one step of a run, such as one that was skipped: scripts/replay.py RUN STEP.

STEP counts as metrics.jsonl does. Same examples, augmentation, noise and dropout as in the run; weights of the newest
checkpoint before the step, or the initial ones. Prints every micro-batch with its loss and the norm of its gradient,
names the examples of those that are not finite, and saves the pictures as RUN/replay-step-N.png. Changes nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets_lib
from trainers.engine.checkpoint.load import put_weights, read_weights
from trainers.engine.checkpoint.manifest import list_checkpoints, verify
from trainers.engine.config.config import RunConfig, load_config
from trainers.engine.data.batches import order_of
from trainers.engine.data.workers import SlotExamples, collate
from trainers.engine.distributed import launch
from trainers.engine.encoders.stages import build_encoders
from trainers.engine.optim.networks import build_trainer, init_networks, prepare_networks
from trainers.engine.optim.optimizer import build_optimizer
from trainers.engine.run.clock import Clock
from trainers.engine.run.context import DataSets
from trainers.engine.run.randomness import SlotRandom, seed_network
from trainers.engine.run.run_folder import SKIPPED_STEPS, read_lines
from trainers.inference.command import command


def find_slots(folder: Path, step: int, micro_batch_size: int) -> tuple[range, int]:
    """A step's slots and the size of its micro-batches: from skipped_steps.jsonl, else from a checkpoint's state."""
    for line in read_lines(folder / SKIPPED_STEPS):
        if line["step"] == step:
            return range(*line["slots"]), line["micro_batch_size"]
    states = [json.loads((path / "state.json").read_text(encoding="utf-8")) for _, path in list_checkpoints(folder)]
    if not states:
        raise ValueError(
            f"{folder}: step {step} was not skipped, and there is no checkpoint from which to count its slots"
        )
    nearest = min(states, key=lambda state: (state["step"] >= step, abs(state["step"] - step)))
    if not 1 <= step <= nearest["total_steps"]:
        raise ValueError(f"{folder}: step {step} is not one of its steps, 1 to {nearest['total_steps']}")
    size = nearest["global_batch_size"]
    first = nearest["slot"] + (step - 1 - nearest["step"]) * size
    return range(first, first + size), micro_batch_size


def replay(run: RunConfig, folder: Path, step: int) -> dict[str, Any]:
    """Prints the step's micro-batches; returns their losses, and the pictures [B, C, H, W] that it was given."""
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
    for number, first in enumerate(range(slots.start, slots.stop, size)):
        keys = [(slot, order.index(slot)) for slot in range(first, first + size)]
        batch = collate([examples[key] for key in keys])
        if isinstance(batch, Exception):
            raise batch
        pictures += [batch["image"]] if "image" in batch else []
        batch = {k: v.to(accelerator.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        seed_network(base.seed, step - 1, number, accelerator.device)
        loss, _ = trainer.compute_loss(encoders.encode(batch), SlotRandom(base.seed, batch["slot"]), step - 1)
        loss.backward()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for network in networks.values() for p in network.parameters() if p.grad is not None]
        )
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"  micro-batch {number}: loss {loss.item():.6g}, gradient norm {norm.item():.6g}")
        if not (loss.isfinite() and norm.isfinite()):
            describe(train_set, keys, batch)
    return {"losses": losses, "pictures": torch.cat(pictures) if pictures else None}


def describe(train_set: Any, keys: list[tuple[int, int]], batch: dict[str, Any]) -> None:
    for row, (slot, index) in enumerate(keys):
        kind = "pixels" if "image" in batch else "latents"
        image = batch["image"][row] if "image" in batch else batch["mean"][row]
        name = train_set.name(index)
        finite = "" if image.isfinite().all() else ", NOT FINITE"
        print(f"    slot {slot}: {name}, {kind} {image.min():.3g} to {image.max():.3g}{finite}")


@command
def main() -> None:
    from torchvision.utils import save_image

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("step", type=int, help="as metrics.jsonl counts, from 1")
    options = parser.parse_args()
    run = load_config(options.run / "config.yaml")
    found = replay(run, options.run, options.step)
    if found["pictures"] is None:
        return  # latents
    path = options.run / f"replay-step-{options.step}.png"
    save_image((found["pictures"] / 2 + 0.5).clamp(0, 1), path)
    print(f"pictures: {path}")


if __name__ == "__main__":
    main()
