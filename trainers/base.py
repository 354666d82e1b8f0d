"""The contract between the loop and a task: what a Trainer has, and what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from datasets_lib.errors import InputError
from datasets_lib.foreign import in_quotes
from trainers.engine.config.base_options import BaseConfig
from trainers.options import Bounds, Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section
from trainers.pretrained import read_model
from trainers.task_options import TrainerConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from datasets_lib.example import DataSet, ImageData

__all__ = [  # what a task imports from here
    "BaseConfig", "Bounds", "CacheKind", "CardFacts", "Encoder", "Fraction", "MeasuresData", "NonNegative",
    "NonNegativeFloat", "Positive", "PositiveFloat", "RandomSource", "RunInfo", "Section", "Trainer", "TrainerConfig",
]  # fmt: skip


class RandomSource(Protocol):
    """Random draws that depend only on (seed, slot of the example, name of the draw); each name can be used once."""

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor: ...  # [B, *shape] float32

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor: ...  # [B, *shape] float32 in [0, 1)

    def integers(self, name: str, high: int, shape: tuple[int, ...] = ()) -> Tensor: ...  # [B, *shape] int64, [0, high)

    def bernoulli(self, name: str, p: float) -> Tensor: ...  # [B] bool, True with probability p

    def generators(self) -> list[torch.Generator]: ...  # one CPU generator per example, for diffusers' pipelines


CacheKind = Literal["memory", "disk"]


@dataclass
class Encoder:
    """A frozen stage in front of the network, such as a VAE's encoder, which the loop runs and can cache.

    `encode(module, values)` maps the column `reads` of a batch to the columns `writes`; it must be deterministic.
    `build()` makes the module on first use. `cache` keeps the outputs in memory or on disk; their key is `source()`
    (hashes of files, dtype, options) and the content of the value. `constants` are values that the task will encode
    besides those of the data.
    """

    reads: str
    writes: tuple[str, ...]
    build: Callable[[], nn.Module]
    encode: Callable[[nn.Module, Any], dict[str, Tensor]]
    source: Callable[[], dict[str, Any]] = dict
    cache: CacheKind | None = None
    constants: tuple[Any, ...] = ()
    optional: bool = False  # whether a batch may lack the column
    default: Any = None  # the value of examples that lack it; None: an error
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)  # of its rows; None for sizes that vary
    dtype: torch.dtype | None = None  # of its rows; rows of a cache are compared with both


@dataclass(kw_only=True)
class RunInfo:
    """Facts about a run that are known before its networks are built."""

    device: torch.device
    weight_dtype: torch.dtype  # of frozen networks; trained weights are float32
    start_step: int = 0  # the first step of a resumed run
    total_steps: int | None = None  # None: loaded for inference
    label_names: list[str] | None = None  # of the data set's classes
    highest_label: int | None = None  # in the data set, if known
    no_labels: str | None = None  # why the data set has none, if it knows
    captions: list[str] | None = None  # some captions of the training set
    class_captions: Sequence[str] = ()  # all captions of its pictures of the class
    encoded_by: str | None = None  # digest of the network that made the data set's latents


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """A task's statements on its result for the header of the model card, in the words of the hub."""

    pipeline_tag: str | None = None  # what the result does; None: the hub has no word for it
    tags: tuple[str, ...] = ()
    base_model: str | None = None  # folder, file or hub name of the model that was trained on
    base_revision: str | None = None  # of a hub name
    base_model_relation: Literal["adapter", "finetune"] | None = None
    instance_prompt: str | None = None  # words that ask for what was learned


class Trainer(ABC):
    """One task: its networks, loss, samples and saved pipeline.

    The four required methods are init_modules, compute_loss, sample and save_pipeline. The loop owns devices,
    optimizer, averaging, data order, checkpoints and files; a Trainer never calls `backward`, `.item()` or
    `torch.randn`, and never asks for its rank. What it returns has the same names in the same order on every rank, and
    in all calls of a validation, because numbers are added up, and pictures gathered, by their places. The names of
    what compute_loss logs may depend on the step.

    A task's module is imported to check a config, so it imports diffusers, transformers and peft inside functions.
    Classes derived from theirs, such as pipelines and networks, belong in `trainers/common`; for a task outside the
    repository, in a module next to its own.
    """

    Config: ClassVar[type[TrainerConfig]]  # schema of the task's config section
    usage: ClassVar[str] = (  # code that loads and samples the result; {output_dir} and options are filled in
        "from diffusers import DiffusionPipeline\n"
        'pipeline = DiffusionPipeline.from_pretrained("{output_dir}")\n'
        'pipeline().images[0].save("sample.png")'
    )
    pipeline_tag: ClassVar[str | None] = None  # see CardFacts
    hub_tags: ClassVar[tuple[str, ...]] = ()
    draws_held_out: ClassVar[bool] = False  # whether sample_requests names examples of the validation set
    sample_batch_size: ClassVar[int | None] = None  # pictures per call at validations; None: all of a process's

    # set by the loop: `run` before setup(), the rest before compute_loss, sample or encode are called
    run: RunInfo
    modules: dict[str, nn.Module]  # wrapped networks: call only their forward, which DDP and FSDP hook
    unwrapped: dict[str, nn.Module]  # the same without wrappers: see raw()
    encoded: Callable[[str, Any], dict[str, Tensor]]  # encoded(name, value): output of encoder `name` for a constant
    training: bool = True  # False in validation: no label or caption dropout
    progress: Callable[[Iterable], Iterable] = staticmethod(iter)  # wraps a sampler's steps: as many on every rank
    frames: list[Tensor] | None = None  # if a list, sample() appends its pictures [N, C, H, W] after every step

    # set by the task in setup()
    num_classes: int | None = None  # all labels are below it; None: the task reads no labels
    grid_columns: int | None = None  # columns of validation grids; None: as square as possible

    def __init__(self, config: TrainerConfig, base: BaseConfig) -> None:
        self.config, self.base = config, base

    @property
    def device(self) -> torch.device:
        return self.run.device

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.run.weight_dtype

    def setup(self) -> None:
        """Prepares what encoders() and init_modules() share, and checks the data; called once, draws nothing random."""
        return None

    @abstractmethod
    def init_modules(self) -> dict[str, nn.Module]:
        """Returns the networks to train; their names label parameter groups, checkpoint folders and metrics.

        Trainable weights are float32; frozen ones are loaded in `self.weight_dtype`.
        """

    @abstractmethod
    def compute_loss(self, batch: dict[str, Any], rng: RandomSource, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the scalar loss, the mean over the batch, and detached scalars to log."""

    @abstractmethod
    def sample(self, requests: list[dict], rng: RandomSource) -> dict[str, Tensor]:
        """Draws one picture per request: {name: images [N, C, H, W] in [0, 1]}; never called with an empty list."""

    @abstractmethod
    def save_pipeline(self, output_dir: Path) -> None:
        """Writes what inference loads, from `self.raw(name)`; main process only, no collective calls.

        A model_index.json or config.json at its top is how scripts know a finished run that has no checkpoints left.
        """

    def sample_requests(self, validation_set: DataSet | None) -> list[dict]:
        """Returns the requests to draw at a validation: the same list on every rank, empty for a task without pictures.

        A request {"example": i} reaches sample() and sample_metrics() with the columns of example i of the validation
        set: see held_out_requests and stacked.
        """
        return [{} for _ in range(self.config.valid_batch_size)]

    def evaluation_requests(self, count: int, validation_set: DataSet | None = None) -> list[dict]:
        """Returns `count` requests for metrics over many pictures; with classes, each `label` equally often.

        Requests with an `example` are reconstructions, which are compared with these held-out pictures. They reach
        sample() with "evaluation": True; one picture each is enough.
        """
        return [{} for _ in range(count)]

    @staticmethod
    def held_out_requests(validation_set: DataSet | None, count: int) -> list[dict]:
        """Returns requests for at most `count` held-out examples, evenly spread; none without a validation set."""
        total = 0 if validation_set is None else len(validation_set)
        chosen = min(count, total)
        return [{"example": number * total // chosen} for number in range(chosen)]

    def stacked(self, requests: list[dict], column: str) -> Tensor:
        """Returns a column of the requests' examples, [N, ...] on the device."""
        import torch

        return torch.stack([torch.as_tensor(request[column]) for request in requests]).to(self.device)

    def sample_metrics(self, requests: list[dict], images: dict[str, Tensor]) -> dict[str, float]:
        """Returns means over pictures [N, C, H, W] that sample() drew for these requests; main process, by batches."""
        return {}

    def notes(self, train_set: ImageData) -> list[str]:
        """Returns lines about the data for the start of the run."""
        return []

    def validation_metrics(self, batch: dict[str, Any], rng: RandomSource) -> dict[str, Tensor]:
        """Returns metrics per example, {name: [B]}; by default the batch's loss.

        A vector per example needs a name for each of its numbers: {"psnr/red": [B], "psnr/green": [B], ...}.
        """
        loss, _ = self.compute_loss(batch, rng, step=0)
        return {"loss": loss.expand(len(batch["slot"]))}

    def validation_summary(self, means: dict[str, float]) -> dict[str, float]:
        """Returns what to log, which follows from the means of validation_metrics over the validation set alone."""
        return means

    def encoders(self) -> dict[str, Encoder]:
        """Returns the frozen stages whose outputs compute_loss finds in its batch, in the order in which they run.

        Called after setup(); their caches are full, and the device is free again, before init_modules() is called.
        """
        return {}

    def param_groups(self, modules: dict[str, nn.Module]) -> list[dict[str, Any]]:
        """Returns optimizer groups {name, params, lr}, one per network; the gradient is clipped per group.

        Raises ValueError if `learning_rate` names an unknown network or leaves one out.
        """
        rates = self.config.learning_rate
        if not isinstance(rates, dict):
            rates = dict.fromkeys(modules, rates)
        if set(rates) != set(modules):
            raise InputError(f"learning_rate = {rates}: needs one rate for each of the networks {', '.join(modules)}")
        return [
            {"name": name, "params": [p for p in module.parameters() if p.requires_grad], "lr": rates[name]}
            for name, module in modules.items()
        ]

    @classmethod
    def load_pipeline(cls, output_dir: str | Path) -> Any:
        """Loads a finished run for inference: its only network, or what has its networks by name as attributes."""
        from diffusers import DiffusionPipeline

        return read_model(DiffusionPipeline, output_dir)

    def usage_of(self, location: str | Path) -> str:
        """Returns code that loads and samples the result in `location`, for the end of a run and the model card."""
        return self.usage.format(**vars(self.config) | {"output_dir": in_quotes(location)})

    def usage_notes(self, run_folder: Path | None = None) -> list[str]:
        """Returns sentences to follow that code: which file is for which program, what can be done in the folder."""
        return []

    def card_facts(self) -> CardFacts:
        """Returns what the header of the model card says of the result."""
        base = getattr(self.config, "pretrained_model_name_or_path", None)
        return CardFacts(
            pipeline_tag=self.pipeline_tag,
            tags=self.hub_tags,
            base_model=base,
            base_revision=getattr(self.config, "revision", None),
            base_model_relation=None if base is None else "finetune",
        )

    def raw(self, name: str) -> Any:
        """Returns a network as init_modules made it; in save_pipeline a float32 CPU copy with averaged weights."""
        return self.unwrapped[name]


class MeasuresData(Trainer):
    """A task whose pipeline holds numbers measured over training examples, such as a scaling factor.

    Before save_pipeline the loop sets `statistics` to the means of data_statistics over at most `statistics_samples`
    examples (0: none), computed with the weights that the pipeline will hold.
    """

    statistics_samples: int
    statistics: dict[str, float]

    @abstractmethod
    def data_statistics(self, batch: dict[str, Any], rng: RandomSource) -> dict[str, Tensor]:
        """Returns a batch's values by name, [B] each."""
