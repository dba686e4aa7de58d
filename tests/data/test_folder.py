"""The pictures of a folder: which files they are, in which order, and that their pixels are what a viewer shows."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from harness import state_differences, train
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


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("RGBA", (77, 77, 77, 10), (248, 248, 248)),  # 10/255 of 77 over 245/255 of white
        ("1", 1, (255, 255, 255)),
        ("P", 3, (0, 0, 0)),  # of an empty palette
    ],
)
def test_picture_of_any_mode_becomes_three_channels(
    tmp_path: Path, mode: str, colour: Any, expected: tuple[int, ...]
) -> None:
    Image.new(mode, (8, 8), colour).save(tmp_path / "0.png")
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


# The pixels are those that a viewer shows, whatever the format. Files are made by hand where Pillow writes none such.

WHITE = 255


def png(pixels: np.ndarray, depth: int, colour_type: int, transparent: tuple[int, ...] = ()) -> bytes:
    """A PNG file.

    Args:
        pixels: [H, W, samples per pixel], whole numbers of `depth` bits.
        colour_type: 0 grey, 2 RGB, 4 grey and alpha, 6 RGB and alpha.
        transparent: the samples of the one colour that is transparent (the tRNS chunk).
    """

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = pixels.shape[:2]
    bits = (pixels.reshape(height, -1, 1).astype(np.uint16) >> np.arange(depth)[::-1]) & 1
    rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)),
            chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b"",
            chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
            chunk(b"IEND", b""),
        ]
    )


def read(path: Path, content: bytes | None = None) -> np.ndarray:
    """The picture of one file, which has its size already: [3, H, W]."""
    if content is not None:
        path.write_bytes(content)
    with Image.open(path) as image:
        assert image.width == image.height
        size = image.width
    pixels: np.ndarray = ImageFolder(path.parent, size).fetch([0])[0].numpy()
    return pixels


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """What shows of a colour (0 .. 255) over a white ground, where alpha is 0 .. 255: [..., samples]."""
    share = alpha[..., None] / 255
    mixed: np.ndarray = np.rint(share * colour + (1 - share) * WHITE)
    return mixed


def channels_first(pixels: np.ndarray) -> np.ndarray:
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).transpose(2, 0, 1)


def test_the_png_files_made_here_are_what_they_say(tmp_path: Path) -> None:
    for depth, colour_type, samples in ((1, 0, 1), (2, 0, 1), (4, 0, 1), (8, 0, 1), (8, 2, 3), (8, 4, 2), (8, 6, 4)):
        pixels = random_pixels(8, 8, samples) >> (8 - depth)
        (tmp_path / "0.png").write_bytes(png(pixels, depth, colour_type))
        with Image.open(tmp_path / "0.png") as image:
            shown = np.asarray(image.convert({1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[samples])).reshape(pixels.shape)
        np.testing.assert_array_equal(shown, pixels.astype(int) * 255 // (2**depth - 1))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_png_of_any_depth_keeps_its_brightness(tmp_path: Path, depth: int) -> None:
    most = 2**depth - 1
    ramp = np.linspace(0, most, 4096).round().astype(int).reshape(64, 64, 1)
    shown = read(tmp_path / "0.png", png(ramp, depth, 0))
    np.testing.assert_array_equal(shown, channels_first(np.floor(ramp * 255 / most + 0.5)))
    assert abs(shown.mean() - 127.5) < 0.5


def test_colour_png_of_16_bits_keeps_its_colours(tmp_path: Path) -> None:
    """Pillow keeps the high byte of each sample, which is less than one level of 255 away."""
    pixels = np.random.default_rng(0).integers(0, 65536, (32, 32, 3))
    shown = read(tmp_path / "0.png", png(pixels, 16, 2))
    np.testing.assert_allclose(shown, channels_first(pixels / 257), atol=1.0)


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_tiff_of_16_bits_by_the_name_of_a_png_keeps_its_brightness(tmp_path: Path, byte_order: str) -> None:
    """Pillow looks at the content, not at the suffix."""
    ramp = np.linspace(0, 65535, 256).round().astype(f"{byte_order}u2").reshape(16, 16)
    mode = "I;16" if byte_order == "<" else "I;16B"
    Image.frombytes(mode, (16, 16), ramp.tobytes()).save(tmp_path / "0.png", format="TIFF")
    shown = read(tmp_path / "0.png")
    np.testing.assert_array_equal(shown, channels_first(np.arange(256).reshape(16, 16, 1)))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_picture_whose_white_is_not_known_is_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (8, 8), 1000).save(tmp_path / "0.png", format="TIFF")
    refused(lambda: read(tmp_path / "0.png"), tmp_path / "0.png", f"mode {mode}", "8 or 16 bits")


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGB", "png"), ("RGB", "bmp"), ("L", "png"), ("L", "bmp"), ("1", "png"), ("1", "bmp")]
)
def test_opaque_picture_gives_its_very_pixels(tmp_path: Path, mode: str, suffix: str) -> None:
    image = Image.fromarray(random_pixels(32, 32, 3)).convert(mode)
    image.save(tmp_path / f"0.{suffix}")
    expected = np.asarray(image, dtype=np.uint8).reshape(32, 32, -1) * np.uint8(255 if mode == "1" else 1)
    np.testing.assert_array_equal(read(tmp_path / f"0.{suffix}"), channels_first(expected))


def test_palette_gives_the_colours_in_it(tmp_path: Path) -> None:
    palette, indices = random_pixels(256, 3, seed=1), random_pixels(16, 16)
    image = Image.frombytes("P", (16, 16), indices.tobytes())
    image.putpalette(palette.tobytes())
    for name in ("0.png", "0.bmp"):
        image.save(tmp_path / name)
        np.testing.assert_array_equal(read(tmp_path / name), channels_first(palette[indices]))
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("mode", "ink", "expected"),
    [
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("YCbCr", (76, 85, 255), (255, 0, 0)),
    ],
)
def test_jpeg_of_another_colour_space_shows_its_colours(
    tmp_path: Path, mode: str, ink: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    Image.new(mode, (16, 16), ink).save(tmp_path / "0.jpg", quality=100)
    assert np.abs(read(tmp_path / "0.jpg").mean(axis=(1, 2)) - expected).max() < 4


# Transparency


@pytest.mark.parametrize("colour_type", [4, 6])
@pytest.mark.parametrize("depth", [8, 16])
def test_transparent_pixels_show_the_white_ground(tmp_path: Path, colour_type: int, depth: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 2**depth, (32, 32, {4: 2, 6: 4}[colour_type]))
    pixels[:8, :, -1], pixels[8:16, :, -1] = 0, 2**depth - 1
    shown = read(tmp_path / "0.png", png(pixels, depth, colour_type))
    as_8_bits = pixels >> (depth - 8)
    expected = channels_first(over_white(as_8_bits[..., :-1], as_8_bits[..., -1]))
    assert (shown[:, :8] == WHITE).all()
    np.testing.assert_array_equal(shown[:, 8:16], channels_first(as_8_bits[..., :-1])[:, 8:16])
    np.testing.assert_allclose(shown, expected, atol=1)


@pytest.mark.parametrize(
    ("depth", "colour_type", "samples"), [(1, 0, 1), (2, 0, 1), (4, 0, 1), (8, 0, 1), (16, 0, 1), (8, 2, 3), (16, 2, 3)]
)
def test_the_one_transparent_colour_of_a_png_shows_the_white_ground(
    tmp_path: Path, depth: int, colour_type: int, samples: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 2**depth, (16, 16, samples))
    hidden = (0,) if depth == 1 else tuple(2 ** (depth - 1) - 1 - sample for sample in range(samples))
    pixels[:2] = hidden
    shown = read(tmp_path / "0.png", png(pixels, depth, colour_type, transparent=hidden))
    opaque = channels_first(np.rint(pixels * 255 / (2**depth - 1)))
    is_hidden = (pixels == hidden).all(axis=-1)
    assert (shown[:, is_hidden] == WHITE).all()
    np.testing.assert_allclose(shown[:, ~is_hidden], opaque[:, ~is_hidden], atol=1 if samples == 3 else 0)


@pytest.mark.parametrize("kind", ["one index", "alpha of every index"])
def test_transparent_colours_of_a_palette_show_the_white_ground(tmp_path: Path, kind: str) -> None:
    palette, indices = random_pixels(256, 3, seed=1), random_pixels(16, 16)
    indices[:2] = 7
    alpha = np.full(256, 255)
    alpha[7] = 0
    if kind != "one index":
        alpha = random_pixels(256, seed=2)
    image = Image.frombytes("P", (16, 16), indices.tobytes())
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "0.png", transparency=7 if kind == "one index" else alpha.astype(np.uint8).tobytes())
    expected = channels_first(over_white(palette[indices], alpha[indices]))
    np.testing.assert_allclose(read(tmp_path / "0.png"), expected, atol=1)


def test_transparent_pixels_of_webp_show_the_white_ground(tmp_path: Path) -> None:
    pixels = random_pixels(16, 16, 4)
    pixels[:4, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "0.webp", lossless=True, exact=True)
    expected = channels_first(over_white(pixels[..., :3], pixels[..., 3]))
    np.testing.assert_allclose(read(tmp_path / "0.webp"), expected, atol=1)


def test_hidden_colours_do_not_bleed_when_a_picture_is_made_smaller(tmp_path: Path) -> None:
    pixels = np.zeros((64, 64, 4), np.uint8)  # transparent black
    pixels[16:48, 16:48] = (255, 255, 255, 255)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    assert (ImageFolder(tmp_path, 16).fetch([0]) == WHITE).all()


# Orientation

CORNERS = {"top left": (0, 0), "top right": (0, -1), "bottom left": (-1, 0), "bottom right": (-1, -1)}
FIRST_PIXEL_IS_SHOWN = {  # EXIF 2.3, tag 0x0112: where the first row and the first column of the file belong
    1: ("top left", "top right"),
    2: ("top right", "top left"),
    3: ("bottom right", "bottom left"),
    4: ("bottom left", "bottom right"),
    5: ("top left", "bottom left"),
    6: ("top right", "bottom right"),
    7: ("bottom right", "top right"),
    8: ("bottom left", "top left"),
}


def exif(orientation: int) -> bytes:
    """An EXIF block of one tag, by hand: little-endian TIFF, tag 0x0112, one short."""
    return b"Exif\0\0II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [1, *range(2, 9)])
def test_picture_is_turned_as_its_exif_says(tmp_path: Path, orientation: int, suffix: str) -> None:
    """The file's first pixel is white and the last of its first row grey, the rest is black."""
    pixels = np.zeros((32, 32), np.uint8)
    pixels[:8, :8], pixels[:8, -8:] = 255, 128
    Image.fromarray(pixels).save(tmp_path / f"0.{suffix}", exif=exif(orientation), quality=100)
    shown = read(tmp_path / f"0.{suffix}")[0].astype(int)
    first, end_of_row = FIRST_PIXEL_IS_SHOWN[orientation]
    for corner, place in CORNERS.items():
        assert abs(shown[place] - {first: 255, end_of_row: 128}.get(corner, 0)) < 16, corner


def test_photo_on_its_side_is_turned_before_its_middle_is_cut_out(tmp_path: Path) -> None:
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = (255, 0, 0)
    pixels[:8, 16:32] = (0, 0, 255)  # the upper half of the middle is blue: on the right once the photo stands
    Image.fromarray(pixels).save(tmp_path / "0.png", exif=exif(6))
    shown = ImageFolder(tmp_path, 16).fetch([0])[0]
    assert (shown[2, :, 9:] == 255).all()
    assert (shown[0, :, :7] == 255).all()


@pytest.mark.parametrize("damaged", [b"Exif\0\0garbage", b"Exif\0\0II*\0", b"Exif\0\0", exif(9), exif(0), exif(6)[:-9]])
def test_picture_whose_exif_is_damaged_or_senseless_is_shown_as_it_lies(tmp_path: Path, damaged: bytes) -> None:
    pixels = random_pixels(16, 16, 3)
    Image.fromarray(pixels).save(tmp_path / "0.jpg", exif=exif(1), quality=100)
    expected = read(tmp_path / "0.jpg")
    Image.fromarray(pixels).save(tmp_path / "0.jpg", exif=damaged, quality=100)
    np.testing.assert_array_equal(read(tmp_path / "0.jpg"), expected)


# Grey or RGB


def save_grey_pictures(folder: Path) -> None:
    """One of each kind that is grey by its header."""
    grey = Image.fromarray(random_pixels(16, 16))
    grey.save(folder / "a.png")
    grey.save(folder / "b.jpg")
    grey.save(folder / "c.bmp")
    grey.convert("1").save(folder / "d.png")
    grey.convert("LA").save(folder / "e.png")
    (folder / "f.png").write_bytes(png(random_pixels(16, 16, 1).astype(int) * 256, 16, 0))


def test_folder_of_grey_pictures_stays_grey_and_one_with_a_coloured_picture_is_rgb(tmp_path: Path) -> None:
    save_grey_pictures(tmp_path)
    as_rgb, as_grey = ImageFolder(tmp_path, 16, 3), ImageFolder(tmp_path, 16, None)
    assert (as_rgb.shape, as_grey.shape) == ((3, 16, 16), (1, 16, 16))
    torch.testing.assert_close(as_grey.fetch(range(6)).expand(-1, 3, -1, -1), as_rgb.fetch(range(6)), rtol=0, atol=0)
    assert as_grey.fingerprint == as_rgb.fingerprint
    for mode in ("RGB", "P", "RGBA"):
        Image.new(mode, (16, 16)).save(tmp_path / "z.png")
        assert ImageFolder(tmp_path, 16, None).shape == (3, 16, 16)


def test_coloured_pictures_become_grey_where_one_channel_is_asked_for(tmp_path: Path) -> None:
    pixels = random_pixels(16, 16, 3)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    grey = ImageFolder(tmp_path, 16, 1).fetch([0])
    assert grey.shape == (1, 1, 16, 16)
    np.testing.assert_allclose(grey[0, 0], pixels @ [0.299, 0.587, 0.114], atol=0.51)


def test_only_a_folder_that_may_be_grey_is_looked_at_file_by_file(tmp_path: Path) -> None:
    """A damaged file is found at the start there; elsewhere when its turn comes."""
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"garbage")
    refused(lambda: ImageFolder(tmp_path, 8, None), tmp_path / "b.png")
    for channels in (1, 3):
        assert len(ImageFolder(tmp_path, 8, channels)) == 2
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert ImageFolder(tmp_path, 8, None).shape[0] == 3


def forget_the_key(run: Path) -> None:
    """Make a run of an older version of this one: neither its config nor its checkpoint knows data.channels."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["data"]["channels"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (path,) = (run / "checkpoints").glob("*.pt")
    values = torch.load(path, weights_only=True)
    del values["config"]["data.channels"]
    torch.save(values, path)
    manifest = path.with_suffix(".json")
    facts = json.loads(manifest.read_text())
    facts |= {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps(facts))


@pytest.mark.slow
def test_run_of_an_older_version_on_grey_pictures_goes_on_in_rgb(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(8):
        Image.fromarray(random_pixels(8, 8, seed=number)).save(pictures / f"{number}.png")
    folder = ("data.name=folder", f"data.root={pictures}", "data.image_size=8", "data.num_workers=0")
    undisturbed = train(1, tmp_path, *folder, "train.max_steps=4", "data.channels=3", name="undisturbed")
    old = train(1, tmp_path, *folder, "train.max_steps=2", "data.channels=3", name="old")
    forget_the_key(old)
    train(1, tmp_path, *folder, "train.max_steps=4", name="old")
    assert state_differences(undisturbed, old) == []
    assert contract_of(old)["image_shape"] == [3, 8, 8]
    new = train(1, tmp_path, *folder, "train.max_steps=2", name="new")
    assert contract_of(new)["image_shape"] == [1, 8, 8]


def contract_of(run: Path) -> dict[str, Any]:
    manifests = sorted((run / "checkpoints").glob("*.json"))
    contract: dict[str, Any] = json.loads(manifests[-1].read_text())["contract"]
    return contract
