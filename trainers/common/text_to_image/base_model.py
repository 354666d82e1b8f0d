"""The Stable Diffusion pipeline that a run starts from, read component by component from a folder or the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.file_hashes import sha256
from datasets_lib.foreign import shown
from trainers.common.model_files import files_digest
from trainers.model_configs import INDEX, check_files, read_config
from trainers.pretrained import read_model, read_part, reading
from trainers.single_file.configs import text_layers as file_text_layers
from trainers.single_file.families import SD2
from trainers.single_file.header import is_single_file
from trainers.single_file.prediction import has_zero_snr
from trainers.single_file.recognition import SingleFile, open_single_file
from trainers.single_file.skeleton import single_file_problems, write_skeleton

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler, ModelMixin, SchedulerMixin, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedModel

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def base_model_problems(source: str | None, parts: tuple[str, ...]) -> Iterator[str]:
    """Yields problems of `pretrained_model_name_or_path`, as far as a local folder or file shows them."""
    if source is None:
        yield "must be the folder, single file or hub name of a Stable Diffusion pipeline (1.x, 2.x or XL)"
        return
    if is_single_file(source):
        yield from single_file_problems(Path(source), parts)
        return
    folder = Path(source)
    if not folder.exists():  # a hub name, or a folder that another run will make
        return
    lacking = [part for part in parts if not any((folder / part).glob("*.json"))]
    if lacking:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        yield f"has no {', '.join(lacking)}; a Stable Diffusion pipeline's folder is needed, found {found}"


def text_layers(source: str | None) -> list[int]:
    """Reads the numbers of layers of a local folder's or file's text encoders, as far as they say them."""
    if source is not None and is_single_file(source):
        with suppress(OSError, ValueError):  # as below
            return file_text_layers(open_single_file(Path(source), source))
    found = []
    for path in [Path(source or "") / name / "config.json" for name in TEXT_ENCODERS]:
        with suppress(OSError, ValueError):  # what is wrong with it is said when the encoder is read
            found.append(read_config(path).get("num_hidden_layers"))
    return [number for number in found if isinstance(number, int)]


class BaseModel:
    """The components of a pipeline; `option` names the option that locates it, for messages.

    A hub name is downloaded without its safety checker, safetensors only; `hash_of` hashes a file. A single file's
    configs and tokenizers are written to a folder of this process. Raises FileNotFoundError if it cannot be reached or
    read.
    """

    def __init__(
        self,
        option: str,
        source: str,
        revision: str | None = None,
        variant: str | None = None,
        hash_of: Callable[[Path], str] = sha256,
    ) -> None:
        self.option, self.source, self.variant, self.hash_of = option, source, variant, hash_of
        self.place = f"{option} = {source}"
        self.single = open_single_file(Path(source), self.place) if is_single_file(source) else None
        self.folder = self._without_weights(self.single) if self.single else self._find(source, revision)
        check_files(self.folder)
        self.index: dict[str, Any] = read_config(self.folder / INDEX) if (self.folder / INDEX).is_file() else {}

    def _without_weights(self, single: SingleFile) -> Path:
        self._made = tempfile.TemporaryDirectory()  # removed with this object
        write_skeleton(Path(self._made.name), single)
        return Path(self._made.name)

    def _find(self, source: str, revision: str | None) -> Path:
        if Path(source).is_dir():
            return Path(source)
        if source.count("/") > 1 or source[0] in "./~":
            raise MissingFileError(f"{self.place}: there is no such folder, and hub names read owner/name")
        return self._download(source, revision)

    def _download(self, source: str, revision: str | None) -> Path:
        from diffusers import DiffusionPipeline

        options = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))  # left out
        options |= {"revision": revision, "variant": self.variant, "use_safetensors": True}
        with reading(DiffusionPipeline, source, self.place):
            return Path(DiffusionPipeline.download(source, **options))

    @cached_property  # read at every step
    def is_xl(self) -> bool:
        """Whether it has the two text encoders and the size conditioning of Stable Diffusion XL."""
        return (self.folder / "text_encoder_2" / "config.json").is_file()

    @property
    def zeros_for_empty(self) -> bool:
        """Whether the pipeline embeds the empty text as zeros, as Stable Diffusion XL does."""
        return bool(self.is_xl and self.index.get("force_zeros_for_empty_prompt", True))

    @property
    def text_encoder_names(self) -> tuple[str, ...]:
        return TEXT_ENCODERS if self.is_xl else TEXT_ENCODERS[:1]

    def tokenizers(self) -> list[CLIPTokenizer]:
        """Loads one tokenizer per text encoder."""
        from transformers import CLIPTokenizer

        names = ("tokenizer", "tokenizer_2")[: len(self.text_encoder_names)]
        return [read_part(CLIPTokenizer, self.folder / name, f"{self.place}, {name}") for name in names]

    def text_configs(self) -> list[CLIPTextConfig]:
        """Reads the text encoders' configs, in which older files lack what is usual."""
        from transformers import CLIPTextConfig

        names = self.text_encoder_names
        return [read_part(CLIPTextConfig, self.folder / name, f"{self.place}, {name}") for name in names]

    def text_encoder(self, name: str, dtype: torch.dtype) -> PreTrainedModel:
        import transformers

        kind = transformers.CLIPTextModelWithProjection if name == "text_encoder_2" else transformers.CLIPTextModel
        return self._read(kind, name, dtype=dtype)

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        from diffusers import UNet2DConditionModel

        return self._read(UNet2DConditionModel, "unet", torch_dtype=dtype)

    def _read(self, kind: type[ModelMixin | PreTrainedModel], name: str, **options: Any) -> Any:
        place = f"{self.place}, {name}"
        if self.single is not None:
            return read_model(kind, self.location, place, subfolder=name, **options)
        return read_model(kind, self.folder / name, place, variant=self.variant, **options)

    @property
    def location(self) -> str:
        """Where the networks are read from: the folder, or the single file."""
        return str(self.single.path if self.single else self.folder)

    def vae_settings(self) -> dict[str, Any]:
        """Returns the config of its autoencoder, or without one what is known of its latents."""
        if self.single is not None:
            family = self.single.family
            return {"scaling_factor": family.scaling_factor, "force_upcast": family.is_xl}
        path = self.folder / "vae" / "config.json"
        return read_config(path) if path.is_file() else {}

    @cached_property
    def sampler(self) -> SchedulerMixin:
        """The pipeline's scheduler, or DDIM with Stable Diffusion's noise schedule if it has none."""
        import diffusers

        path = self.folder / "scheduler" / "scheduler_config.json"
        if not path.is_file():
            noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
            return diffusers.DDIMScheduler(**noise, clip_sample=False, steps_offset=1)
        name = read_config(path).get("_class_name", "DDIMScheduler")
        kind: type[SchedulerMixin] | None = getattr(diffusers, str(name), None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
            raise InputError(f"{self.place}: its scheduler is a {shown(name)}, which diffusers does not have")
        return read_part(kind, path.parent, f"{self.place}, scheduler")

    def pipeline(self, **parts: Any) -> Any:
        """Builds diffusers' pipeline in float32 from `parts` (unet, vae, scheduler, text encoders) and the rest."""
        import diffusers
        import torch

        own = [name for name in self.text_encoder_names if name not in parts]
        parts |= {name: self.text_encoder(name, torch.float32) for name in own}
        parts |= dict(zip(("tokenizer", "tokenizer_2"), self.tokenizers(), strict=False))
        if self.is_xl:
            return diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=self.zeros_for_empty)
        unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return diffusers.StableDiffusionPipeline(**parts, **unchecked)

    def training_scheduler(self, **changes: Any) -> DDPMScheduler:
        """Makes a scheduler for training with the same noise and `changes`, such as the prediction type."""
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(self.sampler.config, clip_sample=False, thresholding=False, **changes)

    def digest(self, *names: str) -> str:
        """Hashes the files of components: 16 hex digits, and 16 of a single file."""
        digest = files_digest(*(self.folder / name for name in names), hash_of=self.hash_of)
        return digest if self.single is None else digest + self.hash_of(self.single.path)[:16]

    def loading(self) -> tuple[str, str, dict[str, Any]]:
        """Returns diffusers' class and method that load it, and what of its scheduler these do not find out."""
        if self.single is None:
            return "DiffusionPipeline", "from_pretrained", {}
        found = {"prediction_type": "v_prediction" if self.single.family is SD2 else "epsilon"}
        names = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
        own = {name: self.sampler.config[name] for name in (names if has_zero_snr(self.single) else names[:1])}
        return self.index["_class_name"], "from_single_file", {k: v for k, v in own.items() if found.get(k) != v}


def check_tokenizer(place: str, tokenizer: Any, config: Any) -> None:
    """Raises ValueError for a tokenizer that makes other or longer rows of tokens than its text encoder reads."""
    largest, length = max(tokenizer.get_vocab().values(), default=0), tokenizer.model_max_length
    known, longest = config.vocab_size, getattr(config, "max_position_embeddings", None)
    if largest >= known:
        raise InputError(f"{place}: reads {known:,} tokens, and its tokenizer has one of the number {largest:,}")
    if longest is not None and not (isinstance(length, int | float) and 2 < length <= longest):
        raise InputError(f"{place}: reads {longest} tokens, and its tokenizer has model_max_length = {shown(length)}")
