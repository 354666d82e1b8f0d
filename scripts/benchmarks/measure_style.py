"""Measures what a text-to-image model and its LoRA draw: scripts/benchmarks/measure_style.py BASE_RUN LORA_RUN

Both runs were trained on captions of labelled pictures, the LoRA's in another style. Support vector machines trained on
these pictures judge drawings of both models, made with diffusers' pipeline: whether they show what the caption asked
for, whether they are in the LoRA's style, and whether their shapes, without colours, are. The report also says what
part of held-out real pictures each judge gets right. Prints JSON and writes it to LORA_RUN/evaluation, with a grid (in
each pair of rows the base above, the LoRA below).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torchvision.utils import save_image
from tqdm.auto import tqdm

import datasets_lib
from trainers.common.lora.files import ADAPTER, read_lora
from trainers.common.lora.loading import load_into_pipeline
from trainers.common.lora.options import AdapterConfig
from trainers.common.lora.tensors import find_lora
from trainers.engine.config.config import RunConfig
from trainers.engine.validation.grids import labelled_grid
from trainers.engine.validation.metrics import Described, class_accuracy, describe, pictures_of, train_classifier
from trainers.inference.command import command, positive
from trainers.inference.saved_run import open_run
from trainers.pretrained import read_model

CPU = torch.device("cpu")
ROWS = 2  # pairs of rows in the grid


class Real(NamedTuple):
    """All pictures that a run was trained on, and those held out."""

    train: Described
    held_out: Described
    captions: dict[int, str]  # by label

    @classmethod
    def of(cls, run: RunConfig) -> Real:
        """Raises ValueError if the pictures have no labels, or none are held out."""
        train, held_out = (datasets_lib.build(run.base, split) for split in ("train", "validation"))
        if train is None or held_out is None:
            raise ValueError(f"{run.base.output_dir}: base.validation_split = null: judges need held-out pictures")
        examples = [held_out.without_image(number, None) for number in range(len(held_out))]
        if "label" not in examples[0]:
            raise ValueError(f"{run.base.output_dir}: its pictures have no labels; judges need them")
        captions = {example["label"]: example["caption"] for example in examples}
        seen = [describe(pictures_of(each, list(range(len(each))), 100), CPU) for each in (train, held_out)]
        return cls(seen[0], seen[1], dict(sorted(captions.items())))


def shapes(pictures: Tensor) -> Tensor:
    """The difference from the corners' colour, scaled to 0 to 1 in each picture: [N, C, H, W] -> [N, 1, H, W]."""
    corners = pictures[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].median(2).values
    distance = (pictures - corners[:, :, None, None]).norm(dim=1, keepdim=True)
    return distance / distance.amax((2, 3), keepdim=True).clamp(min=1e-6)


def draw(pipeline: Any, prompts: list[str], seed: int, batch_size: int, **options: Any) -> Tensor:
    """Pictures [N, 3, H, W] in [0, 1]; each depends on its prompt, its number and the seed."""
    drawn = []
    for first in tqdm(range(0, len(prompts), batch_size), desc="drawing"):
        asked = prompts[first : first + batch_size]
        numbers = range(first, first + len(asked))
        generators = [torch.Generator().manual_seed(seed * len(prompts) + number) for number in numbers]
        drawn.append(pipeline(asked, generator=generators, output_type="pt", **options).images.float())
    return torch.cat(drawn)


def measure(base: Real, style: Real, drawn: Tensor, styled: Tensor, labels: Tensor) -> dict[str, float]:
    """The judges' numbers for the base's pictures `drawn` and the LoRA's `styled`."""
    found: dict[str, float] = {}
    for name, real, pictures in (("base", base, drawn), ("lora", style, styled)):
        recognise = train_classifier(real.train)
        accuracy = class_accuracy(recognise(pictures.flatten(1)), labels)
        found |= {f"{name}_accuracy": accuracy["class_accuracy"], f"{name}_worst": accuracy["worst_class_accuracy"]}
        found[f"{name}_judge_held_out"] = right_of(recognise, real.held_out)
    for name, look in (("styled", lambda pictures: pictures), ("styled_shape", shapes)):
        recognise = train_classifier(kinds(base.train, style.train, look))
        for key, pictures in ((name, styled), (f"base_{name}", drawn)):
            found[key] = recognise(look(pictures).flatten(1)).double().mean().item()
        found[f"{name}_judge_held_out"] = right_of(recognise, kinds(base.held_out, style.held_out, look))
    return found


def kinds(base: Described, style: Described, look: Callable[[Tensor], Tensor]) -> Described:
    """Returns what `look` shows of the base's pictures, labelled 0, and of the style's, labelled 1."""
    looks = [look(real.thumbnails) for real in (base, style)]
    return describe([(rows, torch.full((len(rows),), label)) for label, rows in enumerate(looks)], CPU)


def right_of(recognise: Callable[[Tensor], Tensor], real: Described) -> float:
    assert real.labels is not None
    return class_accuracy(recognise(real.vectors), real.labels)["class_accuracy"]


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """All numbers, and the grid."""
    saved = [open_run(path) for path in (arguments.base, arguments.lora)]
    configs = [each.config(["base.max_train_samples=null"]) for each in saved]
    base, style = (Real.of(config) for config in configs)
    captions = list(base.captions.values())
    rounds = -(-arguments.number // len(captions))
    labels, config = torch.tensor(list(base.captions) * rounds), cast(AdapterConfig, configs[1].config)
    how = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}

    pipeline = read_model(DiffusionPipeline, saved[0].folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)

    def drawing(**options: Any) -> Tensor:
        return draw(pipeline, captions * rounds, arguments.seed, arguments.batch_size, **how, **options)

    drawn = drawing()
    load_into_pipeline(pipeline, find_lora(saved[1].folder), read_lora(saved[1].folder), ADAPTER)
    styled, without = drawing(), drawing(cross_attention_kwargs={"scale": 0.0})
    metrics = {"pictures": len(drawn), **measure(base, style, drawn, styled, labels)}
    pairs = torch.stack([drawn, styled], 1)[: ROWS * len(captions)].unflatten(0, (-1, len(captions)))
    columns = dict(zip(captions, pairs.transpose(0, 1).flatten(1, 2), strict=True))
    picture = labelled_grid(columns, ["base", "LoRA"] * (len(pairs)))
    return metrics | {"scale_0_is_base": torch.equal(without, drawn)}, picture


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="a finished text_to_image run")
    parser.add_argument("lora", type=Path, help="a finished lora run on it")
    parser.add_argument("--number", type=positive, default=500, help="of drawings, captions equally often")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=positive, default=50, help="drawings at once")
    parser.add_argument("--output-dir", type=Path, help="default: LORA_RUN/evaluation")
    arguments = parser.parse_args()
    metrics, picture = run(arguments)
    folder = arguments.output_dir or arguments.lora / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    save_image(picture, folder / "base_and_lora.png")
    print(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
