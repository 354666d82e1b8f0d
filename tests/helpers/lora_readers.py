"""Which tensors of a LoRA file other programs use, and for which layer: their rules in our own words.

Every reader takes the names in a file and a `Family` of full_size.py. No line of diffloop is used here, and nothing of
one reader by another one but for kohya's three programs. Compared with the programs themselves (snapshots of 2025 and 2026) by
the numbers in test_lora_names.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from full_size import Family, Layer

Names = Iterable[str]
Parts = dict[Layer, dict[str, str]]  # by layer: {"down": name of the tensor, "up": ..., "alpha": ..., "dora": ...}
KOHYA = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha", "dora_scale": "dora"}
TEXT = re.compile(r"text_model_encoder_layers_(\d+)_(self_attn_[qkv]_proj|self_attn_out_proj|mlp_fc1|mlp_fc2)")


class Reading(NamedTuple):
    used: Parts
    unused: list[str]
    refused: str = ""  # why the program takes nothing of the file


def underlined(name: str) -> str:
    return name.replace(".", "_")


def _text_layer(network: str, words: str) -> Layer | None:
    """A layer of a text encoder by its name without dots."""
    match = TEXT.fullmatch(words)
    dotted = match and match[2].replace("self_attn_", "self_attn.").replace("mlp_", "mlp.")
    return (network, f"text_model.encoder.layers.{match[1]}.{dotted}") if match else None


def _each(names: Names, place: Callable[[str], tuple[Layer, str] | None]) -> Reading:
    """The reading of a program that goes through the file; `place` gives a tensor's layer and part."""
    used: Parts = {}
    unused = []
    for name in names:
        if (found := place(name)) is None:
            unused.append(name)
        else:
            used.setdefault(found[0], {})[found[1]] = name
    return Reading(used, unused)


def _kohya_file(names: Names, layers: dict[str, Layer], parts: dict[str, str] = KOHYA) -> Reading:
    """The reading of a program that knows layers by what stands before a name's first dot."""

    def place(name: str) -> tuple[Layer, str] | None:
        prefix, _, part = name.partition(".")
        return (layers[prefix], parts[part]) if prefix in layers and part in parts else None

    return _each(names, place)


# ComfyUI and Forge: go through the network's layers, and look in the file for each under several names ------------------

UP_AND_DOWN = (
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
)


def comfyui(names: Names, family: Family) -> Reading:
    names = list(names)
    present, used = set(names), {}
    for prefix, layer in _comfyui_prefixes(family):
        found = {part: f"{prefix}.{suffix}" for part, suffix in (("alpha", "alpha"), ("dora", "dora_scale"))}
        for up, down in UP_AND_DOWN:
            if prefix + up in present:
                found |= {"up": prefix + up, "down": prefix + down}
                break
        if found := {part: name for part, name in found.items() if name in present}:
            used[layer] = found
    taken = {name for found in used.values() for name in found.values()}
    return Reading(used, [name for name in names if name not in taken])


def _comfyui_prefixes(family: Family) -> Iterable[tuple[str, Layer]]:
    for layer in family.shapes:
        network, name = layer
        if network == "unet":
            original = family.original[layer]
            yield f"lora_unet_{underlined(original)}", layer
            yield f"diffusion_model.{original}", layer
            yield f"lora_unet_{underlined(name)}", layer
            yield f"lycoris_{underlined(name)}", layer
            # diffusers' spelling until 2023, of which to_out has no number
            old = name.replace(".to_", ".processor.to_").removesuffix(".0" if name.endswith("to_out.0") else " ")
            yield old, layer
            yield f"unet.{old}", layer
        elif name == "text_projection":
            yield "lora_te2_text_projection", layer
        else:
            tags = ("te2",) if network == "text_encoder_2" else ("te", "te1")
            yield from ((f"lora_{tag}_{underlined(name)}", layer) for tag in tags)
            yield f"{network}.{name}", layer


def forge(names: Names, family: Family) -> Reading:
    """ComfyUI's rules of two years ago; and with more than 12 tensors that are left over it takes nothing."""
    reading = comfyui(names, family)
    left = len(reading.unused)
    return reading._replace(refused=f"{left} tensors left over: another version's LoRA" if left > 12 else "")


# AUTOMATIC1111: the text before the first dot is renamed to a layer of the original network ------------------------------


def a1111(names: Names, family: Family) -> Reading:
    layers = _a1111_layers(family)

    def place(name: str) -> tuple[Layer, str] | None:
        prefix, _, part = name.partition(".")
        layer = layers.get(_a1111_name(prefix, family))
        if layer is None and prefix.startswith("lora_unet"):  # SDXL's names are mostly the original's
            layer = layers.get(prefix.replace("lora_unet", "diffusion_model"))
        elif layer is None and prefix.startswith("lora_te1_text_model"):
            rest = prefix.removeprefix("lora_te1_")
            layer = layers.get(f"0_transformer_{rest}", layers.get(f"transformer_{rest}"))
        return (layer, KOHYA[part]) if layer and part in KOHYA else None

    reading = _each(names, place)
    halves = [layer for layer, parts in reading.used.items() if not {"up", "down"} <= parts.keys()]
    return reading._replace(refused=f"{halves[0]} has no pair" if halves else "")


def _a1111_layers(family: Family) -> dict[str, Layer]:
    found = {f"diffusion_model_{underlined(original)}": layer for layer, original in family.original.items()}
    for layer in family.shapes:
        network, name = layer
        if network == "unet" or name == "text_projection":  # that is no layer in OpenCLIP
            continue
        open_clip = network == "text_encoder_2" or family.name == "sd2"
        number = {"text_encoder": "0_", "text_encoder_2": "1_"}[network] if family.name == "sdxl" else ""
        words = underlined(name)
        if open_clip:  # q, k and v are parts of one layer there, and found by its name
            words = words.removeprefix("text_model_encoder_layers_").replace("self_attn", "attn")
            words = words.replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj")
            found[f"{number}model_transformer_resblocks_{words}"] = layer
        else:
            found[f"{number}transformer_{words}"] = layer
    return found


def _a1111_name(name: str, family: Family) -> str:
    """Stable Diffusion 1's arithmetic, which it also uses for SDXL."""
    tops = {"conv_in": "input_blocks_0_0", "conv_out": "out_2"}
    tops |= {f"time_embedding_linear_{n}": f"time_embed_{2 * n - 2}" for n in (1, 2)}
    words = name.removeprefix("lora_unet_")
    if words in tops and words != name:
        return f"diffusion_model_{tops[words]}"
    if match := re.fullmatch(r"(down|up)_blocks_(\d)_(attentions|resnets)_(\d)_(\w+)", words):
        side, level, kind, layer, rest = match.groups()
        number = 3 * int(level) + int(layer) + (side == "down")
        return f"diffusion_model_{_SIDE[side]}_blocks_{number}_{_COLUMN[kind]}_{_a1111_rest(kind, rest)}"
    if match := re.fullmatch(r"mid_block_(attentions|resnets)_(\d)_(\w+)", words):
        kind, layer, rest = match.groups()
        number = 1 if kind == "attentions" else 2 * int(layer)
        return f"diffusion_model_middle_block_{number}_{_a1111_rest(kind, rest)}"
    if match := re.fullmatch(r"down_blocks_(\d)_downsamplers_0_conv", words):
        return f"diffusion_model_input_blocks_{3 * int(match[1]) + 3}_0_op"
    if match := re.fullmatch(r"up_blocks_(\d)_upsamplers_0_conv", words):
        column = 1 if match[1] == "0" else 2  # in SDXL it is 2 in all blocks
        return f"diffusion_model_output_blocks_{3 * int(match[1]) + 2}_{column}_conv"
    if match := re.fullmatch(r"lora_te(2?)_text_model_encoder_layers_(\w+)", name):
        if match[1] or family.name == "sd2":
            rest = match[2].replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj").replace("self_attn", "attn")
            return f"{'1_' if match[1] else ''}model_transformer_resblocks_{rest}"
        return f"transformer_text_model_encoder_layers_{match[2]}"
    return name


_SIDE = {"down": "input", "up": "output"}
_COLUMN = {"attentions": 1, "resnets": 0}
_IN_RESNETS = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def _a1111_rest(kind: str, rest: str) -> str:
    return _IN_RESNETS.get(rest, rest) if kind == "resnets" else rest


# kohya's sd-scripts: layers inside five kinds of blocks, whose UNet is diffusers' for SD 1 and 2, the original for SDXL ---


def kohya_merge(names: Names, family: Family) -> Reading:
    """merge_lora.py and sdxl_merge_lora.py, which do not read a scale of DoRA."""
    return _kohya_file(names, _kohya_layers(family), {key: part for key, part in KOHYA.items() if part != "dora"})


def kohya(names: Names, family: Family) -> Reading:
    """create_network_from_weights, as used for training on and in generating; it renames diffusers' blocks for SDXL."""
    layers = _kohya_layers(family)
    if family.name == "sdxl" and any("down_blocks" in name or "up_blocks" in name for name in names):
        layers |= {f"lora_unet_{underlined(key[1])}": key for key in family.original if _in_blocks(key[1])}
    return _kohya_file(names, layers, {key: part for key, part in KOHYA.items() if part != "dora"})


def lycoris(names: Names, family: Family) -> Reading:
    """LyCORIS' network module in sd-scripts: any layer of those networks, with DoRA."""
    return _kohya_file(names, _kohya_layers(family, everything=True))


def _in_blocks(name: str) -> bool:
    return name.startswith(("down_blocks", "up_blocks", "mid_block"))


def _kohya_layers(family: Family, everything: bool = False) -> dict[str, Layer]:
    found = {}
    for layer in family.shapes:
        network, name = layer
        if network == "unet" and (everything or _in_blocks(name)):
            own = family.original[layer] if family.name == "sdxl" else name
            found[f"lora_unet_{underlined(own)}"] = layer
        elif network != "unet" and (everything or name != "text_projection"):
            number = {"text_encoder": "1", "text_encoder_2": "2"}[network] if family.name == "sdxl" else ""
            found[f"lora_te{number}_{underlined(name)}"] = layer
    return found


# stable-diffusion.cpp: turns _ into dots except in words that it knows, then diffusers' names into the original ones ------

_CPP_WORD = re.compile(
    "self_attn|out_proj|q_proj|k_proj|v_proj|to_k|to_q|to_v|to_out|text_model|down_blocks|mid_block|up_block|proj_in|"
    "proj_out|transformer_blocks|conv_in|conv_out|lora_down|lora_up|time_emb_proj|conv_shortcut|time_embedding|"
    "input_blocks|output_blocks|middle_block|skip_connection|emb_layers|in_layers|out_layers|diffusion_model|_"
)
_CPP_SUFFIXES = {
    "up": (".lora_up.weight", ".lora.up.weight", "_lora.up.weight", ".lora_B.weight"),
    "down": (".lora_down.weight", ".lora.down.weight", "_lora.down.weight", ".lora_A.weight"),
    "alpha": (".alpha",),
}


def stable_diffusion_cpp(names: Names, family: Family) -> Reading:
    layers = {f"unet.{name}": layer for layer, name in family.original.items()}
    tops = ("conv_in", "conv_out", "time_embedding", "add_embedding")  # renamed for whole models only
    layers |= {f"unet.{key[1]}": key for key in family.original if not key[1].startswith(tops)}
    for layer in family.shapes:
        network, name = layer
        if network != "unet":
            layers |= {f"{tag}.{name}": layer for tag in {"text_encoder": ("te", "te1")}.get(network, ("te2",))}

    def place(name: str) -> tuple[Layer, str] | None:
        for part, suffixes in _CPP_SUFFIXES.items():
            for suffix in suffixes:
                if name.endswith(suffix):
                    module = name.removesuffix(suffix).removeprefix("lora_").replace(".processor", "")
                    dotted = _CPP_WORD.sub(lambda word: "." if word[0] == "_" else word[0], module)
                    dotted = f"{dotted}.0" if dotted.endswith("to_out") else dotted
                    return (layers[dotted], part) if dotted in layers else None
        return None

    return _each(names, place)


# OneTrainer: spellings first, then names; anything that is left over is an error ----------------------------------------


def onetrainer(names: Names, family: Family) -> Reading:
    names = list(names)
    layers = _onetrainer_layers(names, family)
    spelled = {"lora_A.weight": "down", "lora_B.weight": "up", "lora.down.weight": "down", "lora.up.weight": "up"}
    spelled |= {"lora_magnitude_vector.weight": "dora", **KOHYA}

    def place(name: str) -> tuple[Layer, str] | None:
        for suffix, part in spelled.items():
            if name.endswith(f".{suffix}"):
                module = name.removesuffix(f".{suffix}")
                return (layers[module], part) if module in layers else None
        return None

    reading = _each(names, place)
    return reading._replace(refused=f"cannot load {reading.unused[0]}" if reading.unused else "")


def _onetrainer_layers(names: list[str], family: Family) -> dict[str, Layer]:
    """Names with a network's prefix, or without dots; for SDXL the original's or, if these match more, diffusers'."""
    dotted = {f"{network}.{name}": (network, name) for network, name in family.shapes}
    if any(name.startswith("unet.") for name in names):
        return dotted
    tags = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    tags |= {} if family.name == "sdxl" else {"text_encoder": "lora_te"}
    flat = {f"{tags[network]}_{underlined(name)}": (network, name) for network, name in family.shapes}
    text = {name: layer for name, layer in flat.items() if layer[0] != "unet"}
    own = text | {f"lora_unet_{underlined(name)}": layer for layer, name in family.original.items()}
    if family.name != "sdxl":
        return flat
    return max((own, flat), key=lambda each: sum(name.partition(".")[0] in each for name in names))


READERS = {
    "ComfyUI": comfyui,
    "Forge": forge,
    "AUTOMATIC1111": a1111,
    "kohya": kohya,
    "kohya's merge": kohya_merge,
    "LyCORIS": lycoris,
    "stable-diffusion.cpp": stable_diffusion_cpp,
    "OneTrainer": onetrainer,
}
