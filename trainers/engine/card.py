"""The run folder's README.md, which a hub page can show, and the upload of the finished pipeline."""

from __future__ import annotations

import os
from pathlib import Path

from trainers.base import Trainer
from trainers.engine.config import RunConfig


def write_card(
    run: RunConfig, trainer: Trainer, output_dir: Path, metrics: dict[str, float], grids: list[Path]
) -> None:
    """Writes README.md: task, data, options, final metrics, a grid and how to load the result."""
    from huggingface_hub import ModelCard, ModelCardData

    data = run.base.dataset_name or run.base.dataset or Path(run.base.train_data_dir).name
    header = ModelCardData(
        library_name="diffusers", tags=["diffloop", run.task], datasets=[data] if run.base.dataset_name else None
    )
    pictures = [f"![{grid.stem}](samples/{grid.name})" for grid in grids]
    if run.config.use_ema and pictures:
        pictures.append("Left: the weights of the last step. Right: their moving average, which this pipeline holds.")
    rows = [f"| {name} | {value:.6g} |" for name, value in sorted(metrics.items())]
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# {output_dir.resolve().name}",
        f"Trained with diffloop: task `{run.task}`, data `{data}`.",
        *pictures,
        "## Use",
        f"```python\n{trainer.usage.format(output_dir=run.base.hub_model_id or output_dir)}\n```",
        "## Final metrics",
        "\n".join(["| metric | value |", "|---|---|", *rows]),
        "## Configuration",
        f"```yaml\n{run.as_yaml()}```",
    ]
    text = "\n\n".join(sections) + "\n"
    ModelCard(text)  # raises ValueError where a hub would refuse the header
    replacement = output_dir / f".README-{os.getpid()}.md"
    replacement.write_text(text, encoding="utf-8")
    replacement.replace(output_dir / "README.md")


def check_hub_login(push_to_hub: bool) -> None:
    """Raises ValueError before the training where the upload after it could not work."""
    if push_to_hub:
        from huggingface_hub import get_token

        if get_token() is None:
            raise ValueError("base.push_to_hub = true: nobody is logged in; run `hf auth login`, or set it to false")


def push_to_hub(run: RunConfig, output_dir: Path, pipeline_files: list[str], grids: list[Path]) -> str:
    """Uploads the finished pipeline, its card and grid, never checkpoints or logs; returns the page's address."""
    from huggingface_hub import HfApi

    api = HfApi()
    repo = api.create_repo(run.base.hub_model_id or output_dir.resolve().name, exist_ok=True)
    patterns = [pattern for name in pipeline_files for pattern in (name, f"{name}/*")]
    patterns += ["README.md", *(f"samples/{grid.name}" for grid in grids)]
    api.upload_folder(
        repo_id=repo.repo_id, folder_path=output_dir, allow_patterns=patterns, commit_message="Upload pipeline"
    )
    return str(repo)
