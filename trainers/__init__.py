"""The table of tasks, by the name of their section in the configuration."""

# type -> "module:Class", imported only when used, so that other tasks' libraries need not be loaded
TRAINERS = {
    "ddpm": "trainers.ddpm:DDPMTrainer",
    "conditional_ddpm": "trainers.conditional_ddpm:ConditionalDDPMTrainer",
    "dit": "trainers.dit:DiTTrainer",
    "vae": "trainers.vae:VAETrainer",
    "lora": "trainers.sd_lora:LoRATrainer",
    "lcm_lora": "trainers.lcm_lora:LCMLoRATrainer",
    "text_to_image": "trainers.text_to_image:TextToImageTrainer",
    "noisy_classifier": "trainers.noisy_classifier:NoisyClassifierTrainer",
}
