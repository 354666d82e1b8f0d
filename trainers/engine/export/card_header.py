"""Makes the header of the model card, which the hub filters, links and shows models by."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.base import CardFacts
from trainers.engine.config.config import RunConfig
from trainers.engine.export.base_card import BaseCard
from trainers.engine.tracking.gallery import Shown

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

OF_FEATURES = ("fid", "kid", "precision", "recall", "rfid", "rkid")
METRICS = {  # what a run measures -> the hub's metric, and how it is shown
    "fid": ("fid", "FID"), "kid": ("kid", "KID"), "rfid": ("fid", "FID of reconstructions"),
    "rkid": ("kid", "KID of reconstructions"), "precision": ("precision", "Improved precision"),
    "recall": ("recall", "Improved recall"), "class_accuracy": ("accuracy", "Class accuracy of drawn pictures"),
    "accuracy": ("accuracy", "Accuracy at random noise"), "clip_score": ("clip_score", "CLIP score"),
    "accuracy_without_noise": ("accuracy", "Accuracy without noise"), "psnr": ("psnr", "PSNR of reconstructions in dB"),
    "ssim": ("ssim", "SSIM of reconstructions"), "loss": ("loss", "Validation loss"),
}  # fmt: skip


def card_header(
    run: RunConfig, name: str, facts: CardFacts, base: BaseCard, metrics: dict[str, Any], gallery: list[Shown]
) -> ModelCardData:
    """Collects the fields; `metrics` are the newest numbers by name."""
    from huggingface_hub import ModelCardData

    data, results = data_on_hub(run), _results(run, facts.pipeline_tag or "other", metrics)
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=facts.pipeline_tag,
        tags=[*facts.tags, "diffusers", "diffloop", run.task],
        base_model=base.name,
        base_model_relation=facts.base_model_relation if base.name is not None else None,
        datasets=None if data is None else [data],
        license=base.license,
        license_name=base.license_name,
        license_link=base.license_link,
        instance_prompt=facts.instance_prompt,
        widget=[{"text": shown.prompt, "output": {"url": shown.place}} for shown in gallery] or None,
        model_name=name if results else None,  # of the results: the hub has no other field for it
        eval_results=results or None,
    )


def data_on_hub(run: RunConfig) -> str | None:
    """Returns the name of the data set if it is on the hub."""
    name = run.base.dataset_name
    return name if name is not None and not Path(name).exists() else None


def _results(run: RunConfig, task: str, metrics: dict[str, Any]) -> list[EvalResult]:
    """Lists the metrics of validation and evaluation, of the weights that the pipeline holds."""
    from huggingface_hub import EvalResult

    data = data_on_hub(run) or Path(run.base.data_name).name
    valid = "valid_ema" if any(name.startswith("valid_ema/") for name in metrics) else "valid"
    found = []
    for part, split in ((valid, "validation"), ("eval", "train")):
        for name, (kind, shown) in METRICS.items():
            value = metrics.get(f"{part}/{name}")
            if isinstance(value, (int, float)) and math.isfinite(value):
                measured = {"features": Path(run.base.eval_features).name, "pictures": run.base.eval_num_samples}
                found.append(
                    EvalResult(
                        task_type=task,
                        dataset_type=data,
                        dataset_name=data,
                        dataset_config=run.base.dataset_config_name,
                        dataset_split="validation" if name in ("rfid", "rkid") else split,
                        metric_type=kind,
                        metric_name=shown,
                        metric_value=float(f"{value:.6g}"),
                        metric_args=measured if part == "eval" and name in OF_FEATURES else None,
                    )
                )
    return found
