"""Measures what an LCM-LoRA makes of few steps: scripts/benchmarks/measure_steps.py BASE_RUN LCM_RUN --steps 1 2 4

A support vector machine on the base's labelled pictures judges drawings from the same noise, by diffusers' pipeline:
of the base with its own sampler in few steps and in 50, and of the LCM-LoRA with LCM's. `recovered` is the part of
what the base loses in few steps that the LCM-LoRA wins back; null where the base loses less than 10 points. `distance`
is the root of the mean square of the difference to the base's pictures in 50 steps; LCM's sampler adds new noise after
every step but the last. Prints JSON and writes it with a grid (for each number of steps the base above, the LCM-LoRA
below; last the base in 50) to LCM_RUN/evaluation.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.benchmarks.measure_style import GAP, ZOOM, Judge, Real, draw
from trainers.engine.validation.grids import grid_of
from trainers.engine.validation.metrics import class_accuracy
from trainers.inference.arguments import positive
from trainers.inference.saved_run import open_run
from trainers.lcm_lora import LCMLoRATrainer

LOST = 0.1  # of its accuracy: what the base must lose at least for `recovered` to mean something


def recovered(few: float, many: float, lcm: float) -> float | None:
    """The part of the loss many - few that is not lost with the LCM-LoRA."""
    return None if many - few < LOST else (lcm - few) / (many - few)


def rows(drawn: list[Tensor], captions: list[str]) -> Tensor:
    """A column per caption, a row for each list of pictures."""
    first = torch.stack([pictures[: len(captions)] for pictures in drawn], 1)  # [captions, rows, C, H, W]
    first = first.repeat_interleave(ZOOM, 3).repeat_interleave(ZOOM, 4)
    first = torch.nn.functional.pad(first, (0, 0, 0, GAP), value=1.0).transpose(1, 2).flatten(2, 3)
    return grid_of([first], len(captions), captions)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """All numbers, and the grid; ValueError where a run is not what is needed."""
    base, lcm = (open_run(path) for path in (arguments.base, arguments.lcm))
    if lcm.task != LCMLoRATrainer.task:
        raise ValueError(f"{arguments.lcm}: is a run of {lcm.task}; give one of {LCMLoRATrainer.task}")
    real, config = Real.of(base.config(["base.max_train_samples=null"])), lcm.config().config
    judge, captions = Judge(real.train, real.held_out), list(real.captions.values())
    rounds = -(-arguments.number // len(captions))
    labels = torch.tensor(list(real.captions) * rounds)
    guidance = 1 + (config.w_min + config.w_max) / 2 if arguments.guidance is None else arguments.guidance
    pipelines = {
        "base": DiffusionPipeline.from_pretrained(base.folder, safety_checker=None),
        "lcm": LCMLoRATrainer.load_pipeline(lcm.folder),
    }

    def drawing(name: str, steps: int) -> Tensor:
        pipelines[name].set_progress_bar_config(disable=True)
        how = {"num_inference_steps": steps, "guidance_scale": guidance if name == "base" else 1.0}
        return draw(pipelines[name], captions * rounds, arguments.seed, arguments.batch_size, **how)

    drawn = {f"{name}_{steps}": drawing(name, steps) for steps in arguments.steps for name in pipelines}
    many = f"base_{arguments.many}"
    drawn[many] = drawing("base", arguments.many)
    found = {name: class_accuracy(judge(pictures), labels)["class_accuracy"] for name, pictures in drawn.items()}
    parts = {f"recovered_{n}": recovered(found[f"base_{n}"], found[many], found[f"lcm_{n}"]) for n in arguments.steps}
    distances = {
        f"distance_{n}": (x - drawn[many]).square().mean().sqrt().item() for n, x in drawn.items() if n != many
    }
    about = {"pictures": len(labels), "guidance_scale": guidance, "judge_held_out": judge.held_out}
    return about | found | parts | distances, rows(list(drawn.values()), captions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="a finished text_to_image run")
    parser.add_argument("lcm", type=Path, help="a finished lcm_lora run on it")
    parser.add_argument("--steps", type=positive, nargs="+", default=[4])
    parser.add_argument("--many", type=positive, default=50, help="steps of the base to compare with")
    parser.add_argument("--guidance", type=float, help="of the base; default: the middle of what was distilled")
    parser.add_argument("--number", type=positive, default=500, help="of drawings, captions equally often")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=positive, default=50, help="drawings at once")
    arguments = parser.parse_args()
    try:
        metrics, picture = run(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    folder = arguments.lcm / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    save_image(picture, folder / "steps.png")
    print(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
