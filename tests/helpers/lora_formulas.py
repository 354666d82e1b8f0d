"""What other programs add to a weight for a LoRA's parts {"down", "up", "alpha", "dora"}: their formulas in our own words."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

Parts = dict[str, Tensor]


def scale(parts: Parts) -> float:
    """alpha / rank, and 1 without alpha: the rule of them all, and of diffusers for names with a dot."""
    return float(parts["alpha"]) / len(parts["down"]) if "alpha" in parts else 1.0


def product(parts: Parts, weight: Tensor) -> Tensor:
    return (parts["up"].flatten(1) @ parts["down"].flatten(1)).reshape(weight.shape)


def plain(parts: Parts, weight: Tensor) -> Tensor:
    """stable-diffusion.cpp, and ComfyUI, Forge and LyCORIS without DoRA."""
    return scale(parts) * product(parts, weight)


def kohya(parts: Parts, weight: Tensor) -> Tensor:
    """Convolutions are composed, as if they ran one after the other; DoRA's scale is not read."""
    if weight.dim() == 2:
        return parts["up"] @ parts["down"] * scale(parts)
    composed = conv2d(parts["down"].transpose(0, 1), parts["up"]).transpose(0, 1)
    return composed * scale(parts)


def comfyui(parts: Parts, weight: Tensor) -> Tensor:
    """ComfyUI and Forge: DoRA's scale over the row norms of the base's weight, without the change."""
    change = plain(parts, weight)
    if "dora" not in parts:
        return change
    return (weight + change) * (parts["dora"] / (_rows(weight) + torch.finfo(weight.dtype).eps)) - weight


def a1111(parts: Parts, weight: Tensor) -> Tensor:
    """DoRA's scale over the norms of the changed weight's columns, although it holds a number for each row."""
    change = product(parts, weight) * scale(parts)
    if "dora" not in parts:
        return change
    changed = weight + change
    columns = changed.transpose(0, 1).flatten(1).norm(dim=1)
    return changed * (parts["dora"] / columns.reshape(1, -1, *[1] * (weight.dim() - 2))) - weight


def lycoris(parts: Parts, weight: Tensor) -> Tensor:
    """LyCORIS and OneTrainer: as in DoRA's paper, over the row norms of the changed weight."""
    change = plain(parts, weight)
    return (weight + change) * (parts["dora"] / _rows(weight + change)) - weight if "dora" in parts else change


def _rows(weight: Tensor) -> Tensor:
    return weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))


FORMULAS = {
    "ComfyUI": comfyui,
    "Forge": comfyui,
    "AUTOMATIC1111": a1111,
    "kohya": kohya,
    "kohya's merge": kohya,
    "LyCORIS": lycoris,
    "stable-diffusion.cpp": plain,
    "OneTrainer": lycoris,
}
