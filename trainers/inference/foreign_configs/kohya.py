"""kohya's training scripts: a file of options with its data, or a command line."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from trainers.inference.foreign_configs import kohya_rules, rules
from trainers.inference.foreign_configs.kohya_data import flattened, translate_data
from trainers.inference.foreign_configs.kohya_prompts import sample_prompts
from trainers.inference.foreign_configs.kohya_table import DEFAULTS, OF_ADAPTERS, REFUSED, TABLE
from trainers.inference.foreign_configs.shell import LAUNCHERS
from trainers.inference.foreign_configs.translation import Translation
from trainers.single_file.recognition import open_single_file

SCRIPTS = {  # the task of each
    "train_network": "lora", "sdxl_train_network": "lora", "fine_tune": "text_to_image", "sdxl_train": "text_to_image",
    "train_db": "text_to_image",
}  # fmt: skip
ADAPTERS = ("network_module", "network_dim", "network_alpha", "network_weights", "unet_lr", "text_encoder_lr")


def translate(options: dict[str, Any], dataset: dict[str, Any], place: Path, script: str | None = None) -> Translation:
    """Translates options and a dataset_config's document; `place` is where files that they name may lie, too."""
    _check(options)
    task = SCRIPTS[script] if script else "lora" if any(name in options for name in ADAPTERS) else "text_to_image"
    of_data, subsets = flattened(dataset)
    defaults = DEFAULTS | (OF_ADAPTERS if task == "lora" else {})
    made = Translation(task, TABLE, options | of_data, defaults, _is_xl(options, script))
    for name in [name for name in made.given if name.startswith(LAUNCHERS)]:
        if name == f"{LAUNCHERS}mixed_precision" and "mixed_precision" not in made.given:
            made.write("base.mixed_precision", str(made.given[name]), name)
        made.leave(name, "give it to accelerate launch as before")
    if script is None and _is_xl_by_files(options) is None:
        model = "XL" if made.is_xl else "1 or 2"
        made.notes.append(f"taken for Stable Diffusion {model}, as far as names and options tell")
    rules.base_model(made)
    rules.duration(made, "max_train_epochs", "max_train_steps", first="max_train_epochs")
    translate_data(made, subsets)
    for rule in kohya_rules.RULES:
        rule(made)
    kohya_rules.kept_tags(made)
    for name in ("xformers", "diffusers_xformers"):
        rules.xformers(made, name)
    if made.is_xl:
        made.leave("clip_skip", "has no effect there for Stable Diffusion XL")
    sample_prompts(made, place)
    if task == "text_to_image":
        made.write("task.use_ema", False, remark="there is no average there")
        if script in (None, "train_db"):
            made.notes.append("train_db.py trains the text encoder, too; here it stays as it is")
    made.write(
        "base.interpolation", "lanczos", "resize_interpolation", remark="of pictures made larger; area of others"
    )
    made.finish()
    return made


def _check(options: dict[str, Any]) -> None:
    found = [name for name in REFUSED if name in options]
    module = str(options.get("network_module", "networks.lora"))
    if found or module.startswith("networks.lora_"):
        named = ", ".join(found) or f"network_module = {shown(module)}"
        raise InputError(f"{named}: is of another model; Stable Diffusion 1, 2 and XL can be taken over")
    if module != "networks.lora":
        raise InputError(f"network_module = {shown(module)}: has no equal here; networks.lora can be taken over")
    if not TABLE.keys() & options.keys():
        raise InputError("none of its options is one of sd-scripts (train_network.py and the like)")


def _is_xl(options: dict[str, Any], script: str | None) -> bool:
    """Whether it is about Stable Diffusion XL: the script or the base's folder says so, or else the base's name."""
    base = str(options.get("pretrained_model_name_or_path", ""))
    by_option = bool(options.get("cache_text_encoder_outputs") or options.get("cache_text_encoder_outputs_to_disk"))
    if script is not None:
        return script.startswith("sdxl")
    if (found := _is_xl_by_files(options)) is not None:
        return found
    two_rates = isinstance(rates := options.get("text_encoder_lr"), list) and len(rates) > 1
    return by_option or two_rates or any(word in Path(base).name.lower() for word in ("xl", "illustrious", "pony"))


def _is_xl_by_files(options: dict[str, Any]) -> bool | None:
    """Whether the base's folder or file is of Stable Diffusion XL; None if it is not here, or is neither."""
    base = Path(str(options.get("pretrained_model_name_or_path", "")))
    if base.is_dir():
        return (base / "text_encoder_2").is_dir()
    with suppress(OSError, ValueError):  # what is wrong with it is said when the config is checked
        return open_single_file(base, "").family.is_xl
    return None
