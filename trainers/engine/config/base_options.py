"""The options of the config section `base`: the run, its data, logging and durations."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

from trainers.engine.config.eval_networks import classifier_problem, features_problem
from trainers.options import Bounds, NonNegative, Positive, PositiveFloat, Section, Seed

OF_CAPTIONS = (
    "caption_lines", "trigger_word", "shuffle_tags", "keep_tags", "mask_column", "class_data_dir", "class_caption",
)  # fmt: skip
DATA_SOURCES = ("dataset_name", "train_data_dir", "dataset")
FOLDERS = (
    "output_dir", "train_data_dir", "dataset_name", "dataset", "class_data_dir", "cache_dir", "encoder_cache_dir",
)  # fmt: skip
OpenFraction = Annotated[float, Bounds(1e-9, 1 - 1e-9)]
Precision = Literal["no", "fp16", "bf16"]


@dataclass(kw_only=True)
class BaseConfig(Section):
    """The options that every run has, whatever its task."""

    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("num_epochs", "max_train_steps"),
        DATA_SOURCES,
        ("valid_epochs", "valid_steps"),
        ("save_model_epochs", "save_model_steps"),
        ("gradient_accumulation_steps", "global_batch_size"),
    )
    reset_with: ClassVar[dict[str, tuple[str, ...]]] = dict.fromkeys(
        DATA_SOURCES, ("dataset_config_name", "dataset_args")
    )
    same_on_resume: ClassVar[dict[str, tuple[Any, ...]]] = {"caption": ("", None)}  # null was the empty text before
    free_on_resume: ClassVar[tuple[str, ...]] = (
        "output_dir", "resume_from_checkpoint", "allow_changes", "max_skipped_steps", "collective_timeout",
        "gradient_checkpointing", "checkpointing_steps", "checkpoints_total_limit", "save_model_epochs",
        "save_model_steps", "push_to_hub", "hub_model_id", "valid_epochs", "valid_steps", "logging_dir", "logger",
        "logging_steps", "tracker_project", "run_name", "cache_dir", "encoder_cache_dir", "image_cache_mb",
        "eval_steps", "eval_num_samples", "eval_features", "eval_classifier", "dataloader_num_workers",
        "dataloader_timeout", "export_variant",
        # compared by their effect: the global batch size, the remaining learning rates, the data set's fingerprint
        "train_batch_size", "gradient_accumulation_steps", "global_batch_size", "num_epochs", "max_train_steps",
        "dataset_name", "dataset_config_name", "train_data_dir", "dataset", "dataset_args", "max_train_samples",
        "allow_outside", "max_image_pixels",  # of a picture that is used, neither changes a pixel
        "validation_split", "class_data_dir",
        "shard_retries", "shuffle_buffer_resume",
    )  # fmt: skip

    # the run
    output_dir: str = "outputs/run"  # folder of the run: checkpoints, samples, logs and the finished pipeline
    trainer_class: str | None = None  # "package.module:Class" of a task outside the repository
    resume_from_checkpoint: str | bool | None = None  # latest (or true), a name like checkpoint-500, a path; null: no
    allow_changes: list[str] = field(default_factory=list)  # on resume: options, dataset or global_batch_size to accept
    seed: Seed = 0  # of weights, data order, noise and pictures
    num_epochs: Positive | None = None  # passes over the data; exactly one of it and max_train_steps
    max_train_steps: Positive | None = None  # optimizer steps; exactly one of it and num_epochs
    train_batch_size: Positive = 16  # examples per process and micro-batch
    gradient_accumulation_steps: Positive | None = None  # micro-batches per optimizer step; null: the launcher's, or 1
    global_batch_size: Positive | None = None  # examples per optimizer step, instead of the accumulation; null: follows
    mixed_precision: Precision | None = None  # of activations; null: the launcher's, or no
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    enable_xformers_memory_efficient_attention: bool = False  # needs the extra xformers and a CUDA device
    allow_tf32: bool = False  # faster float32 products with 10 bits of mantissa on Ampere and later GPUs
    channels_last: bool | None = None  # channels of a pixel side by side in memory; null: on CUDA
    deterministic: bool = False  # only deterministic kernels: bit-equal runs on a GPU, slower
    compile: bool = False  # torch.compile the networks in place; validations run them uncompiled
    compile_repeated_blocks: bool = False  # only the blocks that a network names (a UNet's transformers): sooner ready
    max_skipped_steps: Positive = 10  # stop after this many steps in a row with a loss or gradient that is not finite
    collective_timeout: PositiveFloat = 1800.0  # seconds that a process waits for the others before the run fails

    # checkpoints and the finished pipeline
    checkpointing_steps: Positive = 500  # write checkpoint-N every this many steps, and at the end
    checkpoints_total_limit: Positive | None = None  # keep the newest this many checkpoints; null: all
    save_model_epochs: Positive | None = None  # export the pipeline every this many epochs; null: only at the end
    save_model_steps: Positive | None = None  # the same in optimizer steps
    export_variant: Literal["fp16", "bf16"] | None = None  # also write weights in half, *.fp16.safetensors; null: no
    push_to_hub: bool = False  # upload the finished pipeline and its card; log in with `hf auth login`
    hub_model_id: str | None = None  # repository to push to, such as me/digits; null: the name of output_dir

    # validation
    valid_epochs: Positive | None = None  # validate every this many epochs; null with valid_steps null: only at the end
    valid_steps: Positive | None = None  # the same in optimizer steps
    validation_split: str | OpenFraction | None = None  # name of a split or folder, or the part to hold out; null: none
    eval_steps: Positive | None = None  # draw many pictures and measure them every this many steps; null: never
    eval_num_samples: Annotated[int, Bounds(5)] = 1000  # pictures to draw for it, of the weights that will be exported
    eval_features: str = "inception"  # network of FID, KID, precision, recall: inception, none, or a file (see README)
    eval_classifier: str | None = None  # a noisy_classifier run or TorchScript file; null: an SVM on the training set

    # logging
    logging_dir: str = "logs"  # folder of the trackers' files, under output_dir
    logger: Literal["tensorboard", "wandb", "both", "none"] = "tensorboard"  # trackers in addition to metrics.jsonl
    logging_steps: Positive = 50  # log means over this many optimizer steps
    tracker_project: str = "diffloop"  # W&B's project; TensorBoard's folder in logging_dir
    run_name: str | None = None  # W&B's run; null: the name of output_dir

    # data: exactly one of dataset_name, train_data_dir and dataset
    dataset_name: str | None = None  # hub data set, or a local folder in a hub data set's layout
    dataset_config_name: str | None = None  # configuration of dataset_name, if it has several
    train_data_dir: str | list[dict[str, Any]] | None = None  # folder, .jsonl, or list of tables: docs/your_data.md
    dataset: str | None = None  # a name in datasets_lib.DATASETS such as digits, or "package.module:build"
    dataset_args: dict[str, Any] = field(default_factory=dict)  # keyword arguments of `dataset`
    allow_outside: list[str] = field(default_factory=list)  # folders that links and paths in the data may lead to
    cache_dir: str | None = None  # where hub data sets are kept; null: the datasets library's folder
    encoder_cache_dir: str | None = None  # of what a task caches on disk; null: encoder-cache next to output_dir
    image_column: str | None = None  # null: found by type
    label_column: str | None = None  # null: found by type, or the column `label` of a folder's metadata
    caption_column: str | None = None  # null: text, caption or prompt, if there is one
    caption_lines: bool = False  # each line of a text file beside a picture is a caption, of which one is drawn
    caption: str | None = None  # the text of every example of a data set without captions; null: empty, if none is seen
    trigger_word: str | None = None  # put in front of every caption, with a comma; null: none
    shuffle_tags: bool = False  # in training, shuffle what commas separate in a caption
    keep_tags: NonNegative = 0  # leading tags that stay in place with shuffle_tags; 0: none but the trigger word
    mask_column: str | None = None  # with grey pictures, one per image; null: mask, if there is one
    class_data_dir: str | None = None  # folder of pictures of the class, for prior preservation; null: none
    class_caption: str | None = None  # the text of every picture in class_data_dir
    mask_files: bool = False  # masks are files beside the pictures: NAME-masklabel.png, or mask/NAME.png
    repeats_column: str | None = None  # of whole numbers: how often each example comes in an epoch; null: once
    folder_repeats: bool = False  # sub-folders are called 10_name: pictures come so often, the name is their caption
    max_train_samples: Positive | None = None  # use a random subset of this many training pictures; null: all
    resolution: Positive = 64  # pixels, height and width of an example; with buckets of pictures drawn at validations
    buckets: bool = False  # sizes by aspect ratio, each batch of one, so that little is cropped away
    bucket_max_pixels: Positive | None = None  # area of an example with buckets at most; null: the square of resolution
    bucket_step: Positive = 64  # pixels: sides of buckets are multiples of it
    channels: Literal[1, 3, 4] = 3  # 1 grey, 3 RGB, 4 RGB and alpha
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"  # for resizing
    center_crop: bool = False  # crop at the centre; false: at random in training
    random_flip: bool = False  # mirror half of the examples in training
    background_color: str = "white"  # put behind transparent pixels if channels is not 4
    convert_to_srgb: bool = True  # pictures whose colour profile says other colours, such as a phone's Display P3
    bad_images: Literal["error", "skip"] = "error"  # an unreadable image stops the run, or is replaced and counted
    max_image_pixels: Annotated[int, Bounds(1, 357913940)] = 64_000_000  # larger images are refused
    image_cache_mb: NonNegative = 512  # MiB; decode once and keep as uint8 a data set that fits; 0: never
    streaming: bool = False  # read shards one after the other: .parquet or .tar files of train_data_dir or dataset_name
    shuffle_buffer_size: Positive | None = None  # with streaming: examples per reader to draw the next from; null: none
    shuffle_buffer_resume: Literal["replay", "reshuffle"] = "replay"  # on resume: read the buffer again, or begin empty
    shard_retries: NonNegative = 3  # with streaming: tries after the first before a shard is skipped and counted
    dataloader_num_workers: NonNegative = 0  # processes that decode ahead, per training process
    dataloader_timeout: PositiveFloat = 600.0  # seconds without a batch from the workers before the run stops

    def __post_init__(self) -> None:
        self.output_dir = os.path.expanduser(self.output_dir)

    @property
    def has_class_images(self) -> bool:
        """Whether each example comes with a picture of its class, for prior preservation."""
        return self.class_data_dir is not None or any(table.get("regularization") for table in self._tables)

    @property
    def trigger_words(self) -> list[str]:
        """The words in front of captions, of all folders."""
        words = [table.get("trigger_word") for table in self._tables]
        return list(dict.fromkeys(word for word in (*words, self.trigger_word) if word))

    @property
    def data_name(self) -> str:
        """The data's name for messages and cards."""
        named = self.dataset_name or self.dataset or self.train_data_dir or ""
        return named if isinstance(named, str) else ", ".join(str(table.get("path")) for table in named)

    @property
    def _tables(self) -> list[dict[str, Any]]:
        return self.train_data_dir if isinstance(self.train_data_dir, list) else []

    def problems(self) -> Iterator[tuple[str, str]]:
        if (self.num_epochs is None) == (self.max_train_steps is None):
            yield "num_epochs", "exactly one of num_epochs and max_train_steps must be set"
        sources = [name for name in DATA_SOURCES if getattr(self, name) is not None]
        if len(sources) != 1:
            given = " and ".join(sources) or "none"
            yield "dataset_name", f"exactly one of dataset_name, train_data_dir and dataset must be set, not {given}"
        if self.buckets and self.eval_steps is not None:
            yield "eval_steps", "measures pictures of one size, and cannot with buckets: true; set it to null"
        for pair in self.exclusive[2:]:
            if all(getattr(self, name) is not None for name in pair):
                yield pair[0], f"at most one of {pair[0]} and {pair[1]} can be set"
        yield from self._malformed()
        yield from self._without_effect()

    def _malformed(self) -> Iterator[tuple[str, str]]:
        logging_dir = PurePosixPath(self.logging_dir)
        for name in FOLDERS:
            if not str("-" if getattr(self, name) is None else getattr(self, name)).strip():
                yield name, "must not be blank (an unset variable of the shell?)"
        if logging_dir.is_absolute() or ".." in logging_dir.parts or not logging_dir.parts:
            yield "logging_dir", "must be a relative path below output_dir, such as logs"
        if self.hub_model_id is not None and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", self.hub_model_id):
            yield "hub_model_id", "must read name or owner/name"
        if problem := features_problem(self.eval_features):
            yield "eval_features", problem
        if self.eval_classifier is not None and (problem := classifier_problem(self.eval_classifier)):
            yield "eval_classifier", problem
        if self.trigger_word is not None and not self.trigger_word.strip():
            yield "trigger_word", "must not be blank; null for none"
        if not all(folder.strip() for folder in self.allow_outside):
            yield "allow_outside", "must be a list of folders, such as [/shared/pictures]"
        if self.class_data_dir is not None and any(table.get("regularization") for table in self._tables):
            yield "class_data_dir", "and tables of train_data_dir with regularization: true mean the same; keep one"
        if self.class_data_dir is not None and not (self.class_caption or "").strip():
            yield "class_caption", "must be the text of the pictures in class_data_dir, such as a photo of a dog"
        if self.enable_xformers_memory_efficient_attention and importlib.util.find_spec("xformers") is None:
            yield "enable_xformers_memory_efficient_attention", "needs xformers: pip install diffloop[xformers]"

    def _without_effect(self) -> Iterator[tuple[str, str]]:
        """A setting that cannot take effect is an error, not silence."""
        for condition, holds, *options in (
            ("push_to_hub: true", self.push_to_hub, "hub_model_id"),
            ("shuffle_tags: true", self.shuffle_tags, "keep_tags"),
            ("class_data_dir", self.class_data_dir is not None, "class_caption"),
            ("buckets: true", self.buckets, "bucket_max_pixels", "bucket_step"),
            ("compile: true", self.compile, "compile_repeated_blocks"),
            ("streaming: true", self.streaming, "shuffle_buffer_size", "shard_retries"),
            ("shuffle_buffer_size", self.shuffle_buffer_size is not None, "shuffle_buffer_resume"),
            ("dataset_name", self.dataset_name is not None or self.streaming, "dataset_config_name", "cache_dir",
             "image_column"),
            ("eval_steps", self.eval_steps is not None, "eval_num_samples", "eval_features", "eval_classifier"),
            ("dataset_name and train_data_dir", self.dataset is None, "label_column", "mask_column", "caption_column",
             "repeats_column"),
            ("train_data_dir without streaming", self.train_data_dir is not None and not self.streaming,
             "caption_lines", "mask_files", "folder_repeats"),
            ("dataset_name and train_data_dir without streaming", not self.streaming, "repeats_column"),
            ("logger: wandb or both", self.logger in ("wandb", "both"), "run_name"),
        ):  # fmt: skip
            yield from self.without_effect(options, condition, holds)
        if self.dataset_args and self.dataset is None:  # its default is made by a factory
            yield "dataset_args", "has an effect with dataset only"
        if self.allow_outside and self.dataset is not None and self.class_data_dir is None:
            yield "allow_outside", "has an effect with train_data_dir, dataset_name and class_data_dir only"
        if self.tracker_project != "diffloop" and self.logger == "none":
            yield "tracker_project", "has no effect with logger: none"
