"""diffusers' training scripts: their defaults, and the rules between their options."""

from __future__ import annotations

from typing import Any, NamedTuple

from trainers.inference.foreign_configs import rules
from trainers.inference.foreign_configs.diffusers_table import TABLE
from trainers.inference.foreign_configs.shell import LAUNCHERS, Command
from trainers.inference.foreign_configs.translation import Cell, Translation

ADAPTER = {"rank": 4, "image_interpolation_mode": "lanczos"}
EVERY = {"lr_scheduler": "constant", "lr_warmup_steps": 500, "learning_rate": 1e-4, "resolution": 512}
CAPTIONED = EVERY | {"num_train_epochs": 100, "train_batch_size": 16, "image_interpolation_mode": "lanczos"}
DREAMBOOTH = EVERY | {"num_train_epochs": 1, "train_batch_size": 4}
DISTILLED = EVERY | {"num_train_epochs": 100, "train_batch_size": 16, "lora_rank": 64, "lora_alpha": 64,
                     "loss_type": "l2", "w_max": 15.0}  # fmt: skip
XL = {"resolution": 1024}
WHOLE = {"use_ema": False}
DRAWING = ("num_validation_images", "validation_epochs", "validation_steps")
FOUR_OFTEN, FOUR_SELDOM = ({"num_validation_images": 4, "validation_epochs": epochs} for epochs in (1, 50))
PIXELS = WHOLE | {
    "resolution": 64, "num_epochs": 100, "train_batch_size": 16, "learning_rate": 1e-4, "lr_scheduler": "cosine",
    "lr_warmup_steps": 500, "adam_beta1": 0.95, "adam_weight_decay": 1e-6, "save_images_epochs": 10,
    "save_model_epochs": 10,
}  # fmt: skip


class Script(NamedTuple):
    """One script: the task here, and what it does if an option is not given."""

    task: str
    defaults: dict[str, Any]


SCRIPTS = {
    "train_text_to_image": Script("text_to_image", CAPTIONED | WHOLE | {"validation_epochs": 5}),
    "train_text_to_image_sdxl": Script("text_to_image", CAPTIONED | WHOLE | XL | FOUR_OFTEN),
    "train_text_to_image_lora": Script("lora", CAPTIONED | ADAPTER | FOUR_OFTEN),
    "train_text_to_image_lora_sdxl": Script("lora", CAPTIONED | ADAPTER | XL | FOUR_OFTEN),
    "train_dreambooth": Script(
        "text_to_image",
        DREAMBOOTH | {"learning_rate": 5e-6, "num_validation_images": 4, "validation_steps": 100},
    ),
    "train_dreambooth_lora": Script("lora", DREAMBOOTH | ADAPTER | FOUR_SELDOM | {"learning_rate": 5e-4}),
    "train_dreambooth_lora_sdxl": Script(
        "lora", DREAMBOOTH | ADAPTER | XL | FOUR_SELDOM | {"adam_weight_decay": 1e-4, "text_encoder_lr": 5e-6}
    ),
    "train_unconditional": Script("ddpm", PIXELS),
    "train_lcm_distill_lora_sd_wds": Script("lcm_lora", DISTILLED | {"w_min": 5.0}),
    "train_lcm_distill_lora_sdxl": Script("lcm_lora", DISTILLED | XL | {"w_min": 3.0, "learning_rate": 1e-6}),
    "train_lcm_distill_lora_sdxl_wds": Script("lcm_lora", DISTILLED | XL | {"w_min": 3.0}),
}
OPTIMIZERS = {"adamw": "adamw", "prodigy": "prodigy"}


def translate(command: Command) -> Translation:
    script = SCRIPTS[command.script]
    made = Translation(script.task, TABLE, command.options, script.defaults, is_xl="sdxl" in command.script)
    _launcher(made)
    teacher = "pretrained_teacher_model"
    rules.base_model(made, teacher if teacher in made.given else "pretrained_model_name_or_path")
    epochs = "num_epochs" if script.task == "ddpm" else "num_train_epochs"
    rules.duration(made, epochs, "max_train_steps", first="max_train_steps")
    rules.optimizer(made, OPTIMIZERS, "optimizer", use_8bit_adam="adamw_8bit")
    rules.xformers(made, "enable_xformers_memory_efficient_attention")
    for rule in (_rates, _pictures, _prior, _objective, _validation, _caches):
        rule(made)
    resume = "resume_from_checkpoint"
    if made.given.get(resume, "latest") != "latest":
        made.leave(resume, "checkpoints of other tools are not read")
    if "use_ema" not in script.defaults:
        made.write("task.use_ema", False, remark="there is no average there")
    made.finish()
    return made


def _launcher(made: Translation) -> None:
    """accelerate launch goes on as before; only its precision is written down, where the script has none."""
    for name in [name for name in made.given if name.startswith(LAUNCHERS)]:
        if name == f"{LAUNCHERS}mixed_precision" and "mixed_precision" not in made.given:
            made.write("base.mixed_precision", str(made.given[name]), name)
        made.leave(name, "give it to accelerate launch as before")


def _rates(made: Translation) -> None:
    trains_text = made.is_on("train_text_encoder")
    if trains_text and made.task != "lora":
        made.leave("train_text_encoder", "text_to_image trains the UNet alone")
        made.notes.append("the script trains the text encoder, too; here it stays as it is")
    if not (trains_text and made.task == "lora") or not made.get("text_encoder_lr"):
        made.leave("text_encoder_lr", "has an effect with train_text_encoder only")
        made.forget("text_encoder_lr")
        return
    encoders = ("text_encoder", "text_encoder_2") if made.is_xl else ("text_encoder",)
    rate, of_text = made.read("learning_rate"), made.read("text_encoder_lr")
    if rate is not None and of_text is not None:
        rates = {"unet": rate} | dict.fromkeys(encoders, of_text)
        made.write("task.learning_rate", rates, "learning_rate", "text_encoder_lr")


def _pictures(made: Translation) -> None:
    folder, repeats = made.get("instance_data_dir"), made.read("repeats") or 1
    if folder is not None and repeats > 1:
        table = {"path": Cell(str(folder), ("instance_data_dir",)), "repeats": Cell(repeats, ("repeats",))}
        made.write("base.train_data_dir", [table], "instance_data_dir", "repeats")
    elif repeats > 1:
        made.leave("repeats", "of a data set that is not a folder: base.repeats_column")
    made.leave("repeats", "is 1, as here")


def _prior(made: Translation) -> None:
    names = ("class_data_dir", "class_prompt", "prior_loss_weight")
    if made.is_on("with_prior_preservation"):
        if "class_data_dir" in made.given:
            made.write("base.class_data_dir", made.read("class_data_dir"), "class_data_dir", "with_prior_preservation")
        return
    for name in (*names, "with_prior_preservation"):
        made.leave(name, "has an effect with with_prior_preservation only")


def _objective(made: Translation) -> None:
    dream = "dream_detail_preservation"
    if made.is_on("dream_training"):
        made.write(f"task.{dream}", made.read(dream) if dream in made.given else 1.0, "dream_training", dream)
    made.leave(dream, "has an effect with dream_training only")
    if made.is_on("offset_noise"):
        made.write("task.noise_offset", 0.1, "offset_noise")


def _validation(made: Translation) -> None:
    """Without a prompt the scripts draw nothing, and how often and how many has no effect."""
    asked = [name for name in ("validation_prompt", "validation_prompts") if name in made.given]
    if made.task == "ddpm" or asked:
        for name in asked[:1]:
            prompts = made.read(name) or []
            made.write("task.validation_prompts", prompts, name)
            if prompts and "num_validation_images" not in made.given.keys() | made.defaults.keys():
                made.write("task.valid_batch_size", len(prompts), remark="one of each, as there")
        return
    if made.task == "lcm_lora":  # it has its own prompts
        return
    for unused in DRAWING:
        made.leave(unused, "has an effect there with validation prompts only")
    made.forget(*DRAWING)


def _caches(made: Translation) -> None:
    name = "pre_compute_text_embeddings"
    if made.is_on(name) and made.has("task.cache_text"):
        made.write("task.cache_text", "memory", name)
    made.leave(name, "is off, as here")
