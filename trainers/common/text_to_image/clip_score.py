"""The CLIP score of pictures and prompts, by torchmetrics."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.multimodal import clip_score

from trainers.pretrained import read_model, read_part

if TYPE_CHECKING:
    from transformers import CLIPModel


class Features(nn.Module):
    """A CLIPModel with features as tensors, as torchmetrics expects; transformers 5 wraps them in an output object."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values).pooler_output

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.get_text_features(input_ids, attention_mask).pooler_output


class ClipScore:
    """100 times the mean cosine similarity of pictures and prompts, by the CLIP in `source`.

    Its weights are read on first use. Raises FileNotFoundError, naming the `option`, if it cannot be read.
    """

    def __init__(self, option: str, source: str, device: torch.device) -> None:
        from transformers import CLIPConfig, CLIPProcessor

        self.source, self.place, self.device = source, f"{option} = {source}", device
        read_part(CLIPConfig, source, self.place)
        self.processor = read_part(CLIPProcessor, source, self.place)

    @cached_property
    def features(self) -> Features:
        from transformers import CLIPModel

        return Features(read_model(CLIPModel, self.source, self.place)).to(self.device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> float:
        """Scores images [N, 3, H, W] in [0, 1]."""
        pixels = (images.to(self.device) * 255).round().to(torch.uint8)
        model: Any = self.features, self.processor  # of a CLIPModel torchmetrics calls no other methods
        return clip_score(list(pixels), list(prompts), lambda: model).item()
