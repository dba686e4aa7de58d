"""The blocks of a data set that is being drawn: files that outlive a stop, until the data set is written from them.

`images.npz.parts/`, or `folder/parts/`, holds a file for each block that is drawn, a stamp, and `attempts/`, by which
only one attempt at a time writes there. The stamp says what the images follow from, so that no block of another data
set gets in between. Files that this module did not write are never removed; a folder of that name that holds such
files and no stamp is somebody else's, and is refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
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

_IN_EVERY_STAMP = {"run", "step", "seed"}
_TEMPORARY = rf"\.[0-9]+-[0-9]+{re.escape(TEMPORARY)}"
_NAMES = {
    "block": re.compile(r"[0-9]{6,}\.npy"),
    "temporary": re.compile(rf"\.([0-9]{{6,}}\.npy|stamp\.json){_TEMPORARY}"),
    "attempt": re.compile(rf"[0-9]{{5,}}\.json|\.[0-9]{{5,}}\.json{_TEMPORARY}|\..+-[0-9]+\.claim"),
}
"""The names of the files that are written here; attempts are in the folder `attempts/`."""


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
        """The stamp of the data set that is being drawn here; {} if there is none, or if it is written already."""
        found = self._read()
        return {} if "written" in found else found

    def is_written(self, stamp: Stamp, num: int) -> bool:
        """Whether this very data set is written, and only the rest of this folder is to be removed."""
        return self._read() == {**stamp, "written": num} and self._target.is_written(num)

    def _read(self) -> dict[str, Any]:
        found = read_json(self._stamp_file) or {}
        return found if found.keys() >= _IN_EVERY_STAMP else {}

    def claim(self, wait: Callable[[float], None]) -> None:
        """Become the one attempt that writes here.

        Args:
            wait: called with the seconds to wait while it is not clear whether another attempt is alive; may raise.

        Raises:
            ConfigError: another attempt is alive, and the message says where; or the folder holds files of others.
            OSError: the folder cannot be written.
        """
        self._refuse_files_of_others()
        refusal = ("is being filled", "give another --out")
        try:
            self._lease = claim(self._attempts, {}, 1, wait, refusal)
        except FileNotFoundError:  # the attempt before has just written its data set, and removed the folder
            self._lease = claim(self._attempts, {}, 1, wait, refusal)
        self.attempt = self._lease.number

    def _refuse_files_of_others(self) -> None:
        """Raise ConfigError if there is no stamp, and something that this module did not write."""
        found = {path: self._kind(path) for path in self._files()}
        if self._read():
            return
        if "attempt" not in found.values():  # others number their files too, so blocks alone are not known to be ours
            found = dict.fromkeys(found)
        others = [path for path, kind in found.items() if kind is None]
        if others:
            name = others[0].relative_to(self.folder)
            raise ConfigError(
                f"{self.folder}: is needed to keep images while they are drawn, but {name} in it was not written by "
                "this command; give another --out, or move that folder away"
            )

    def release(self) -> None:
        """Say that this attempt has ended, so that the next one need not wait."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    def begin(self, stamp: Stamp) -> None:
        """Stamp the folder, or find that its stamp is this one.

        Blocks without a stamp, and those of a data set that is written, are removed.

        Raises:
            ConfigError: another data set was begun here.
            OSError: the folder cannot be written.
        """
        before = self.read_stamp()
        if not before:
            self._remove("block")
            write_json(self._stamp_file, dict(stamp))
        elif before != stamp:
            keys = [key for key in {**before, **stamp} if before.get(key) != stamp.get(key)]
            changed = "; ".join(f"{key}: {_short(before.get(key))} -> {_short(stamp.get(key))}" for key in keys)
            raise ConfigError(
                f"{self.folder}: was begun with something else: {changed}. Its images stay as they are; give the old "
                "values to go on, another --out, or remove that folder to start anew"
            )
        self._remove("temporary")
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

    def say_written(self, num: int) -> None:
        """Note in the stamp that the data set is written, with `num` images.

        Raises:
            TakenOver: another attempt writes here now.
            OSError: the stamp cannot be written.
        """
        try:
            write_json(self._stamp_file, {**self.stamp, "written": num}, self._fence)
        except FileNotFoundError:
            raise TakenOver(f"{self.folder}: another attempt has written the same data set, and removed it") from None

    def remove(self) -> None:
        """Remove what this module wrote here, once the data set is written; the folder stays if it holds more.

        The stamp goes last, and says that all is done: whoever is killed before that removes the rest the next time.
        Another attempt that starts meanwhile may remove the same files.
        """
        self._remove("block", "temporary")
        self.release()
        self._remove("attempt")
        # Otherwise an attempt has begun since, and the stamp may be its own.
        if all(self._kind(path) != "attempt" for path in self._files()):
            self._stamp_file.unlink(missing_ok=True)
        for folder in (self._attempts, self.folder):
            with contextlib.suppress(OSError):  # it is not empty, or is gone already
                folder.rmdir()

    def _files(self) -> list[Path]:
        """All that lies here, and in `attempts/`, which is not listed itself."""
        found = []
        for folder in (self.folder, self._attempts):
            with contextlib.suppress(FileNotFoundError):  # another attempt has just written its data set
                found += [path for path in folder.iterdir() if path != self._attempts]
        return sorted(found)

    def _kind(self, path: Path) -> str | None:
        """What this module wrote into this file: a key of _NAMES. None if it did not write it."""
        kinds = ("attempt",) if path.parent == self._attempts else ("block", "temporary")
        return next((kind for kind in kinds if _NAMES[kind].fullmatch(path.name) and not path.is_dir()), None)

    def _remove(self, *kinds: str) -> None:
        for path in self._files():
            if self._kind(path) in kinds:
                path.unlink(missing_ok=True)

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
