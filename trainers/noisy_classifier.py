"""Task `noisy_classifier`: a classifier of noisy pictures, which can guide a diffusion model, arXiv 2105.05233."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from datasets_lib.errors import InputError
from trainers.base import Positive, RandomSource, Trainer
from trainers.common.autoencoder.latents import images_of
from trainers.common.diffusion.classes import count_classes, labels_of
from trainers.common.diffusion.pixel_diffusion import NoisyPixelsConfig, build_schedule
from trainers.common.model_files import Grid
from trainers.common.unet2d import build_unet2d
from trainers.pretrained import read_model

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainers.base import DataSet

TASK = "noisy_classifier"


@dataclass(kw_only=True)
class NoisyClassifierConfig(NoisyPixelsConfig):
    """Options of the section `noisy_classifier`; its noise schedule must be that of the diffusion model to guide."""

    fixed_by_task: ClassVar[tuple[str, ...]] = ("out_channels",)

    num_classes: Positive | None = None  # null: the number of classes that the data set names


class NoisyClassifierTrainer(Trainer):
    """Trains a UNet2DModel whose output has a channel per class; its mean over the pixels is the class's logit."""

    Config = NoisyClassifierConfig
    config: NoisyClassifierConfig
    num_classes: int
    pipeline_tag = "image-classification"
    usage = (
        "import torch\n"
        "from diffusers import UNet2DModel\n"
        'classifier = UNet2DModel.from_pretrained("{output_dir}", subfolder="classifier")\n'
        "channels, side = classifier.config.in_channels, classifier.config.sample_size\n"
        "pictures = torch.zeros(1, channels, side, side)  # yours, in [-1, 1]\n"
        "logits = classifier(pictures, 0).sample.mean((2, 3))  # without noise"
    )

    def setup(self) -> None:
        self.scheduler = build_schedule(self.config)
        self.num_classes = count_classes(TASK, self, self.config.num_classes)

    def init_modules(self) -> dict[str, nn.Module]:
        config, settings = self.config, {"out_channels": self.num_classes}
        pretrained, grid = config.pretrained_model_name_or_path, Grid.of(self.base)
        return {"classifier": build_unet2d(config.model_config, pretrained, grid, settings)}

    def compute_loss(self, batch: dict[str, Any], rng: RandomSource, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        metrics = self.validation_metrics(batch, rng)
        return metrics["loss"].mean(), {"accuracy": metrics["accuracy"].mean().detach()}

    def validation_metrics(self, batch: dict[str, Any], rng: RandomSource) -> dict[str, Tensor]:
        """Returns cross-entropy and accuracy at a random timestep; in validation also the accuracy without noise."""
        from torch.nn.functional import cross_entropy

        images, labels = images_of(batch), labels_of(TASK, batch)
        timesteps = rng.integers("timestep", self.config.ddpm_num_steps)
        noisy = self.scheduler.add_noise(images, rng.normal("noise", images.shape[1:]), timesteps)
        logits = self._logits(noisy, timesteps)
        metrics = {
            "loss": cross_entropy(logits, labels, reduction="none"),
            "accuracy": (logits.argmax(1) == labels).float(),
        }
        if not self.training:
            clean = self._logits(images, timesteps.new_zeros(len(labels)))
            metrics["accuracy_without_noise"] = (clean.argmax(1) == labels).float()
        return metrics

    def _logits(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.modules["classifier"](noisy, timesteps).sample.float().mean((2, 3))

    def sample_requests(self, validation_set: DataSet | None) -> list[dict]:
        return []

    def evaluation_requests(self, count: int, validation_set: DataSet | None = None) -> list[dict]:
        return []

    def sample(self, requests: list[dict], rng: RandomSource) -> dict[str, Tensor]:
        raise InputError("noisy_classifier draws no pictures; give its folder to conditional_ddpm.classifier")

    def save_pipeline(self, output_dir: Path) -> None:
        self.raw("classifier").save_pretrained(output_dir / "classifier")
        self.scheduler.save_pretrained(output_dir / "scheduler")

    @classmethod
    def load_pipeline(cls, output_dir: str | Path) -> Any:
        from diffusers import UNet2DModel

        return read_model(UNet2DModel, output_dir, subfolder="classifier")
