"""A folder of pictures as a data set: which files belong to it, and the pixels of each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ddpm_dist.config import DataConfig, loader_workers
from ddpm_dist.errors import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class ImageFolder:
    """Every picture below a folder, in the order of their names: RGB, resized, centre-cropped, read when asked for.

    The fingerprint covers the names and sizes of the files, not their pixels.

    Args:
        root: the folder.
        image_size: height and width in pixels.

    Raises:
        DataError: there is no such folder, or no picture in it.
    """

    num_workers = loader_workers(DataConfig(name="folder"))

    def __init__(self, root: Path, image_size: int) -> None:
        if not root.is_dir():
            raise DataError(f"data.root={root}: no such folder")
        self._files = _picture_files(root)
        if not self._files:
            raise DataError(f"data.root={root}: no images ({', '.join(sorted(SUFFIXES))}) in this folder")
        self.shape = (3, image_size, image_size)
        listing = "\n".join(f"{path.relative_to(root)} {path.stat().st_size}" for path in self._files)
        self.fingerprint = hashlib.blake2b(listing.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W] in [0, 255].

        Raises:
            DataError: names the picture that cannot be read.
        """
        return torch.stack([self._read(self._files[index]) for index in indices])

    def _read(self, path: Path) -> Tensor:
        from torchvision.transforms import functional

        size = self.shape[1]
        try:
            with Image.open(path) as image:
                small = functional.resize(image.convert("RGB"), [size], antialias=True)
                pixels: Tensor = functional.pil_to_tensor(functional.center_crop(small, [size, size]))
                return pixels
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises all of them
            raise DataError(f"{path}: cannot be read as an image ({error})") from None


def _picture_files(root: Path) -> list[Path]:
    """All pictures below a folder, sorted. Links are followed, since data sets are often put together from them."""
    seen, files = set(), []
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()  # links in a circle
            continue
        seen.add(real)
        files += [path for name in names if (path := Path(folder, name)).suffix.lower() in SUFFIXES]
    return sorted(files)
