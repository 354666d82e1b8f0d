"""Writes a pipeline as one file: scripts/export_single_file.py RUN|PIPELINE OUTPUT.safetensors [--dtype float16]

ComfyUI, AUTOMATIC1111 and others read it as a checkpoint, with text encoders and autoencoder inside. RUN is a run of
text_to_image or one of its checkpoints, PIPELINE a folder or hub name of Stable Diffusion 1, 2 or XL, or a single file.
A LoRA is baked into its base first, by scripts/merge_lora.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datasets_lib.errors import FileError, InputError
from datasets_lib.foreign import shown
from trainers.common.lora.training import AdapterTrainer
from trainers.common.text_to_image.stable_diffusion import StableDiffusionTrainer
from trainers.engine.config.trust import add_trust_argument
from trainers.engine.run.files import staged
from trainers.inference.arguments import DTYPES
from trainers.inference.command import command, path_argument
from trainers.inference.lora_pipeline import load_pipeline
from trainers.inference.prompts import is_pipeline
from trainers.inference.saved_run import load_trainer, open_run
from trainers.single_file.header import ENDING
from trainers.single_file.writing import single_file_of
from trainers.weight_files import write_tensors


def pipeline_of(options: argparse.Namespace) -> Any:
    """Loads what is to be written; ValueError for a run that is no Stable Diffusion model."""
    source = options.source
    if is_pipeline(source) or (Path(source) / "model_index.json").is_file():
        return load_pipeline(source, DTYPES[options.dtype])
    saved = open_run(Path(source), options.trust_code)
    if issubclass(saved.trainer_class, AdapterTrainer):
        merge = f"scripts/merge_lora.py BASE MERGED --lora {source}"
        raise InputError(f"{source}: is a LoRA; bake it into its base first: {merge}, and give MERGED")
    if not issubclass(saved.trainer_class, StableDiffusionTrainer):
        raise InputError(
            f"{source}: is a run of task {saved.task}, and no Stable Diffusion model; give text_to_image's"
        )
    trainer: Any = load_trainer(saved, device="cpu")
    return trainer.pipeline()


def export(options: argparse.Namespace) -> str:
    """Writes the file; returns a line that says so. ValueError for what does not fit one."""
    if options.output.suffix != ENDING or options.output.exists():
        raise InputError(f"{options.output}: must be a new file with the ending {ENDING}")
    pipeline = pipeline_of(options)
    tensors, about = single_file_of(pipeline, options.output.stem, options.source, DTYPES[options.dtype])
    try:
        with staged(options.output) as place:
            write_tensors(tensors, place, about | {"format": "pt"})
    except OSError as error:
        raise FileError(f"{options.output}: cannot be written ({shown(error)})") from None
    return f"{options.output.stat().st_size / 1e9:.2f} GB, {options.dtype}: {options.output}"


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="RUN|PIPELINE", help="a run or a checkpoint, or a pipeline's place")
    parser.add_argument("output", type=path_argument, help=f"a new {ENDING} file")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    add_trust_argument(parser)
    print(export(parser.parse_args()))


if __name__ == "__main__":
    main()
