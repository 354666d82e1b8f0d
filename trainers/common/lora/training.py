"""Base class of tasks that train low-rank adapters: pictures next to the base model's, and LoRA files."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets_lib.foreign import in_quotes
from trainers.base import CardFacts, RandomSource
from trainers.common.text_to_image.stable_diffusion import StableDiffusionTrainer
from trainers.pretrained import read_model

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from torch import Tensor, nn

    from trainers.base import DataSet, ImageData
    from trainers.common.lora.options import AdapterConfig

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]


def as_arguments(settings: dict[str, Any]) -> str:
    """Writes settings as further arguments of a call in Python."""
    return "".join(f", {name}={value!r}" for name, value in settings.items())


class AdapterTrainer(StableDiffusionTrainer):
    """Trains an adapter; the result is a LoRA file that every diffusers pipeline of the same family can load."""

    config: AdapterConfig
    usual_targets = ATTENTION  # if target_modules is null
    usage = (
        "from diffusers import {pipeline}\n"
        "pipeline = {pipeline}.{reader}({base_model})\n"
        "{scheduler}"
        'pipeline.load_lora_weights("{output_dir}")\n'
        '{prepared}pipeline("a prompt"{clip_skip}).images[0].save("sample.png")'
    )

    def build_networks(self) -> dict[str, nn.Module]:
        from trainers.common.lora.loading import load_lora

        networks = self.add_adapters()
        self.left_out: tuple[str, ...] = ()
        if self.config.lora_weights is not None and self.run.start_step == 0:
            self.left_out = load_lora(Path(self.config.lora_weights), networks)
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

        generators, own = rng.generators(), self.base_sampler()
        states = [generator.get_state() for generator in generators]
        with lora_scaled(self.modules.values(), self.config.lora_scale):
            drawn = self.draw(requests, generators, own if self.config.lora_scale == 0 else None)
        if not all(request.get("beside_base") for request in requests):
            return {"samples": drawn}
        key = repr((requests, [state.sum().item() for state in states]))
        if key not in self.base_pictures:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            with lora_scaled(self.modules.values(), 0.0):
                self.base_pictures[key] = self.draw(requests, generators, own).cpu()
        base = self.base_pictures[key].to(drawn.device)
        return {"samples": drawn, "base_and_lora": torch.cat([base, drawn], dim=3)}

    def sample_requests(self, validation_set: DataSet | None) -> list[dict]:
        return [request | {"beside_base": True} for request in super().sample_requests(validation_set)]

    def base_sampler(self) -> SchedulerMixin | None:
        """Returns the sampler of the base model without its adapter; None: the same as with it."""
        from trainers.common.diffusion.sampling import build_sampler

        if not self.scheduler_changes:
            return None
        name, base_model = self.config.sampler, self.base_model
        return base_model.sampler if name is None else build_sampler(name, base_model.training_scheduler())

    @property
    def scheduler_changes(self) -> dict[str, Any]:
        """The settings of the base's scheduler that the run changes; whoever loads the LoRA must change them, too."""
        from trainers.common.text_to_image.objective import asked_of_scheduler

        before = self.base_model.sampler.config
        return {name: value for name, value in asked_of_scheduler(self.config).items() if before.get(name) != value}

    def notes(self, train_set: ImageData) -> list[str]:
        return [*super().notes(train_set), *self.left_out, *self._unlike_base()]

    def _unlike_base(self) -> list[str]:
        """Returns a sentence on what the LoRA predicts, if its base predicts something else."""
        changes = ", ".join(f"{name}: {value}" for name, value in self.scheduler_changes.items())
        advice = "wherever it is loaded, the scheduler must be set to it"
        return [f"Unlike the base model the LoRA is for {changes}; {advice}"] if changes else []

    def kohya_problem(self) -> str | None:
        """Returns why no file in kohya's format is written besides, or None if it is."""
        from trainers.common.lora.kohya import DORA, name_problem, unnamed_module

        formats = self.config.lora_formats
        if formats is not None and "kohya" not in formats:
            return "lora_formats leaves it out"
        if formats is None and self.config.use_dora:
            return f"{DORA}; scripts/convert_lora.py with --dora writes it nevertheless"
        if (module := unnamed_module(self.unwrapped)) is not None:
            return f"kohya's format has no name for {module}"
        return name_problem(self.title)

    def card_facts(self) -> CardFacts:
        kind = "dora" if self.config.use_dora else "lora"
        found = super().card_facts()
        return replace(found, tags=(*found.tags, kind, "template:sd-lora"), base_model_relation="adapter")

    def usage_of(self, location: str | Path) -> str:
        config, place = self.config, f'"{in_quotes(self.config.pretrained_model_name_or_path)}"'
        for name in ("revision", "variant"):
            place += f', {name}="{in_quotes(getattr(config, name))}"' if getattr(config, name) else ""
        pipeline, reader, unfound = self.base_model.loading()
        about = {"pipeline": pipeline, "reader": reader, "base_model": place, "scheduler": self.scheduler_usage()}
        about |= {"output_dir": in_quotes(location), "unfound": as_arguments(unfound)}
        return self.usage.format(**vars(config) | self.prompts.usage() | about)

    def usage_notes(self, run_folder: Path | None = None) -> list[str]:
        if (problem := self.kohya_problem()) is None:
            found = [f"For ComfyUI, AUTOMATIC1111, Forge and kohya's tools: {self.title}.safetensors"]
            programs, options = ", for these programs", " --dora" if self.config.use_dora else ""
        else:
            found = [f"No file for ComfyUI and AUTOMATIC1111 was written: {problem}"]
            programs, options = "", " --to diffusers"
        if run_folder is not None:
            convert = f"python scripts/convert_lora.py {shlex.quote(str(run_folder))} FOLDER --all{options}"
            found.append(f"The LoRAs of all checkpoints{programs}: {convert}")
        return [*self._unlike_base(), *found]

    def scheduler_usage(self) -> str:
        """Returns lines that change the loaded scheduler into the base's, as the run changed it."""
        settings = self.base_model.loading()[2] | self.scheduler_changes
        if not settings:
            return ""
        kind = type(self.learned.sampler).__name__
        return (
            f"from diffusers import {kind}\n"
            f"pipeline.scheduler = {kind}.from_config(pipeline.scheduler.config{as_arguments(settings)})\n"
        )

    def save_pipeline(self, output_dir: Path) -> None:
        from trainers.common.lora.files import FILE_NAME, lora_of, write_lora
        from trainers.common.lora.kohya import OTHER_FILE, remove_earlier, write_kohya

        lora = lora_of(self.unwrapped, self.about() | self.about_base()).folded()
        other = f"{self.title}.safetensors" if self.kohya_problem() is None else ""
        write_lora(output_dir / FILE_NAME, lora._replace(about=lora.about | {OTHER_FILE: other}))
        if other:
            write_kohya(output_dir / other, lora, self.title)
        remove_earlier(Path(self.base.output_dir), other)

    @property
    def title(self) -> str:
        """The name by which users of other programs know the LoRA."""
        return Path(self.base.output_dir).resolve().name

    def about(self) -> dict[str, str]:
        """Returns the texts of the file's header that follow from the configuration."""
        from trainers.common.lora.about import config_texts

        return config_texts(self.config, self.base, self.adapter(), self.targets())

    def about_base(self) -> dict[str, str]:
        """Returns the texts of the file's header that follow from the base model."""
        from trainers.common.lora.about import family_texts
        from trainers.common.lora.header import SCHEDULER_KEY

        noise = self.learned.scheduler.config
        found = family_texts(self.base_model) | {"prediction_type": noise.prediction_type}
        if noise.rescale_betas_zero_snr:
            found["rescale_betas_zero_snr"] = "True"
        if self.scheduler_changes:
            found[SCHEDULER_KEY] = json.dumps(self.scheduler_changes)
        return found

    @classmethod
    def load_pipeline(cls, output_dir: str | Path) -> Any:
        """Loads the adapter with the base model of its run, whose scheduler it may change."""
        from diffusers import DiffusionPipeline

        from trainers.common.lora.about import base_of
        from trainers.common.lora.files import ADAPTER, read_lora
        from trainers.common.lora.loading import adapt_sampler, load_into_pipeline
        from trainers.common.lora.tensors import find_lora

        file, lora = find_lora(Path(output_dir)), read_lora(Path(output_dir))
        place = base_of(file.parent, lora.about)
        source = place.pop("pretrained_model_name_or_path")
        pipeline = read_model(DiffusionPipeline, source, safety_checker=None, **place)
        load_into_pipeline(pipeline, file, lora, ADAPTER)
        adapt_sampler(pipeline, {file: lora})
        return pipeline
