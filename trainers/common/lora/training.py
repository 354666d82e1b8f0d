"""Base class of tasks that train low-rank adapters: options, pictures next to the base model's, LoRA files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from datasets_lib.errors import InputError
from datasets_lib.foreign import in_quotes
from trainers.base import BaseConfig, Fraction, NonNegativeFloat, Positive, PositiveFloat, RandomSource
from trainers.common.text_to_image.options import StableDiffusionConfig
from trainers.common.text_to_image.stable_diffusion import StableDiffusionTrainer
from trainers.pretrained import read_model
from trainers.version import VERSION

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainers.base import DataSet

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]


@dataclass(kw_only=True)
class AdapterConfig(StableDiffusionConfig):
    """Options of the UNet's adapter, arXiv 2106.09685."""

    free_on_resume: ClassVar[tuple[str, ...]] = (*StableDiffusionConfig.free_on_resume, "lora_scale")
    training_only: ClassVar[tuple[str, ...]] = (*StableDiffusionConfig.training_only, "lora_weights")

    rank: Positive = 16  # r: columns of A, rows of B
    lora_alpha: PositiveFloat | None = None  # alpha: the adapter is scaled by alpha / r; null: r, a scale of 1
    lora_dropout: Fraction = 0.0  # fraction of the adapters' inputs dropped in training
    target_modules: list[str] | str | None = None  # endings of the UNet's modules, or one pattern; null: its attention
    use_rslora: bool = False  # scale by alpha / sqrt(r) (arXiv 2312.03732)
    use_dora: bool = False  # also train the norm of each row of weights (arXiv 2402.09353)
    init_lora_weights: Literal["gaussian", "kaiming"] = "gaussian"  # of A; B starts at 0
    lora_weights: str | None = None  # a LoRA file, or its folder, to continue from; null: a new adapter
    use_ema: bool = False  # average the adapter's weights
    lora_scale: NonNegativeFloat = 1.0  # factor on the adapter in validation pictures; 0: off

    def problems(self, base: BaseConfig) -> Iterator[tuple[str, str]]:
        yield from super().problems(base)
        resumed = bool(base.resume_from_checkpoint)  # then the checkpoint holds the adapter
        if self.lora_weights is not None and not resumed and not Path(self.lora_weights).exists():
            yield "lora_weights", "there is no such file or folder"
        yield from (("target_modules", problem) for problem in target_problems(self.target_modules))


def target_problems(targets: list[str] | str | None) -> Iterator[str]:
    """Yields problems of target modules: endings of names, or one pattern."""
    if targets in ([], ""):
        yield "must name at least one module, or be null"
    elif isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            yield f"is no pattern (a regular expression that matches modules' names): {error}"


class AdapterTrainer(StableDiffusionTrainer):
    """Trains an adapter; the result is a LoRA file that every diffusers pipeline of the same family can load."""

    config: AdapterConfig
    usual_targets = ATTENTION  # if target_modules is null
    usage = (
        "from diffusers import DiffusionPipeline\n"
        "pipeline = DiffusionPipeline.from_pretrained({base_model})\n"
        'pipeline.load_lora_weights("{output_dir}")\n'
        '{prepared}pipeline("a prompt"{clip_skip}).images[0].save("sample.png")'
    )

    def build_networks(self) -> dict[str, nn.Module]:
        from trainers.common.lora.loading import load_lora

        networks = self.add_adapters()
        if self.config.lora_weights is not None and self.run.start_step == 0:
            load_lora(Path(self.config.lora_weights), networks)
        self.base_pictures: dict[str, Tensor] = {}  # cached: they never change
        return networks

    def add_adapters(self) -> dict[str, nn.Module]:
        """Returns the frozen networks with new adapters."""
        from trainers.common.lora.adapters import add_lora

        option, unet = f"{self.task}.target_modules", self.base_model.unet(self.weight_dtype)
        return {"unet": add_lora(option, unet, self.targets(), self.adapter())}

    def targets(self) -> list[str] | str:
        return self.config.target_modules or self.usual_targets

    def adapter(self) -> dict[str, Any]:
        """Returns peft's settings of the adapter."""
        config = self.config
        settings = {name: getattr(config, name) for name in ("lora_dropout", "use_rslora", "use_dora")}
        settings["init_lora_weights"] = True if config.init_lora_weights == "kaiming" else "gaussian"
        return {"r": config.rank, "lora_alpha": config.lora_alpha or config.rank} | settings

    def sample(self, requests: list[dict], rng: RandomSource) -> dict[str, Tensor]:
        """Draws pictures, and at validations strips "base model | LoRA" [N, 3, H, 2W] from the same noise."""
        import torch

        from trainers.common.lora.adapters import lora_scaled

        generators = rng.generators()
        states = [generator.get_state() for generator in generators]
        with lora_scaled(self.modules.values(), self.config.lora_scale):
            drawn = self.draw(requests, generators)
        if not all(request.get("beside_base") for request in requests):
            return {"samples": drawn}
        key = repr((requests, [state.sum().item() for state in states]))
        if key not in self.base_pictures:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            with lora_scaled(self.modules.values(), 0.0):
                self.base_pictures[key] = self.draw(requests, generators).cpu()
        base = self.base_pictures[key].to(drawn.device)
        return {"samples": drawn, "base_and_lora": torch.cat([base, drawn], dim=3)}

    def sample_requests(self, validation_set: DataSet | None) -> list[dict]:
        return [request | {"beside_base": True} for request in super().sample_requests(validation_set)]

    def usage_of(self, location: str | Path) -> str:
        config, place = self.config, f'"{in_quotes(self.config.pretrained_model_name_or_path)}"'
        for name in ("revision", "variant"):
            place += f', {name}="{in_quotes(getattr(config, name))}"' if getattr(config, name) else ""
        about = {"base_model": place, "output_dir": in_quotes(location)}
        return self.usage.format(**vars(config) | self.prompts.usage() | about)

    def save_pipeline(self, output_dir: Path) -> None:
        from trainers.common.lora.files import save_lora

        save_lora(output_dir, self.unwrapped, self.about())

    def about(self) -> dict[str, str]:
        """Returns the texts of the file's header."""
        adapter, config = self.adapter(), self.config
        return {
            "base_model": self.base_model.source,
            "base_revision": config.revision or "",
            "base_variant": config.variant or "",
            "rank": str(adapter["r"]),
            "alpha": f"{adapter['lora_alpha']:g}",
            "target_modules": str(self.targets()),
            "trigger_word": ", ".join(self.base.trigger_words),
            **{name: str(value) for name, value in config.texts.unusual().items()},
            "diffloop_version": VERSION,
        }

    @classmethod
    def load_pipeline(cls, output_dir: str | Path) -> Any:
        """Loads the adapter with its base model, which the file's header names."""
        from diffusers import DiffusionPipeline

        from trainers.common.lora.files import ADAPTER, read_lora
        from trainers.common.lora.loading import load_into_pipeline
        from trainers.common.lora.tensors import find_lora

        file, lora = find_lora(Path(output_dir)), read_lora(Path(output_dir))
        if not lora.about.get("base_model"):
            raise InputError(f"{file}: its header names no base_model; give a finished run's folder")
        place = {name: lora.about.get(f"base_{name}") or None for name in ("revision", "variant")}
        pipeline = read_model(DiffusionPipeline, lora.about["base_model"], safety_checker=None, **place)
        load_into_pipeline(pipeline, file, lora, ADAPTER)
        return pipeline
