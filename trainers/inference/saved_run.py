"""Loads a trained run for inference: its trainer with the weights of a checkpoint or the finished pipeline."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import datasets_lib
from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.example import ImageData
from datasets_lib.foreign import read_json, shown
from trainers.base import RunInfo, Trainer
from trainers.engine.checkpoint.load import put_weights, read_weights
from trainers.engine.checkpoint.manifest import list_checkpoints, verify
from trainers.engine.checkpoint.state_file import MOST_BYTES, STATE, read_state_file
from trainers.engine.config.base_options import BaseConfig
from trainers.engine.config.config import RunConfig, check_config, find_trainer
from trainers.engine.config.files import read_config_file
from trainers.engine.config.trust import RUN_CONFIG, Trust
from trainers.engine.encoders.stages import build_encoders
from trainers.engine.run.run_folder import INDEX_FILES

RAW, AVERAGED = "raw", "ema"


class SavedRun(NamedTuple):
    """A run on disk: its options, its class names, and a checkpoint, or None for the finished pipeline."""

    document: dict[str, Any]  # both sections of the configuration
    label_names: list[str] | None
    folder: Path  # of the run
    checkpoint: Path | None
    trust: Trust

    @property
    def task(self) -> str:
        return next(section for section in self.document if section != "base")

    @property
    def trainer_class(self) -> type[Trainer]:
        return find_trainer(self.task, self.document["base"].get("trainer_class"), self.trust)

    def config(self, overrides: list[str] | None = None) -> RunConfig:
        """Checks the run's options with `overrides`; raises ConfigError."""
        return check_config(copy.deepcopy(self.document), overrides, trust=self.trust)

    def build_data(self, base: BaseConfig, split: str) -> ImageData | None:
        """Builds a split of the run's data; ValueError for a data set whose code is not trusted."""
        if problem := self.trust.problem("dataset", base.dataset):
            raise InputError(f"base.dataset = {shown(base.dataset)}: {problem}")
        return datasets_lib.build(base, split)


def open_run(path: Path, trust_code: bool = False, overrides: Iterable[str] = ()) -> SavedRun:
    """Opens a checkpoint, the newest one of a run, or else the run's finished pipeline.

    Raises FileNotFoundError if there is none, ValueError for a damaged checkpoint, or one that names code which is
    neither diffloop's, nor named by the user's own `overrides`, nor allowed by `trust_code`.
    """
    trust = Trust.of_run(path, trust_code, overrides)
    is_checkpoint = (path / STATE).is_file()
    checkpoint = path if is_checkpoint else next((folder for _, folder in list_checkpoints(path)), None)
    if checkpoint is not None:
        verify(checkpoint)
        state = read_state_file(checkpoint)
        run = checkpoint.absolute().parent
        document = _for_inference(state["config"], checkpoint, run, trust)
        return SavedRun(document, state.get("label_names"), run, checkpoint, trust)
    indices = [path / name for name in INDEX_FILES if (path / name).is_file()]
    if (path / RUN_CONFIG).is_file() and indices:
        names = _class_names(indices[0]) if indices[0].suffix == ".json" else []
        document = _for_inference(read_config_file(path / RUN_CONFIG), path, path, trust)
        return SavedRun(document, names or None, path, None, trust)
    raise MissingFileError(f"{path}: is no checkpoint, and holds no run with checkpoints or a finished pipeline")


def _class_names(index: Path) -> list[str]:
    """Returns the names of a pipeline's classes by number; ValueError for an index that diffusers would not write."""
    content = read_json(index, MOST_BYTES)
    try:
        names = {int(number): str(name) for number, name in (content.get("id2label") or {}).items()}
    except (AttributeError, ValueError):
        raise InputError(f"{shown(index)}: is not the index of a pipeline, a mapping with id2label") from None
    return [names[number] for number in sorted(names)]


def _for_inference(document: dict[str, Any], folder: Path, run: Path, trust: Trust) -> dict[str, Any]:
    """Removes options that only training needs, whose files may be missing here.

    A network that is saved whole brings its own config.
    """
    training = {"eval_steps", "eval_num_samples", "eval_features", "eval_classifier", "optimizer"}
    training |= {"enable_xformers_memory_efficient_attention", "push_to_hub", "hub_model_id", "resume_from_checkpoint"}
    [task] = [section for section in document if section != "base"]
    schema = find_trainer(task, document["base"].get("trainer_class"), trust).Config
    networks = [path.parent for path in sorted(folder.glob("*/config.json")) if not path.parent.name.endswith("_ema")]
    networks = [path for path in networks if not (path.name == "vae" and document[task].get("vae"))]  # which is frozen
    finished = (run / "config.json").is_file()  # a single network
    networks = [run] if finished and (networks or folder == run) else networks
    whole = "model_config" in document[task] and len(networks) == 1
    training |= {*schema.training_only, *schema.replaced, *(schema.initial_weights if whole else ())}
    kept = {name: {k: v for k, v in values.items() if k not in training} for name, values in document.items()}
    if whole:
        kept[task]["model_config"] = str(networks[0])
    elif finished:  # the finished network has what the checkpoint leaves out
        kept[task] |= {name: None for name in ("subfolder", "revision") if name in kept[task]}
        kept[task]["pretrained_model_name_or_path"] = str(run)
    if schema.export_is_base_model and (folder / "model_index.json").is_file():
        kept[task] |= {"pretrained_model_name_or_path": str(run), "model_config": None}
        kept[task] |= {"revision": None, "variant": None}  # those of the base: the run's files have neither
    if kept[task].get("vae") and (run / "vae" / "config.json").is_file():
        kept[task]["vae"] = str(run / "vae")  # the pipeline's own
    return kept


def load_trainer(
    saved: SavedRun, overrides: list[str] | None = None, weights: str | None = None, device: str | None = None
) -> Trainer:
    """Loads the run's trainer with trained weights: "ema", "raw", or None for averaged ones if there are any.

    Raises ValueError for missing weights, wrong overrides, and an unavailable device.
    """
    run = saved.config(overrides)
    trainer = run.trainer_class(run.config, run.base)
    trainer.run = RunInfo(device=find_device(device), weight_dtype=torch.float32, label_names=saved.label_names)
    trainer.setup()
    networks = trainer.init_modules()
    held = AVERAGED if run.config.use_ema else RAW
    if saved.checkpoint is not None:
        put_weights(read_weights(saved.checkpoint, networks, suffix_of(saved.checkpoint, held, weights)), networks)
    elif weights not in (None, held):
        raise InputError(f"{saved.folder}: has no checkpoints, and its pipeline holds the {held} weights only")
    else:
        pipeline = run.trainer_class.load_pipeline(saved.folder)
        for name, network in networks.items():
            found = pipeline if isinstance(pipeline, nn.Module) else getattr(pipeline, name)
            network.load_state_dict(found.state_dict())
    trainer.unwrapped = trainer.modules = {k: network.to(trainer.device).eval() for k, network in networks.items()}
    build_encoders(trainer)
    return trainer


def suffix_of(checkpoint: Path, held: str, weights: str | None) -> str:
    """Returns the ending of a checkpoint's folders with the wanted weights, by default the ones that are `held`.

    Raises ValueError for averaged weights where there are none.
    """
    if weights == AVERAGED and held == RAW:
        raise InputError(f"{checkpoint}: has no averaged weights, its run had use_ema: false; ask for raw")
    return "_ema" if (weights or held) == AVERAGED else ""


def find_device(name: str | None) -> torch.device:
    """Returns the named device, or else CUDA if available; ValueError if it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device = {name}: cannot be used ({str(error).splitlines()[0]}); give cpu or cuda") from None
    return device
