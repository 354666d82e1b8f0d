"""Rules between kohya's options: learning rates, the adapter, the optimizer, losses, caches, validation pictures."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from trainers.engine.optim.table import OPTIMIZERS
from trainers.inference.foreign_configs import rules
from trainers.inference.foreign_configs.readers import SCHEDULES, NoEqual, number
from trainers.inference.foreign_configs.translation import Translation

TRANSFORMER = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
OPTIMIZER_NAMES = {  # theirs in lower case; only what our table has is taken
    "": "adamw", "adamw": "adamw", "adamw8bit": "adamw_8bit", "lion": "lion", "prodigy": "prodigy",
    "adafactor": "adafactor",
}  # fmt: skip
ADAM = {"weight_decay": "adam_weight_decay", "eps": "adam_epsilon"}


def rates(made: Translation) -> None:
    """Networks with rates of their own become a mapping by name; a text encoder with a rate of 0 is not trained."""
    if made.task != "lora":
        return
    of_all, unet, of_text = made.read("learning_rate"), made.read("unet_lr"), _of_text(made)
    of_text = of_text or [of_all]
    unet = of_all if unet is None else unet
    if unet is None:
        return
    trains_text = not made.is_on("network_train_unet_only") and any(of_text)
    made.write("task.train_text_encoder", trains_text, "network_train_unet_only")
    if trains_text:
        made.write("task.text_encoder_target_modules", TEXT_LAYERS, remark="as there")
        encoders = ("text_encoder", "text_encoder_2") if made.is_xl else ("text_encoder",)
        by_name = {"unet": unet} | dict(zip(encoders, 2 * of_text, strict=False))
        if {"unet_lr", "text_encoder_lr"} <= made.given.keys():
            made.leave("learning_rate", "has no effect beside unet_lr and text_encoder_lr")
        rate = unet if len(set(by_name.values())) == 1 else by_name
        made.write("task.learning_rate", rate, "learning_rate", "unet_lr", "text_encoder_lr")
    else:
        made.leave("text_encoder_lr", "is of the text encoder, which is not trained")
        made.write("task.learning_rate", unet, "unet_lr" if "unet_lr" in made.given else "learning_rate")
        made.leave("learning_rate", "has no effect beside unet_lr")


def _of_text(made: Translation) -> list[float] | None:
    """The rates of the text encoders: one for all, or one for each."""
    given = made.get("text_encoder_lr")
    if given in (None, []):
        return None
    try:
        return [number(rate) for rate in (given if isinstance(given, list) else [given])]
    except NoEqual as reason:
        made.leave("text_encoder_lr", str(reason))
        return None


def adapter(made: Translation) -> None:
    if made.task != "lora":
        return
    made.leave("network_module", "is the task lora")
    if "network_weights" in made.given:
        made.write(
            "task.lora_weights", str(made.given["network_weights"]), "network_weights", remark="convert it first"
        )
    made.write("task.init_lora_weights", "kaiming", remark="as there")
    targets, names = TRANSFORMER, tuple[str, ...]()
    of_conv = _parts(made, "network_args")
    if "conv_dim" in of_conv:
        targets, names = TRANSFORMER + CONVOLUTIONS, ("network_args.conv_dim",)
        for what, own, ours in (("rank", "conv_dim", "network_dim"), ("alpha", "conv_alpha", "network_alpha")):
            there, here = of_conv.get(own, "1"), made.get(ours)
            if there not in (str(here), f"{here:g}" if isinstance(here, float) else ""):
                made.notes.append(f"convolutions have {what} {there} there, and {what} {here} here")
        made.leave("network_args.conv_alpha", "is network_alpha here")
    made.write("task.target_modules", targets, *names, remark="" if names else "as there")
    for name in of_conv:
        made.leave(f"network_args.{name}", "has no equal here")


def _parts(made: Translation, name: str) -> dict[str, str]:
    """Splits a list of key=value into options of their own, such as network_args.conv_dim."""
    given = made.given.pop(name, [])
    pairs = [str(each).partition("=") for each in (given if isinstance(given, list) else [given])]
    found = {key.strip(): value.strip() for key, _, value in pairs}
    made.given |= {f"{name}.{key}": value for key, value in found.items()}
    return found


def optimizer(made: Translation) -> None:
    parts = _parts(made, "optimizer_args")
    switches = {"use_8bit_adam": "adamw_8bit", "use_lion_optimizer": "lion"}
    rules.optimizer(made, OPTIMIZER_NAMES, "optimizer_type", **switches)
    wanted = "lion" if made.is_on("use_lion_optimizer") else str(made.given.get("optimizer_type", "")).lower()
    known = OPTIMIZER_NAMES.get(wanted, "") in OPTIMIZERS
    for key, value in parts.items():
        name = f"optimizer_args.{key}"
        try:
            read = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            read = value
        if not known:
            made.leave(name, "is of an optimizer that is not taken over")
        elif key == "betas" and isinstance(read, tuple | list) and len(read) == 2:
            made.write("task.adam_beta1", read[0], name)
            made.write("task.adam_beta2", read[1], remark="the other one of betas")
        elif key in ADAM and isinstance(read, int | float):
            made.write(f"task.{ADAM[key]}", float(read), name)
        else:
            made.leave(name, "has no equal here")


def schedule(made: Translation) -> None:
    given = made.given.get("lr_scheduler")
    if given is not None and given not in SCHEDULES:
        made.leave("lr_scheduler", f"has no equal; constant is used (there are {', '.join(SCHEDULES)})")
        made.write("task.lr_scheduler", "constant", remark="its own has no equal")
    warmup = made.given.get("lr_warmup_steps")
    ratio = _ratio(warmup)
    if ratio is None:
        return
    if "base.max_train_steps" not in made.entries:
        made.leave(
            "lr_warmup_steps",
            "is a fraction, and epochs leave the number of steps open; give steps, or 10 % are taken, at most 500",
        )
        return
    steps = int(ratio * made.entries["base.max_train_steps"].value)
    made.write("task.lr_warmup_steps", steps, "lr_warmup_steps", remark=f"{warmup} of all")


def _ratio(value: Any) -> float | None:
    """The fraction that 0.05 or "5%" means; None for a number of steps."""
    text = str(value)
    try:
        found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return found if text.endswith("%") or 0 < found < 1 else None


def losses(made: Translation) -> None:
    kind = made.given.get("loss_type", "l2")
    if kind == "huber" and made.task in ("lora", "text_to_image"):
        made.write("task.loss_type", "huber", "loss_type")
        c, scale = made.read("huber_c"), made.read("huber_scale")
        if scale is not None:
            made.write("task.huber_c", (0.1 if c is None else c) * scale, "huber_c", "huber_scale")
        if made.given.get("huber_schedule", "snr") != "constant":
            made.notes.append("huber_c changes with the noise there (huber_schedule), and is constant here")
    elif kind != "l2":
        made.leave("loss_type", "has no equal; l2 is used")
    for name in ("huber_c", "huber_scale") if kind != "huber" else ():
        made.leave(name, "has an effect with loss_type: huber only")
    low, high = made.read("min_timestep"), made.read("max_timestep")
    if low is not None or high is not None:
        limits = [low or 0, 1000 if high is None else high]
        made.write("task.timestep_range", limits, "min_timestep", "max_timestep")


def caches(made: Translation) -> None:
    text_trained = "task.train_text_encoder" in made.entries and made.entries["task.train_text_encoder"].value
    for first, ours in (("cache_latents", "task.cache_latents"), ("cache_text_encoder_outputs", "task.cache_text")):
        to_disk = f"{first}_to_disk"
        kept = "disk" if made.is_on(to_disk) else "memory" if made.is_on(first) else None
        given = [name for name in (first, to_disk) if name in made.given]
        if kept is not None and text_trained and ours == "task.cache_text":
            for name in given:
                made.leave(name, "keeps what the text encoders give, and they are trained")
        elif given:
            made.write(ours, kept, *given)


def output(made: Translation) -> None:
    folder, name = made.given.get("output_dir"), made.given.get("output_name")
    if folder is not None or name is not None:
        parts = [str(part) for part in (folder or "outputs", name) if part is not None]
        made.write("base.output_dir", "/".join(parts), "output_dir", "output_name")
    if made.given.get("huggingface_repo_id") is not None:
        made.write("base.push_to_hub", True, remark="uploads after the run, as there")


def cadence(made: Translation) -> None:
    """One cadence for pictures and held-out losses: that of the pictures, epochs before steps."""
    order = ("sample_every_n_epochs", "sample_every_n_steps", "validate_every_n_epochs", "validate_every_n_steps")
    chosen = next((name for name in order if made.given.get(name)), None)
    for name in order:
        if name == chosen:
            made.take(name)
        else:
            made.leave(name, f"{chosen} decides when pictures are drawn and losses measured" if chosen else "is off")
    if made.given.get("save_every_n_epochs") and "save_every_n_steps" in made.given:
        made.take("save_every_n_steps", "save_every_n_epochs")


def kept_tags(made: Translation) -> None:
    """A prefix of all captions counts among the tags that keep_tokens keeps; the trigger word here does not."""
    names = [name for name in made.given if name.rpartition(".")[2] == "caption_prefix" and "subsets" not in name]
    prefixes = [str(made.given[name]) for name in names]
    entry = made.entries.get("base.keep_tags")
    if entry is not None and prefixes:
        entry.value = max(0, entry.value - len([tag for tag in prefixes[0].split(",") if tag.strip()]))
        entry.remark = "without those of caption_prefix"


RULES: tuple[Callable[[Translation], None], ...] = (
    rates, adapter, optimizer, schedule, losses, caches, output, cadence,
)  # fmt: skip
