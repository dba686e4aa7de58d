"""Images that are read are the images in the files; a file that is not what it should be is named in one line."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from ddpm_dist.config import DataConfig
from ddpm_dist.data.datasets import ImageFolder, ImagesInMemory, load, prepare, read_idx_images
from ddpm_dist.errors import DataError


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx_bytes(pixels: np.ndarray, magic: int = 0x803) -> bytes:
    return struct.pack(f">{1 + pixels.ndim}i", magic, *pixels.shape) + pixels.tobytes()


def refused(read: Any, *mentions: object) -> str:
    """The one line of the DataError that `read` raises; it names the things mentioned."""
    with pytest.raises(DataError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    for thing in mentions:
        assert str(thing) in message
    return message


# IDX


def test_idx_file_gives_its_very_pixels(tmp_path: Path) -> None:
    pixels = random_pixels(3, 5, 7)
    path = tmp_path / "images"
    path.write_bytes(idx_bytes(pixels))
    read = read_idx_images(path)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, pixels)


def test_idx_file_is_mapped_and_cannot_be_written_through(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(idx_bytes(random_pixels(3, 4, 4)))
    read = read_idx_images(path)
    assert isinstance(read, np.memmap), "ranks of a node share the pages of a map"
    with pytest.raises(ValueError, match="read-only"):
        read[0, 0, 0] = 1


@pytest.mark.parametrize("change", [-1, -48, +1])
def test_idx_file_of_another_length_is_refused_with_both_lengths(tmp_path: Path, change: int) -> None:
    content = idx_bytes(random_pixels(3, 4, 4))
    path = tmp_path / "images"
    path.write_bytes(content[:change] if change < 0 else content + b"x" * change)
    refused(lambda: read_idx_images(path), path, len(content) + change, len(content))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00\x08",
        idx_bytes(random_pixels(3, 4, 4))[:15],
        idx_bytes(random_pixels(3, 4, 4), magic=0x801),
        idx_bytes(random_pixels(3, 4, 4), magic=0x1F8B0800),
        struct.pack(">4i", 0x803, 0, 4, 4),
        struct.pack(">4i", 0x803, -3, 4, -4) + bytes(48),
    ],
    ids=["empty", "3 bytes", "15 bytes", "labels", "gzip", "no images", "negative sizes"],
)
def test_file_that_is_no_idx_file_of_images_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    refused(lambda: read_idx_images(path), path, "not an IDX file of images")


def test_missing_idx_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    refused(lambda: read_idx_images(tmp_path / "images"), tmp_path / "images", "data.root", "data.download=true")


def test_folder_in_the_place_of_an_idx_file_is_refused(tmp_path: Path) -> None:
    refused(lambda: read_idx_images(tmp_path), tmp_path)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_is_loaded_from_torchvisions_place(tmp_path: Path, name: Any, folder: str) -> None:
    pixels = random_pixels(6, 28, 28)
    path = tmp_path / folder / "raw" / "train-images-idx3-ubyte"
    path.parent.mkdir(parents=True)
    path.write_bytes(idx_bytes(pixels))
    data = DataConfig(name=name, root=str(tmp_path), batch_size=4, download=False)
    prepare(data)
    images = load(data)
    assert (len(images), images.shape) == (6, (1, 28, 28))
    np.testing.assert_array_equal(images.fetch([5, 0, 5])[:, 0].numpy(), pixels[[5, 0, 5]])


def test_missing_set_is_refused_and_not_fetched_where_download_is_false(tmp_path: Path) -> None:
    for name in ("mnist", "fashion-mnist", "cifar10"):
        data = DataConfig(name=name, root=str(tmp_path), download=False)
        refused(lambda data=data: prepare(data), tmp_path, "data.download=true")
    assert list(tmp_path.iterdir()) == []


# In memory


def test_fetch_gives_a_copy_so_that_a_batch_can_be_changed() -> None:
    pixels = random_pixels(4, 1, 4, 4)
    images = ImagesInMemory(pixels.copy())
    images.fetch([1, 2]).zero_()
    np.testing.assert_array_equal(images.fetch([0, 1, 2, 3]).numpy(), pixels)


def test_fingerprint_changes_with_one_pixel_and_with_the_shape_alone() -> None:
    pixels = random_pixels(10, 1, 4, 8)
    same = ImagesInMemory(pixels.copy()).fingerprint
    assert ImagesInMemory(pixels).fingerprint == same
    changed = pixels.copy()
    changed[9, 0, 3, 7] ^= 1
    others = {ImagesInMemory(changed).fingerprint, ImagesInMemory(pixels.reshape(10, 1, 8, 4)).fingerprint}
    assert len(others | {same}) == 3


def test_fingerprint_of_a_mapped_file_is_that_of_its_pixels(tmp_path: Path) -> None:
    pixels = random_pixels(5, 4, 4)
    path = tmp_path / "images"
    path.write_bytes(idx_bytes(pixels))
    assert ImagesInMemory(read_idx_images(path)[:, None]).fingerprint == ImagesInMemory(pixels[:, None]).fingerprint


def test_mnist5k_is_5000_pictures_of_digits() -> None:
    images = load(DataConfig(name="mnist5k"))
    assert (len(images), images.shape) == (5000, (1, 28, 28))
    pictures = images.fetch(range(5000))
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (5000, 1, 28, 28)
    assert pictures.amax() == 255
    assert pictures.amin() == 0
    ink = pictures.float().mean(dim=(0, 1))
    assert ink[10:18, 10:18].mean() > 60, "digits are in the middle"
    for edge in (ink[:2], ink[-2:], ink[:, :2], ink[:, -2:]):
        assert edge.mean() < 2, "and nothing at the edges (the label is no pixel)"
    assert not torch.equal(pictures[0], pictures[-1])


# Too few, or of a wrong size


def test_fewer_images_than_a_batch_are_refused_and_just_enough_are_not(tmp_path: Path) -> None:
    for number in range(5):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    data = DataConfig(name="folder", root=str(tmp_path), image_size=8, batch_size=5)
    assert len(load(data)) == 5
    refused(lambda: load(replace(data, batch_size=6)), "5 images", "data.batch_size=6", "up to 5")


def test_images_that_the_unet_cannot_halve_twice_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "0.png")
    data = DataConfig(name="folder", root=str(tmp_path), image_size=30, batch_size=1)
    refused(lambda: load(data), "multiples of 4")


# A folder of images


def test_folder_is_read_in_the_order_of_the_names_whatever_the_order_of_writing(tmp_path: Path) -> None:
    names = ["b/0.png", "a/2.png", "a/10.png", "c.PNG", "a/1.bmp"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (names.index(name) * 10, 0, 0)).save(path)
    (tmp_path / "notes.txt").write_text("not an image")
    images = ImageFolder(tmp_path, 8)
    assert len(images) == 5
    order = [names.index(name) for name in sorted(names)]
    assert images.fetch(range(5))[:, 0, 0, 0].tolist() == [index * 10 for index in order]


@pytest.mark.parametrize(("mode", "colour"), [("L", 77), ("RGBA", (77, 77, 77, 10)), ("1", 1), ("P", 3)])
def test_picture_of_any_mode_becomes_three_channels(tmp_path: Path, mode: str, colour: Any) -> None:
    Image.new(mode, (8, 8), colour).save(tmp_path / "0.png")
    expected = Image.new(mode, (1, 1), colour).convert("RGB").getpixel((0, 0))
    picture = ImageFolder(tmp_path, 8).fetch([0])
    assert picture.dtype == torch.uint8
    assert picture.shape == (1, 3, 8, 8)
    assert picture[0, :, 4, 4].tolist() == list(expected)


def test_jpeg_and_webp_are_images_too(tmp_path: Path) -> None:
    for name in ("0.jpg", "1.jpeg", "2.webp"):
        Image.new("RGB", (8, 8), (200, 100, 50)).save(tmp_path / name)
    pictures = ImageFolder(tmp_path, 8).fetch([0, 1, 2]).float()
    assert (pictures.mean(dim=(2, 3)) - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 8


@pytest.mark.parametrize("size", [(40, 16), (16, 40), (8, 20), (16, 16), (97, 33)])
def test_picture_of_any_size_is_resized_by_its_short_side_and_cropped_in_the_middle(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    """A red square in the middle, as wide as the short side: all that is left is red."""
    width, height = size
    short = min(size)
    picture = Image.new("RGB", size, (0, 0, 255))
    left, top = (width - short) // 2, (height - short) // 2
    picture.paste((255, 0, 0), (left, top, left + short, top + short))
    picture.save(tmp_path / "0.png")
    image = ImageFolder(tmp_path, 16).fetch([0])
    assert image.shape == (1, 3, 16, 16)
    inside = image[0, :, 2:-2, 2:-2]
    assert (inside[0] > 250).all()
    assert (inside[2] < 5).all()


def test_resizing_downwards_averages_pixels(tmp_path: Path) -> None:
    board = np.indices((64, 64)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "0.png")
    small = ImageFolder(tmp_path, 8).fetch([0])
    assert (small.float() - 127.5).abs().max() < 10, "without antialiasing a checkerboard becomes black or white"


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "bomb"])
def test_picture_that_cannot_be_read_is_named(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        Image.fromarray(random_pixels(32, 32, 3)).save(tmp_path / f"{number}.png")
    bad = tmp_path / "1.png"
    if damage == "bomb":
        Image.fromarray(random_pixels(64, 64, 3)).save(bad)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 3)
        images = ImageFolder(tmp_path, 8)
    else:
        whole = bad.read_bytes()
        bad.write_bytes({"garbage": b"hello", "truncated": whole[: len(whole) // 2], "empty": b""}[damage])
        images = ImageFolder(tmp_path, 8)
    assert images.fetch([0, 2]).shape == (2, 3, 8, 8)
    refused(lambda: images.fetch([0, 1]), bad)


def test_large_png_with_a_damaged_inner_chunk_is_named(tmp_path: Path) -> None:
    """Pillow reports it by a SyntaxError, which is neither an OSError nor a ValueError."""
    path = tmp_path / "0.png"
    Image.fromarray(random_pixels(200, 200, 3)).save(path)
    content = path.read_bytes()
    assert content.count(b"IDAT") > 1, "one chunk only: the test shows nothing"
    second = content.index(b"IDAT", content.index(b"IDAT") + 4)
    path.write_bytes(content[:second] + b"\x01\x02\x03\x04" + content[second + 4 :])
    images = ImageFolder(tmp_path, 8)
    refused(lambda: images.fetch([0]), path)


def test_picture_that_vanished_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    images = ImageFolder(tmp_path, 8)
    (tmp_path / "0.png").unlink()
    refused(lambda: images.fetch([0]), tmp_path / "0.png")


def test_folder_without_images_and_missing_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not an image")
    refused(lambda: ImageFolder(tmp_path, 8), tmp_path, "no images", ".png")
    refused(lambda: ImageFolder(tmp_path / "nowhere", 8), tmp_path / "nowhere", "no such folder")


def test_fingerprint_of_a_folder_follows_its_files_and_not_its_place(tmp_path: Path) -> None:
    def folder(place: str, names: tuple[str, ...], size: int = 8) -> str:
        (tmp_path / place).mkdir()
        for name in names:
            Image.fromarray(random_pixels(size, size, 3)).save(tmp_path / place / name)
        return ImageFolder(tmp_path / place, 8).fingerprint

    first = folder("first", ("0.png", "1.png"))
    assert folder("moved", ("0.png", "1.png")) == first
    assert folder("more", ("0.png", "1.png", "2.png")) != first
    assert folder("renamed", ("0.png", "2.png")) != first
    assert folder("larger", ("0.png", "1.png"), size=9) != first


# CIFAR-10


def make_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A small CIFAR-10 in torchvision's layout, with checksums to match. Returns its pixels [N, 3, 32, 32]."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = random_pixels(15, 3, 32, 32)

    def write(name: str, content: Any) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    train_list = []
    for number in range(5):
        part = pixels[number * 3 : number * 3 + 3].reshape(3, 3072)
        name = f"data_batch_{number + 1}"
        train_list.append([name, write(name, {"data": part, "labels": [0, 1, 2]})])
    test = write("test_batch", {"data": random_pixels(3, 3072, seed=1), "labels": [0, 1, 2]})
    meta = write("batches.meta", {"label_names": [str(number) for number in range(10)]})
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", train_list)
    monkeypatch.setattr(kind, "test_list", [["test_batch", test]])
    monkeypatch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta})
    return pixels


def test_cifar10_gives_the_training_pixels_with_channels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = make_cifar10(tmp_path, monkeypatch)
    data = DataConfig(name="cifar10", root=str(tmp_path), batch_size=5, download=False)
    prepare(data)
    images = load(data)
    assert (len(images), images.shape) == (15, (3, 32, 32))
    fetched = images.fetch(range(15))
    assert fetched.dtype == torch.uint8
    np.testing.assert_array_equal(fetched.numpy(), pixels)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._folder),)


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"])
def test_cifar10_file_with_a_wrong_checksum_is_refused_before_it_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make_cifar10(tmp_path, monkeypatch)
    trace = tmp_path / "it-ran"
    bad = tmp_path / "cifar-10-batches-py" / name
    bad.write_bytes(pickle.dumps(Malicious(trace)))
    refused(lambda: load(DataConfig(name="cifar10", root=str(tmp_path), batch_size=5)), bad.parent)
    assert not trace.exists()
    pickle.loads(bad.read_bytes())
    assert trace.exists(), "the pickle was harmless: the test shows nothing"


def test_cifar10_file_that_is_truncated_or_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar10(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    data = DataConfig(name="cifar10", root=str(tmp_path), batch_size=5)
    path.write_bytes(path.read_bytes()[:-100])
    refused(lambda: load(data), path)
    path.unlink()
    refused(lambda: load(data), path, "missing")


def test_fingerprint_of_cifar10_changes_with_a_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar10(tmp_path, monkeypatch)
    data = DataConfig(name="cifar10", root=str(tmp_path), batch_size=5)
    before = load(data).fingerprint
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    content = pickle.loads(path.read_bytes())
    content["data"][1, 7] ^= 1
    path.write_bytes(pickle.dumps(content))
    checksum = hashlib.md5(path.read_bytes()).hexdigest()
    train_list = [
        [name, checksum if name == path.name else md5] for name, md5 in torchvision.datasets.CIFAR10.train_list
    ]
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", train_list)
    assert load(data).fingerprint != before
