"""Colour profiles of displays, made from their primaries and curve, and the same colours in their numbers."""

from __future__ import annotations

import struct

import numpy as np

D65, D50 = (0.3127, 0.3290), (0.9642, 1.0, 0.8249)  # white: as x and y, and the profiles' own as XYZ
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))  # x and y of red, green and blue
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def decode(values):
    """Light of sRGB's numbers in [0, 1]."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encode(light):
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * np.maximum(light, 0) ** (1 / 2.4) - 0.055)


def to_xyz(primaries):
    """The matrix from light of these primaries to XYZ, white D65."""

    def upright(x, y):
        return np.array([x / y, 1, (1 - x - y) / y])

    columns = np.stack([upright(*each) for each in primaries], 1)
    return columns * np.linalg.solve(columns, upright(*D65))


def numbers_of(pixels, primaries, gamma=None):
    """What uint8 sRGB pixels [..., 3] are in the numbers of another display; sRGB's curve, or a gamma."""
    matrix = np.linalg.solve(to_xyz(primaries), to_xyz(SRGB))
    light = (decode(pixels / 255) @ matrix.T).clip(0, 1)
    return np.rint(255 * (encode(light) if gamma is None else light ** (1 / gamma))).astype(np.uint8)


def profile(primaries, gamma=None, space=b"RGB "):
    """An ICC profile, version 4, of a display; for `space` GRAY of its curve alone."""
    white = to_xyz(primaries).sum(1)
    scale = (BRADFORD @ np.array(D50)) / (BRADFORD @ white)
    adapted = np.linalg.solve(BRADFORD, scale[:, None] * (BRADFORD @ to_xyz(primaries)))
    numbers = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045) if gamma is None else (gamma,)
    curve = b"para" + bytes(4) + struct.pack(">HH", 3 if gamma is None else 0, 0) + b"".join(map(_fixed, numbers))
    text = b"mluc" + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 2, 28) + "x".encode("utf-16-be")
    tags = {b"desc": text, b"cprt": text, b"wtpt": _xyz(D50)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {f"{name}XYZ".encode(): _xyz(column) for name, column in zip("rgb", adapted.T, strict=True)}
        tags |= {f"{name}TRC".encode(): curve for name in "rgb"}
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    body = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(">I4sI4s4s4s", 128 + len(body), bytes(4), 0x04000000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + b"".join(map(_fixed, D50))
    return head + bytes(128 - len(head)) + body


def _fixed(number):
    return struct.pack(">i", round(number * 65536))


def _xyz(values):
    return b"XYZ " + bytes(4) + b"".join(map(_fixed, values))
