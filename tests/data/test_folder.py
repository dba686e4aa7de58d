"""The pictures of a folder: which files they are, in which order, and that their pixels are what a viewer shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_dist.data.folder import ImageFolder
from ddpm_dist.errors import DataError


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def refused(read: Any, *mentions: object) -> None:
    """`read` raises a DataError of one line that names the things mentioned."""
    with pytest.raises(DataError) as caught:
        read()
    assert "\n" not in str(caught.value)
    for thing in mentions:
        assert str(thing) in str(caught.value)


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
