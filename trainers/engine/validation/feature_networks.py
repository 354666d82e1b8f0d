"""Networks that measure pictures: features, for Fréchet distances and others, and classifiers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from datasets_lib.errors import InputError
from trainers.engine.config.eval_networks import ALLOWED_FEATURES
from trainers.pretrained import read_model

PictureNetwork = Callable[[Tensor], Tensor]  # pictures [B, C, H, W] in [0, 1] on the device -> rows [B, D]


def load_features(spec: str, device: torch.device) -> PictureNetwork | None:
    """Loads the network of `eval_features`; None for "none". Raises ValueError if it cannot be loaded."""
    if spec == "none":
        return None
    if spec == "inception":
        inception = _inception().to(device)
        return lambda images: inception(_bytes(_in_color(images)))[0]
    if Path(spec).is_file():
        script = _torchscript(spec, device)
        extra = {"return_features": True} if "return_features" in str(getattr(script.forward, "schema", "")) else {}
        return lambda images: script(_bytes(_in_color(images)), **extra).flatten(1)
    name, _, file = spec.partition(":")
    return _torchvision(name, file, device)


def load_classifier(spec: str, device: torch.device) -> PictureNetwork:
    """Loads a noisy_classifier run, or a TorchScript file that takes float32 in [-1, 1]: logits [B, classes]."""
    if (Path(spec) / "classifier" / "config.json").is_file():
        from diffusers import UNet2DModel

        network = read_model(UNet2DModel, spec, subfolder="classifier").to(device)
        return lambda images: network(images * 2 - 1, 0).sample.mean((2, 3))
    script = _torchscript(spec, device)
    return lambda images: script(images * 2 - 1)


def _bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


def _in_color(images: Tensor) -> Tensor:
    """Returns three channels: grey is repeated, alpha is dropped."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]


def _inception() -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors
        reason = f"its weights cannot be downloaded ({error})"
        raise InputError(f"eval_features = inception: {reason}; allowed: {ALLOWED_FEATURES}") from None


def _torchscript(path: str, device: torch.device) -> torch.jit.ScriptModule:
    try:
        return torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise InputError(f"{path}: not a TorchScript file ({first}); make one with torch.jit.save") from None


def _torchvision(name: str, file: str, device: torch.device) -> PictureNetwork:
    """Loads a torchvision network without its last layer."""
    from safetensors.torch import load_file
    from torchvision.models import get_model, get_model_weights
    from torchvision.transforms.functional import normalize, resize

    network = get_model(name, weights=None)
    try:
        is_safe = file.endswith(".safetensors")
        network.load_state_dict(load_file(file) if is_safe else torch.load(file, "cpu", weights_only=True))
    except Exception as error:
        first = str(error).splitlines()[0]
        raise InputError(f"eval_features = {name}:{file}: these are not the weights of {name} ({first})") from None
    linear = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise InputError(f"eval_features = {name}:{file}: {name} ends in no linear layer; take one such as resnet50")
    network.set_submodule(linear[-1], nn.Identity())
    network = network.to(device).eval()
    preset = get_model_weights(name).DEFAULT.transforms()
    size = [preset.crop_size[0]] * 2

    def features(images: Tensor) -> Tensor:
        return network(normalize(resize(_in_color(images), size, antialias=True), preset.mean, preset.std))

    return features
