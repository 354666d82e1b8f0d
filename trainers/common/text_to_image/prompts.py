"""Text conditioning of a Stable Diffusion UNet: tokens, embeddings, and Stable Diffusion XL's sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from trainers.base import CacheKind, Encoder
from trainers.common.text_to_image.base_model import BaseModel, check_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

EMBEDS, POOLED = "prompt_embeds", "pooled_prompt_embeds"


class Prompts:
    """Embeds captions with a base model's tokenizers and text encoders.

    Embeddings are {"prompt_embeds": [B, L, D]} and, for Stable Diffusion XL, {"pooled_prompt_embeds": [B, P]}.
    """

    def __init__(self, base_model: BaseModel, device: torch.device, dtype: torch.dtype) -> None:
        self.base_model, self.device, self.dtype = base_model, device, dtype
        self.tokenizers = base_model.tokenizers()
        self.names = base_model.text_encoder_names
        self.configs = base_model.text_configs()
        for name, tokenizer, config in zip(self.names, self.tokenizers, self.configs, strict=True):
            check_tokenizer(f"{base_model.place}, {name}", tokenizer, config)
        self.columns = (EMBEDS, POOLED) if base_model.is_xl else (EMBEDS,)

    def embed(self, networks: Mapping[str, nn.Module], captions: list[str]) -> dict[str, Tensor]:
        """Runs the text encoders `networks`, by name."""
        import torch

        tokens = []
        for tokenizer in self.tokenizers:
            options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
            rows = tokenizer(captions, return_tensors="pt", **options).input_ids
            rows = rows.pin_memory() if self.device.type == "cuda" else rows  # else the copy would wait for the device
            tokens.append(rows.to(self.device, non_blocking=True))
        if not self.base_model.is_xl:
            return {EMBEDS: networks["text_encoder"](tokens[0])[0]}
        found = [networks[n](t, output_hidden_states=True) for n, t in zip(self.names, tokens, strict=True)]
        return {EMBEDS: torch.cat([each.hidden_states[-2] for each in found], dim=-1), POOLED: found[1][0]}

    def encoder(self, cache: CacheKind | None, constants: tuple[str, ...], default: str) -> Encoder:
        """Makes the encoder from captions to embeddings; `constants` are texts besides the captions.

        `default` is the caption of examples that have none.
        """
        from torch import nn

        def build() -> nn.ModuleDict:
            return nn.ModuleDict({name: self.base_model.text_encoder(name, self.dtype) for name in self.names})

        def encode(networks: nn.Module, captions: list[str]) -> dict[str, Tensor]:
            return self.embed(dict(networks.named_children()), list(captions))

        def source() -> dict[str, Any]:
            folders = (*self.names, *("tokenizer", "tokenizer_2")[: len(self.names)])
            digest = self.base_model.digest(*folders)
            return {"text encoders": digest, "variant": self.base_model.variant, "dtype": str(self.dtype)}

        found = Encoder("caption", self.columns, build, encode, source, cache, constants, default=default)
        found.shapes, found.dtype = self._shapes(), self.dtype
        return found

    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Returns the shapes of a caption's rows, by the text encoders' configs."""
        width = sum(config.hidden_size for config in self.configs)
        return {EMBEDS: (self.tokenizers[0].model_max_length, width), POOLED: (self.configs[-1].projection_dim,)}

    def truncated(self, captions: Iterable[str]) -> tuple[int, str | None]:
        """Counts the captions longer than the tokenizer's length; also returns the text cut off the first of them."""
        captions, tokenizer = list(dict.fromkeys(captions)), self.tokenizers[0]
        limit, lost = tokenizer.model_max_length, 0
        first: str | None = None
        for start in range(0, len(captions), 10_000):
            for ids in tokenizer(captions[start : start + 10_000], add_special_tokens=False).input_ids:
                if len(ids) > limit - 2:  # two tokens mark beginning and end
                    lost += 1
                    first = first or tokenizer.batch_decode([ids[limit - 2 :]])[0]
        return lost, first


def size_conditions(sizes: Any, corners: Any, target: tuple[int, int]) -> Tensor:
    """Stable Diffusion XL's time_ids [B, 6]: original height and width, crop top and left, target height and width."""
    import torch

    return torch.cat([sizes, corners, constant_rows(target, len(sizes), sizes.device)], dim=1)


def constant_rows(values: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """Repeats values in rows, int64 [count, len(values)], filled on the device because a copy to it would wait."""
    import torch

    return torch.stack([torch.full((count,), value, device=device) for value in values], dim=1)
