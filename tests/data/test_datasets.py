"""Images that are read are the images in the files; a file that is not what it should be is named in one line."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from ddpm_dist.config import DataConfig
from ddpm_dist.data.datasets import DATASETS, HELD_OUT, DataSet, load, prepare, read
from ddpm_dist.data.in_memory import ImagesInMemory, read_idx_images
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


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_test_images_of_mnist_are_others_than_the_training_images(tmp_path: Path, name: Any, folder: str) -> None:
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    pixels = {"train": random_pixels(6, 28, 28), "t10k": random_pixels(3, 28, 28, seed=1)}
    data = DataConfig(name=name, root=str(tmp_path), download=False)
    for part, of_part in pixels.items():
        refused(lambda: prepare(data, held_out=True), raw / "t10k-images-idx3-ubyte")
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(of_part))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(len(of_part), dtype=np.uint8), 0x801))
    for part in pixels:
        prepare(data, labels=True, held_out=part == "t10k")
        images = read(data, labels=True, held_out=part == "t10k")
        np.testing.assert_array_equal(images.fetch(range(len(images)))[:, 0].numpy(), pixels[part])
        assert images.conditions([2])["labels"].tolist() == [2]


def test_a_set_without_test_images_is_refused(tmp_path: Path) -> None:
    for data in (DataConfig(name="mnist5k"), DataConfig(name="folder", root=str(tmp_path), image_size=8)):
        for ask in (prepare, read):
            words = (f"data.name={data.name}: has no test images", "mnist, fashion-mnist, cifar10")
            refused(lambda ask=ask, data=data: ask(data, held_out=True), *words)


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
    refused(lambda: load(replace(data, batch_size=6)), "5 images", "data.batch_size=6", "at most 5")


def test_images_that_the_unet_cannot_halve_twice_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "0.png")
    data = DataConfig(name="folder", root=str(tmp_path), image_size=30, batch_size=1)
    refused(lambda: load(data), "multiples of 4")


# Channels


@pytest.fixture
def grey_and_coloured(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Two sets in memory, "grey" and "coloured", and their pixels."""
    sets = {"grey": random_pixels(4, 1, 8, 12), "coloured": random_pixels(4, 3, 8, 12)}

    def load_one(data: DataConfig, channels: int | None) -> ImagesInMemory:
        return ImagesInMemory(sets[data.name], channels)

    for name in sets:
        monkeypatch.setitem(DATASETS, name, DataSet(load_one))
    return sets


@pytest.mark.parametrize("name", ["grey", "coloured"])
@pytest.mark.parametrize("channels", ["auto", "1", "3"])
def test_set_in_memory_has_the_channels_that_are_asked_for(
    grey_and_coloured: dict[str, np.ndarray], name: Any, channels: Any
) -> None:
    pixels = grey_and_coloured[name]
    images = load(DataConfig(name=name, batch_size=4, channels=channels))
    wanted = pixels.shape[1] if channels == "auto" else int(channels)
    pictures = [Image.fromarray(picture.transpose(1, 2, 0).squeeze()) for picture in pixels]
    expected = [np.asarray(picture.convert({1: "L", 3: "RGB"}[wanted])) for picture in pictures]
    fetched = images.fetch(range(4))
    assert images.shape == (wanted, 8, 12)
    assert (fetched.dtype, fetched.shape) == (torch.uint8, (4, wanted, 8, 12))
    np.testing.assert_array_equal(fetched.permute(0, 2, 3, 1).numpy(), np.reshape(expected, (4, 8, 12, wanted)))
    fetched.zero_()
    assert images.fetch([3]).any(), "a batch is a copy"


def test_conversion_of_channels_changes_the_fingerprint(grey_and_coloured: dict[str, np.ndarray]) -> None:
    for name, other in (("grey", "3"), ("coloured", "1")):
        data = DataConfig(name=name, batch_size=4)  # type: ignore[arg-type]
        as_it_is = load(data).fingerprint
        assert ImagesInMemory(grey_and_coloured[name]).fingerprint == as_it_is
        assert load(replace(data, channels="1" if other == "3" else "3")).fingerprint == as_it_is
        assert load(replace(data, channels=other)).fingerprint != as_it_is  # type: ignore[arg-type]


def test_what_auto_meant_at_step_0_holds_when_a_run_is_resumed(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    data = DataConfig(name="folder", root=str(tmp_path), image_size=8, batch_size=1)
    assert load(data).shape == load(data, (1, 8, 8)).shape == (1, 8, 8)
    assert load(data, (3, 8, 8)).shape == (3, 8, 8)
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    assert load(data).shape == load(data, (3, 8, 8)).shape == (3, 8, 8)
    assert load(data, (1, 8, 8)).shape == (1, 8, 8)
    assert load(replace(data, channels="3")).shape == (3, 8, 8)
    assert load(replace(data, channels="1")).shape == (1, 8, 8)


# Size


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [4, 12, 16])
def test_set_in_memory_of_another_size_is_what_a_folder_of_its_pictures_is(
    tmp_path: Path, channels: int, size: int
) -> None:
    pixels = random_pixels(3, channels, 8, 12)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture.transpose(1, 2, 0).squeeze()).save(tmp_path / f"{number}.png")
    folder = load(DataConfig(name="folder", root=str(tmp_path), image_size=size, batch_size=1))
    held = ImagesInMemory(pixels, size=size)
    assert held.shape == folder.shape == (channels, size, size)
    assert torch.equal(held.fetch([2, 0, 1]), folder.fetch([2, 0, 1]))


def test_shrinking_averages_pixels_and_keeps_what_is_where() -> None:
    fine = np.indices((4, 4)).sum(0) % 2 * 255.0  # a chessboard of single pixels
    board = np.block([[fine, np.zeros((4, 4))], [np.full((4, 4), 255.0), fine]]).astype(np.uint8)
    (small,) = ImagesInMemory(board[None, None], size=4).fetch([0])
    assert small[0, 0, 3] < 30 < 90 < small[0, 0, 0] < 165 < 225 < small[0, 3, 0]


def test_size_belongs_to_the_fingerprint_and_their_own_size_leaves_images_alone() -> None:
    pixels = random_pixels(3, 1, 8, 8)
    as_they_are = ImagesInMemory(pixels)
    assert ImagesInMemory(pixels, size=8).fingerprint == as_they_are.fingerprint
    assert torch.equal(ImagesInMemory(pixels, size=8).fetch([0, 1, 2]), as_they_are.fetch([0, 1, 2]))
    assert ImagesInMemory(pixels, size=4).fingerprint != as_they_are.fingerprint


def test_every_built_in_set_takes_a_size() -> None:
    assert load(DataConfig(name="mnist5k", image_size=16)).shape == (1, 16, 16)


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
    held_out = read(data, labels=True, held_out=True)
    expected = random_pixels(3, 3072, seed=1).reshape(3, 3, 32, 32)
    np.testing.assert_array_equal(held_out.fetch(range(3)).numpy(), expected)
    assert held_out.conditions([0, 2])["labels"].tolist() == [0, 2]


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


# The table


def test_every_name_that_the_config_knows_is_in_the_table() -> None:
    assert set(get_args(get_type_hints(DataConfig)["name"])) == set(DATASETS)
    assert set(HELD_OUT) <= set(DATASETS)


def test_a_new_data_set_is_one_function_and_one_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = random_pixels(6, 3, 8, 8)

    def load_mine(data: DataConfig, channels: int | None) -> ImagesInMemory:
        return ImagesInMemory(pixels, channels)

    monkeypatch.setitem(DATASETS, "mine", DataSet(load_mine))
    data = DataConfig(name="mine", batch_size=2)  # type: ignore[arg-type]
    prepare(data)
    np.testing.assert_array_equal(load(data).fetch([0, 5]).numpy(), pixels[[0, 5]])


def test_missing_files_of_a_new_data_set_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [Path("mine/a"), Path("mine/b")]
    monkeypatch.setitem(DATASETS, "mine", DataSet(lambda *_: ImagesInMemory(random_pixels(2, 1, 4, 4)), lambda: files))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").touch()
    data = DataConfig(name="mine", root=str(tmp_path), batch_size=2, download=False)  # type: ignore[arg-type]
    refused(lambda: prepare(data), tmp_path / "mine/b", "data.download=true")
    (tmp_path / "mine" / "b").touch()
    prepare(data)


def test_the_size_must_be_a_multiple_of_what_the_network_needs(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    data = DataConfig(name="folder", root=str(tmp_path), image_size=24, batch_size=1)
    for divisor in (1, 2, 4, 8):
        load(data, divisor=divisor)
    refused(lambda: load(data, divisor=16), "24 x 24", "multiples of 16")
