"""Makes a LoRA file for other programs: scripts/convert_lora.py INPUT OUTPUT [--to kohya|diffusers] [--all]

INPUT is a run of task lora or lcm_lora, one of its checkpoints, a LoRA of any format that is read (docs/lora.md), or a
folder with one; OUTPUT is a new .safetensors file. With --all, INPUT is a run, and OUTPUT a folder that gets a file for
each checkpoint.

kohya: for ComfyUI, AUTOMATIC1111, Forge, stable-diffusion.cpp and kohya's tools, with an alpha for each module, which
includes rsLoRA's scale, and for SDXL the original network's names. diffusers: for load_lora_weights, with alpha = rank.

Of a DoRA, ComfyUI and Forge draw nearly the same (they divide by the norm of the base's weight instead of the changed
one's: 1 % of the change), AUTOMATIC1111 something else (it norms the other axis), and kohya's tools,
stable-diffusion.cpp and diffusers ignore its scale in kohya's format; --dora writes it nevertheless.
"""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from datasets_lib.errors import FileError, InputError, MissingFileError, UserError
from datasets_lib.foreign import shown
from trainers.common.lora.files import read_lora, write_lora
from trainers.common.lora.kohya import DORA, write_kohya
from trainers.common.lora.lora_file import LoraFile
from trainers.common.lora.tensors import FILE_NAME
from trainers.engine.checkpoint.manifest import list_checkpoints
from trainers.engine.checkpoint.state_file import STATE, read_state_file
from trainers.engine.config.trust import add_trust_argument
from trainers.engine.run.files import make_folder, staged
from trainers.inference.checkpoint_lora import read_checkpoint_lora
from trainers.inference.command import command, path_argument
from trainers.inference.lora_pipeline import print_notes
from trainers.inference.saved_run import open_run


def convert(
    source: Path,
    output: Path,
    to: str = "kohya",
    dora: bool = False,
    weights: str | None = None,
    trust_code: bool = False,
) -> None:
    """Writes the LoRA of `source` in a format; ValueError if there is none, or if readers would misread it."""
    check_output(output)
    lora = read(source, weights, trust_code)
    print_notes(lora)
    if lora.is_dora and to == "kohya" and not dora:
        raise InputError(f"{source}: is a DoRA; {DORA}; ComfyUI's change is right to about 1 %: --dora writes it")
    make_folder(output.parent)
    try:
        with staged(output, ".safetensors") as place:
            if to == "kohya":
                write_kohya(place, lora, output.stem)
            else:
                write_lora(place, lora)
    except (OSError, SafetensorError) as error:
        raise FileError(f"{output}: cannot be written ({shown(error)})") from None
    print(f"{to} format: {output}")


def check_output(output: Path) -> None:
    """Raises ValueError unless a path is that of a new file with the right ending."""
    if output.suffix != ".safetensors":
        raise InputError(f"{output}: the name must end in .safetensors, by which programs know the format")
    if os.path.lexists(output):
        raise InputError(f"{output}: is there already; choose another place, or remove it")


def read(source: Path, weights: str | None, trust_code: bool) -> LoraFile:
    """Reads a LoRA from a file, a finished run, a checkpoint, or else from the newest checkpoint of a run."""
    held = [source] if (source / STATE).is_file() else [folder for _, folder in list_checkpoints(source)]
    if weights is not None and not held:
        raise InputError(f"--weights {weights}: {source} is no checkpoint and holds none; leave the option out")
    if held and (weights is not None or held == [source] or not (source / FILE_NAME).is_file() or goes_on(held[0])):
        return read_checkpoint_lora(open_run(source, trust_code), weights)
    return read_lora(source)


def goes_on(checkpoint: Path) -> bool:
    """Whether a run had more to train at its newest checkpoint, so that a LoRA beside it is of before."""
    with suppress(UserError):  # of a damaged one
        state = read_state_file(checkpoint)
        return state["step"] < state["total_steps"]
    return False


def convert_all(source: Path, output: Path, **how: Any) -> None:
    """Writes a file for each checkpoint of a run, named as kohya's tools name theirs."""
    checkpoints = list_checkpoints(source)
    if not checkpoints:
        raise MissingFileError(f"{source}: holds no checkpoints; --all needs a run's folder with some")
    name = source.resolve().name
    files = {folder: output / f"{name}-step{step:08d}.safetensors" for step, folder in reversed(checkpoints)}
    for file in files.values():  # before the first one is written
        check_output(file)
    for folder, file in files.items():
        convert(folder, file, **how)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=path_argument, help="a run, a checkpoint, a LoRA, or a folder with one")
    parser.add_argument("output", type=path_argument, help="a new .safetensors file; with --all a folder")
    parser.add_argument("--to", choices=("kohya", "diffusers"), default="kohya", help="default: kohya")
    parser.add_argument("--all", action="store_true", help="convert every checkpoint of a run")
    parser.add_argument("--dora", action="store_true", help="write a DoRA in kohya's format, too")
    parser.add_argument("--weights", choices=("ema", "raw"), help="of checkpoints; default: averaged ones if any")
    add_trust_argument(parser)
    return parser.parse_args(words)


@command
def main() -> None:
    options = parse()
    how = {name: getattr(options, name) for name in ("to", "dora", "weights", "trust_code")}
    (convert_all if options.all else convert)(options.input, options.output, **how)


if __name__ == "__main__":
    main()
