"""Makes a single file of a pipeline, with the names that ComfyUI, AUTOMATIC1111 and others read.

Such a file holds no configs: readers take those of its family. So a pipeline that is built otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.single_file.families import ORIGINAL_CODE, SD1, SD2, SDXL, architecture_of
from trainers.single_file.header import Header
from trainers.single_file.names import original_names
from trainers.single_file.prediction import EPSILON, MARKS, VELOCITY
from trainers.single_file.reading import without_weights
from trainers.single_file.recognition import FIRST, SingleFile
from trainers.single_file.skeleton import NOISE
from trainers.single_file.tensors import as_original
from trainers.single_file.vocabulary import LENGTH, TOKENS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# a few of CLIP's tokens
KNOWN = {"!": 0, "a</w>": 320, "photo</w>": 1125, "<|startoftext|>": TOKENS - 2, "<|endoftext|>": TOKENS - 1}
FREE = ("sample_size", "upcast_attention", "force_upcast", "dropout")  # of configs: no reader needs them
OF_TEXT = (
    "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "hidden_act", "layer_norm_eps",
)  # fmt: skip


def single_file_of(
    pipeline: Any, title: str, place: str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns tensors and header of a pipeline's file.

    Raises ValueError, naming the `place`, for what no reader expects, and for numbers that are not finite.
    """
    import torch

    family = SDXL if hasattr(pipeline, "text_encoder_2") else SD2 if pipeline.unet.config.use_linear_projection else SD1
    tensors = {
        f"{prefix}{name}": as_original(name, [state[key].to(dtype) for key in keys]).contiguous()
        for network, (kind, prefix) in family.networks.items()
        for state in [getattr(pipeline, network).state_dict()]
        for name, keys in original_names(kind, state).items()
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    single = SingleFile(Path(title), place, Header(shapes, {}, {}), family, shapes[FIRST][1])
    for problem in (*_config_problems(single, pipeline), *_other_problems(single, pipeline)):
        raise single.error(f"{problem}; a single file of {family.title} cannot say so")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise single.error(f"{name} holds numbers that are not finite in {dtype}; take --dtype float32")
    scheduler = pipeline.scheduler.config
    marks = [scheduler.prediction_type == VELOCITY, bool(scheduler.get("rescale_betas_zero_snr"))]
    tensors |= {mark: torch.zeros(0) for mark, holds in zip(MARKS, marks, strict=True) if holds}
    return tensors, _about(single, pipeline)


def _config_problems(single: SingleFile, pipeline: Any) -> Iterator[str]:
    """Yields where a network's config is another than readers will make of its tensors."""
    for network in single.family.networks:
        own = getattr(pipeline, network).config
        usual = without_weights(single, network, type(getattr(pipeline, network))).config
        values = [dict(config) if network in ("unet", "vae") else config.to_dict() for config in (own, usual)]
        names = OF_TEXT if network.startswith("text") else [n for n in values[1] if n[0] != "_" and n not in FREE]
        for name in names:
            found, wanted = (_plain(config.get(name)) for config in values)
            if found != wanted:
                yield f"its {network} has {name} = {found}, and readers take {wanted}"


def _plain(value: Any) -> Any:
    """Writes what means the same in one way: [8, 8, 8] as 8, and nothing as None."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    return (items[0] if len(set(map(str, items))) == 1 else items) or None


def _other_problems(single: SingleFile, pipeline: Any) -> Iterator[str]:
    """Yields what readers would not know of the tokenizers and the noise."""
    tokenizers = [pipeline.tokenizer, *([pipeline.tokenizer_2] if single.family.is_xl else [])]
    for tokenizer in tokenizers:
        known, length = tokenizer.get_vocab(), tokenizer.model_max_length
        if len(known) != TOKENS or length != LENGTH or any(known.get(token) != n for token, n in KNOWN.items()):
            found = f"its tokenizer has {len(known):,} tokens and rows of {length}"
            yield f"{found}, and is not CLIP's of {TOKENS:,} and {LENGTH}"
    scheduler = pipeline.scheduler.config
    if scheduler.get("prediction_type") not in (EPSILON, VELOCITY):
        yield f"it predicts {scheduler.get('prediction_type')}"
    for name, value in NOISE.items():
        if scheduler.get(name) != value:
            yield f"its scheduler has {name} = {scheduler.get(name)}, and readers take {value}"


def _about(single: SingleFile, pipeline: Any) -> dict[str, str]:
    """Returns the header's texts, in the words of modelspec, which programs and model sites show."""
    is_velocity, side = pipeline.scheduler.config.prediction_type == VELOCITY, 8 * pipeline.unet.config.sample_size
    texts = {
        "sai_model_spec": "1.0.0",
        "architecture": architecture_of(single.family, is_velocity),
        "implementation": ORIGINAL_CODE,
        "title": single.path.name,
        "resolution": f"{side}x{side}",
        "prediction_type": "v" if is_velocity else EPSILON,
    }
    return {f"modelspec.{name}": text for name, text in texts.items()}
