"""Text conditioning of a Stable Diffusion UNet: tokens, embeddings, and Stable Diffusion XL's sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets_lib.errors import InputError
from trainers.base import CacheKind, Encoder
from trainers.common.text_to_image.base_model import BaseModel, check_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import CLIPTokenizer

EMBEDS, POOLED = "prompt_embeds", "pooled_prompt_embeds"
CAPTION_TOKENS = (75, 150, 225)  # values of max_caption_tokens: one to three chunks
MARKS = 2  # of a chunk: a token for its start, another for its end
TEXT_MODEL = (
    'if not hasattr(pipeline.text_encoder, "text_model"):  # transformers 5 has none, and diffusers reads it\n'
    '    vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder\n'
)


class TextSettings(NamedTuple):
    """How texts are embedded."""

    max_caption_tokens: int = CAPTION_TOKENS[0]
    clip_skip: int | None = None  # last layers left out, as diffusers counts

    @property
    def chunks(self) -> int:
        return self.max_caption_tokens // CAPTION_TOKENS[0]

    def unusual(self) -> dict[str, int]:
        """Returns the settings that are not the defaults, for keys and headers."""
        return {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}


class Prompts:
    """Embeds captions with a base model's tokenizers and text encoders.

    Embeddings are {"prompt_embeds": [B, L, D]} and, for Stable Diffusion XL, {"pooled_prompt_embeds": [B, P]}, where L
    is the number of chunks times the tokenizer's length.
    """

    def __init__(
        self, base_model: BaseModel, device: torch.device, dtype: torch.dtype, settings: TextSettings | None = None
    ) -> None:
        self.base_model, self.device, self.dtype = base_model, device, dtype
        self.settings, self.task = settings or TextSettings(), base_model.option.partition(".")[0]
        self.tokenizers = base_model.tokenizers()
        self.names = base_model.text_encoder_names
        self.configs = base_model.text_configs()
        for name, tokenizer, config in zip(self.names, self.tokenizers, self.configs, strict=True):
            check_tokenizer(f"{base_model.place}, {name}", tokenizer, config)
        if problem := clip_skip_problem(self.settings.clip_skip, [config.num_hidden_layers for config in self.configs]):
            raise InputError(f"{self.task}.clip_skip = {self.settings.clip_skip}: {problem}")
        self.columns = (EMBEDS, POOLED) if base_model.is_xl else (EMBEDS,)

    def embed(self, networks: Mapping[str, nn.Module], captions: list[str]) -> dict[str, Tensor]:
        """Runs the text encoders `networks`, by name."""
        encoders = [networks[name] for name in self.names]
        return embed_texts(self.tokenizers, encoders, captions, self.settings, self.device)

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
            found = {"text encoders": digest, "variant": self.base_model.variant, "dtype": str(self.dtype)}
            return found | self.settings.unusual()

        found = Encoder("caption", self.columns, build, encode, source, cache, constants, default=default)
        found.shapes, found.dtype = self._shapes(), self.dtype
        return found

    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Returns the shapes of a caption's rows, by the text encoders' configs."""
        width = sum(config.hidden_size for config in self.configs)
        length = self.settings.chunks * self.tokenizers[0].model_max_length
        return {EMBEDS: (length, width), POOLED: (self.configs[-1].projection_dim,)}

    def notes(self, captions: Iterable[str] | None) -> Iterator[str]:
        """Notes captions that lose tokens, and that not every program draws from as many tokens as are trained."""
        settings, length = self.settings, self.tokenizers[0].model_max_length
        lost, end = (0, None) if captions is None else self.truncated(captions)
        if lost:
            most = f"{self.task}.max_caption_tokens = {settings.max_caption_tokens}"
            most = f"the text encoder's {length} tokens" if settings.chunks == 1 else most
            more = " or ".join(str(n) for n in CAPTION_TOKENS if n > settings.max_caption_tokens)
            advice = f"; {self.task}.max_caption_tokens: {more} keeps more" if more else ""
            end = f"{str(end)[:80]} ..." if len(str(end)) > 80 else end
            yield f"{lost:,} captions are longer than {most}: the first loses {end!r}{advice}"
        if settings.chunks > 1:
            yield (
                f"captions are read in {settings.chunks} chunks of {length - MARKS} tokens, as ComfyUI, AUTOMATIC1111 "
                f"and scripts/sample.py do; a call of diffusers' pipeline cuts prompts at {length} tokens"
            )

    def usage(self) -> dict[str, str]:
        """Returns what a task's `usage` needs for clip_skip: an argument of the call, and lines in front of it."""
        if self.settings.clip_skip is None:
            return {"clip_skip": "", "prepared": ""}
        prepared = "" if self.base_model.is_xl else TEXT_MODEL
        return {"clip_skip": f", clip_skip={self.settings.clip_skip}", "prepared": prepared}

    def truncated(self, captions: Iterable[str]) -> tuple[int, str | None]:
        """Counts the captions that have too many tokens; also returns the text cut off the first of them."""
        captions, tokenizer = list(dict.fromkeys(captions)), self.tokenizers[0]
        limit, lost = self.settings.chunks * (tokenizer.model_max_length - MARKS), 0
        first: str | None = None
        for start in range(0, len(captions), 10_000):
            several = captions[start : start + 10_000]
            for ids in tokenizer(several, add_special_tokens=False, verbose=False).input_ids:  # no warnings of length
                if len(ids) > limit:
                    lost += 1
                    first = first or tokenizer.batch_decode([ids[limit:]])[0]
        return lost, first


def embed_texts(
    tokenizers: Sequence[CLIPTokenizer],
    encoders: Sequence[nn.Module],
    texts: Sequence[str],
    settings: TextSettings,
    device: torch.device,
) -> dict[str, Tensor]:
    """Embeds texts with one text encoder, as Stable Diffusion 1 and 2 do, or with the two of Stable Diffusion XL.

    Each chunk is encoded by itself, and the chunks' embeddings are joined; the pooled embedding is the first chunk's.
    """
    import torch

    tokens = []
    for tokenizer in tokenizers:
        rows = tokenize(tokenizer, texts, settings.chunks)
        rows = rows.pin_memory() if device.type == "cuda" else rows  # else the copy would wait for the device
        tokens.append(rows.to(device, non_blocking=True))
    if len(encoders) == 1 and settings.clip_skip is None:
        return {EMBEDS: _joined(encoders[0](tokens[0])[0], len(texts))}
    found = [encoder(rows, output_hidden_states=True) for encoder, rows in zip(encoders, tokens, strict=True)]
    if len(encoders) == 1:
        norm = next(module for name, module in encoders[0].named_modules() if name.endswith("final_layer_norm"))
        hidden = found[0].hidden_states[-1 - (settings.clip_skip or 0)]
        return {EMBEDS: _joined(norm(hidden.to(norm.weight.dtype)), len(texts))}  # accelerate returns float32
    hidden = torch.cat([each.hidden_states[-2 - (settings.clip_skip or 0)] for each in found], dim=-1)
    return {EMBEDS: _joined(hidden, len(texts)), POOLED: found[1][0].unflatten(0, (len(texts), -1))[:, 0]}


def _joined(rows: Tensor, count: int) -> Tensor:
    """Joins the chunks [count * chunks, L, D] of each text along the length."""
    return rows.reshape(count, -1, rows.shape[-1])


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str], chunks: int) -> Tensor:
    """Returns padded rows of tokens [B * chunks, L], each with a start and an end; a text's tokens are cut anywhere."""
    import torch

    length = tokenizer.model_max_length
    if chunks == 1:
        options = {"padding": "max_length", "max_length": length, "truncation": True}
        return tokenizer(list(texts), return_tensors="pt", **options).input_ids
    size = length - MARKS
    options = {"add_special_tokens": False, "truncation": True, "max_length": chunks * size}
    found = tokenizer(list(texts), **options).input_ids
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = [[start, *ids[n * size : (n + 1) * size], end] for ids in found for n in range(chunks)]
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows])


def clip_skip_problem(clip_skip: int | None, layers: Sequence[int]) -> str | None:
    """Returns what is wrong with a clip_skip for text encoders with these numbers of layers, or None."""
    if clip_skip is None or clip_skip < min(layers, default=clip_skip + 1):
        return None
    return f"the text encoder has {min(layers)} layers; give at most {min(layers) - 1}"


def size_conditions(sizes: Any, corners: Any, target: tuple[int, int]) -> Tensor:
    """Stable Diffusion XL's time_ids [B, 6]: original height and width, crop top and left, target height and width."""
    import torch

    return torch.cat([sizes, corners, constant_rows(target, len(sizes), sizes.device)], dim=1)


def constant_rows(values: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """Repeats values in rows, int64 [count, len(values)], filled on the device because a copy to it would wait."""
    import torch

    return torch.stack([torch.full((count,), value, device=device) for value in values], dim=1)
