"""What a set of images is to the rest of the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL.Image import Image
from torch import Tensor


class Images(Protocol):
    """A fixed, ordered set of images. Sets derive from it; one with labels overrides the members with defaults.

    Attributes:
        shape: (C, H, W).
        fingerprint: changes when the images do; kept in the checkpoint, so that a resumed run sees the same.
        num_classes: number of labels; 0 without labels.
        class_names: of the classes, in the order of their numbers; empty if they have none.
    """

    shape: tuple[int, int, int]
    fingerprint: str
    num_classes: int = 0
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W] in [0, 255]."""
        ...

    def conditions(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """What the network is conditioned on, by the names of its arguments, each [B, ...]; empty without labels."""
        return {}


def as_square(image: Image, size: int) -> Tensor:
    """Shrink or enlarge an image until its shorter side has `size` pixels, and cut out the middle.

    Pillow computes in whole numbers, so that every machine gets the same pixels.

    Args:
        image: in Pillow's mode L (grey) or RGB.

    Returns:
        uint8 [C, size, size] in [0, 255].
    """
    from torchvision.transforms import functional

    small = functional.resize(image, [size], antialias=True)
    pixels: Tensor = functional.pil_to_tensor(functional.center_crop(small, [size, size]))
    return pixels
