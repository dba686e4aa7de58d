"""The two forms of an image: whole numbers 0 .. 255 on disk and on a screen, numbers in [-1, 1] for the network."""

from __future__ import annotations

import torch
from torch import Tensor


def from_uint8(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1]  (Ho et al. 2020, section 3.3, arXiv:2006.11239)."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float32 -> uint8 in [0, 255]: clamped to [-1, 1], scaled, and rounded to the nearest whole number."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
