"""Says how a picture was drawn in the words of AUTOMATIC1111, which image browsers and civitai read, too.

Its generation parameters ("infotext") are the prompt, a line "Negative prompt: ...", and a last line of "Name: value"
with commas in between, in the text chunk `parameters` of a PNG.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets_lib.file_hashes import FileHashes
from trainers.common.lora.tensors import FILE_NAME, find_lora
from trainers.inference.saved_run import SavedRun
from trainers.version import VERSION

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# by diffusers' class; the others are called after their class
SAMPLERS = {
    "EulerDiscreteScheduler": "Euler", "EulerAncestralDiscreteScheduler": "Euler a", "LMSDiscreteScheduler": "LMS",
    "HeunDiscreteScheduler": "Heun", "KDPM2DiscreteScheduler": "DPM2", "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "DPMSolverMultistepScheduler": "DPM++ 2M", "UniPCMultistepScheduler": "UniPC", "PNDMScheduler": "PLMS",
    "FlowMatchEulerDiscreteScheduler": "Euler",
}  # fmt: skip
# what readers search for in the prompts; in small letters it is the same to CLIP, which knows no capitals
WORDS_OF_READERS = re.compile(r"Negative prompt:|^(Steps|Template|Negative Template): ", re.MULTILINE)
HASH_DIGITS, MODEL_DIGITS = 12, 10  # of a LoRA, of a model
HASHES = Path("outputs", "encoder-cache")  # remembers those of models, as runs in outputs/ do


class NamedLora(NamedTuple):
    """A LoRA as prompts name it: <lora:name:weight>."""

    name: str
    weight: float
    digest: str | None = None  # None: no file


@dataclass(frozen=True, kw_only=True)
class Infotext:
    """Facts that the pictures of a call have in common."""

    model: str  # folder, file or hub name, of which the last part is written
    sampler: str  # by sampler_name
    plain_sampler: str | None = None  # where no LoRA acts; None: the same
    steps: int
    guidance: float
    seed: int | None  # of the call: a picture's own noise follows from it and from its number; None: nothing is random
    negative_prompt: str | None = None
    loras: tuple[NamedLora, ...] = ()
    clip_skip: int | None = None  # by clip_skip_of
    strength: float | None = None  # fraction of the steps for a picture that is redrawn

    @cached_property
    def model_hash(self) -> str | None:
        """By which AUTOMATIC1111 finds the file of a model; None for a folder or a name on the hub."""
        path = Path(self.model)
        return FileHashes(HASHES).sha256(path)[:MODEL_DIGITS] if path.is_file() else None

    def of(self, prompt: str, size: tuple[int, int], scales: float | Sequence[float] = 1.0) -> str:
        """Returns the text for a picture of `size` (width, height), drawn with `scales` times the LoRAs' weights."""
        factors = scales if isinstance(scales, Sequence) else [scales] * len(self.loras)
        scaled = [lora._replace(weight=lora.weight * n) for lora, n in zip(self.loras, factors, strict=True)]
        active = [lora for lora in scaled if lora.weight]
        tags = [f"<lora:{plain(lora.name)}:{lora.weight:g}>" for lora in active]
        hashes = dict.fromkeys(f"{plain(lora.name)}: {lora.digest}" for lora in active if lora.digest)
        values = {
            "Steps": self.steps,
            "Sampler": self.sampler if active else self.plain_sampler or self.sampler,
            "CFG scale": f"{max(self.guidance, 1.0):g}",  # at most 1 means no guidance, which is 1 there
            "Seed": self.seed,
            "Size": f"{size[0]}x{size[1]}",
            "Model hash": self.model_hash,
            "Model": plain(model_name(self.model)),
            "Denoising strength": None if self.strength is None else f"{self.strength:g}",
            "Clip skip": self.clip_skip,
            "Lora hashes": f'"{", ".join(hashes)}"' if hashes else None,
            "Version": f"diffloop {VERSION}",
        }
        lines = [" ".join([_harmless(prompt), *tags])]
        lines += [f"Negative prompt: {_harmless(self.negative_prompt)}"] if self.negative_prompt else []
        lines.append(", ".join(f"{name}: {value}" for name, value in values.items() if value is not None))
        return "\n".join(lines).strip()


def _harmless(prompt: str) -> str:
    """Returns a prompt in which no line begins as those after it do: there are no quotes for it."""
    lines = "\n".join(prompt.strip().splitlines()).encode(errors="replace").decode()  # no halves of surrogate pairs
    return WORDS_OF_READERS.sub(lambda found: found[0].lower(), lines)


def plain(name: str) -> str:
    """Returns a name without what would end it in a prompt or in the last line."""
    return " ".join(re.sub(r'[:,<>"\\]', " ", name.encode(errors="replace").decode()).split()) or "unnamed"


def model_name(source: str) -> str:
    """Returns the last part of a folder, file or hub name."""
    return os.path.basename(os.path.abspath(source)).removesuffix(".safetensors")


def sampler_name(scheduler: SchedulerMixin) -> str:
    """Returns what AUTOMATIC1111 calls a sampler."""
    kind, config = type(scheduler).__name__, scheduler.config
    name = SAMPLERS.get(kind, kind.removesuffix("Scheduler").removesuffix("Discrete"))
    name += " SDE" if str(config.get("algorithm_type")).startswith("sde-") else ""
    return name + (" Karras" if config.get("use_karras_sigmas") else "")


def clip_skip_of(pipeline: Any, skipped: int | None) -> int | None:
    """Counts clip_skip as AUTOMATIC1111 does: from the last layer, which is 1; 2 is usual for SDXL."""
    usual = 2 if getattr(pipeline, "text_encoder_2", None) is not None else 1
    return None if skipped is None else skipped + usual


def named_lora(path: Path, weight: float) -> NamedLora:
    """Names a LoRA after its file, or after the folder of a run, with the hash by which AUTOMATIC1111 finds it.

    That is the hash of the run's other file, where it lies beside the one for diffusers.
    """
    file = find_lora(path)
    folder = path if path.is_dir() else file.parent
    name = model_name(str(folder if path.is_dir() or file.name == FILE_NAME else file))
    other = folder / f"{name}.safetensors"
    return NamedLora(name, weight, lora_hash(other if other.is_file() else file))


def named_loras(loras: Iterable[tuple[Path, float]]) -> tuple[NamedLora, ...]:
    return tuple(named_lora(path, weight) for path, weight in loras)


def lora_of_run(saved: SavedRun, arguments: argparse.Namespace, weight: float) -> NamedLora:
    """Names a run's own LoRA, with a hash where its file holds the weights that are drawn with."""
    file, checkpoint = saved.folder / FILE_NAME, saved.checkpoint
    exported = file.is_file() and arguments.weights is None and Path(arguments.path).resolve() == saved.folder.resolve()
    if exported and (checkpoint is None or checkpoint.stat().st_mtime <= file.stat().st_mtime):
        return named_lora(file, weight)
    return NamedLora(saved.folder.name, weight)


def lora_hash(file: Path) -> str:
    """Hashes what follows a safetensors file's header, so that the texts of a header do not matter, as kohya does."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        opened.seek(8 + length)
        return hashlib.file_digest(opened, "sha256").hexdigest()[:HASH_DIGITS]
