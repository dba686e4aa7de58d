"""Grids are for the eye: small images are enlarged, and no pixel is lost or smoothed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_dist.evaluation.pictures import save_grid


@pytest.mark.parametrize(("size", "factor"), [(8, 8), (16, 4), (28, 2), (32, 2), (33, 1), (64, 1), (96, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_pixel_becomes_a_square(tmp_path: Path, size: int, factor: int, channels: int) -> None:
    images = torch.randint(0, 256, (5, channels, size, size), dtype=torch.uint8)
    save_grid(images, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    step = size * factor + 2
    assert grid.shape == (2 * step + 2, 3 * step + 2, 3)  # two rows of three, with a border of two pixels
    for number, image in enumerate(images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()):
        row, column = divmod(number, 3)
        shown = grid[row * step + 2 :, column * step + 2 :][: size * factor, : size * factor]
        np.testing.assert_array_equal(shown, image.repeat(factor, axis=0).repeat(factor, axis=1))
