"""Metrics of drawn pictures against real ones: distances of distributions, classes, memorisation.

FID, KID, precision and recall are torch-fidelity's, on the features of a network (see judges.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainers.engine.validation.feature_networks import Judge

THUMBNAIL_SIZE = 32  # pixels; larger pictures are compared at this size
LEAST_PICTURES = 5  # of either kind, for metrics of features
KID_SUBSET_SIZE = 1000  # pictures, where there are as many


class Described(NamedTuple):
    """What is kept of N pictures."""

    thumbnails: Tensor  # [N, C, h, w] in [0, 1], at most THUMBNAIL_SIZE pixels
    features: Tensor | None  # [N, D] of the feature network
    predicted: Tensor | None  # [N] int64, the class that a classifier sees
    labels: Tensor | None  # [N] int64, the class that it is, or was to be
    finite: Tensor  # [N] bool; what is not is black in the rest

    @property
    def vectors(self) -> Tensor:
        return self.thumbnails.flatten(1)


@torch.no_grad()
def describe(
    batches: Iterable[tuple[Tensor, Tensor | None]],
    device: torch.device,
    features: Judge | None = None,
    classifier: Judge | None = None,
) -> Described:
    """Describes batches of (pictures [B, C, H, W] in [0, 1], labels [B] or None), on the CPU."""
    found: list[list[Tensor]] = [[], [], [], [], []]
    for images, labels in batches:
        found[4].append(images.isfinite().flatten(1).all(1))
        images = images.nan_to_num(0.0, 1.0, 0.0)
        on_device = images.to(device)
        found[0].append(_thumbnails(images))
        if features is not None:
            found[1].append(features(on_device).float().cpu())
        if classifier is not None:
            found[2].append(classifier(on_device).argmax(1).cpu())
        if labels is not None:
            found[3].append(labels.cpu())
    return Described(*(torch.cat(parts) if parts else None for parts in found))


def pictures_of(dataset: Any, numbers: list[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches of a data set's pictures in [0, 1] and their labels, or None; nothing random.

    Raises ValueError for a data set of latents.
    """
    for first in range(0, len(numbers), batch_size):
        examples = [dataset.get(number, None) for number in numbers[first : first + batch_size]]
        if "image" not in examples[0]:
            raise ValueError("the data set holds latents; name the pictures', as with base.dataset=digits")
        yield torch.stack([example["image"] for example in examples]) / 2 + 0.5, as_labels(examples)


def as_labels(rows: list[dict]) -> Tensor | None:
    """The labels [N] of examples or requests; None where they have none."""
    labels = [row.get("label") for row in rows]
    return None if None in labels else torch.tensor(labels)


def spread(count: int, most: int) -> list[int]:
    """At most so many of `count` numbers, evenly spread."""
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
    """All metrics that what is known allows; NaN where one cannot be computed.

    `recognise(vectors) -> classes` stands in where nothing is predicted; `held_out_distances` are those of held-out
    pictures to their nearest training pictures.
    """
    metrics = feature_metrics(drawn.features, real.features) if drawn.features is not None else {}
    if drawn.labels is not None:
        if drawn.predicted is not None or recognise is not None:
            metrics |= class_accuracy(recognised(drawn, recognise), drawn.labels)
        if real.labels is not None:
            metrics["class_diversity"] = _ratio(within_classes(drawn), within_classes(real))
    else:
        metrics["diversity"] = _ratio(_mean_distance(drawn.vectors), _mean_distance(real.vectors))
    if not drawn.finite.all():
        metrics["not_finite"] = (~drawn.finite).double().mean().item()
    return metrics | memorisation(nearest(drawn.vectors, real.vectors)[0], held_out_distances)


def measure_reconstructions(reconstructions: Described, originals: Described) -> dict[str, float]:
    """FID and KID of reconstructions against their originals; nothing without a feature network."""
    if originals.features is None:
        return {}
    found = feature_metrics(reconstructions.features, originals.features)
    return {"rfid": found["fid"], "rkid": found["kid"]}


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference else math.nan


def feature_metrics(drawn: Tensor, real: Tensor) -> dict[str, float]:
    """FID (arXiv 1706.08500), KID (1801.01401) and improved precision and recall (1904.06991) on features [N, D].

    Raises ValueError for fewer than five pictures of either kind.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    if min(len(drawn), len(real)) < LEAST_PICTURES:
        found = f"{len(drawn)} drawn and {len(real)} real pictures"
        raise ValueError(f"{found}: metrics need at least {LEAST_PICTURES} of each")
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


def recognised(pictures: Described, recognise: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The class that is seen in each picture, [N]."""
    return pictures.predicted if pictures.predicted is not None else recognise(pictures.vectors)


def class_accuracy(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """The part of pictures that is seen as the class asked for: over all, and of the class that does worst."""
    right = (predicted == labels).double().mean().item()
    return {"class_accuracy": right, "worst_class_accuracy": min(accuracy_by_class(predicted, labels).values())}


def accuracy_by_class(predicted: Tensor, labels: Tensor) -> dict[int, float]:
    return {k: (predicted[labels == k] == k).double().mean().item() for k in labels.unique().tolist()}


def train_classifier(real: Described, most: int = 10_000) -> Callable[[Tensor], Tensor]:
    """A support vector machine on the real pictures, evenly chosen `most` of them: vectors [N, V] -> classes [N].

    Raises ValueError where they are all of one class.
    """
    from sklearn.svm import SVC

    chosen = spread(len(real.labels), most)
    if len(real.labels[chosen].unique()) < 2:
        raise ValueError("the real pictures are all of one class; class accuracy needs at least two")
    machine = SVC(C=10).fit(real.vectors[chosen].numpy(), real.labels[chosen].numpy())
    return lambda vectors: torch.from_numpy(machine.predict(vectors.numpy()))


def within_classes(pictures: Described) -> float:
    """The mean distance of two pictures of one class, averaged over the classes that have two; NaN without any."""
    classes, counts = pictures.labels.unique(return_counts=True)
    found = [_mean_distance(pictures.vectors[pictures.labels == k]) for k in classes[counts > 1]]
    return sum(found) / len(found) if found else math.nan


def _mean_distance(vectors: Tensor, most: int = 2000) -> float:
    return torch.pdist(vectors[:most]).mean().item()


def memorisation(distances: Tensor, held_out_distances: Tensor | None) -> dict[str, float]:
    """From the distances [N] of pictures to their nearest training pictures.

    `copies` is the part of the drawn pictures that is no farther from a training picture than the nearest 5 % of the
    held-out ones are; real pictures would get 0.05.
    """
    metrics = {"nearest_distance": distances.median().item()}
    if held_out_distances is not None and len(held_out_distances) >= 20:
        metrics["nearest_distance_held_out"] = held_out_distances.median().item()
        limit = held_out_distances.quantile(0.05)
        metrics["nearest_distance_held_out_5th_percentile"] = limit.item()
        metrics["copies"] = (distances <= limit).double().mean().item()
    return metrics


def nearest(vectors: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest of `others` [M, V] and its number, each [N].

    Products of matrices find the neighbour fast but cannot tell a copy from a near picture, so its distance is
    computed anew.
    """
    indices = torch.cat([torch.cdist(part, others).argmin(1) for part in vectors.split(256)])
    return (vectors - others[indices]).norm(dim=1), indices
