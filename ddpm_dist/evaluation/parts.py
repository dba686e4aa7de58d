"""The blocks of a data set that is being drawn: files that outlive a stop, until the data set is written from them.

`images.npz.parts/`, or `folder/parts/`, holds a file for each block that is drawn, a stamp, and `attempts/`, by which
only one attempt at a time writes there. The stamp says what the images follow from, so that no block of another data
set gets in between.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_dist.errors import ConfigError, DataError, TakenOver
from ddpm_dist.evaluation.generate import BLOCK_SIZE
from ddpm_dist.evaluation.image_files import Target
from ddpm_dist.run.files import TEMPORARY, read_json, replacing, write_json
from ddpm_dist.run.lease import Lease, check_claim, claim

Stamp = Mapping[str, Any]
"""What images follow from, as plain JSON: run, step and sha256 of the checkpoint, sampler, seed, ..."""


class Parts:
    """Where the blocks of one data set are kept while it is drawn.

    Args:
        target: where the data set will be written.

    Attributes:
        folder: where they are.
        attempt: the number of the attempt that draws them, from 1; 0 before rank 0 has claimed the folder. The other
            ranks are told by rank 0.
        stamp: what the images follow from; {} before it is agreed on.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        is_folder = target.kind == "folder"
        self.folder = target.path / "parts" if is_folder else target.path.with_name(f"{target.path.name}.parts")
        self._stamp_file, self._attempts = self.folder / "stamp.json", self.folder / "attempts"
        self._lease: Lease | None = None
        self.attempt = 0
        self.stamp: Stamp = {}

    def read_stamp(self) -> Stamp:
        """The stamp of the data set that was begun here; {} if none was."""
        return {key: value for key, value in self._read().items() if key != "written"}

    def is_written(self) -> bool:
        """Whether the data set is written, and only the rest of this folder is to be removed."""
        return "written" in self._read() and self._target.path.exists()

    def _read(self) -> dict[str, Any]:
        return read_json(self._stamp_file) or {}

    def claim(self, wait: Callable[[float], None]) -> None:
        """Become the one attempt that writes here.

        Args:
            wait: called with the seconds to wait while it is not clear whether another attempt is alive; may raise.

        Raises:
            ConfigError: another attempt is alive; the message says where.
            OSError: the folder cannot be written.
        """
        refusal = ("is being filled", "give another --out")
        try:
            self._lease = claim(self._attempts, {}, 1, wait, refusal)
        except FileNotFoundError:  # the attempt before has just written its data set, and removed the folder
            self._lease = claim(self._attempts, {}, 1, wait, refusal)
        self.attempt = self._lease.number

    def release(self) -> None:
        """Say that this attempt has ended, so that the next one need not wait."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    def begin(self, stamp: Stamp) -> None:
        """Stamp the folder, or find that its stamp is this one. Whatever lies here without a stamp is removed.

        Raises:
            ConfigError: another data set was begun here.
            OSError: the folder cannot be written.
        """
        before = self.read_stamp()
        if not before:
            for path in self.folder.glob("*.npy"):
                path.unlink()
            write_json(self._stamp_file, dict(stamp))
        elif before != stamp:
            keys = [key for key in {**before, **stamp} if before.get(key) != stamp.get(key)]
            changed = "; ".join(f"{key}: {_short(before.get(key))} -> {_short(stamp.get(key))}" for key in keys)
            raise ConfigError(
                f"{self.folder}: was begun with something else: {changed}. Its images stay as they are; give the old "
                "values to go on, another --out, or remove that folder to start anew"
            )
        for path in self.folder.glob(f".*{TEMPORARY}"):
            path.unlink(missing_ok=True)
        self.stamp = stamp

    def missing(self, num: int) -> list[int]:
        """The blocks of the images 0 .. num - 1 that are not drawn yet."""
        return [block for block in range(-(-num // BLOCK_SIZE)) if not self._is_whole(block)]

    def num_drawn(self, num: int) -> int:
        """How many of the images 0 .. num - 1 are drawn."""
        missing = self.missing(num)
        return num - sum(min(num - block * BLOCK_SIZE, BLOCK_SIZE) for block in missing)

    def refuse_without_space(self, num: int, missing: Collection[int]) -> None:
        """Raise OSError if the disk has no room for the missing blocks and for all `num` images."""
        image = int(np.prod(self.stamp["shape"]))
        needed = (len(missing) * BLOCK_SIZE + num) * image
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            text = f"{os.strerror(errno.ENOSPC)}: {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed"
            raise OSError(errno.ENOSPC, text, str(self.folder))

    def write(self, block: int, images: Tensor) -> None:
        """Keep a block that is drawn.

        Args:
            images: uint8 [BLOCK_SIZE, C, H, W].

        Raises:
            TakenOver: another attempt writes here now.
            OSError: the file cannot be written.
        """
        with replacing(self._path(block), self._fence) as file:
            np.save(file, images.numpy())

    def images(self, num: int, should_stop: Callable[[], None]) -> Iterator[Tensor]:
        """The images 0 .. num - 1, block by block; all of these blocks must be drawn.

        Args:
            should_stop: called before each block; may raise.

        Yields:
            uint8 [<= BLOCK_SIZE, C, H, W].

        Raises:
            DataError: the file of a block is missing or damaged.
        """
        for first in range(0, num, BLOCK_SIZE):
            should_stop()
            path = self._path(first // BLOCK_SIZE)
            try:
                images = np.load(path)
            except (ValueError, FileNotFoundError, EOFError):
                path.unlink(missing_ok=True)
                raise DataError(f"{path}: missing or damaged; the same command draws this block again") from None
            yield torch.from_numpy(images)[: num - first]

    def remove(self) -> None:
        """Remove the folder, once the data set is written.

        The stamp goes last, and says that all is done: whoever is killed before that removes the rest the next time.
        """
        write_json(self._stamp_file, {**self.stamp, "written": True})
        self.release()
        shutil.rmtree(self._attempts)
        for path in self.folder.iterdir():
            if path != self._stamp_file:
                path.unlink()
        self._stamp_file.unlink()
        self.folder.rmdir()

    def _fence(self) -> None:
        """Raise TakenOver if this attempt may not write any more."""
        check_claim(self._attempts, self.attempt)
        if self.read_stamp() != self.stamp:
            raise TakenOver(f"{self.folder}: another data set is being drawn there now; this attempt writes nothing")

    def _path(self, block: int) -> Path:
        return self.folder / f"{block:06d}.npy"

    def _is_whole(self, block: int) -> bool:
        path, pixels = self._path(block), BLOCK_SIZE * int(np.prod(self.stamp["shape"]))
        return path.exists() and path.stat().st_size == pixels + 128  # numpy's header has 128 bytes


def _short(value: Any) -> str:
    """A value of a stamp, for a message: what was not given is the default, and of a digest the first digits do."""
    return (
        "default" if value is None else str(value)[:12] if isinstance(value, str) and len(value) == 64 else str(value)
    )
