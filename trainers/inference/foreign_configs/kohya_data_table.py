"""The options of kohya's data: in the main file, in [general], [[datasets]] and [[datasets.subsets]]; their equals."""

from __future__ import annotations

from trainers.inference.foreign_configs.diffusers_table import NO_EQUAL
from trainers.inference.foreign_configs.readers import NoEqual, flag, interpolation, number, whole
from trainers.inference.foreign_configs.translation import Row

FILES_READ = (".txt", ".caption")
METADATA = 'write lines {"file_name": ..., "text": ...} into a metadata.jsonl of the folder'
ASPECTS = "buckets follow the pictures, up to an aspect of 2"


def opposite(value: object) -> bool:
    return not flag(value)


def dropped(value: object) -> float:
    if not 0 <= (part := number(value)) <= 1:
        raise NoEqual("is no fraction")
    return part


DATA: dict[str, Row] = {
    # folders
    "train_data_dir": Row("base.train_data_dir", "with base.folder_repeats for 10_name"),
    "reg_data_dir": Row("base.class_data_dir", "one folder 1_name; several become tables of base.train_data_dir"),
    "in_json": Row("", METADATA),
    "metadata_file": Row("", METADATA),
    "image_dir": Row("base.train_data_dir", "of its table `path`"),
    "num_repeats": Row("base.train_data_dir", "of its table `repeats`; pictures of the class have none", whole),
    "dataset_repeats": Row("base.train_data_dir", "of its table `repeats`", whole),
    "class_tokens": Row("base.train_data_dir", "of its table `caption`: of pictures without a text file"),
    "is_reg": Row("base.train_data_dir", "of its table `regularization`", flag),
    "caption_prefix": Row("base.trigger_word", "with a comma behind it; in tables, too"),
    "caption_suffix": Row("", NO_EQUAL),
    "caption_extension": Row("", "NAME.txt is read, then NAME.caption, and no other"),
    "caption_extention": Row("", "NAME.txt is read, then NAME.caption, and no other"),
    "cache_info": Row("", NO_EQUAL),
    "dataset_class": Row("", "a data set of your own is base.dataset"),
    "debug_dataset": Row("", "scripts/inspect_data.py shows the data"),
    # captions
    "shuffle_caption": Row("base.shuffle_tags", read=flag),
    "keep_tokens": Row("base.keep_tags", read=whole),
    "caption_dropout_rate": Row("task.caption_dropout", read=dropped),
    "enable_wildcard": Row("base.caption_lines", "one line is drawn; {a|b} is text", flag),
    "caption_separator": Row("", "tags are separated by commas"),
    "keep_tokens_separator": Row("", NO_EQUAL),
    "secondary_separator": Row("", NO_EQUAL),
    "caption_dropout_every_n_epochs": Row("", NO_EQUAL),
    "caption_tag_dropout_rate": Row("", NO_EQUAL),
    "token_warmup_min": Row("", NO_EQUAL),
    "token_warmup_step": Row("", NO_EQUAL),
    # pictures
    "batch_size": Row("base.train_batch_size", read=whole),
    "train_batch_size": Row("base.train_batch_size", read=whole),
    "resolution": Row("base.resolution", "squares; with buckets also base.bucket_max_pixels"),
    "enable_bucket": Row("base.buckets", "not with pictures of the class", flag),
    "bucket_reso_steps": Row("base.bucket_step", read=whole),
    "min_bucket_reso": Row("", ASPECTS),
    "max_bucket_reso": Row("", ASPECTS),
    "bucket_no_upscale": Row("", "small pictures are enlarged"),
    "resize_interpolation": Row("base.interpolation", read=interpolation),
    "flip_aug": Row("base.random_flip", read=flag),
    "random_crop": Row("base.center_crop", "the opposite", opposite),
    "color_aug": Row("", NO_EQUAL),
    "face_crop_aug_range": Row("", NO_EQUAL),
    "alpha_mask": Row("", "masks are files or a column: base.mask_files, base.mask_column"),
    "network_multiplier": Row("", NO_EQUAL),
    "custom_attributes": Row("", NO_EQUAL),
}  # fmt: skip

ALIASES = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}  # of the main file
ONE_FOR_ALL = (
    "shuffle_caption", "keep_tokens", "caption_dropout_rate", "enable_wildcard", "batch_size", "bucket_reso_steps",
    "resize_interpolation", "flip_aug", "random_crop",
)  # fmt: skip
