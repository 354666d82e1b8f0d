"""Writes the run folder's README.md, which is also its hub page, and uploads the finished pipeline."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from trainers.base import Trainer
from trainers.engine.config.config import RunConfig
from trainers.engine.run.context import RunContext
from trainers.engine.run.files import write_text
from trainers.engine.tracking.tracker import Tracker

# absolute, of a home folder, or from above, alone or after NAME: or NAME=; no URL
LOCAL_PATH = re.compile(r"(?<![^\s:=,])(?:file:/*|~|\.\.?/|/(?!/))[^\s:=,]+")
OF_THE_MACHINE = ("seconds", "peak_memory_gib")  # metrics that do not describe the result


def write_card(run: RunConfig, trainer: Trainer, location: str | Path, tracker: Tracker) -> None:
    """Writes README.md: task, data, options, final metrics, a grid, and how to load the result from `location`."""
    from huggingface_hub import ModelCard, ModelCardData

    output_dir = tracker.output_dir
    name, data = output_dir.resolve().name, run.base.data_name
    on_hub = run.base.dataset_name is not None and not Path(data).exists()
    header = ModelCardData(library_name="diffusers", tags=["diffloop", run.task], datasets=[data] if on_hub else None)
    pictures = [f"![{grid.stem}](samples/{grid.name})" for grid in tracker.grids]
    if run.config.use_ema and pictures:
        raw, averaged = ("Above", "Below") if trainer.grid_columns else ("Left", "Right")
        which = "their moving average, which this pipeline holds"
        pictures.append(f"{raw}: the weights of the last step. {averaged}: {which}.")
    found = [(name, value) for name, value in sorted(tracker.latest.items()) if not name.endswith(OF_THE_MACHINE)]
    rows = [f"| {name} | {value:.6g} |" for name, value in found]
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# {html.escape(shown(name))}",
        f"Trained with diffloop: task `{run.task}`, data `{_in_code(data if on_hub else Path(data).name)}`.",
        *pictures,
        "## Use",
        f"```python\n{trainer.usage_of(location)}\n```",
        "## Final metrics",
        "\n".join(["| metric | value |", "|---|---|", *rows]),
        "## Configuration",
        f"```yaml\n{OmegaConf.to_yaml(OmegaConf.create(_without_paths(run.as_dict())))}```",
    ]
    text = "\n\n".join(sections) + "\n"
    ModelCard(text)  # raises ValueError if the hub would refuse the header
    write_text(output_dir / "README.md", text)


def _in_code(text: str) -> str:
    """Returns a text for a code span, which it cannot end."""
    return shown(text).replace("`", "'")


def _without_paths(value: Any) -> Any:
    """Leaves of every path of this machine the last part: a card is published with the pipeline."""
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    return LOCAL_PATH.sub(lambda found: Path(found[0]).name, value) if isinstance(value, str) else value


def check_hub_login(push_to_hub: bool) -> None:
    """Raises ValueError before the training if the upload after it would fail."""
    if push_to_hub:
        from huggingface_hub import get_token

        if get_token() is None:
            raise InputError("base.push_to_hub = true: you are not logged in; run `hf auth login`, or set it to false")


def publish(ctx: RunContext, trainer: Trainer, tracker: Tracker, pipeline_files: list[str]) -> None:
    """Writes the card on the main process; with push_to_hub uploads the pipeline, card and grids, no checkpoints."""
    if not ctx.accelerator.is_main_process:
        return
    if not ctx.run.base.push_to_hub:
        write_card(ctx.run, trainer, _without_paths(str(ctx.output_dir)), tracker)
        return
    from huggingface_hub import HfApi

    name = ctx.run.base.hub_model_id or ctx.output_dir.resolve().name
    repository = HfApi().create_repo(name, exist_ok=True).repo_id
    write_card(ctx.run, trainer, repository, tracker)
    patterns = [pattern for name in pipeline_files for pattern in (name, f"{name}/*")]
    patterns += ["README.md", *(f"samples/{grid.name}" for grid in tracker.grids)]
    HfApi().upload_folder(
        repo_id=repository, folder_path=ctx.output_dir, allow_patterns=patterns, commit_message="Upload pipeline"
    )
    print(f"Uploaded to {repository}")
