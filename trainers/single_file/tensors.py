"""Tensors of diffusers' networks as the original code has them, and back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CONVOLUTION = re.compile(r"(encoder|decoder)\.mid\.attn_1\.(q|k|v|proj_out)\.weight")  # of 1 x 1 pixels, not linear
TRANSPOSED = "text_projection"


def as_original(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Returns the tensor of this original name: of OpenCLIP's attention the three matrices in one."""
    import torch

    tensor = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    if CONVOLUTION.fullmatch(name):
        return tensor[:, :, None, None]
    return tensor.T.contiguous() if name == TRANSPOSED else tensor


def from_original(name: str, tensor: Tensor, count: int) -> Sequence[Tensor]:
    """Returns the `count` tensors of diffusers' or transformers' network that one of this original name holds."""
    if CONVOLUTION.fullmatch(name) and tensor.dim() == 4:
        tensor = tensor[:, :, 0, 0]
    tensor = tensor.T.contiguous() if name == TRANSPOSED else tensor
    return [part.clone() for part in tensor.chunk(count)] if count > 1 else [tensor]  # views cannot be saved
