"""Edges after Canny, "A Computational Approach to Edge Detection", IEEE PAMI 8(6), 1986."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

SIGMA = 1.0  # pixels of the Gaussian
LOW, HIGH = 64.0, 128.0  # of the gradient, which is 2.56 times a step: steps of 25 and 50, as ControlNets are used to


def canny(gray: np.ndarray, sigma: float = SIGMA, low: float = LOW, high: float = HIGH) -> np.ndarray:
    """Whether each pixel of a picture [H, W] in [0, 255] is an edge: bool [H, W], lines of one pixel.

    Gaussian of `sigma` pixels, Sobel's gradient, only its maxima across the edge, and of these what is at least `high`
    or, being at least `low`, is joined to such.
    """
    smooth = ndimage.gaussian_filter(gray.astype(np.float64), sigma, mode="nearest")
    dy, dx = (ndimage.sobel(smooth, axis, mode="nearest") for axis in (0, 1))
    length = np.hypot(dx, dy)
    thin = np.where(_is_maximum(length, dx, dy), length, 0.0)
    return ndimage.binary_propagation(thin >= high, structure=np.ones((3, 3)), mask=thin >= low)


def _is_maximum(length: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Where the gradient is longer than at both neighbours along it, in the nearest of four directions."""
    octant = np.round(np.arctan2(dy, dx) / (np.pi / 4)).astype(int) % 4  # 0: along x, 2: along y
    padded = np.pad(length.round(6), 1)  # equal but for the last bits is equal
    found = np.zeros(length.shape, bool)
    for number, (down, right) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        before, here, after = (_shifted(padded, n * down, n * right) for n in (-1, 0, 1))
        found |= (octant == number) & (here > before) & (here >= after)  # one of two equal ones
    return found


def _shifted(padded: np.ndarray, down: int, right: int) -> np.ndarray:
    height, width = padded.shape
    return padded[1 + down : height - 1 + down, 1 + right : width - 1 + right]
