"""Writes the run folder's README.md, which is also its hub page, and uploads the finished pipeline."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from omegaconf import OmegaConf

from datasets_lib.errors import InputError
from datasets_lib.foreign import in_quotes, shown
from trainers.base import CardFacts, Trainer
from trainers.engine.config.config import RunConfig
from trainers.engine.export.base_card import BaseCard, read_base_card
from trainers.engine.export.card_header import card_header
from trainers.engine.run.context import RunContext
from trainers.engine.run.files import write_text
from trainers.engine.tracking.gallery import read_gallery
from trainers.engine.tracking.tracker import Tracker

# absolute, of a home folder, or from above, alone, in quotes or brackets, or after NAME: or NAME=; no URL
LOCAL_PATH = re.compile(r"(?<![^\s:=,\"'`(\[{])(?:file:/*|~|\.\.?/|/(?!/)|[A-Za-z]:\\)[^\s:=,]+")
OF_THE_MACHINE = ("seconds", "peak_memory_gib")  # metrics that do not describe the result


def write_card(run: RunConfig, trainer: Trainer, location: str | Path, tracker: Tracker) -> None:
    """Writes README.md: the header, pictures, how to load the result from `location`, metrics and options."""
    from huggingface_hub import ModelCard, ModelCardData

    name, facts = tracker.output_dir.resolve().name, trainer.card_facts()
    base = read_base_card(facts.base_model, facts.base_revision, online=run.base.push_to_hub)
    gallery = read_gallery(tracker.output_dir)
    found = card_header(run, name, facts, base, tracker.latest, gallery).to_dict()
    header = ModelCardData(**_without_paths(found))
    data = header.datasets[0] if header.datasets else Path(run.base.data_name).name
    rows = [(name, value) for name, value in sorted(tracker.latest.items()) if not name.endswith(OF_THE_MACHINE)]
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# {html.escape(shown(name), quote=False)}",
        *(["<Gallery />"] if gallery else []),
        f"Trained with diffloop: task `{run.task}`, data `{_in_code(data)}`.",
        *_about_base(facts, base),
        *_grids(run, trainer, tracker),
        "## Use",
        f"```python\n{_usage(trainer, facts, base, location)}\n```",
        *(html.escape(shown(_without_paths(note)), quote=False) for note in trainer.usage_notes()),
        "## Final metrics",
        "\n".join(["| metric | value |", "|---|---|", *(f"| {name} | {value:.6g} |" for name, value in rows)]),
        "## Configuration",
        f"```yaml\n{OmegaConf.to_yaml(OmegaConf.create(_without_paths(run.as_dict())))}```",
    ]
    text = "\n\n".join(sections) + "\n"
    ModelCard(text)  # raises ValueError if the hub would refuse the header
    write_text(tracker.output_dir / "README.md", text)


def _about_base(facts: CardFacts, base: BaseCard) -> Iterator[str]:
    """Yields a paragraph on the model that was trained on and its licence, and one on the words that ask for it."""
    if facts.base_model is not None:
        link = (
            f"[{base.name}](https://huggingface.co/{base.name})"
            if base.name
            else f"`{_in_code(_base_name(facts, base))}`"
        )
        licence = f"its licence, `{base.license}`, applies" if base.license else "its licence applies"
        yield f"Trained on {link}: {licence}."
    if facts.instance_prompt is not None:
        yield f"Use `{_in_code(_without_paths(facts.instance_prompt))}` in a prompt."


def _grids(run: RunConfig, trainer: Trainer, tracker: Tracker) -> Iterator[str]:
    yield from (f"![{grid.stem}](samples/{grid.name})" for grid in tracker.grids)
    if run.config.use_ema and tracker.grids:
        raw, averaged = ("Above", "Below") if trainer.grid_columns else ("Left", "Right")
        which = "their moving average, which this pipeline holds"
        yield f"{raw}: the weights of the last step. {averaged}: {which}."


def _usage(trainer: Trainer, facts: CardFacts, base: BaseCard, location: str | Path) -> str:
    """Returns the code, in which the base model is called as others can find it."""
    code, used = trainer.usage_of(location), in_quotes(facts.base_model or "")
    return code.replace(f'"{used}"', f'"{in_quotes(_base_name(facts, base))}"') if used else code


def _base_name(facts: CardFacts, base: BaseCard) -> str:
    return base.name or Path(facts.base_model or "").name


def _in_code(text: str) -> str:
    """Returns a text for a code span, which it cannot end."""
    return shown(text).replace("`", "'")


def _without_paths(value: Any) -> Any:
    """Leaves of every path of this machine the last part: a card is published with the pipeline.

    PureWindowsPath knows both kinds of separators.
    """
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    return LOCAL_PATH.sub(lambda found: PureWindowsPath(found[0]).name, value) if isinstance(value, str) else value


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
    patterns += [shown.place for shown in read_gallery(ctx.output_dir)]
    HfApi().upload_folder(
        repo_id=repository, folder_path=ctx.output_dir, allow_patterns=patterns, commit_message="Upload pipeline"
    )
    print(f"Uploaded to {repository}")
