"""Files that are no LoRA of Stable Diffusion, but something near to it: refused by their names."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown

BAKE = "bake it into the base with a program that reads it, and take the result as the base"
OTHER_FAMILY = "take a LoRA that was trained on Stable Diffusion 1, 2 or XL, as its base was"


class Kind(NamedTuple):
    """Something that is not read."""

    name: str
    pattern: str  # found in the names of its tensors
    advice: str = BAKE


KINDS = (
    Kind("a LoHa", r"\.hada_[wt][0-9]"),
    Kind("a LoKr", r"\.lokr_[wt][0-9]"),
    Kind("an OFT or BOFT", r"\.(oft|boft)_"),
    Kind("a GLoRA", r"\.([ab][12]|bm[12]|[ab]m)\.weight$"),
    Kind("an IA3", r"\.on_input$|\.ia3_l"),
    Kind("a VeRA", r"\bvera_(lambda|[AB])"),
    Kind("full differences of weights, which need no low rank", r"\.diff(_b)?$"),
    Kind("changed norms, beside or instead of a LoRA", r"\.[wb]_norm$"),
    Kind("Custom Diffusion", r"custom_diffusion"),
    Kind("an embedding (textual inversion)", "^(clip_[lg]|emb_params)$", "no script here reads embeddings"),
    Kind("a LoRA of FLUX or a similar transformer", r"(^|[._])(double|single|single_transformer)_blocks[._]",
         OTHER_FAMILY),
    Kind("a LoRA of Stable Diffusion 3", r"(^|[._])joint_blocks[._]", OTHER_FAMILY),
    Kind("a LoRA of Stable Cascade", "^lora_prior_", OTHER_FAMILY),
    Kind("a LoRA of a transformer or of T5", r"^(lora_)?transformer[._]|t5xxl|^lora_te3[._]|^text_encoder_3\.|"
         r"^((model\.)?diffusion_model\.|lora_unet_)(transformer_)?(blocks|layers)[._][0-9]", OTHER_FAMILY),
    Kind("a control-LoRA", r"^lora_controlnet$", "no script here reads one"),
    Kind("a whole network", r"^(?!.*lora).*\.(weight|bias)$", "give it, or its pipeline, as the base"),
)  # fmt: skip


def check_kind(file: Path, keys: Collection[str]) -> None:
    """Raises ValueError, naming it, for a kind that is not read."""
    for kind in KINDS:
        pattern = re.compile(kind.pattern, re.ASCII)
        for key in keys:
            if pattern.search(key):
                what = f"{shown(key)} belongs to {kind.name}"
                raise InputError(f"{file}: {what}; LoRA, LoCon and DoRA of Stable Diffusion are read; {kind.advice}")
