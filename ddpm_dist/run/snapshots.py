"""Snapshots of power-function averages: `ema_snapshots/step-00000200.pt`, committed by `step-00000200.json`.

From all of them together, averages of other widths are computed after the training, so none of them is ever removed.
A snapshot of step s holds nothing but averages after s steps: it follows from s, like all that a run learns. It is
kept in memory until the next checkpoint is written, and lies on the disk before that checkpoint is committed. So a run
that goes on from a checkpoint has all snapshots up to its step, and writes the later ones again.

Half precision is enough, and takes half of the space. With 40 snapshots its rounding moves a computed average by 2e-5
of its norm, at widths between the two that are kept.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ddpm_dist.run.files import TEMPORARY, Fence, no_fence, read_json, replacing, write_json
from ddpm_dist.run.formats import Damaged, load_plain
from ddpm_dist.run.store import refuse_damaged, steps_in, write_values

FORMAT = 1  # of a snapshot file
States = dict[str, dict[str, Tensor]]


class SnapshotStore:
    """The snapshots of one run directory. Many processes may read them; one may write, and the fence sees to that.

    Args:
        directory: the `ema_snapshots/` folder; made with the first snapshot.
        fence: `Lease.check` of the attempt that trains. Who only reads leaves it out.
    """

    def __init__(self, directory: Path, fence: Fence = no_fence) -> None:
        self.directory, self._fence = directory, fence
        self._kept: deque[tuple[int, States]] = deque()

    def keep(self, step: int, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy the averages of a step into memory. `flush` writes them.

        Args:
            step: finished steps.
            states: state dicts of power-function averages, by name.
        """
        self._kept.append((step, {name: _halved(state) for name, state in states.items()}))

    def flush(self) -> None:
        """Write what was kept. What cannot be written stays in memory, for the next call.

        Raises:
            OSError: it cannot be written.
            TakenOver: another attempt writes here now.
        """
        while self._kept:
            step, states = self._kept[0]
            self.directory.mkdir(exist_ok=True)
            values = {"format": FORMAT, "step": step, "averages": states}
            manifest = {"step": step, **write_values(self._path(step), values, self._fence), "averages": list(states)}
            write_json(self._manifest(step), manifest, self._fence)
            self._kept.popleft()

    def committed(self, up_to: int) -> list[int]:
        """Steps that have a manifest, ascending, up to and including the given one."""
        return sorted(step for step in steps_in(self.directory, "json") if step <= up_to)

    def averages(self, step: int) -> list[str]:
        """The names of the averages in a snapshot, as its manifest says."""
        return [str(name) for name in (read_json(self._manifest(step)) or {}).get("averages", [])]

    def load(self, step: int) -> States:
        """The averages of a snapshot by name, verified; half precision, on the CPU.

        Raises:
            Damaged: it is not what was saved.
        """
        path, manifest = self._path(step), read_json(self._manifest(step)) or {}
        try:
            refuse_damaged(path, manifest.get("size"), str(manifest.get("sha256")))
            values = load_plain(path)
        except Damaged as error:
            raise Damaged(
                f"{self.directory}: {error}; restore it, or remove {path.name} and {self._manifest(step).name} to do "
                "without this snapshot"
            ) from None
        states: States = values["averages"]
        return states

    def adopt(self, other: SnapshotStore, up_to: int) -> None:
        """Copy the snapshots of another run, up to a step. Those that were copied before are not copied again.

        Raises:
            OSError: a file cannot be read or written.
            TakenOver: another attempt writes here now.
        """
        for step in other.committed(up_to):
            if read_json(self._manifest(step)) != read_json(other._manifest(step)):
                self.directory.mkdir(exist_ok=True)
                for path in (other._path(step), other._manifest(step)):
                    with replacing(self.directory / path.name, self._fence) as file, path.open("rb") as source:
                        shutil.copyfileobj(source, file)

    def sweep(self) -> None:
        """Remove what killed attempts leave behind: temporary files, and files that were never committed."""
        for leftover in self.directory.glob(f".*{TEMPORARY}"):
            leftover.unlink(missing_ok=True)
        for step in steps_in(self.directory, "pt") - steps_in(self.directory, "json"):
            with contextlib.suppress(FileNotFoundError):
                self._path(step).unlink()

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.pt"

    def _manifest(self, step: int) -> Path:
        return self._path(step).with_suffix(".json")


def _halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy on the CPU, in half precision where that can hold the numbers."""
    copied = {}
    for name, value in state.items():
        half = value.to("cpu", torch.float16, copy=True) if value.is_floating_point() else value
        fits = value.is_floating_point() and bool(torch.isfinite(half).all())
        copied[name] = half if fits else value.to("cpu", copy=True)
    return copied
