"""Makes a config of another trainer's: scripts/import_config.py FILE [OUTPUT.yaml] [--dataset-config FILE]

FILE is a TOML of kohya's sd-scripts (train_network.py --config_file and the like), or a shell script or text with the
command line of one of these or of diffusers' training scripts for Stable Diffusion 1, 2 and XL. Nothing in it is run.
Every option is either taken over, with its name there behind the line, or listed at the end with the reason. Tokens and
keys are never written. At the end the config is checked as train.py does; exit code 1 if that finds problems.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from omegaconf import OmegaConf

import datasets_lib
from datasets_lib.errors import InputError, MissingFileError
from trainers.engine.config.config import check_config
from trainers.engine.config.files import ConfigError
from trainers.engine.run.files import write_text
from trainers.inference.command import command, path_argument
from trainers.inference.foreign_configs.importing import Imported, import_config


def problems_of(made: Imported) -> str | None:
    """Returns what the check of train.py says against it."""
    document = OmegaConf.to_container(OmegaConf.create(made.text))
    try:
        check_config(document, data_problems=datasets_lib.problems)  # type: ignore[arg-type]
    except ConfigError as error:
        return str(error)
    return None


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=path_argument, help="the other trainer's TOML, or a text with its command line")
    parser.add_argument("output", type=path_argument, nargs="?", help="a new .yaml file (standard output)")
    parser.add_argument(
        "--dataset-config", type=path_argument, metavar="FILE", help="instead of the file that FILE names"
    )
    options = parser.parse_args()
    if options.output is not None:
        _check_output(options.output)
    made = import_config(options.file, options.dataset_config)
    if options.output is None:
        print(made.text, end="")
    else:
        write_text(options.output, made.text)
    found = problems_of(made)
    print(found or f"A config of the task {made.translation.task}; the check finds nothing.", file=sys.stderr)
    print(f"{len(made.translation.left)} options were left out, see its end.", file=sys.stderr)
    if found:
        sys.exit(1)


def _check_output(path: Path) -> None:
    if path.exists():
        raise InputError(f"{path}: exists; choose a new file")
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"{path}: must end in .yaml")
    if not path.resolve().parent.is_dir():
        raise MissingFileError(f"{path}: there is no folder {path.resolve().parent}; make it first")


if __name__ == "__main__":
    main()
