"""Finds out what a single file holds, by the names, shapes and types in its header."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from trainers.single_file.families import ALONE, FAMILIES, PUBLISHED, Family, Network
from trainers.single_file.header import ENDING, PICKLES, Header, read_header
from trainers.single_file.names import CLIP, OPEN_CLIP, UNET, VAE

FIRST = "model.diffusion_model.input_blocks.0.0.weight"  # of every UNet in the original names
TYPES = ("F16", "BF16", "F32", "F64", "I32", "I64", "BOOL")  # of whole numbers are counts and positions
CHANNELS = {4: "", 9: "inpainting"}  # that a UNet sees
OTHER_CHANNELS = {5: "a depth model", 7: "an upscaler", 8: "an instruct-pix2pix model"}

DROPPED = {  # what files hold besides, and no network of diffusers has
    UNET: r"$^",
    VAE: r"(loss|model_ema)\.",  # of the autoencoder's own training
    CLIP: r"(?!text_model\.)|text_model\.embeddings\.position_ids$",
    OPEN_CLIP: r"(logit_scale|attn_mask|text_projection)$|visual\.",
}
OTHERS = {  # kinds of models, by a name that one of its tensors has
    r"(.*[._])?(lora_|lokr_|hada_|oft_|lora\.)": "is a LoRA, and a base is needed; scripts take it by --lora",
    r"(model\.diffusion_model\.)?double_blocks\.": "is a FLUX model",
    r"(model\.diffusion_model\.)?joint_blocks\.": "is a Stable Diffusion 3 model",
    r"control_model\.|input_hint_block\.|controlnet_": "is a ControlNet",
    r"(first_stage_model\.)?(encoder|decoder)\.(conv_in|mid|mid_block)\.": "is an autoencoder alone, for option vae",
    r"down_blocks\.|mid_block\.": "is one network in diffusers' names, of a pipeline's folder; give that folder",
    r"(text_model|transformer\.resblocks)\.": "is a text encoder alone",
    r"emb_params$|clip_[gl]$|string_to_param": "is an embedding (textual inversion)",
    r"model\.diffusion_model\.|input_blocks\.": "is a UNet alone, or another model than Stable Diffusion",
}
EDM = {"edm_mean": "Playground 2.5", "edm_vpred.sigma_max": "CosXL"}


class SingleFile(NamedTuple):
    """A base model in one file."""

    path: Path
    place: str  # what locates it, for messages
    header: Header
    family: Family
    channels: int  # that its UNet sees

    def error(self, text: str) -> InputError:
        return InputError(f"{self.place}: {text}")

    def names(self, network: str) -> dict[str, str]:
        """Returns the names in the file by the original names of a network's tensors, those left out included."""
        kind, prefix = self.family.networks[network]
        found = {name.removeprefix(prefix): name for name in self.header.shapes if name.startswith(prefix)}
        if kind == CLIP and not any(name.startswith("text_model.") for name in found):  # merged by early tools
            found = {f"text_model.{short}": name for short, name in found.items()}
        return found

    def shapes(self, network: str) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of a network's tensors by their original names."""
        return {short: self.header.shapes[name] for short, name in self.names(network).items()}

    @property
    def is_inpainting(self) -> bool:
        return CHANNELS[self.channels] == "inpainting"


def open_single_file(path: Path, place: str) -> SingleFile:
    """Reads a file's header; ValueError, naming the `place`, unless it is of Stable Diffusion 1, 2 or XL."""
    if path.suffix.lower() != ENDING and path.exists():
        raise InputError(f"{place}: {_refused_ending(path.suffix.lower())}")
    header = read_header(path)
    for problem in _problems(header):
        raise InputError(f"{place}: {problem}; a Stable Diffusion 1, 2 or XL model with its text encoders is needed")
    family = next(_families(header))
    return SingleFile(path, place, header, family, header.shapes[FIRST][1])


def open_autoencoder(path: Path, place: str) -> SingleFile:
    """Reads the header of a file with an autoencoder, alone or in a base model, as open_single_file does."""
    if path.suffix.lower() == ENDING:
        header = read_header(path)
        for prefix in ("", PUBLISHED["vae"].prefix) if FIRST not in header.shapes else ():
            if f"{prefix}decoder.mid.block_1.conv1.weight" in header.shapes:
                return SingleFile(path, place, header, ALONE._replace(networks={"vae": Network(VAE, prefix)}), 0)
    return open_single_file(path, place)


def _refused_ending(ending: str) -> str:
    if ending in PICKLES:
        reason = f"{ending} is a pickle, which can run any code when it is read, and is not read here"
        return f"{reason}; take the model as {ENDING}, or convert it in the program that you trust it with"
    return f"must be {ENDING}, found {shown(ending) or 'no ending'}; quantised models cannot be trained"


def _families(header: Header) -> Iterator[Family]:
    for family in FAMILIES:
        prefixes = [network.prefix for name, network in family.networks.items() if name.startswith("text_encoder")]
        if all(any(name.startswith(prefix) for name in header.shapes) for prefix in prefixes):
            yield family


def _problems(header: Header) -> Iterator[str]:
    """Yields why a file is no base model; the first is the reason."""
    names = header.shapes
    if len(names.get(FIRST, ())) != 4:
        known = (what for pattern, what in OTHERS.items() if any(re.match(pattern, name) for name in names))
        first = shown(min(names, default="nothing"))
        yield next(known, f"is no model that is known here (its first tensor is {first})")
        return
    if odd := set(header.types.values()) - set(TYPES):
        yield f"is quantised ({', '.join(sorted(map(shown, odd)))}), which can be neither trained nor merged"
    for name in EDM.keys() & names.keys():
        yield f"is {EDM[name]}, whose noise is another"
    family, channels = next(_families(header), None), names[FIRST][1]
    extra = any(name.startswith("model.diffusion_model.label_emb.") for name in names)
    if channels not in CHANNELS:
        found = OTHER_CHANNELS.get(channels, "another model")
        yield f"is {found}: its UNet sees {channels} channels, not 4 or, for inpainting, 9"
    elif family is None:
        refiner = any(name.startswith("conditioner.embedders.0.model.") for name in names)
        yield "is the refiner of Stable Diffusion XL" if refiner else "has no text encoder that is known here"
    elif extra != family.is_xl:
        yield "is a unCLIP model, which draws from pictures" if extra else "lacks the UNet's label_emb"
