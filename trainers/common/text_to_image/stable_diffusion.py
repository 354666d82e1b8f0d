"""Base class of tasks on a Stable Diffusion pipeline: latents, captions, the UNet's objective, and pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datasets_lib.errors import InputError
from datasets_lib.file_hashes import FileHashes, cache_directory
from trainers.base import CardFacts, Encoder, RandomSource, Trainer
from trainers.common.autoencoder.latents import LatentSpace
from trainers.common.diffusion.objective import Predict, columns
from trainers.common.diffusion.sampling import build_sampler, denoise, initial_noise, to_unit_range
from trainers.common.text_to_image.base_model import BaseModel
from trainers.common.text_to_image.objective import Learned, build_diffusion
from trainers.common.text_to_image.options import StableDiffusionConfig
from trainers.common.text_to_image.prompt_requests import captions_and_labels, held_out_captions, prompt_requests
from trainers.common.text_to_image.prompts import EMBEDS, POOLED, Prompts, constant_rows, size_conditions

if TYPE_CHECKING:
    import torch
    from diffusers import SchedulerMixin, UNet2DConditionModel
    from torch import Tensor, nn

    from trainers.base import DataSet, ImageData
    from trainers.common.class_pipeline import Condition
    from trainers.common.text_to_image.clip_score import ClipScore


class StableDiffusionTrainer(Trainer):
    """Trains the UNet of a pipeline, whole or with adapters, on pictures with captions; tasks choose the weights."""

    config: StableDiffusionConfig
    pipeline_tag = "text-to-image"
    sample_batch_size = 4
    clip_score: ClipScore | None = None
    trains_text: bool = False  # whether text encoders are trained, so that captions must be encoded at every step
    task: str  # the section's name, for messages

    def setup(self) -> None:
        config = self.config
        option, source = f"{self.task}.pretrained_model_name_or_path", config.pretrained_model_name_or_path
        assert source is not None  # the config was checked
        hashes = FileHashes(cache_directory(self.base))
        self.base_model = BaseModel(option, source, config.revision, config.variant, hashes.sha256)
        vae = (option, self.base_model.location) if config.vae is None else (f"{self.task}.vae", config.vae)
        variant, cached = config.variant if config.vae is None else None, config.cache_latents is not None
        place = *vae, self.base, self.device, self.weight_dtype, self.run.encoded_by, variant
        self.latents = LatentSpace(*place, offloaded=cached, base_settings=self.base_model.vae_settings())
        self.prompts = Prompts(self.base_model, self.device, self.weight_dtype, config.texts)
        self.learned = self.build_objective()
        if config.clip_score_model is not None:
            from trainers.common.text_to_image.clip_score import ClipScore

            self.clip_score = ClipScore(f"{self.task}.clip_score_model", config.clip_score_model, self.device)

    def init_modules(self) -> dict[str, nn.Module]:
        networks = self.build_networks()
        unet: UNet2DConditionModel = networks["unet"]
        channels, wanted = unet.config.in_channels, self.latents.grid.channels
        if channels != wanted:  # such as the 9 of an inpainting model
            found = f"its UNet sees {channels} channels, and latents have {wanted}; give a text-to-image model"
            raise InputError(f"{self.base_model.option} = {self.base_model.source}: {found}")
        return networks

    def build_networks(self) -> dict[str, nn.Module]:
        """Returns the networks to train: "unet", and text encoders by the names of their folders."""
        raise NotImplementedError

    def build_objective(self) -> Learned:
        return build_diffusion(self.task, self.config, self.base_model)

    def card_facts(self) -> CardFacts:
        family = "stable-diffusion-xl" if self.base_model.is_xl else "stable-diffusion"
        tags = (family, f"{family}-diffusers", "text-to-image", "diffusers-training")
        words = [*self.base.trigger_words, *filter(None, [self.base.caption])]
        return replace(super().card_facts(), tags=(*tags, *self.hub_tags), instance_prompt=", ".join(words) or None)

    # --- data

    def encoders(self) -> dict[str, Encoder]:
        cache = self.config.cache_latents
        found = {"latents": self.latents.encoder(cache)}
        if self.base.has_class_images:
            found["class_latents"] = self.latents.encoder(cache, "class_")
        if not self.trains_text:
            found["text"] = self.prompts.encoder(self.config.cache_text, self._constant_texts(), self._fixed_caption())
        return found

    def _constant_texts(self) -> tuple[str, ...]:
        """Returns the texts to encode besides the captions of the data."""
        texts = ["", self._fixed_caption(), self.config.negative_prompt, *self.run.class_captions]
        texts += self.config.validation_prompts or []
        return tuple(dict.fromkeys(text for text in texts if text is not None))

    def notes(self, train_set: ImageData) -> list[str]:
        """Notes data without captions, and captions that are too long for the text encoder."""
        found = [train_set.caption_note, *self.prompts.notes(train_set.captions())]
        return [note for note in found if note]

    # --- training

    def compute_loss(self, batch: dict[str, Any], rng: RandomSource, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        clean = self.latents.draw(batch, rng)
        asked = self._asked(batch, clean, rng)
        loss = self.learned.objective.loss(self._asking(asked), clean, rng, self._mask(batch, clean)).mean()
        if "class_caption" not in batch or not self.training:
            return loss, {}
        clean = self.latents.draw(batch, rng, "class_")  # class images preserve the model's prior of the class
        condition = self._condition(self.embed(batch["class_caption"]), clean.shape, batch, "class_")
        prior = self.learned.objective.loss(self._asking(condition), clean, rng, prefix="class_").mean()
        values = {"instance_loss": loss.detach(), "prior_loss": prior.detach()}
        return loss + self.config.prior_loss_weight * prior, values

    def validation_metrics(self, batch: dict[str, Any], rng: RandomSource) -> dict[str, Tensor]:
        """Returns the unweighted loss at a timestep in each quarter of the time, and the mean of the four."""
        import torch

        clean = self.latents.draw(batch, rng)
        ask, mask = self._asking(self._asked(batch, clean, rng)), self._mask(batch, clean)
        quarters = {
            f"loss_quarter_{n + 1}": objective.loss(ask, clean, rng, mask, f"quarter_{n}_")
            for n, objective in enumerate(self.learned.quarters)
        }
        return {"loss": torch.stack(list(quarters.values())).mean(0)} | quarters

    def _asked(self, batch: dict[str, Any], clean: Tensor, rng: RandomSource) -> Condition:
        """The condition of a batch: its captions, some of them dropped in training."""
        import torch

        if EMBEDS in batch:
            embeds = {name: batch[name] for name in self.prompts.columns}
        else:
            embeds = self.embed(batch.get("caption") or [self._fixed_caption()] * len(clean))
        if self.training and self.config.caption_dropout:
            hidden, empty = rng.bernoulli("caption_dropout", self.config.caption_dropout), self.empty()
            embeds = {
                name: torch.where(columns(hidden, rows), empty[name].to(rows.dtype), rows)
                for name, rows in embeds.items()
            }
        return self._condition(embeds, clean.shape, batch)

    def embed(self, captions: list[str]) -> dict[str, Tensor]:
        """Embeds texts that are not a column of the batch."""
        import torch

        if self.trains_text:
            return self.prompts.embed(self.modules, list(captions))
        found = [self.encoded("text", caption) for caption in captions]
        return {name: torch.cat([each[name].to(self.device) for each in found]) for name in self.prompts.columns}

    def empty(self) -> dict[str, Tensor]:
        """Embeds the empty text (B = 1) as the pipeline does."""
        import torch

        embeds = self.embed([""])
        return {n: torch.zeros_like(rows) for n, rows in embeds.items()} if self.base_model.zeros_for_empty else embeds

    def _condition(
        self, embeds: dict[str, Tensor], shape: torch.Size, batch: dict[str, Any], prefix: str = ""
    ) -> Condition:
        """Adds Stable Diffusion XL's sizes to embeddings: the examples' or, without any, those of a whole picture."""
        import torch

        if not self.base_model.is_xl:
            return embeds
        target = shape[2] * self.latents.factor, shape[3] * self.latents.factor
        whole = constant_rows(target, shape[0], self.device)
        sizes = batch.get(f"{prefix}original_size", whole)
        corners = batch.get(f"{prefix}crop_top_left", torch.zeros_like(whole))
        return embeds | {"time_ids": size_conditions(sizes, corners, target)}

    @staticmethod
    def _mask(batch: dict[str, Any], clean: Tensor) -> Tensor | None:
        """The mask of a batch [B, 1, h, w] at the size of its latents, or None."""
        from torch import nn

        if "mask" not in batch:
            return None
        return nn.functional.interpolate(batch["mask"], size=clean.shape[2:], mode="area")

    def _asking(self, condition: Condition) -> Predict:
        """Returns the UNet with this condition, for the objective."""
        return lambda noisy, timesteps: self._network(noisy, timesteps, condition)

    def _network(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        dtype = self.weight_dtype
        embeds = condition[EMBEDS].to(dtype)
        added = None
        if POOLED in condition:
            added = {"text_embeds": condition[POOLED].to(dtype), "time_ids": condition["time_ids"]}
        return self.modules["unet"](noisy.to(dtype), timesteps, embeds, added_cond_kwargs=added).sample

    # --- pictures

    def sample_requests(self, validation_set: DataSet | None) -> list[dict]:
        """Cycles through the prompts, `valid_batch_size` in all; without prompts, through held-out captions."""
        prompts, count = self.config.validation_prompts, self.config.valid_batch_size
        if prompts is None:
            prompts = held_out_captions(validation_set, count) or self._known_prompts()[:count]
        return prompt_requests([{"prompt": prompt} for prompt in prompts], max(count, len(prompts)))

    def evaluation_requests(self, count: int, validation_set: DataSet | None = None) -> list[dict]:
        """Cycles through held-out captions, with their labels; without a validation set through the prompts."""
        if validation_set is not None:
            return prompt_requests(captions_and_labels(validation_set, count), count)
        prompts = self.config.validation_prompts or self._known_prompts()
        return prompt_requests([{"prompt": prompt} for prompt in prompts], count)

    def _known_prompts(self) -> list[str]:
        """Captions of the training set, if known, or the fixed one that all examples share."""
        return self.run.captions or [self._fixed_caption()]

    def _fixed_caption(self) -> str:
        return ", ".join(part for part in (self.base.trigger_word, self.base.caption) if part)

    def sample(self, requests: list[dict], rng: RandomSource) -> dict[str, Tensor]:
        return {"samples": self.draw(requests, rng.generators())}

    def draw(
        self, requests: list[dict], generators: list[torch.Generator], sampler: SchedulerMixin | None = None
    ) -> Tensor:
        """Draws pictures [N, 3, H, W] in [0, 1]; the pipeline draws the same from the same generators."""
        import torch

        from trainers.common.class_pipeline import Guidance

        config = self.config
        noise = initial_noise(self.latents.grid.shape, generators, self.device)
        asked = self._condition(self.embed([request["prompt"] for request in requests]), noise.shape, {})
        negative = self.empty() if config.negative_prompt is None else self.embed([config.negative_prompt])
        embeds = {name: torch.cat([rows] * len(requests)) for name, rows in negative.items()}
        none = self._condition(embeds, noise.shape, {})
        # in diffusers' pipelines a scale of at most 1 means no guidance
        guidance = Guidance(max(config.guidance_scale, 1.0), config.guidance_rescale)

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            return guidance.predict(self._network, noisy, timestep, asked, none, sigma=0.0)

        sampler, steps = sampler or self.chosen_sampler(), config.num_inference_steps
        return self._as_pictures(denoise(predict, sampler, noise, steps, generators, self.progress))

    def pipeline(self) -> Any:
        """Builds diffusers' pipeline from the current networks and CPU copies of all other components."""
        networks = {name: self.raw(name) for name in self.unwrapped}
        return self.base_model.pipeline(**networks, vae=self.latents.load(), scheduler=self.learned.sampler)

    def chosen_sampler(self) -> SchedulerMixin:
        """The sampler that the config names, or else the finished pipeline's."""
        name = self.config.sampler
        return self.learned.sampler if name is None else build_sampler(name, self.learned.scheduler)

    def _as_pictures(self, sample: Tensor) -> Tensor:
        """Decodes latents one at a time, because decoding needs more memory than all the rest."""
        import torch

        pictures = torch.cat([to_unit_range(self.latents.decode(row[None])) for row in sample])
        self.latents.offload()
        return pictures

    def sample_metrics(self, requests: list[dict], images: dict[str, Tensor]) -> dict[str, float]:
        """Returns the CLIP score, 100 times the cosine of picture and prompt, if a CLIP is given."""
        if self.clip_score is None:
            return {}
        return {"clip_score": self.clip_score(images["samples"], [request["prompt"] for request in requests])}
