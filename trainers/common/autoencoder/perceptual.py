"""Perceptual distances of pictures: LPIPS, features of a torchvision network, MS-SSIM."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from datasets_lib.errors import InputError
from trainers.common.autoencoder.options import ALLOWED, SSIM_WINDOW

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # per scale (Wang et al. 2003)


def load_perceptual(spec: str, resolution: int) -> nn.Module:
    """Builds the distance of `perceptual_loss`: two batches of pictures [B, C, H, W] in [-1, 1] -> [B].

    It is frozen, in float32, and passes gradients to the pictures. Raises ValueError if its weights are unavailable.
    """
    name, _, file = spec.partition(":")
    distance: nn.Module
    if spec == "ms_ssim":
        distance = MultiScaleSSIM(resolution)
    elif name == "lpips":
        distance = LPIPS(file or None)
    else:
        distance = FeatureDistance(name, file, resolution)
    return distance.eval().requires_grad_(False)


class MultiScaleSSIM(nn.Module):
    """1 - MS-SSIM over as many scales as fit, at most five; in [0, 1]."""

    def __init__(self, resolution: int) -> None:
        super().__init__()
        # the window must fit into the smallest scale; from three scales on torchmetrics asks for more than that
        fitting = [s for s in range(5) if min(resolution >> s, resolution // max(1, s * s)) >= SSIM_WINDOW]
        weights = MS_SSIM_WEIGHTS[: len(fitting)]
        self.weights = tuple(weight / sum(weights) for weight in weights)

    def forward(self, pictures: Tensor, others: Tensor) -> Tensor:
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

        # "simple" maps similarities to [0, 1]; clamping at 0 would give their powers an infinite gradient there
        similarity = multiscale_structural_similarity_index_measure(
            pictures / 2 + 0.5,
            others / 2 + 0.5,
            data_range=1.0,
            betas=self.weights,
            reduction="none",
            normalize="simple",
        )
        return 1 - similarity


class LPIPS(nn.Module):
    """LPIPS with VGG16 (arXiv 1801.03924): torchmetrics' network, which includes the trained heads."""

    def __init__(self, file: str | None) -> None:
        super().__init__()
        from torchmetrics.functional.image.lpips import _LPIPS

        held = {} if file is None else read_weights("lpips", file)
        try:
            self.network = _LPIPS(net="vgg", pnet_rand=file is not None)
        except OSError as error:  # urllib's errors are OSErrors
            raise InputError(
                f"perceptual_loss = lpips: VGG16's weights cannot be downloaded ({error}); fetch vgg16-397923af.pth "
                f"on a machine that is online and give it as lpips:FILE; allowed: {ALLOWED}"
            ) from None
        if file is not None:
            own = self.network.net.named_parameters()  # slice1.0.weight is features.0.weight in torchvision
            put_weights("lpips", file, held, {f"features.{key.partition('.')[2]}": weight for key, weight in own})

    def forward(self, pictures: Tensor, others: Tensor) -> Tensor:
        return self.network(_in_color(pictures), _in_color(others)).flatten()


class FeatureDistance(nn.Module):
    """LPIPS without trained heads: mean over positions of the squared difference of features of unit length.

    Summed over the last activation at each resolution of the network, down to 2 pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, file: str, resolution: int) -> None:
        super().__init__()
        from torchvision.models import get_model, get_model_weights
        from torchvision.models.feature_extraction import create_feature_extractor

        held = read_weights(name, file)
        network = get_model(name, weights=None).eval()
        self.network = create_feature_extractor(network, _last_of_each_size(network, resolution))
        own = self.network.state_dict()  # without the classification head, which a file may lack
        put_weights(name, file, held, own)
        preset = get_model_weights(name).DEFAULT.transforms()
        for key, values in (("mean", preset.mean), ("std", preset.std)):
            self.register_buffer(key, torch.tensor(values)[:, None, None])

    def forward(self, pictures: Tensor, others: Tensor) -> Tensor:
        features, of_others = [
            self.network((_in_color(x) / 2 + 0.5 - self.mean) / self.std) for x in (pictures, others)
        ]
        distances = [_unit(rows) - _unit(of_others[node]) for node, rows in features.items()]
        return reduce(torch.add, (distance.square().sum(1).mean((1, 2)) for distance in distances))


def _last_of_each_size(network: nn.Module, resolution: int) -> list[str]:
    """Names the last activation at each resolution above one pixel, for pictures of this size."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    nodes = get_graph_node_names(network)[1][1:]  # the first is the input
    with torch.no_grad():
        found = create_feature_extractor(network, nodes)(torch.zeros(1, 3, resolution, resolution))
    last: dict[int, str] = {}
    for node, rows in found.items():
        if rows.ndim == 4 and 1 < rows.shape[-1] <= min(last, default=resolution):  # pooling in a head may enlarge
            last[rows.shape[-1]] = node
    return list(last.values())


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()


def _in_color(pictures: Tensor) -> Tensor:
    return pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures


def read_weights(name: str, file: str) -> dict[str, Tensor]:
    """Reads the tensors of a .safetensors or .pth file (weights only); ValueError if it holds anything else."""
    from safetensors.torch import load_file

    try:
        if file.endswith(".safetensors"):
            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"perceptual_loss = {name}:{file}: no file of weights ({reason})") from None
    if not isinstance(weights, dict):
        raise InputError(f"perceptual_loss = {name}:{file}: holds a {type(weights).__name__}, expected named weights")
    return weights


@torch.no_grad()
def put_weights(name: str, file: str, weights: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    """Copies weights to tensors, by their names in the file; ValueError if one is missing or has another shape."""
    for key, tensor in own.items():
        found = weights.get(key)
        if key.endswith("num_batches_tracked"):  # missing in older files, and used only in training
            continue
        if not isinstance(found, Tensor) or found.shape != tensor.shape:
            shape = list(found.shape) if isinstance(found, Tensor) else "missing"
            raise InputError(
                f"perceptual_loss = {name}:{file}: not the weights of torchvision's {name.replace('lpips', 'vgg16')}: "
                f"{key} is {shape}, expected {list(tensor.shape)}"
            )
        tensor.copy_(found)
