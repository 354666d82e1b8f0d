"""Names of tensors in LoRA files of many programs: the network, the module and the part that each one means."""

from __future__ import annotations

import re
from typing import NamedTuple

from trainers.common.lora.kohya_names import with_dots
from trainers.common.lora.original_names import in_diffusers

READ = "diffusers, peft, kohya's trainer, LyCORIS (LoCon), ComfyUI and OneTrainer"

# networks by the start of a name; None: what follows says it
PREFIXES: dict[str, str | None] = {
    **dict.fromkeys(("unet.", "diffusion_model.", "model.diffusion_model.", "lora_unet.", "lora_unet_"), "unet"),
    **dict.fromkeys(("text_encoder.", "lora_te.", "lora_te1.", "lora_te_", "lora_te1_"), "text_encoder"),
    **dict.fromkeys(("clip_l.", "text_encoders.clip_l.transformer."), "text_encoder"),
    **dict.fromkeys(("clip_h.", "text_encoders.clip_h.transformer."), "text_encoder"),  # Stable Diffusion 2's
    **dict.fromkeys(("text_encoder_2.", "lora_te2.", "lora_te2_"), "text_encoder_2"),
    **dict.fromkeys(("clip_g.", "text_encoders.clip_g.transformer."), "text_encoder_2"),
    "lycoris_": None,
    "": None,
}
START = re.compile(f"({'|'.join(map(re.escape, PREFIXES))})" + r"(?:base_model\.model\.)?(.+)")
KOHYAS = ("lora_", "lycoris_")  # starts of names in files that have an alpha for each module, and no settings

PART = re.compile(
    r"(.+?)(?:"
    r"(?P<down>\.lora_(?:A|down)(?:\.\w+)?\.weight|(?:[._]lora|\.lora_linear_layer)\.down\.weight)|"
    r"(?P<up>\.lora_(?:B|up)(?:\.\w+)?\.weight|(?:[._]lora|\.lora_linear_layer)\.up\.weight)|"
    r"(?P<mid>\.lora_mid\.weight)|"
    r"(?P<alpha>(?:[._]lora)?\.alpha)|"
    r"(?P<magnitude>\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?)|"
    r"(?P<dora_scale>\.dora_scale))"
)
UNET = re.compile(
    r"(?:(?:down|up|input|output)_blocks|mid_block|middle_block|(?:time|add)_embedding|time_embed|label_emb|out)\..+"
    "|conv_in|conv_out"
)
TEXT_ENCODER = re.compile(r"(?:text_model\.)?encoder\.layers\..+|(?:text_model\.)?text_projection")


class Spelled(NamedTuple):
    """The meaning of a tensor's name."""

    network: str
    module: str  # in diffusers or transformers
    part: str  # a group of PART


def spelled(key: str, encoder: str = "text_encoder") -> Spelled | None:
    """Reads a tensor's name, None for one that is unknown; `encoder` has the names that belong to any text encoder."""
    part = PART.fullmatch(key)
    start = START.fullmatch(part[1]) if part else None
    if part is None or part.lastgroup is None or start is None:
        return None
    network, module = PREFIXES[start[1]], start[2]
    if start[1].endswith("_"):
        module = with_dots(module)
    module = module.replace(".processor.", ".")
    if network is None:
        network = "unet" if UNET.fullmatch(module) else encoder if TEXT_ENCODER.fullmatch(module) else None
    if network is None or not module:
        return None
    return Spelled(network, _of_unet(module) if network == "unet" else _of_text_encoder(module), part.lastgroup)


def _of_unet(module: str) -> str:
    return re.sub(r"\.to_out$", ".to_out.0", in_diffusers(module))  # an old spelling leaves out the 0


def _of_text_encoder(module: str) -> str:
    return re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", module)  # an old spelling names them as the UNet's
