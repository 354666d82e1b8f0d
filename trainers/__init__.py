"""The tasks that diffloop trains, by the name of their section in the configuration."""

# type -> "module:Class", imported only when used: a config is checked without loading the other tasks' libraries.
TRAINERS = {
    "ddpm": "trainers.ddpm:DDPMTrainer",
    "conditional_ddpm": "trainers.conditional_ddpm:ConditionalDDPMTrainer",
    "vae": "trainers.vae:VAETrainer",
    "noisy_classifier": "trainers.noisy_classifier:NoisyClassifierTrainer",
}
