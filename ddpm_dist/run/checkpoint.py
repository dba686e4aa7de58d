"""Checkpoints: typed plain values in `step-00000200.pt`, committed by `step-00000200.json` with their sha256.

torch.load does not notice flipped bits (199 of 200 loaded silently when tried), hence the checksum of our own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from ddpm_dist.errors import DataError, Diverged
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

FORMAT = 1
SLACK_BYTES = 1_000_000  # names, numbers and the zip's own; leaves room for the small files too


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on. Random generators are not here: randomness is derived from the step.

    Attributes:
        step: finished steps; fixes learning rate, data position and noise.
        model, ema, optimizer, scaler: state dicts.
        window: float64 [6], sums and counts since the last line of metrics.jsonl (see training.trainer).
        config: {dotted key: value}, resolved.
        contract: what was decided once, at step 0, and binds every later attempt.
        format: version of this layout.
    """

    step: int
    model: dict[str, Any]
    ema: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    window: torch.Tensor
    config: dict[str, Any]
    contract: dict[str, Any]
    format: int = FORMAT


class Damaged(DataError):
    """A checkpoint that no save of ours leaves behind: missing, truncated, flipped, of another program."""


class CheckpointStore:
    """The checkpoints of one run directory. Only one process writes.

    Args:
        directory: the `checkpoints/` folder; made at the first save.
        fence: called before each rename; raises if this process may no longer write.
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
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self._path(checkpoint.step)
        _refuse_infinite(checkpoint)
        self._refuse_without_space(checkpoint)
        try:
            with replacing(path, self._fence) as file, HashingWriter(file) as writer:
                torch.save({name: getattr(checkpoint, name) for name in _FIELDS}, cast(BinaryIO, writer))
                writer.flush()
        except RuntimeError as error:
            # torch wraps the file system's error in one about its zip writer.
            if not isinstance(error.__context__, OSError):
                raise
            with naming(path):
                raise error.__context__ from None
        manifest = {"step": checkpoint.step, "size": writer.size, "sha256": writer.hexdigest(), **facts}
        write_json(path.with_suffix(".json"), manifest, self._fence)
        return path

    def verify(self, step: int) -> None:
        """Read back what was saved: through the page cache, so this finds what memory and file system did to it.

        Raises:
            Damaged: it is not what was written.
        """
        if sha256_of(self._path(step)) != self.read_manifest(step).get("sha256"):
            raise Damaged(f"{self._path(step).name}: reads back differently from what was written")

    def prune(self, step: int, keep_last: int, keep_every: int | None = None) -> None:
        """Remove all but the newest keep_last up to `step`, which is known to be good.

        Args:
            keep_every: checkpoints at multiples of this step stay too.

        Raises:
            OSError: something could not be removed.
        """
        self._fence()
        # Damaged ones ahead, that this run fell back from, do not count.
        for old in [other for other in self.committed() if other <= step][:-keep_last]:
            if not keep_every or old % keep_every:
                self._manifest(old).unlink()
                self._path(old).unlink(missing_ok=True)

    def set_aside(self, newer_than: int) -> list[Path]:
        """Rename checkpoints that turned out to be damaged: all that are newer than the one that is used."""
        damaged = [step for step in self.committed() if step > newer_than]
        for step in damaged:
            for path in (self._manifest(step), self._path(step)):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(path, path.with_name(f"{path.name}.damaged"))
        return [self._path(step) for step in damaged]

    def _refuse_without_space(self, checkpoint: Checkpoint) -> None:
        needed = (
            sum(tensor.nbytes for tensor in _tensors([getattr(checkpoint, name) for name in _FIELDS])) + SLACK_BYTES
        )
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            text = f"{os.strerror(errno.ENOSPC)}: {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed"
            raise OSError(errno.ENOSPC, text, str(self.directory))

    def committed(self) -> list[int]:
        """Steps that have a manifest, ascending. Ordered by step, never by time."""
        return sorted(_steps(self.directory, "json"))

    def read_manifest(self, step: int) -> dict[str, Any]:
        """What the manifest says; {} where it is missing or damaged."""
        return read_json(self._manifest(step)) or {}

    def newest_valid(self) -> tuple[Checkpoint, str] | None:
        """The newest checkpoint that is what its manifest says, and its sha256; None if none was committed.

        Raises:
            DataError: there are checkpoints and all of them are damaged: starting over is for the user to say. Or
                the newest whole one is none that this version reads.
            OSError: it cannot be read now, which says nothing about it.
        """
        problems = []
        for step in reversed(self.committed()):
            try:
                try:
                    return self.load(step)
                except Damaged:
                    return self.load(step)  # once more: perhaps it was read wrongly
            except Damaged as error:
                problems.append(str(error))
        if problems:
            raise DataError(
                f"no usable checkpoint in {self.directory}, so this run will not start over by itself: "
                f"{'; '.join(problems)}. Restore one, or move the run directory away to start at step 0"
            )
        return None

    def load(self, step: int, sha256: str | None = None) -> tuple[Checkpoint, str]:
        """One checkpoint, verified; tensors on the CPU.

        Args:
            sha256: the digest that it must have (what rank 0 chose); None: its manifest's.

        Raises:
            Damaged: it is not what was saved.
            DataError: it is whole, but none that this version reads.
            OSError: it cannot be read now.
        """
        path, manifest = self._path(step), self.read_manifest(step)
        if not self._manifest(step).exists():
            there = ", ".join(map(str, self.committed())) or "none"
            raise DataError(f"{self.directory}: no checkpoint of step {step}; there are: {there}")
        if not isinstance(manifest.get("sha256"), str):
            raise Damaged(f"{self._manifest(step).name}: unreadable manifest")
        expected = sha256 or manifest["sha256"]
        try:
            if path.stat().st_size != manifest.get("size"):
                raise Damaged(f"{path.name}: {path.stat().st_size} bytes, expected {manifest.get('size')}")
            if sha256_of(path) != expected:
                raise Damaged(f"{path.name}: its sha256 is not the manifest's, it is damaged")
            values = torch.load(path, map_location="cpu", weights_only=True)
        except DataError:
            raise
        except (FileNotFoundError, IsADirectoryError):
            raise Damaged(f"{path.name}: missing") from None
        except (OSError, MemoryError):  # of this machine, at this moment
            raise
        except pickle.UnpicklingError:  # torch's own message says how to load it all the same
            raise Damaged(
                f"{path.name}: holds more than tensors and plain values, nothing of it was executed"
            ) from None
        except Exception as error:  # torch.load raises half a dozen types for files that are not its own
            if "memory" in str(error):  # torch's allocator raises RuntimeError
                raise
            raise Damaged(f"{path.name}: not a checkpoint ({_first_line(error)})") from None
        if not isinstance(values, dict) or set(values) != set(_FIELDS):
            raise DataError(f"{path.name}: not a checkpoint of ddpm_dist")
        if values["format"] != FORMAT:
            raise DataError(f"{path.name}: format {values['format']}, this version reads {FORMAT}")
        if values["step"] != step:
            raise Damaged(f"{path.name}: holds step {values['step']}")
        return Checkpoint(**values), expected

    def sweep(self) -> None:
        """Remove what killed saves left behind: temporary files, and files that were never committed."""
        for leftover in self.directory.glob(f".*{TEMPORARY}"):
            leftover.unlink(missing_ok=True)
        for step in _steps(self.directory, "pt") - _steps(self.directory, "json"):
            self._path(step).unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.pt"

    def _manifest(self, step: int) -> Path:
        return self._path(step).with_suffix(".json")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _refuse_infinite(checkpoint: Checkpoint) -> None:
    for name in ("model", "ema"):
        for key, tensor in getattr(checkpoint, name).items():
            if not tensor.is_floating_point() or torch.isfinite(tensor.sum()):
                continue  # a finite sum has finite terms, and takes a tenth of the time to look at
            if not torch.isfinite(tensor).all():
                raise Diverged(f"step {checkpoint.step}: {name}.{key} holds NaN or inf; such weights are never saved")


_FIELDS = tuple(item.name for item in dataclasses.fields(Checkpoint))


def _steps(directory: Path, suffix: str) -> set[int]:
    found = (re.fullmatch(rf"step-(\d{{8,}})\.{suffix}", path.name) for path in directory.glob(f"step-*.{suffix}"))
    return {int(match[1]) for match in found if match}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
