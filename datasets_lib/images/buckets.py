"""Aspect-ratio buckets: the sizes to which pictures are brought, and the best one for a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

Size = tuple[int, int]  # height, width
MOST_ASPECT = 2  # of the longer side to the shorter one


def sizes_of(args: Any) -> tuple[Size, ...]:
    """Return the sizes that examples may have: the buckets or, without them, one square."""
    if not args.buckets:
        return ((args.resolution, args.resolution),)
    return bucket_sizes(args.bucket_max_pixels or args.resolution**2, args.bucket_step)


def bucket_sizes(max_pixels: int, step: int) -> tuple[Size, ...]:
    """Return the sizes with at most `max_pixels` that cannot grow, lowest first; each side is a multiple of `step`.

    The longer side is at most twice the shorter one.
    """
    widest = {}  # by height
    for height in range(step, math.isqrt(MOST_ASPECT * max_pixels) + 1, step):
        width = min(MOST_ASPECT * height, max_pixels // height) // step * step
        if width * MOST_ASPECT >= height:
            widest[height] = width
    return tuple((height, width) for height, width in widest.items() if widest.get(height + step, 0) < width)


def kept_part(size: Size, target: Size) -> float:
    """Return the share of a picture that is left after it is resized to just cover the target, and cropped."""
    sides = size[0] * target[1], size[1] * target[0]
    return min(sides) / max(sides)


def best(size: Size, sizes: Sequence[Size]) -> Size:
    """Return the size that crops a picture least; of equals the largest, then the first."""
    return max(sizes, key=lambda target: (kept_part(size, target), target[0] * target[1]))


def problems(args: Any) -> Iterator[tuple[str, str]]:
    """Yield (option, what is wrong) for settings that do not work with buckets."""
    if not args.buckets:
        return
    if args.has_class_images:
        yield (
            "buckets",
            "does not work with pictures of the class, which would differ in shape from those beside them",
        )
    if not 1 <= args.bucket_step <= args.resolution:
        yield "bucket_step", f"must be at least 1, and at most resolution = {args.resolution}"
    elif args.bucket_max_pixels is not None and args.bucket_max_pixels < args.bucket_step**2:
        yield "bucket_max_pixels", f"must be at least the square of bucket_step = {args.bucket_step}"
