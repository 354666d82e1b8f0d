"""The CLIP score of pictures and prompts, by torchmetrics."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.multimodal import clip_score

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

        self.option, self.source, self.device = option, source, device
        self._read(CLIPConfig)
        self.processor = self._read(CLIPProcessor)

    def _read(self, kind: Any, **options: Any) -> Any:
        try:
            return kind.from_pretrained(self.source, **options)
        except (OSError, ValueError) as error:
            advice, reason = "give a local folder, or a hub name that can be reached", str(error).splitlines()[0]
            found = f"no CLIP could be read; {advice} ({reason})"
            raise FileNotFoundError(f"{self.option} = {self.source}: {found}") from None

    @cached_property
    def features(self) -> Features:
        from transformers import CLIPModel

        return Features(self._read(CLIPModel, use_safetensors=True)).to(self.device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> float:
        """Scores images [N, 3, H, W] in [0, 1]."""
        pixels = (images.to(self.device) * 255).round().to(torch.uint8)
        model: Any = self.features, self.processor  # of a CLIPModel torchmetrics calls no other methods
        return clip_score(list(pixels), list(prompts), lambda: model).item()
