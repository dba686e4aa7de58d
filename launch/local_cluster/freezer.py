"""The cgroup v1 freezer, by which SLURM finds and ends all processes of a job step.

The kernel lets us mount this one hierarchy even where the machine itself uses cgroup v2. With it (proctrack/cgroup)
SLURM ends orphans and children in sessions of their own at the end of a step; without it (proctrack/linuxproc) it
follows parent pids and loses whatever init has adopted.

The hierarchy is the whole machine's, and SLURM's groups are named by node and job alone. So SLURM is shown one group
of it, bound to where SLURM looks: what it or we end there is ours and nobody else's.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from .identity import digest
from .machine import run, succeeds
from .processes import kill


class Freezer:
    """One cluster's group of the freezer.

    Args:
        state: the cluster's directory.
    """

    def __init__(self, state: Path) -> None:
        self._hierarchy = state / "freezer"
        self._shown = state / "cgroup" / "freezer"
        self._group = self._hierarchy / f"ddpm-{digest(state)[:8]}"

    def mount(self) -> bool:
        """Make our group and show it to SLURM; returns whether this machine permits that."""
        for folder in (self._hierarchy, self._shown):
            folder.mkdir(parents=True, exist_ok=True)
        if not succeeds("mount", "-t", "cgroup", "-o", "freezer", "none", self._hierarchy):
            return False
        with contextlib.suppress(OSError):
            self._group.mkdir(exist_ok=True)
            if succeeds("mount", "--bind", self._group, self._shown):
                return True
        self.unmount()
        return False

    def processes(self, node: str = "*") -> list[int]:
        """The pids of all job steps of a node, or of all nodes."""
        found: list[int] = []
        if os.path.ismount(self._hierarchy):
            for path in self._group.glob(f"slurm_{node}/**/cgroup.procs"):
                with contextlib.suppress(OSError):
                    found += [int(word) for word in path.read_text().split()]
        return [pid for pid in found if pid > 0]  # 0: a process of a PID namespace that we do not see

    def unmount(self) -> None:
        """Kill what is left in our group, and remove it."""
        if not os.path.ismount(self._hierarchy):
            return
        for _ in range(50):  # the kernel needs a moment to empty the groups
            for pid in self.processes():
                kill(pid)
            for folder in sorted(self._group.glob("slurm_*/**/"), key=lambda path: -len(path.parts)):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if not list(self._group.glob("slurm_*")):
                break
            time.sleep(0.1)
        if os.path.ismount(self._shown):
            run("umount", self._shown, check=False)
        with contextlib.suppress(OSError):
            self._group.rmdir()
        run("umount", self._hierarchy, check=False)
