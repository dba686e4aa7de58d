"""The tables of data sets: which files each consists of, and who reads them.

To add one, write a loader and enter it in DATASETS, and add its name to `data.name` in config/schema.py. If it can be
fetched, its files are named in the table and its source in download.py. If it has test images, which nothing is trained
on, enter those in HELD_OUT.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ddpm_dist.config import DataConfig
from ddpm_dist.data.download import download_once
from ddpm_dist.data.folder import ImageFolder
from ddpm_dist.data.images import Images
from ddpm_dist.data.in_memory import (
    ImagesInMemory,
    cifar10_files,
    read_cifar10,
    read_cifar10_labels,
    read_idx_images,
    read_mnist5k,
    read_mnist5k_labels,
)
from ddpm_dist.data.labels import CLOTHES, DIGITS, LabelledImages, Labels, read_idx_labels
from ddpm_dist.errors import DataError


@dataclass(frozen=True)
class DataSet:
    """One line of the table.

    Attributes:
        load: the images that a section `data` of the config describes, with so many channels (None: as they are).
        files: the files that it consists of, relative to data.root; none if it is never fetched.
        labels: the labels of the images that were loaded; None if the set has none.
        label_files: the further files in which these are, relative to data.root.
    """

    load: Callable[[DataConfig, int | None], Images]
    files: Callable[[], list[Path]] = list
    labels: Callable[[DataConfig, Images], Labels] | None = None
    label_files: Callable[[], list[Path]] = list


def _mnist5k(data: DataConfig, channels: int | None) -> Images:
    return ImagesInMemory(read_mnist5k(), channels, data.image_size)


def _mnist5k_labels(data: DataConfig, images: Images) -> Labels:
    return read_mnist5k_labels()


def _folder(data: DataConfig, channels: int | None) -> Images:
    assert data.image_size is not None, "the config is refused without it"
    return ImageFolder(Path(data.root), data.image_size, channels)


def _folder_labels(data: DataConfig, images: Images) -> Labels:
    assert isinstance(images, ImageFolder)
    return images.labels()


IDX_FILES = {
    "mnist": Path("MNIST/raw/train-images-idx3-ubyte"),
    "fashion-mnist": Path("FashionMNIST/raw/train-images-idx3-ubyte"),
}
IDX_LABELS = {
    "mnist": Path("MNIST/raw/train-labels-idx1-ubyte"),
    "fashion-mnist": Path("FashionMNIST/raw/train-labels-idx1-ubyte"),
}
CLASS_NAMES = {"mnist": DIGITS, "fashion-mnist": CLOTHES}


def _idx_set(name: str, part: Literal["train", "t10k"]) -> DataSet:
    """Args: part: how the names of its files begin."""
    pixels, numbers = (path.with_name(path.name.replace("train", part)) for path in (IDX_FILES[name], IDX_LABELS[name]))

    def load(data: DataConfig, channels: int | None) -> Images:
        return ImagesInMemory(read_idx_images(Path(data.root) / pixels)[:, None], channels, data.image_size)

    def labels(data: DataConfig, images: Images) -> Labels:
        return read_idx_labels(Path(data.root) / numbers, CLASS_NAMES[name])

    return DataSet(load, lambda: [pixels], labels, lambda: [numbers])


def _cifar10_set(part: Literal["train", "test"]) -> DataSet:
    def load(data: DataConfig, channels: int | None) -> Images:
        return ImagesInMemory(read_cifar10(Path(data.root), part), channels, data.image_size)

    def labels(data: DataConfig, images: Images) -> Labels:
        return read_cifar10_labels(Path(data.root), part)

    return DataSet(load, cifar10_files, labels)


DATASETS = {
    "mnist": _idx_set("mnist", "train"),
    "fashion-mnist": _idx_set("fashion-mnist", "train"),
    "cifar10": _cifar10_set("train"),
    "mnist5k": DataSet(_mnist5k, labels=_mnist5k_labels),
    "folder": DataSet(_folder, labels=_folder_labels),
}
"""The training images, by the name that data.name gives the set."""

HELD_OUT = {
    "mnist": _idx_set("mnist", "t10k"),
    "fashion-mnist": _idx_set("fashion-mnist", "t10k"),
    "cifar10": _cifar10_set("test"),
}
"""The test images of the sets that have some."""


def _line(data: DataConfig, held_out: bool) -> DataSet:
    """The line of the table. Raises DataError if the test images are asked for and the set has none."""
    table = HELD_OUT if held_out else DATASETS
    if data.name not in table:
        raise DataError(f"data.name={data.name}: has no test images of its own; sets with some: {', '.join(table)}")
    return table[data.name]


def missing_files(data: DataConfig, labels: bool = False, held_out: bool = False) -> list[Path]:
    """The files of the data set that are not in data.root; none of a set that is never fetched.

    Args:
        labels: whether those of the labels are wanted too.
        held_out: whether the test images are meant, not those to train on.

    Raises:
        DataError: the test images are meant, and the set has none.
    """
    line = _line(data, held_out)
    files = [*line.files(), *(line.label_files() if labels else [])]
    return [path for file in files if not (path := Path(data.root) / file).exists()]


def prepare(data: DataConfig, labels: bool = False, held_out: bool = False) -> None:
    """Fetch the data set if it is not there. For rank 0 alone.

    Args:
        labels: whether the labels are wanted too.
        held_out: whether the test images are meant, not those to train on.

    Raises:
        DataError: it is not there and data.download is false, or it cannot be fetched; or there is no such set.
    """
    root = Path(data.root)
    with _errors_of_the_file_system(data):
        missing = missing_files(data, labels, held_out)
        if missing and not data.download:
            raise DataError(f"{missing[0]}: missing; set data.root to where it is, or data.download=true")
        if missing:
            download_once(data.name, root)


def load(
    data: DataConfig, image_shape: Sequence[int] | None = None, *, divisor: int = 4, labels: bool = False
) -> Images:
    """The training images.

    Args:
        data: the section `data` of the config.
        image_shape: (C, H, W) of the run that is resumed, as its contract has it: what data.channels=auto meant at
            step 0. None for a run that starts now.
        divisor: height and width must be multiples of this, for the network.
        labels: whether the images come with their labels.

    Raises:
        DataError: names the file that is missing, truncated or not an image; or there are fewer images than one
            step needs; or the network cannot take images of this size; or the set has no labels.
    """
    channels = None if image_shape is None else image_shape[0]
    if data.channels != "auto":
        channels = int(data.channels)
    images = read(data, channels, labels)
    if len(images) < data.batch_size:
        raise DataError(
            f"data.name={data.name}: {len(images)} images are fewer than one step of "
            f"data.batch_size={data.batch_size}; valid: at most {len(images)}, and a multiple of elastic.shards"
        )
    height, width = images.shape[1:]
    if height % divisor or width % divisor:
        raise DataError(
            f"data.name={data.name}: images of {height} x {width} pixels; "
            f"the network needs height and width to be multiples of {divisor}"
        )
    return images


def read(data: DataConfig, channels: int | None = None, labels: bool = False, held_out: bool = False) -> Images:
    """The images that a section `data` of the config describes, be they enough to train on or not.

    Args:
        data: the section.
        channels: 1 or 3 to convert them; None leaves them as they are.
        labels: whether the images come with their labels.
        held_out: whether the test images are meant, not those to train on.

    Raises:
        DataError: names the file that is missing, truncated or not an image; or the set has no labels; or no test
            images, if they are meant.
    """
    line = _line(data, held_out)
    with _errors_of_the_file_system(data):
        images = line.load(data, channels)
        if not labels:
            return images
        if line.labels is None:
            known = ", ".join(name for name, other in DATASETS.items() if other.labels)
            raise DataError(f"model.class_labels=true: data.name={data.name} has no labels; valid: {known}")
        where = ", ".join(str(Path(data.root) / file) for file in line.label_files()) or f"data.name={data.name}"
        return LabelledImages(images, line.labels(data, images), where)


@contextlib.contextmanager
def _errors_of_the_file_system(data: DataConfig) -> Iterator[None]:
    """Turns an OSError of the code inside into a DataError about data.root."""
    try:
        yield
    except OSError as error:
        raise DataError(f"data.root={data.root}: cannot be used ({error})") from None
