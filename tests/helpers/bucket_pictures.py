"""Pictures of several sizes, and settings that give them three buckets."""

from __future__ import annotations

import numpy as np

BUCKETS = {"buckets": True, "resolution": 16, "bucket_step": 4}  # 12 x 20, 16 x 16, 20 x 12
SIZES = [(30, 50), (40, 40), (50, 30), (33, 47), (64, 20)]  # height, width


def pictures(count=10, sizes=SIZES):
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (*sizes[n % len(sizes)], 3), dtype=np.uint8) for n in range(count)]
