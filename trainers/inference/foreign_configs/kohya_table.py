"""The options of kohya's training scripts, such as train_network and sdxl_train_network, and their equals here."""

from __future__ import annotations

from trainers.inference.foreign_configs.diffusers_table import ALWAYS, NO_EQUAL, SECRET
from trainers.inference.foreign_configs.kohya_data_table import DATA
from trainers.inference.foreign_configs.readers import (
    NoEqual,
    above_zero,
    flag,
    loggers,
    number,
    one_less,
    sampler,
    schedule,
    unset_at_zero,
    whole,
)
from trainers.inference.foreign_configs.translation import Row

BY_ACCELERATE = "choose a launch of configs/accelerate for accelerate launch --config_file"
CHECKPOINTS = "checkpoint-N holds everything that a run needs to go on: base.resume_from_checkpoint: latest"
HUB = "only base.push_to_hub and base.hub_model_id are there"
ONLY_UNET = "text_to_image trains the UNet alone"
FLOAT32 = "what is trained is float32 here, the rest has base.mixed_precision"


def as_v(value: object) -> str:
    return "v_prediction" if flag(value) else "epsilon"


def minutes(value: object) -> float:
    return 60 * number(value)


def part_held_out(value: object) -> float:
    if (part := number(value)) == 0:
        raise NoEqual("is off, as here")
    return part


MAIN: dict[str, Row] = {
    # the base model
    "pretrained_model_name_or_path": Row("task.pretrained_model_name_or_path", "folder, .safetensors file or hub name"),
    "v2": Row("", "the base model's files say it"),
    "v_parameterization": Row("task.prediction_type", "v_prediction", as_v),
    "zero_terminal_snr": Row("task.rescale_betas_zero_snr", read=flag),
    "vae": Row("task.vae"),
    "tokenizer_cache_dir": Row("", "the base model's tokenizer is always used"),
    "clip_skip": Row("task.clip_skip", "one less; 1 is null; no effect there for XL", one_less),
    "max_token_length": Row("task.max_caption_tokens", read=whole),
    "weighted_captions": Row("", NO_EQUAL),
    "no_token_padding": Row("", NO_EQUAL),
    # the adapter
    "network_module": Row("", "networks.lora is the task lora; others are refused"),
    "network_dim": Row("task.rank", read=whole),
    "network_alpha": Row("task.lora_alpha", read=number),
    "network_dropout": Row("task.lora_dropout", "of the input here, of A's output there", number),
    "network_args": Row("task.target_modules", "conv_dim adds the convolutions; other keys have no equal"),
    "network_weights": Row("task.lora_weights", "kohya's files are read as they are"),
    "network_train_unet_only": Row("task.train_text_encoder", "the opposite", flag),
    "network_train_text_encoder_only": Row("", "the UNet's adapter is always trained"),
    "dim_from_weights": Row("", "give the rank: task.rank"),
    "base_weights": Row("", "scripts/merge_lora.py makes a base of it"),
    "base_weights_multiplier": Row("", "scripts/merge_lora.py makes a base of it"),
    "scale_weight_norms": Row("", NO_EQUAL),
    "no_metadata": Row("", "rank, alpha and what was trained with stand in the file's header"),
    "training_comment": Row("", NO_EQUAL),
    # learning rate and optimizer
    "learning_rate": Row("task.learning_rate", read=number),
    "unet_lr": Row("task.learning_rate", "a rate for each network", number),
    "text_encoder_lr": Row("task.learning_rate", "a rate for each network"),
    "learning_rate_te": Row("", ONLY_UNET),
    "learning_rate_te1": Row("", ONLY_UNET),
    "learning_rate_te2": Row("", ONLY_UNET),
    "train_text_encoder": Row("", ONLY_UNET),
    "stop_text_encoder_training": Row("", ONLY_UNET),
    "block_lr": Row("", NO_EQUAL),
    "optimizer_type": Row("task.optimizer"),
    "use_8bit_adam": Row("task.optimizer", "adamw_8bit", flag),
    "use_lion_optimizer": Row("task.optimizer", "lion, if it is there", flag),
    "optimizer_args": Row("task.adam_weight_decay", "also betas and eps; other keys have no equal"),
    "fused_backward_pass": Row("", NO_EQUAL),
    "fused_optimizer_groups": Row("", NO_EQUAL),
    "max_grad_norm": Row("task.max_grad_norm", "of each network; 0 is null", unset_at_zero),
    "lr_scheduler": Row("task.lr_scheduler", read=schedule),
    "lr_scheduler_type": Row("", "a class of another library"),
    "lr_scheduler_args": Row("", NO_EQUAL),
    "lr_warmup_steps": Row("task.lr_warmup_steps", "a fraction becomes steps", whole),
    "lr_decay_steps": Row("", NO_EQUAL),
    "lr_scheduler_num_cycles": Row("task.lr_num_cycles", read=whole),
    "lr_scheduler_power": Row("task.lr_power", read=number),
    "lr_scheduler_timescale": Row("", NO_EQUAL),
    "lr_scheduler_min_lr_ratio": Row("task.lr_min_ratio", read=number),
    # the run
    "output_dir": Row("base.output_dir", "a folder for this run alone, so with output_name"),
    "output_name": Row("base.output_dir", "the folder's name"),
    "seed": Row("base.seed", read=whole),
    "max_train_steps": Row("base.max_train_steps", read=whole),
    "max_train_epochs": Row("base.num_epochs", "wins there, too", whole),
    "gradient_accumulation_steps": Row("base.gradient_accumulation_steps", read=whole),
    "gradient_checkpointing": Row("base.gradient_checkpointing", read=flag),
    "cpu_offload_checkpointing": Row("", NO_EQUAL),
    "mixed_precision": Row("base.mixed_precision"),
    "full_fp16": Row("", FLOAT32),
    "full_bf16": Row("", FLOAT32),
    "fp8_base": Row("", FLOAT32),
    "fp8_base_unet": Row("", FLOAT32),
    "no_half_vae": Row("", "the autoencoder's own force_upcast decides"),
    "xformers": Row("base.enable_xformers_memory_efficient_attention", "torch's own attention is as fast", flag),
    "diffusers_xformers": Row("base.enable_xformers_memory_efficient_attention", read=flag),
    "sdpa": Row("", ALWAYS),
    "mem_eff_attn": Row("", "torch's own attention saves memory, too"),
    "torch_compile": Row("base.compile", read=flag),
    "dynamo_backend": Row("", "torch's default is used"),
    "lowram": Row("", NO_EQUAL),
    "highvram": Row("", NO_EQUAL),
    "max_data_loader_n_workers": Row("base.dataloader_num_workers", read=whole),
    "persistent_data_loader_workers": Row("", ALWAYS),
    "ddp_timeout": Row("base.collective_timeout", "in seconds, minutes there", minutes),
    "ddp_gradient_as_bucket_view": Row("", NO_EQUAL),
    "ddp_static_graph": Row("", NO_EQUAL),
    "deepspeed": Row("", BY_ACCELERATE),
    "zero_stage": Row("", BY_ACCELERATE),
    "offload_optimizer_device": Row("", BY_ACCELERATE),
    "offload_optimizer_nvme_path": Row("", BY_ACCELERATE),
    "offload_param_device": Row("", BY_ACCELERATE),
    "offload_param_nvme_path": Row("", BY_ACCELERATE),
    "zero3_init_flag": Row("", BY_ACCELERATE),
    "zero3_save_16bit_model": Row("", BY_ACCELERATE),
    "fp16_master_weights_and_gradients": Row("", BY_ACCELERATE),
    # caches
    "cache_latents": Row("task.cache_latents", "memory", flag),
    "cache_latents_to_disk": Row("task.cache_latents", "disk", flag),
    "cache_text_encoder_outputs": Row("task.cache_text", "memory", flag),
    "cache_text_encoder_outputs_to_disk": Row("task.cache_text", "disk", flag),
    "vae_batch_size": Row("", NO_EQUAL),
    "skip_cache_check": Row("", "a cache's rows are found by content"),
    "disable_mmap_load_safetensors": Row("", NO_EQUAL),
    # objective
    "min_snr_gamma": Row("task.snr_gamma", "0 is null", unset_at_zero),
    "scale_v_pred_loss_like_noise_pred": Row("", NO_EQUAL),
    "v_pred_like_loss": Row("", NO_EQUAL),
    "debiased_estimation_loss": Row("", NO_EQUAL),
    "noise_offset": Row("task.noise_offset", read=number),
    "noise_offset_random_strength": Row("", NO_EQUAL),
    "adaptive_noise_scale": Row("", NO_EQUAL),
    "multires_noise_iterations": Row("", NO_EQUAL),
    "multires_noise_discount": Row("", NO_EQUAL),
    "ip_noise_gamma": Row("task.input_perturbation", read=number),
    "ip_noise_gamma_random_strength": Row("", NO_EQUAL),
    "min_timestep": Row("task.timestep_range", "[min, max]", whole),
    "max_timestep": Row("task.timestep_range", "[min, max]", whole),
    "loss_type": Row("task.loss_type", "l2 and huber"),
    "huber_c": Row("task.huber_c", "constant over time", number),
    "huber_schedule": Row("", "c is constant over time here"),
    "huber_scale": Row("task.huber_c", "times huber_c", number),
    "prior_loss_weight": Row("task.prior_loss_weight", read=number),
    "masked_loss": Row("", "is on where there are masks: base.mask_files, base.mask_column"),
    "conditioning_data_dir": Row("", "masks are NAME-masklabel.png or mask/NAME.png: base.mask_files"),
    # files that are written
    "save_every_n_steps": Row("base.checkpointing_steps", "scripts/sample.py draws with checkpoint-N", above_zero),
    "save_every_n_epochs": Row("base.save_model_epochs", "the newest is kept, and all checkpoints", above_zero),
    "save_n_epoch_ratio": Row("", NO_EQUAL),
    "save_last_n_epochs": Row("", "base.checkpoints_total_limit counts checkpoints"),
    "save_last_n_steps": Row("", "base.checkpoints_total_limit counts checkpoints"),
    "save_last_n_epochs_state": Row("", "base.checkpoints_total_limit counts checkpoints"),
    "save_last_n_steps_state": Row("", "base.checkpoints_total_limit counts checkpoints"),
    "save_state": Row("", CHECKPOINTS),
    "save_state_on_train_end": Row("", CHECKPOINTS),
    "resume": Row("", "checkpoints of other tools are not read"),
    "initial_epoch": Row("", CHECKPOINTS),
    "initial_step": Row("", CHECKPOINTS),
    "skip_until_initial_step": Row("", CHECKPOINTS),
    "save_model_as": Row("", "always safetensors; of a LoRA the second file is kohya's"),
    "use_safetensors": Row("", ALWAYS),
    "save_precision": Row("", "files have the precision of what was trained, float32"),
    # the hub
    "huggingface_repo_id": Row("base.hub_model_id", "with base.push_to_hub: true"),
    "huggingface_token": Row("", SECRET, secret=True),
    "huggingface_repo_type": Row("", HUB),
    "huggingface_path_in_repo": Row("", HUB),
    "huggingface_repo_visibility": Row("", HUB),
    "save_state_to_huggingface": Row("", HUB),
    "resume_from_huggingface": Row("", HUB),
    "async_upload": Row("", HUB),
    # logs and pictures
    "logging_dir": Row("", "logs are in the run's folder: base.logging_dir"),
    "log_with": Row("base.logger", read=loggers),
    "log_prefix": Row("", "logs are in the run's folder: base.logging_dir"),
    "log_tracker_name": Row("base.tracker_project"),
    "wandb_run_name": Row("base.run_name"),
    "wandb_api_key": Row("", "secrets do not belong into configs: log in with `wandb login`", secret=True),
    "log_tracker_config": Row("", NO_EQUAL),
    "log_config": Row("", ALWAYS),
    "sample_every_n_steps": Row("base.valid_steps", read=above_zero),
    "sample_every_n_epochs": Row("base.valid_epochs", "wins there, too", above_zero),
    "sample_at_first": Row("", "scripts/sample.py draws with the base"),
    "sample_prompts": Row("task.validation_prompts", "the file's texts; also n, s and l if all lines have the same"),
    "sample_sampler": Row("task.sampler", read=sampler),
    "validation_split": Row("base.validation_split", read=part_held_out),
    "validation_seed": Row("", "base.seed decides it"),
    "validate_every_n_steps": Row("base.valid_steps", "if pictures are not drawn at other times", above_zero),
    "validate_every_n_epochs": Row("base.valid_epochs", "if pictures are not drawn at other times", above_zero),
    "max_validation_steps": Row("", "all held-out pictures are measured"),
    # files of options
    "dataset_config": Row("", "its options are taken over one by one"),
    "config_file": Row("", "its options are taken over one by one"),
    "output_config": Row("", "train.py --print-config shows all options"),
}  # fmt: skip

TABLE = MAIN | DATA
DEFAULTS = {
    "learning_rate": 2e-6, "lr_scheduler": "constant", "lr_warmup_steps": 0, "max_train_steps": 1600, "batch_size": 1,
    "mixed_precision": "no", "random_crop": False,
}  # fmt: skip
OF_ADAPTERS = {"network_dim": 4, "network_alpha": 1.0}
REFUSED = ("ae", "t5xxl", "clip_l", "clip_g", "gemma2", "qwen3")  # of models that are not Stable Diffusion 1, 2 or XL
