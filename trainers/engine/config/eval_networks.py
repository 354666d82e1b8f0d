"""The networks that the options eval_features and eval_classifier may name, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

ALLOWED_FEATURES = (
    "inception (downloaded), none, a TorchScript file (uint8 [B, 3, H, W] -> features [B, D]), or NAME:FILE, a "
    "torchvision network and its weights, such as resnet50:resnet50.pth"
)


def features_problem(spec: str) -> str | None:
    """Says what is wrong with the option `eval_features`; None if nothing is."""
    if spec in ("inception", "none") or Path(spec).is_file():
        return None
    name, _, file = spec.partition(":")
    if not file:
        return f"no such file; allowed: {ALLOWED_FEATURES}"
    from torchvision import models

    if name not in models.list_models(module=models):
        return f"{name} is not a network of torchvision; allowed: {ALLOWED_FEATURES}"
    return None if Path(file).is_file() else f"no file {file}; give {name}'s weights as .pth or .safetensors"


def classifier_problem(spec: str) -> str | None:
    """Says what is wrong with the option `eval_classifier`; None if nothing is."""
    if Path(spec).is_file() or (Path(spec) / "classifier" / "config.json").is_file():
        return None
    return "must be a finished noisy_classifier run, or a TorchScript file (float32 [B, C, H, W] in [-1, 1] -> logits)"
