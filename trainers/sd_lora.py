"""Task `lora`: low-rank adapters of a Stable Diffusion pipeline, arXiv 2106.09685 and 2112.10752."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainers.base import BaseConfig
from trainers.common.lora.options import AdapterConfig, target_problems
from trainers.common.lora.training import AdapterTrainer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

TEXT_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]


@dataclass(kw_only=True)
class LoRAConfig(AdapterConfig):
    train_text_encoder: bool = False  # also adapt the text encoders; learning_rate can be a dict
    text_encoder_target_modules: list[str] | str | None = None  # in the text encoders; null: their attention

    def problems(self, base: BaseConfig) -> Iterator[tuple[str, str]]:
        yield from super().problems(base)
        yield from self.without_effect(("text_encoder_target_modules",), "train_text_encoder", self.train_text_encoder)
        found = target_problems(self.text_encoder_target_modules)
        yield from (("text_encoder_target_modules", problem) for problem in found)
        if self.train_text_encoder and self.cache_text is not None:
            yield "cache_text", "keeps text embeddings, which train_text_encoder changes; switch one of them off"


class LoRATrainer(AdapterTrainer):
    """Trains adapters of the UNet and, with train_text_encoder, of the text encoders by denoising."""

    Config = LoRAConfig
    config: LoRAConfig
    task = "lora"

    def setup(self) -> None:
        super().setup()
        self.trains_text = self.config.train_text_encoder

    def add_adapters(self) -> dict[str, nn.Module]:
        from trainers.common.lora.adapters import add_lora

        config, networks = self.config, super().add_adapters()
        for name in self.base_model.text_encoder_names if config.train_text_encoder else ():
            encoder, option = self.base_model.text_encoder(name, self.weight_dtype), "lora.text_encoder_target_modules"
            targets = config.text_encoder_target_modules or TEXT_ATTENTION
            networks[name] = add_lora(option, encoder, targets, self.adapter(), self._unused(name, encoder))
        return networks

    def _unused(self, name: str, encoder: PreTrainedModel) -> str | None:
        """Returns a pattern of the last layers, if no embedding depends on them.

        An adapter there would get no gradient, and DDP would wait for it. Stable Diffusion XL never reads the last
        layer of its first text encoder, and always pools the last one of its second.
        """
        layers, unused = encoder.config.num_hidden_layers, self.config.clip_skip or 0
        if self.base_model.is_xl:
            unused = unused + 1 if name == "text_encoder" else 0
        numbers = "|".join(str(number) for number in range(layers - unused, layers))
        return rf".*layers\.({numbers})\..*" if unused else None
