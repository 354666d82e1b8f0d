"""Assembles what a text-to-image model from scratch starts from: scripts/data/make_base.py VAE CONFIG OUTPUT

VAE is a finished vae run, CONFIG a run's configuration whose data set has captions. OUTPUT gets the folders that
`pretrained_model_name_or_path` of task text_to_image needs: vae, scheduler (Stable Diffusion's noise, DDIM), a
tokenizer of these captions' words, and a CLIP text encoder with random weights. Such an encoder tells captions apart
but knows nothing of their meaning: it is for small vocabularies for which there is no trained one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import datasets_lib
from datasets_lib.errors import InputError
from trainers.common.autoencoder.latents import latents_problems
from trainers.common.autoencoder.options import find_subfolder
from trainers.common.lora.lora_file import file_name
from trainers.engine.config.config import load_config
from trainers.engine.config.trust import add_trust_argument
from trainers.inference.command import check_new, command, path_argument, positive
from trainers.pretrained import read_model

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}  # Stable Diffusion's
MERGES = 1000  # at most, of letters to words


def write_tokenizer(folder: Path, captions: Iterable[str], max_length: int) -> CLIPTokenizer:
    """Writes a CLIP tokenizer in the layout of Stable Diffusion's: every text can be written, known words are short."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, *(f"{c}</w>" for c in letters), BOS, EOS])}
    blank = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=max_length)
    trained = blank.train_new_from_iterator(captions, vocab_size=len(vocabulary) + MERGES)
    folder.mkdir(parents=True)
    trained.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    settings = {**special, "model_max_length": max_length, "tokenizer_class": "CLIPTokenizer"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    """A CLIP text encoder with random weights; `width` is the size of the embeddings."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def save_text_encoder(encoder: CLIPTextModel, folder: Path) -> None:
    """Saves an encoder with the names of tensors that the hub's have, and transformers 4 needs."""
    state = {file_name("text_encoder", key): value for key, value in encoder.state_dict().items()}
    encoder.save_pretrained(folder, state_dict=state)


def make_base(options: argparse.Namespace) -> str:
    """Writes the folder and returns a line about its content; raises ValueError for unsuitable input."""
    check_new(options.output)
    for problem in latents_problems(options.vae):
        raise InputError(f"VAE = {options.vae}: {problem}")
    base = load_config(options.config, options.overrides, datasets_lib.problems, options.trust_code).base
    texts = datasets_lib.build(base, "train").captions()
    if texts is None:
        raise InputError(f"CONFIG = {options.config}: its data set has no captions() to make a vocabulary of; add them")
    captions = set(texts)
    torch.manual_seed(options.seed)
    vae = read_model(AutoencoderKL, options.vae, subfolder=find_subfolder(options.vae, None))
    vae.save_pretrained(options.output / "vae")
    tokenizer = write_tokenizer(options.output / "tokenizer", sorted(captions), options.max_length)
    encoder = build_text_encoder(tokenizer, options.width, options.layers)
    save_text_encoder(encoder, options.output / "text_encoder")
    sampler = DDIMScheduler(**NOISE, clip_sample=False, timestep_spacing="trailing")
    sampler.save_pretrained(options.output / "scheduler")
    return f"{len(captions)} captions, {len(tokenizer)} tokens: {options.output}"


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vae", help="a finished vae run, or another folder of an AutoencoderKL")
    parser.add_argument(
        "config", type=path_argument, help="a configuration; its section base says what the captions are"
    )
    parser.add_argument("output", type=path_argument, help="a new folder")
    parser.add_argument("overrides", nargs="*", metavar="base.key=value")
    parser.add_argument("--width", type=positive, default=64, help="of the text embeddings, a multiple of 32")
    parser.add_argument("--layers", type=positive, default=2, help="of the text encoder")
    parser.add_argument("--max-length", type=positive, default=77, help="tokens of a caption")
    parser.add_argument("--seed", type=int, default=0)
    add_trust_argument(parser)
    options = parser.parse_intermixed_args()
    print(make_base(options))


if __name__ == "__main__":
    main()
