"""Class labels: what each image shows, for the sets that say so, and a set of images together with its labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_dist.data.images import Images
from ddpm_dist.errors import DataError

DIGITS = tuple("0123456789")
CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


@dataclass(frozen=True)
class Labels:
    """The labels of a set of images.

    Attributes:
        numbers: int64 [N] in [0, number of classes - 1], the class of each image.
        names: of the classes, in the order of their numbers.
    """

    numbers: Tensor
    names: tuple[str, ...]


class LabelledImages(Images):
    """Images, with the label of each as the condition `labels`. The fingerprint covers the labels too.

    Args:
        images: without labels.
        labels: of these images, in their order.
        where: the place of the labels, for the message.

    Raises:
        DataError: there are more images than labels, or fewer.
    """

    def __init__(self, images: Images, labels: Labels, where: str) -> None:
        if len(labels.numbers) != len(images):
            raise DataError(f"{where}: {len(labels.numbers)} labels for {len(images)} images; one of both is damaged")
        self._images, self._numbers = images, labels.numbers
        self.shape, self.num_classes, self.class_names = images.shape, len(labels.names), labels.names
        digest = hashlib.blake2b(images.fingerprint.encode(), digest_size=16)
        digest.update(labels.numbers.numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W] in [0, 255]. Raises DataError if an image cannot be read."""
        return self._images.fetch(indices)

    def conditions(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`labels`: int64 [B] in [0, num_classes - 1]."""
        return {"labels": self._numbers[torch.as_tensor(indices, dtype=torch.int64)]}


def read_idx_labels(path: Path, names: tuple[str, ...]) -> Labels:
    """An IDX file of labels (MNIST's format).

    Args:
        names: of the classes.

    Raises:
        DataError: the file is missing, is no IDX file of labels, is truncated, or has a label that has no name.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{path}: missing; set data.root to where it is, or data.download=true, or model.class_labels=false"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    header = np.frombuffer(content[:8], dtype=">i4") if len(content) >= 8 else np.zeros(2)
    if header[0] != 0x801 or header[1] <= 0:
        raise DataError(f"{path}: not an IDX file of labels")
    if len(content) != 8 + header[1]:
        raise DataError(
            f"{path}: {len(content)} bytes, expected {8 + header[1]}: truncated or damaged; remove it to fetch it again"
        )
    numbers = np.frombuffer(content, dtype=np.uint8, offset=8).astype(np.int64)
    if numbers.max() >= len(names):
        raise DataError(
            f"{path}: has the label {numbers.max()}, expected 0 to {len(names) - 1}; remove it to fetch it again"
        )
    return Labels(torch.from_numpy(numbers), names)


def labels_of_folders(root: Path, pictures: Sequence[Path]) -> Labels:
    """The label of each picture is the first sub-folder below `root` in which it lies; the folders are sorted by name.

    Args:
        pictures: files below root.

    Raises:
        DataError: some picture lies in no sub-folder, or all lie in one.
    """
    places = [picture.relative_to(root).parts for picture in pictures]
    for place in places:
        if len(place) == 1:
            raise DataError(
                f"data.root={root}: {place[0]} lies in no sub-folder, whose name would be its label; sort the pictures "
                "into one sub-folder for each class, or set model.class_labels=false"
            )
    names = sorted({place[0] for place in places})
    if len(names) == 1:
        raise DataError(
            f"data.root={root}: all pictures lie in one sub-folder, {names[0]}, and labels need two classes; set "
            f"data.root={root / names[0]} if the classes are in there, or model.class_labels=false"
        )
    number_of = {name: number for number, name in enumerate(names)}
    return Labels(torch.tensor([number_of[place[0]] for place in places]), tuple(names))
