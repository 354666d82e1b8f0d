"""Task `conditional_ddpm`: a class-conditional UNet of pixels or latents, with classifier-free guidance."""

from __future__ import annotations

from typing import Any

from trainers.common.diffusion.class_diffusion import ClassDiffusionConfig, ClassDiffusionTrainer, usage_by_class


class ConditionalDDPMTrainer(ClassDiffusionTrainer):
    """Trains a UNet2DModel with an embedding per class and one for "no class"; the result draws classes by name."""

    Config = ClassDiffusionConfig
    task = "conditional_ddpm"
    usage = usage_by_class("UNet2DModel", "unet")

    def network_settings(self) -> dict[str, Any]:
        return {"num_class_embeds": self.num_classes + 1, "class_embed_type": None}
