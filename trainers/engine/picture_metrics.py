"""Metrics of drawn pictures against real ones: distances of distributions, classes, memorisation.

FID, KID, precision and recall are torch-fidelity's, on the features of a network (see judges.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainers.engine.judges import Judge

THUMBNAIL_SIZE = 32  # pixels; larger pictures are compared at this size
KID_SUBSET_SIZE = 1000  # pictures, where there are as many


class Described(NamedTuple):
    """What is kept of N pictures."""

    thumbnails: Tensor  # [N, C, h, w] in [0, 1], at most THUMBNAIL_SIZE pixels
    features: Tensor | None  # [N, D] of the feature network
    predicted: Tensor | None  # [N] int64, the class that a classifier sees
    labels: Tensor | None  # [N] int64, the class that it is, or was to be

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
    found: list[list[Tensor]] = [[], [], [], []]
    for images, labels in batches:
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
    """Batches of a data set's pictures in [0, 1] and their labels, or None; nothing random."""
    for first in range(0, len(numbers), batch_size):
        examples = [dataset.get(number, None) for number in numbers[first : first + batch_size]]
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
    drawn: Described, real: Described, held_out: Described | None, recognise: Callable[[Tensor], Tensor] | None = None
) -> dict[str, float]:
    """All metrics that what is known allows; `recognise(vectors) -> classes` stands in where nothing is predicted."""
    metrics = feature_metrics(drawn.features, real.features) if drawn.features is not None else {}
    if drawn.labels is not None:
        if drawn.predicted is not None or recognise is not None:
            metrics |= class_accuracy(recognised(drawn, recognise), drawn.labels)
        if real.labels is not None:
            metrics["class_diversity"] = within_classes(drawn) / within_classes(real)
    else:
        metrics["diversity"] = _mean_distance(drawn.vectors) / _mean_distance(real.vectors)
    return metrics | memorisation(drawn.vectors, real.vectors, held_out.vectors if held_out is not None else None)


def feature_metrics(drawn: Tensor, real: Tensor) -> dict[str, float]:
    """FID (arXiv 1706.08500), KID (1801.01401) and improved precision and recall (1904.06991) on features [N, D].

    Raises ValueError for fewer than five pictures of either kind.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    if min(len(drawn), len(real)) < 5:
        raise ValueError(f"{len(drawn)} drawn and {len(real)} real pictures: metrics need at least 5 of each")
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
    """A support vector machine on the real pictures, evenly chosen `most` of them: vectors [N, V] -> classes [N]."""
    from sklearn.svm import SVC

    chosen = spread(len(real.labels), most)
    machine = SVC(C=10).fit(real.vectors[chosen].numpy(), real.labels[chosen].numpy())
    return lambda vectors: torch.from_numpy(machine.predict(vectors.numpy()))


def within_classes(pictures: Described) -> float:
    """The mean distance of two pictures of one class, averaged over the classes that have two."""
    classes, counts = pictures.labels.unique(return_counts=True)
    return float(np.mean([_mean_distance(pictures.vectors[pictures.labels == k]) for k in classes[counts > 1]]))


def _mean_distance(vectors: Tensor, most: int = 2000) -> float:
    return torch.pdist(vectors[:most]).mean().item()


def memorisation(drawn: Tensor, real: Tensor, held_out: Tensor | None) -> dict[str, float]:
    """Distances to the nearest training picture, of vectors [N, V].

    `copies` is the part of the drawn pictures that is nearer to a training picture than all but 5 % of the held-out
    ones are; real pictures would get 0.05.
    """
    distances = nearest(drawn, real)[0]
    metrics = {"nearest_distance": distances.median().item()}
    if held_out is not None and len(held_out) >= 20:
        own = nearest(held_out, real)[0]
        metrics["nearest_distance_held_out"] = own.median().item()
        metrics["copies"] = (distances < own.quantile(0.05)).double().mean().item()
    return metrics


def nearest(vectors: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest of `others` [M, V] and its number, each [N]."""
    exact = "donot_use_mm_for_euclid_dist"  # the fast way cannot tell copies from near ones
    found = [torch.cdist(part, others, compute_mode=exact).min(1) for part in vectors.split(256)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])
