"""A folder of pictures as a data set: which files belong to it, and the pixels of each."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from ddpm_dist.data.images import Images, as_square
from ddpm_dist.data.labels import Labels, labels_of_folders
from ddpm_dist.errors import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
DEEP_GREY_MODES = {"I;16", "I;16L", "I;16B", "I;16N", "I", "F"}  # Pillow's names for grey of more than 8 bits
GREY_MODES = {"1", "L", "LA", "La", *DEEP_GREY_MODES}


class ImageFolder(Images):
    """Every picture below a folder, in the order of their names: resized, centre-cropped, read when asked for.

    The fingerprint covers the names and sizes of the files, not their pixels.

    Args:
        root: the folder.
        image_size: height and width in pixels.
        channels: 3 for RGB, 1 for grey; None for grey if each picture is grey by the header of its file, else RGB.

    Raises:
        DataError: there is no such folder, or no picture in it, or a file has no header that could be read.
    """

    def __init__(self, root: Path, image_size: int, channels: int | None = 3) -> None:
        if not root.is_dir():
            if root.exists():
                raise DataError(f"data.root={root}: is a file; give the folder in which the pictures lie")
            where = "" if root.is_absolute() else f" in {Path.cwd()}"
            raise DataError(f"data.root={root}: no such folder{where}")
        self._root, self._files = root, _picture_files(root)
        if not self._files:
            raise DataError(f"data.root={root}: no images ({', '.join(sorted(SUFFIXES))}) in this folder")
        if channels is None:  # ends at the first picture with colours, so that only grey folders take a while
            channels = 1 if all(map(_is_grey, self._files)) else 3
        self._mode = {1: "L", 3: "RGB"}[channels]
        self.shape = (channels, image_size, image_size)
        listing = "\n".join(f"{path.relative_to(root)} {path.stat().st_size}" for path in self._files)
        self.fingerprint = hashlib.blake2b(listing.encode(), digest_size=16).hexdigest()

    def labels(self) -> Labels:
        """The label of each picture: the first sub-folder of the root in which it lies.

        Raises:
            DataError: some picture lies in no sub-folder, or all lie in one.
        """
        return labels_of_folders(self._root, self._files)

    def __len__(self) -> int:
        return len(self._files)

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W] in [0, 255].

        Raises:
            DataError: names the picture that cannot be read.
        """
        return torch.stack([self._read(self._files[index]) for index in indices])

    def _read(self, path: Path) -> Tensor:
        with _errors_name(path), Image.open(path) as file:
            return as_square(_as_shown(file).convert(self._mode), self.shape[1])


def _is_grey(path: Path) -> bool:
    """Reads the header only; a palette counts as colour, and so does WebP, which knows no grey."""
    with _errors_name(path), Image.open(path) as file:
        return file.mode in GREY_MODES


def _as_shown(file: ImageFile.ImageFile) -> Image.Image:
    """The picture as a viewer shows it on a white page: upright, opaque, 8 bits a sample, of any size and mode.

    Colours of 16 bits lose their low byte, since Pillow reads no more; grey values of 16 bits are rounded.
    """
    _scale_transparent_colour(file)
    file.load()
    turn = _turn(file)
    image: Image.Image = file
    if image.mode in DEEP_GREY_MODES:
        image = _grey_of_16_bits(file)
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    return image if turn is None else image.transpose(turn)


_TURNS = {  # EXIF's tag 0x0112 says where the first row and column of a file belong; this puts them there
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turn(file: ImageFile.ImageFile) -> Image.Transpose | None:
    """What puts the picture upright; None if it is, or if its EXIF cannot be read."""
    try:
        return _TURNS.get(file.getexif().get(0x0112, 1))
    except Exception:  # a damaged EXIF block fails in many ways, and the pixels are whole all the same
        return None


def _grey_of_16_bits(file: ImageFile.ImageFile) -> Image.Image:
    """Grey values of 16 bits rounded to 8, and white where they are the transparent one."""
    if file.mode in ("I", "F") and (file.mode, file.format) != ("I", "PNG"):  # what older versions of Pillow say
        raise ValueError(f"grey of mode {file.mode}, whose white is unknown; save it with 8 or 16 bits")
    grey = np.asarray(file).astype(np.uint32)
    shown = np.where(grey == file.info.get("transparency"), 65535, grey)
    return Image.fromarray(((shown + 128) // 257).astype(np.uint8))


def _scale_transparent_colour(file: ImageFile.ImageFile) -> None:
    """Bring the one transparent colour of a PNG file to 8 bits: Pillow does so for the pixels alone.

    To be called before the pixels are loaded: only until then does Pillow tell how many bits a sample has.
    """
    transparent = file.info.get("transparency")
    if transparent is None or not file.tile:
        return
    layout = file.tile[0].args
    if layout in ("L;2", "L;4"):
        most = 3 if layout == "L;2" else 15
        file.info["transparency"] = transparent * 255 // most
    elif layout == "RGB;16B":
        file.info["transparency"] = tuple(sample >> 8 for sample in transparent)


@contextlib.contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Turns what Pillow raises about a picture into a DataError that names the file."""
    try:
        yield
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)  # whose message has the path once more
        reason = "it is none, whatever its name says" if unknown else str(error)
        raise DataError(f"{path}: cannot be read as an image ({reason}); mend it or remove it") from None


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
