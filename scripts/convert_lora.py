"""Converts a LoRA file to another format: scripts/convert_lora.py INPUT OUTPUT --to kohya|diffusers

diffusers: what load_lora_weights of diffusers reads, with alpha in the header. kohya: what ComfyUI and AUTOMATIC1111
read, with an alpha for each module, which includes rsLoRA's scaling; the UNet's blocks have diffusers' names, which
both read for SDXL, too. From kohya, the block names of the original SDXL network are also read.

With DoRA, ComfyUI divides by the norm of the base's weight instead of the changed one's, so its pictures differ a
little; diffusers reads DoRA in its own format only.
"""

from __future__ import annotations

import argparse
import secrets
from pathlib import Path

from datasets_lib.errors import InputError
from trainers.common.lora.files import read_lora, write_lora
from trainers.common.lora.kohya import to_kohya
from trainers.common.lora.tensors import write_tensors
from trainers.engine.run.files import make_folder
from trainers.inference.command import command, path_argument


def convert(source: Path, output: Path, wanted: str) -> None:
    """Writes `source`, a file or folder, in the `wanted` format; ValueError if it is no LoRA."""
    if output.suffix != ".safetensors" or output.exists():
        raise InputError(f"{output}: must be a new file with the ending .safetensors")
    lora = read_lora(source)
    staging = output.with_name(f".tmp-{secrets.token_hex(4)}-{output.name}")
    try:
        if wanted == "kohya":
            write_tensors(staging, *to_kohya(lora))
        else:
            write_lora(staging, lora)
        staging.rename(output)
    finally:
        staging.unlink(missing_ok=True)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=path_argument, help="a LoRA as .safetensors, or a folder with one")
    parser.add_argument("output", type=path_argument, help="a new .safetensors file")
    parser.add_argument("--to", choices=("kohya", "diffusers"), required=True)
    options = parser.parse_args()
    make_folder(options.output.parent)
    convert(options.input, options.output, options.to)
    print(f"{options.to} format: {options.output}")


if __name__ == "__main__":
    main()
