"""The checkpoints of a run: tensors and plain values in `step-00000200.pt`, committed by `step-00000200.json`.

The .json file, the manifest, is written last and holds the sha256 of the .pt file: a .pt file without a manifest is
no checkpoint. The checksum is our own because torch.load does not notice flipped bits (199 of 200 files with one
flipped bit were loaded without an error). What a .pt file holds, and how older formats are read: run/formats.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from ddpm_dist.errors import DataError
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.files import (
    TEMPORARY,
    Fence,
    HashingWriter,
    naming,
    no_fence,
    read_json,
    replacing,
    sha256_of,
    write_json,
)
from ddpm_dist.run.formats import Damaged, Values, read_values

SLACK_BYTES = 1_000_000  # for names, numbers and what the zip file adds; leaves room for the small files too


@dataclass(frozen=True)
class Found:
    """A checkpoint that was read and verified, and the sha256 of its file, by which other ranks know it."""

    checkpoint: Checkpoint
    sha256: str


def write_values(path: Path, values: Values, fence: Fence) -> dict[str, Any]:
    """Write tensors and plain values into a file, whole or not at all. Returns its size and sha256.

    Raises:
        OSError: it cannot be written; an older file of this name stays.
        TakenOver: another attempt writes here now; an older file of this name stays.
    """
    try:
        with replacing(path, fence) as file, HashingWriter(file) as writer:
            torch.save(values, cast(BinaryIO, writer))
            writer.flush()
    except RuntimeError as error:
        # torch wraps the file system's error in one about its zip writer.
        if not isinstance(error.__context__, OSError):
            raise
        with naming(path):
            raise error.__context__ from None
    return {"size": writer.size, "sha256": writer.hexdigest()}


def refuse_damaged(path: Path, size: Any, expected: str) -> None:
    """Compare a file with what its manifest says.

    Args:
        size: number of bytes.
        expected: sha256.

    Raises:
        Damaged: it is not what was written.
    """
    try:
        if path.stat().st_size != size:
            raise Damaged(f"{path.name}: {path.stat().st_size} bytes, expected {size}")
        if sha256_of(path) != expected:
            raise Damaged(f"{path.name}: its sha256 is not the manifest's, it is damaged")
    except (FileNotFoundError, IsADirectoryError):
        raise Damaged(f"{path.name}: missing") from None


class CheckpointStore:
    """The checkpoints of one run directory. Many processes may read them; one may write, and the fence sees to that.

    Args:
        directory: the `checkpoints/` folder; made at the first save.
        fence: `Lease.check` of the attempt that trains. Who only reads leaves it out.
    """

    def __init__(self, directory: Path, fence: Fence = no_fence) -> None:
        self.directory, self._fence = directory, fence

    def save(self, checkpoint: Checkpoint, facts: dict[str, Any]) -> Path:
        """Write, then commit. After a kill at any instant the newest committed checkpoint is whole.

        Args:
            facts: plain JSON to add to the manifest (attempt, world size, versions ...).

        Raises:
            OSError: nothing was committed; older checkpoints are untouched.
            Diverged: the weights are not all finite; nothing was committed.
            TakenOver: another attempt writes here now; nothing was committed.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path, values = self._path(checkpoint.step), checkpoint.to_values()
        checkpoint.refuse_infinite()
        self._refuse_without_space(values)
        manifest = {"step": checkpoint.step, **write_values(path, values, self._fence), **facts}
        write_json(self._manifest(checkpoint.step), manifest, self._fence)
        return path

    def verify(self, step: int) -> None:
        """Read a saved file again and compare it with its manifest.

        The content comes from the page cache, so this finds what memory and the file system did to it, and not
        what the disk will do to it later.

        Raises:
            Damaged: it is not what was written.
        """
        if sha256_of(self._path(step)) != self.read_manifest(step).get("sha256"):
            raise Damaged(f"{self._path(step).name}: reads back differently from what was written")

    def prune(self, step: int, keep_last: int, keep_every: int | None = None) -> None:
        """Remove all but the newest keep_last of the checkpoints up to `step`, which is known to be good.

        Newer ones than `step` are damaged ones, from which this run fell back; they are neither counted nor removed.

        Args:
            keep_every: checkpoints at multiples of this step stay too.

        Raises:
            OSError: something could not be removed.
            TakenOver: another attempt writes here now; nothing was removed.
        """
        self._fence()
        for old in [other for other in self.committed() if other <= step][:-keep_last]:
            if not keep_every or old % keep_every:
                self._manifest(old).unlink()
                self._path(old).unlink(missing_ok=True)

    def set_aside(self, newer_than: int) -> list[Path]:
        """Rename all checkpoints that are newer than the one that is used: they turned out to be damaged."""
        damaged = [step for step in self.committed() if step > newer_than]
        for step in damaged:
            for path in (self._manifest(step), self._path(step)):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(path, path.with_name(f"{path.name}.damaged"))
        return [self._path(step) for step in damaged]

    def sweep(self) -> None:
        """Remove what killed saves leave behind: temporary files, and files that were never committed."""
        for leftover in self.directory.glob(f".*{TEMPORARY}"):
            leftover.unlink(missing_ok=True)
        for step in steps_in(self.directory, "pt") - steps_in(self.directory, "json"):
            self._path(step).unlink(missing_ok=True)

    def committed(self) -> list[int]:
        """Steps that have a manifest, ascending. Times of files play no part: clocks differ between machines."""
        return sorted(steps_in(self.directory, "json"))

    def read_manifest(self, step: int) -> dict[str, Any]:
        """What the manifest says; {} where it is missing or damaged."""
        return read_json(self._manifest(step)) or {}

    def newest_valid(self) -> Found | None:
        """The newest checkpoint that is what its manifest says; None if none was committed.

        Raises:
            DataError: there are checkpoints and all of them are damaged (then the user must decide whether the run
                starts again at step 0); or the newest one is whole, but this version cannot read it.
            OSError: it cannot be read now, which says nothing about whether it is damaged.
        """
        problems = []
        for step in reversed(self.committed()):
            try:
                try:
                    return self._read(step)
                except Damaged:
                    return self._read(step)  # the file may be sound, and only the first reading wrong
            except Damaged as error:
                problems.append(str(error))
        if problems:
            raise DataError(
                f"no usable checkpoint in {self.directory}, so this run will not start over by itself: "
                f"{'; '.join(problems)}. Restore one, or move the run directory away to start at step 0"
            )
        return None

    def load(self, step: int, sha256: str | None = None) -> Checkpoint:
        """One checkpoint, verified; tensors on the CPU.

        Args:
            sha256: the digest that the file must have (that of the file which rank 0 chose); None: its manifest's.

        Raises:
            Damaged: it is not what was saved.
            DataError: there is no checkpoint of this step; or it is whole, but this version cannot read it.
            OSError: it cannot be read now.
        """
        return self._read(step, sha256).checkpoint

    def _read(self, step: int, sha256: str | None = None) -> Found:
        path, manifest = self._path(step), self.read_manifest(step)
        if not self._manifest(step).exists():
            there = ", ".join(map(str, self.committed())) or "none"
            raise DataError(f"{self.directory}: no checkpoint of step {step}; there are: {there}")
        if not isinstance(manifest.get("sha256"), str):
            raise Damaged(f"{self._manifest(step).name}: unreadable manifest")
        expected: str = sha256 or manifest["sha256"]
        refuse_damaged(path, manifest.get("size"), expected)
        values = read_values(path)
        try:
            checkpoint = Checkpoint.from_values(values)
        except DataError as error:
            raise DataError(f"{path.name}: {error}") from None
        if checkpoint.step != step:
            raise Damaged(f"{path.name}: holds step {checkpoint.step}")
        return Found(checkpoint, expected)

    def _refuse_without_space(self, values: Values) -> None:
        needed = sum(tensor.nbytes for tensor in _tensors(values)) + SLACK_BYTES
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            text = f"{os.strerror(errno.ENOSPC)}: {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed"
            raise OSError(errno.ENOSPC, text, str(self.directory))

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.pt"

    def _manifest(self, step: int) -> Path:
        return self._path(step).with_suffix(".json")


def steps_in(directory: Path, suffix: str) -> set[int]:
    """The steps of which a folder has a file `step-00000200.SUFFIX`."""
    found = (re.fullmatch(rf"step-(\d{{8,}})\.{suffix}", path.name) for path in directory.glob(f"step-*.{suffix}"))
    return {int(match[1]) for match in found if match}


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
