"""Canny's edge detector: "A Computational Approach to Edge Detection", IEEE PAMI 8(6), 1986."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

SIGMA = 1.0  # of the Gaussian, in pixels
LOW, HIGH = 64.0, 128.0  # of the gradient, 2.56 times a step's height: steps of 25 and 50, as usual for ControlNets


def canny(gray: np.ndarray, sigma: float = SIGMA, low: float = LOW, high: float = HIGH) -> np.ndarray:
    """Finds edges one pixel wide in a picture [H, W] in [0, 255]; returns bool [H, W].

    A Gaussian of `sigma` pixels, Sobel's gradient, non-maximum suppression, and hysteresis: edges are at least `high`,
    or at least `low` and connected to such pixels.
    """
    smooth = ndimage.gaussian_filter(gray.astype(np.float64), sigma, mode="nearest")
    dy, dx = (ndimage.sobel(smooth, axis, mode="nearest") for axis in (0, 1))
    length = np.hypot(dx, dy)
    thin = np.where(_is_maximum(length, dx, dy), length, 0.0)
    return ndimage.binary_propagation(thin >= high, structure=np.ones((3, 3)), mask=thin >= low)


def _is_maximum(length: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Whether the gradient exceeds both neighbours along it, in the nearest of four directions; bool [H, W]."""
    octant = np.round(np.arctan2(dy, dx) / (np.pi / 4)).astype(int) % 4  # 0: along x, 2: along y
    here = length.round(6)  # so that differences in the last bits do not count
    padded, found = np.pad(here, 1), np.zeros(length.shape, bool)
    for number, step in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        before, after = (np.roll(padded, np.multiply(sign, step), (0, 1))[1:-1, 1:-1] for sign in (1, -1))
        found |= (octant == number) & (here > before) & (here >= after)  # only one of two equal neighbours
    return found
