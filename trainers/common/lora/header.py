"""Options in a LoRA file's header: those that are read, checked, and what peft gets instead of them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from datasets_lib.errors import InputError
from datasets_lib.foreign import shown
from trainers.common.text_to_image.prompts import CAPTION_TOKENS, TextSettings

SETTINGS_KEY = "lora_adapter_metadata"  # diffusers' entry of the header: JSON of "network.option"
MODULE = re.compile(r"\^?[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", re.ASCII)  # ^: the whole name, not its end
ADVICE = "remove the option there, or save the LoRA anew with its own program"

# Only these say what a file's tensors mean. Which modules have them, and of which rank, the tensors show.
READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora")

# Without effect on a finished adapter, whatever they say: they choose modules, or belong to training.
LEFT_OUT = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "inference_mode",
    "base_model_name_or_path", "revision", "peft_version", "task_type", "auto_mapping", "megatron_config",
    "megatron_core", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "ensure_weight_tying", "qalora_group_size",
)  # fmt: skip
INITIAL = (True, False, "gaussian", "eva", "orthogonal")  # of init_lora_weights; the others change the base as well

SCHEDULER_KEY = "scheduler_changes"  # our entry of the header: JSON of what the training changed in the base's
SCHEDULER: dict[str, tuple] = {
    "prediction_type": ("epsilon", "v_prediction"),
    "rescale_betas_zero_snr": (True,),
    "timestep_spacing": ("trailing",),
}

Settings = dict[str, Any]  # options of peft's LoraConfig


def header_options(file: str, about: Mapping[str, str], alone: str = "") -> dict[str, Settings]:
    """Returns the options that are read, by network; ValueError for wrong values, and for others with an effect.

    Of a network that is `alone` in a file, as a network's own save_lora_adapter writes it, the options may not name it.
    """
    try:
        options = json.loads(about.get(SETTINGS_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: {SETTINGS_KEY} in its header is no JSON ({shown(error)})") from None
    if not isinstance(options, dict):
        raise InputError(f"{file}: {SETTINGS_KEY} in its header must be a JSON object, found {shown(options)}")
    named = {key if "." in key or not alone else f"{alone}.{key}": value for key, value in options.items()}
    return checked_options(file, named, "its header")


def checked_options(file: str, options: Mapping[str, Any], place: str) -> dict[str, Settings]:
    """Returns those of the options "network.option" that are read, by network; ValueError as header_options."""
    found: dict[str, Settings] = {}
    for key, value in options.items():
        network, _, option = key.partition(".")
        if option in READ:
            found.setdefault(network, {})[option] = value
        elif option not in LEFT_OUT and not _is_usual(option, value):
            what = "changes what the LoRA does, and is not supported here"
            raise InputError(f"{file}: {shown(key)} = {shown(value)} in {place} {what}; {ADVICE}")
    for network, values in found.items():
        for option, problem in _problems(values):
            name, value = shown(f"{network}.{option}"), shown(values[option])
            raise InputError(f"{file}: {name} = {value} in {place}: {problem}; {ADVICE}")
    return found


def _is_usual(option: str, value: Any) -> bool:
    """Whether an option has no effect; another version of peft may have some that this one does not know."""
    from peft import LoraConfig

    if option == "init_lora_weights":
        return not value or value in INITIAL
    return not value or value == LoraConfig().to_dict().get(option)


def _problems(values: Settings) -> Iterator[tuple[str, str]]:
    for option, value in values.items():
        if option in ("use_dora", "use_rslora"):
            if not isinstance(value, bool):
                yield option, "must be true or false"
        elif not option.endswith("_pattern"):
            if problem := _number_problem(option, value):
                yield option, problem
        elif not isinstance(value, dict):
            yield option, "must be an object of modules and numbers"
        else:
            for module, number in value.items():
                if not MODULE.fullmatch(module):
                    name = f"'{shown(module)}' is no name of a module"
                    yield option, f"{name} (letters, digits, _ and dots; regular expressions are not read)"
                if problem := _number_problem(option, number):
                    yield option, problem


def _number_problem(option: str, value: Any) -> str | None:
    if option in ("r", "rank_pattern"):
        is_rank = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        return None if is_rank else "a rank must be an integer of at least 1"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return None if is_number and 0 < value <= sys.float_info.max else "an alpha must be positive and finite"


def header_number(file: str, about: Mapping[str, str], name: str) -> int | None:
    """Reads a number of training from the header, None if it does not say; ValueError for no number from 1 to 9999."""
    text = about.get(name)
    if text is not None and re.fullmatch("[1-9][0-9]{0,3}", text) is None:
        raise InputError(f"{file}: {name} = {shown(text)} in its header must be an integer from 1 to 9999")
    return None if text is None else int(text)


def text_settings(file: str, about: Mapping[str, str]) -> TextSettings | None:
    """Returns how texts were embedded in training, None if the header does not say; ValueError for wrong values."""
    found = {name: header_number(file, about, name) for name in TextSettings._fields}
    tokens = found["max_caption_tokens"] or CAPTION_TOKENS[0]
    if tokens not in CAPTION_TOKENS:
        allowed = ", ".join(map(str, CAPTION_TOKENS))
        raise InputError(f"{file}: max_caption_tokens = {tokens} in its header must be one of {allowed}")
    return TextSettings(tokens, found["clip_skip"]) if any(found.values()) else None


def scheduler_changes(file: str, about: Mapping[str, str]) -> Settings:
    """Returns the settings of the base's scheduler that the training changed; ValueError for others than those."""
    try:
        found = json.loads(about.get(SCHEDULER_KEY, "{}"))
    except (ValueError, RecursionError):
        found = None
    if not (isinstance(found, dict) and all(value in SCHEDULER.get(name, ()) for name, value in found.items())):
        allowed = ", ".join(f"{name}: {' or '.join(map(json.dumps, values))}" for name, values in SCHEDULER.items())
        what = f"{SCHEDULER_KEY} = {shown(about[SCHEDULER_KEY])} in its header"
        raise InputError(f"{file}: {what} must be a JSON object with some of {allowed}")
    return found


def of_module(patterns: Mapping[str, Any]) -> Callable[[str], Any]:
    """Returns the function from a module to the value of the first name that is its own or, without ^, the end of it.

    As peft finds it, but with names for regular expressions; None without any.
    """
    order: dict[str, tuple[int, Any]] = {}
    for number, (name, value) in enumerate(patterns.items()):
        order.setdefault(name.replace("text_model.", "", 1), (number, value))

    def find(module: str) -> Any:
        parts = module.split(".")
        names = [f"^{module}", *(".".join(parts[start:]) for start in range(len(parts)))]
        return min((order[name] for name in names if name in order), default=(0, None))[1]

    return find


def peft_settings(ranks: Mapping[str, int], alphas: Mapping[str, float], dora: bool, rslora: bool) -> Settings:
    """Returns options of a LoraConfig for modules by name: the rank and alpha of most modules, and the exceptions."""
    from diffusers.utils import get_peft_kwargs

    own, scaled = ({key.removeprefix("text_model."): n for key, n in each.items()} for each in (ranks, alphas))
    settings = get_peft_kwargs(own, scaled, {})
    kept = {name: settings[name] for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}
    return kept | {"target_modules": sorted(own), "use_dora": dora, "use_rslora": rslora}
