"""Compares drawn pictures with real ones: distances of distributions, class accuracy, diversity, memorisation.

FID, KID, precision and recall are torch-fidelity's, on the features of a network of feature_networks.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from datasets_lib.errors import InputError
from datasets_lib.example import DataSet
from trainers.engine.validation.feature_networks import PictureNetwork

THUMBNAIL_SIZE = 32  # pixels; larger pictures are compared at this size
LEAST_PICTURES = 5  # drawn and real, for metrics of features
KID_SUBSET_SIZE = 1000  # pictures, if there are as many

Batch = tuple[Tensor, Tensor | None]  # pictures [B, C, H, W] in [0, 1], labels [B]


class Described(NamedTuple):
    """Measurements of N pictures."""

    thumbnails: Tensor  # [N, C, h, w] in [0, 1], at most THUMBNAIL_SIZE pixels
    features: Tensor | None  # [N, D] of the feature network
    predicted: Tensor | None  # [N] int64, the class by a classifier
    labels: Tensor | None  # [N] int64, the true or requested class
    finite: Tensor  # [N] bool; pictures that are not finite were replaced by black ones

    @property
    def vectors(self) -> Tensor:
        return self.thumbnails.flatten(1)

    def each(self, change: Callable[[Tensor], Tensor]) -> Described:
        """Applies a function to all measurements."""
        return Described._make(None if rows is None else change(rows) for rows in self)


@torch.no_grad()
def describe(
    batches: Iterable[Batch],
    device: torch.device,
    features: PictureNetwork | None = None,
    classifier: PictureNetwork | None = None,
) -> Described:
    """Measures batches of pictures; the results are on the CPU."""
    found = []
    for images, labels in batches:
        finite, images = images.isfinite().flatten(1).all(1), images.nan_to_num(0.0, 1.0, 0.0)
        on_device, labels = images.to(device), None if labels is None else labels.cpu()
        measured = None if features is None else features(on_device).float().cpu()
        predicted = None if classifier is None else classifier(on_device).argmax(1).cpu()
        found.append(Described(_thumbnails(images), measured, predicted, labels, finite))
    return Described._make(None if rows[0] is None else torch.cat(rows) for rows in zip(*found, strict=True))


def pictures_of(dataset: DataSet, numbers: list[int], batch_size: int) -> Iterator[Batch]:
    """Yields a data set's pictures and labels without augmentation; raises ValueError for a data set of latents."""
    for first in range(0, len(numbers), batch_size):
        examples = [dataset.get(number, None) for number in numbers[first : first + batch_size]]
        if "image" not in examples[0]:
            raise InputError("the data set holds latents; name the pictures', as with base.dataset=digits")
        yield torch.stack([example["image"] for example in examples]) / 2 + 0.5, as_labels(examples)


def as_labels(rows: list[dict]) -> Tensor | None:
    """Returns the labels [N] of examples or requests; None if any has none."""
    labels = [row.get("label") for row in rows]
    return None if None in labels else torch.tensor(labels)


def spread(count: int, most: int) -> list[int]:
    """Chooses at most `most` of the numbers below `count`, evenly spread."""
    return torch.linspace(0, count - 1, min(count, most)).long().tolist()


def _thumbnails(images: Tensor) -> Tensor:
    if max(images.shape[2:]) <= THUMBNAIL_SIZE:
        return images
    return torch.nn.functional.interpolate(images, (THUMBNAIL_SIZE, THUMBNAIL_SIZE), mode="area")


def measure(
    drawn: Described,
    real: Described,
    held_out_distances: Tensor | None = None,
    recognise: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Computes all metrics that the measurements allow, NaN if one fails; `recognise` replaces missing predictions."""
    metrics: dict[str, float] = {}
    if drawn.features is not None and real.features is not None:
        metrics |= feature_metrics(drawn.features, real.features)
    if drawn.labels is not None:
        if (seen := recognised(drawn, recognise)) is not None:
            metrics |= class_accuracy(seen, drawn.labels)
        if real.labels is not None:
            metrics["class_diversity"] = _ratio(within_classes(drawn), within_classes(real))
    else:
        metrics["diversity"] = _ratio(_mean_distance(drawn.vectors), _mean_distance(real.vectors))
    if not drawn.finite.all():
        metrics["not_finite"] = (~drawn.finite).double().mean().item()
    return metrics | memorisation(nearest(drawn.vectors, real.vectors)[0], held_out_distances)


def measure_reconstructions(reconstructions: Described, originals: Described) -> dict[str, float]:
    """Computes FID and KID of reconstructions against their originals; nothing without a feature network."""
    if reconstructions.features is None or originals.features is None:
        return {}
    found = feature_metrics(reconstructions.features, originals.features)
    return {"rfid": found["fid"], "rkid": found["kid"]}


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference else math.nan


def feature_metrics(drawn: Tensor, real: Tensor) -> dict[str, float]:
    """Computes FID (arXiv 1706.08500), KID (1801.01401), improved precision and recall (1904.06991) of features."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    if min(len(drawn), len(real)) < LEAST_PICTURES:
        found = f"{len(drawn)} drawn and {len(real)} real pictures"
        raise InputError(f"{found}: metrics need at least {LEAST_PICTURES} of each")
    if not (drawn.isfinite().all() and real.isfinite().all()):
        return dict.fromkeys(("fid", "kid", "precision", "recall"), math.nan)
    drawn, real = drawn.double(), real.double()
    statistics = [fid_features_to_statistics(rows) for rows in (drawn, real)]
    subset = min(KID_SUBSET_SIZE, len(drawn), len(real))
    kid = kid_features_to_metric(drawn, real, kid_subset_size=subset, verbose=False)
    prc = prc_features_to_metric(drawn, real, save_cpu_ram=True, verbose=False)
    return {
        "fid": fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"],
        "kid": kid["kernel_inception_distance_mean"],
        "precision": prc["precision"],
        "recall": prc["recall"],
    }


def recognised(pictures: Described, recognise: Callable[[Tensor], Tensor] | None) -> Tensor | None:
    """Returns the recognised class of each picture, [N]; None without a classifier."""
    if pictures.predicted is None and recognise is not None:
        return recognise(pictures.vectors)
    return pictures.predicted


def class_accuracy(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """The share of pictures recognised as the requested class: of all pictures, and of the worst class."""
    right = (predicted == labels).double().mean().item()
    return {"class_accuracy": right, "worst_class_accuracy": min(accuracy_by_class(predicted, labels).values())}


def accuracy_by_class(predicted: Tensor, labels: Tensor) -> dict[int, float]:
    return {k: (predicted[labels == k] == k).double().mean().item() for k in labels.unique().tolist()}


def train_classifier(real: Described, most: int = 10_000) -> Callable[[Tensor], Tensor]:
    """Trains a support vector machine on `most` real pictures, evenly chosen: vectors [N, V] -> classes [N]."""
    from sklearn.svm import SVC

    chosen = spread(len(real.vectors), most)
    labels = None if real.labels is None else real.labels[chosen]
    if labels is None or len(labels.unique()) < 2:
        raise InputError("the real pictures are all of one class; class accuracy needs at least two")
    machine = SVC(C=10).fit(real.vectors[chosen].numpy(), labels.numpy())
    return lambda vectors: torch.from_numpy(machine.predict(vectors.numpy()))


def within_classes(pictures: Described) -> float:
    """The mean distance of two pictures of one class, averaged over classes that have two; NaN if none has."""
    if pictures.labels is None:
        return math.nan
    classes, counts = pictures.labels.unique(return_counts=True)
    found = [_mean_distance(pictures.vectors[pictures.labels == k]) for k in classes[counts > 1]]
    return sum(found) / len(found) if found else math.nan


def _mean_distance(vectors: Tensor, most: int = 2000) -> float:
    return torch.pdist(vectors[:most]).mean().item()


def memorisation(distances: Tensor, held_out_distances: Tensor | None) -> dict[str, float]:
    """Computes metrics of the distances [N] from pictures to their nearest training pictures.

    `copies` is the share of drawn pictures that are as close to a training picture as the closest 5 % of the held-out
    pictures are; real pictures would get 0.05.
    """
    metrics = {"nearest_distance": distances.median().item()}
    if held_out_distances is not None and len(held_out_distances) >= 20:
        metrics["nearest_distance_held_out"] = held_out_distances.median().item()
        limit = held_out_distances.quantile(0.05)
        metrics["nearest_distance_held_out_5th_percentile"] = limit.item()
        metrics["copies"] = (distances <= limit).double().mean().item()
    return metrics


def nearest(vectors: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the distance to the nearest of `others` [M, V], and its number, each [N].

    Matrix products find the neighbour fast but are too inexact to tell a copy from a near picture, so its distance is
    computed again.
    """
    indices = torch.cat([torch.cdist(part, others).argmin(1) for part in vectors.split(256)])
    return (vectors - others[indices]).norm(dim=1), indices
