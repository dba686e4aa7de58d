"""The files that drawn images go into: a grid, a folder of PNGs, or one .npz file."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ddpm_dist.errors import ConfigError
from ddpm_dist.run.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from ddpm_dist.evaluation.classes import Classes


@dataclass(frozen=True)
class Target:
    """Where drawn images go.

    Attributes:
        path: of the file or the folder.
        kind: grid is one .png file, folder has a PNG for each image, npz is one file with all of them.
    """

    path: Path
    kind: Literal["grid", "folder", "npz"]

    @staticmethod
    def named(text: str) -> Target:
        """The target that a user has written, like grid.png, images.npz or a folder/. Raises ConfigError."""
        path = Path(text)
        if text.endswith("/") or path.suffix == "":
            return Target(path, "folder")
        if path.suffix not in (".png", ".npz"):
            raise ConfigError(f"--out {text}: expected grid.png, images.npz or a folder/")
        return Target(path, "grid" if path.suffix == ".png" else "npz")

    def probe(self, num: int) -> None:
        """Find out whether `num` images can be written here, before hours of sampling.

        Raises:
            ConfigError: the path is a folder where a file is asked for, or holds more images than are asked for.
            OSError: nothing can be written here.
        """
        if self.kind != "folder" and self.path.is_dir():
            raise ConfigError(f"--out {self.path}: is a folder; give {self.path}/ to fill it, or the name of a file")
        folder = self.path if self.kind == "folder" else self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        if self.kind == "folder" and any(_number(path) >= num for path in folder.glob("*.png")):
            raise ConfigError(
                f"--out {self.path}: holds more images than --num {num} already, and all are left as they are; give "
                "an empty folder"
            )
        with tempfile.TemporaryFile(dir=folder):
            pass

    def is_written(self, num: int) -> bool:
        """Whether the file, or each of the `num` files of the folder, is there."""
        if self.kind != "folder":
            return self.path.is_file()
        return all((self.path / _name(index)).is_file() for index in range(num))

    def cannot_be_written(self, error: OSError) -> ConfigError:
        """What a user is told about an error of `probe` or `write`."""
        reason = "Not a directory" if isinstance(error, FileExistsError) else error.strerror
        return ConfigError(f"--out {self.path}: cannot be written ({error.filename or self.path}: {reason})")

    def write(self, blocks: Iterable[Tensor], num: int, classes: Classes | None = None) -> None:
        """Write the images. No more than one block of them need be in memory, except for a grid.

        Args:
            blocks: uint8 [B, C, H, W] each, in the order of the images' indices.
            num: number of images in all blocks together.
            classes: of which class each image is; a grid has a row for each.

        Raises:
            OSError: they cannot be written.
        """
        if self.kind == "npz":
            _write_npz(blocks, self.path, num)
        elif self.kind == "folder":
            _write_folder(blocks, self.path)
        else:
            _write_grid(blocks, self.path, classes)


def _number(path: Path) -> int:
    """The index of the image in a file like 00017.png; -1 for a file of another name."""
    return int(path.stem) if path.stem.isascii() and path.stem.isdecimal() else -1


def _name(index: int) -> str:
    return f"{index:05d}.png"


def _write_grid(blocks: Iterable[Tensor], path: Path, classes: Classes | None) -> None:
    import torch

    from ddpm_dist.evaluation.pictures import save_grid

    images, columns = torch.cat(list(blocks)), None
    if classes is not None:
        images, columns = classes.in_rows(images)
    save_grid(images, path, columns)


def _write_folder(blocks: Iterable[Tensor], folder: Path) -> None:
    from ddpm_dist.evaluation.pictures import save_png

    index = 0
    for block in blocks:
        for image in block:
            save_png(image, folder / _name(index), durable=False)
            index += 1
    os.sync()  # once for all of them, since fsync takes much longer than to draw a small PNG


def _write_npz(blocks: Iterable[Tensor], path: Path, num: int) -> None:
    """Write the bytes that np.savez writes, block by block."""
    import numpy as np

    with (
        replacing(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        for index, block in enumerate(blocks):
            pixels = block.permute(0, 2, 3, 1).contiguous().numpy()
            if index == 0:
                facts = {"descr": "|u1", "fortran_order": False, "shape": (num, *pixels.shape[1:])}
                np.lib.format.write_array_header_1_0(member, facts)
            member.write(pixels.data)
