"""Names of Stable Diffusion's tensors: those of the original code, which single files have, for those of diffusers.

One table for both directions: a file is read by it, and written by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable

UNET, VAE, CLIP, OPEN_CLIP = "unet", "vae", "clip", "open_clip"  # kinds of networks

UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_WORDS = {
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k",
    "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip
OPEN_CLIP_WORDS = {
    "embeddings.token_embedding": "token_embedding", "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc",
    "fc2": "c_proj", "self_attn": "attn", "final_layer_norm": "ln_final", "text_projection.weight": "text_projection",
}  # fmt: skip
HEADS = re.compile(r"\.([qkv])_proj\.(weight|bias)$")  # one matrix in OpenCLIP: query, key and value in this order


def original_names(kind: str, keys: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Returns the keys of a network's tensors by the original name; the three of OpenCLIP's attention have one."""
    named = {UNET: _of_unet, VAE: _of_vae, CLIP: _of_clip, OPEN_CLIP: _of_open_clip}[kind](keys)
    found: dict[str, tuple[str, ...]] = {}
    for key in sorted(keys, key=lambda key: HEADS.sub(lambda match: f".{'qkv'.index(match[1])}.{match[2]}", key)):
        found[named(key)] = (*found.get(named(key), ()), key)
    return found


def _replaced(words: dict[str, str], text: str) -> str:
    """Replaces whole words between dots."""
    for word, other in words.items():
        text = re.sub(rf"(^|\.){re.escape(word)}(?=\.|$)", rf"\g<1>{other}", text)
    return text


def _count(pattern: str, keys: Iterable[str]) -> int:
    return len({match[1] for key in keys if (match := re.match(pattern, key))})


def _of_unet(keys: Collection[str]) -> Callable[[str], str]:
    per_block = _count(r"down_blocks\.0\.resnets\.(\d+)\.", keys) + 1
    attended = {int(key.split(".")[1]) for key in keys if key.startswith("up_blocks.") and ".attentions." in key}
    return lambda key: unet_name(key, per_block, attended)


def unet_name(key: str, per_block: int, attended: Collection[int]) -> str:
    """Returns the original name of a UNet's tensor.

    `per_block` counts a block's layers, and what halves or doubles; `attended` are the blocks on the way up that have
    attention.
    """
    module, _, end = key.rpartition(".")
    if module in UNET_ENDS:
        return f"{UNET_ENDS[module]}.{end}"
    side, *parts = key.split(".")
    block = 0 if side == "mid_block" else int(parts.pop(0))
    what, number, rest = parts[0], int(parts[1]), ".".join(parts[2:])
    rest = _replaced(UNET_RESNET, rest) if what == "resnets" else rest
    if side == "mid_block":
        return f"middle_block.{1 if what == 'attentions' else 2 * number}.{rest}"
    if what == "downsamplers":
        return f"input_blocks.{(block + 1) * per_block}.0.op.{end}"
    if what == "upsamplers":
        return f"output_blocks.{(block + 1) * per_block - 1}.{2 if block in attended else 1}.{rest}"
    position = block * per_block + number
    place = f"input_blocks.{position + 1}" if side == "down_blocks" else f"output_blocks.{position}"
    return f"{place}.{1 if what == 'attentions' else 0}.{rest}"


def _of_vae(keys: Collection[str]) -> Callable[[str], str]:
    last = _count(r"decoder\.up_blocks\.(\d+)\.", keys) - 1  # the original counts from the picture

    def name(key: str) -> str:
        key = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", key)
        key = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
        key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("down_blocks.", "down.")
        key = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", key.replace(".resnets.", ".block."))
        return _replaced(VAE_WORDS, key)

    return name


def _of_clip(keys: Collection[str]) -> Callable[[str], str]:
    return lambda key: f"text_model.{key.removeprefix('text_model.')}"  # which newer transformers leave out


def _of_open_clip(keys: Collection[str]) -> Callable[[str], str]:
    return lambda key: HEADS.sub(r".in_proj_\2", _replaced(OPEN_CLIP_WORDS, key.removeprefix("text_model.")))
