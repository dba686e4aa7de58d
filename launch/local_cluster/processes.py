"""Processes, told apart by pid and start time: a pid alone may belong to somebody else by now."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .errors import LocalClusterError

PROC = Path("/proc")
SECONDS_AFTER_SIGKILL = 5.0


def stat_of(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on (state, parent, ...); none if there is no such process."""
    try:
        return (PROC / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return []


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it has ended, also while it is a zombie."""
    fields = stat_of(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def all_pids() -> list[int]:
    return [int(path.name) for path in PROC.iterdir() if path.name.isdigit()]


def command_of(pid: int) -> list[bytes]:
    """Its argv, as the process shows it; none if it has ended."""
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return [b""]


def environment_of(pid: int) -> list[bytes]:
    """The variables it was started with, as b"NAME=value"; none if it has ended."""
    try:
        return (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return []


def with_descendants(pid: int) -> list[int]:
    """This process and all below it."""
    children: dict[int, list[int]] = {}
    for each in all_pids():
        if fields := stat_of(each):
            children.setdefault(int(fields[1]), []).append(each)
    found, waiting = [], [pid]
    while waiting:
        current = waiting.pop()
        found.append(current)
        waiting += children.get(current, [])
    return found


def processes_of_jobs(slurm_conf: Path) -> list[int]:
    """Step daemons and tasks whose environment names this slurm.conf; they outlive their slurmd in ports mode."""
    ours = f"SLURM_CONF={slurm_conf}".encode()
    found = []
    for pid in all_pids():
        environment = environment_of(pid) if pid != os.getpid() else []
        of_a_job = command_of(pid)[0].startswith(b"slurmstepd") or any(
            variable.startswith(b"SLURM_JOB_ID=") for variable in environment
        )
        if of_a_job and ours in environment:
            found.append(pid)
    return found


def kill(pid: int) -> None:
    """Send SIGKILL, unless the process has ended by now."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_until(
    what: str,
    condition: Callable[[], bool],
    seconds: float,
    pause: float = 0.1,
    is_alive: Callable[[], bool] = lambda: True,
) -> None:
    """Wait for a condition.

    Args:
        what: what is waited for, for the message.
        condition: looked at every `pause` seconds.
        seconds: the longest to wait.
        pause: seconds.
        is_alive: whether the process that is to bring the condition about still runs.

    Raises:
        LocalClusterError: the time is up, or that process has ended.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        if not is_alive():
            raise LocalClusterError(f"{what} exited")
        time.sleep(pause)
    raise LocalClusterError(f"timed out after {seconds}s waiting for {what}")


class RecordedProcesses:
    """The processes that this cluster started, by name; procs.json in the state directory keeps them.

    Args:
        state: the cluster's directory.
    """

    def __init__(self, state: Path) -> None:
        self._path = state / "procs.json"
        self._recorded: dict[str, dict[str, int | None]] = (
            json.loads(self._path.read_text()) if self._path.exists() else {}
        )

    def names(self) -> list[str]:
        return list(self._recorded)

    def pid(self, name: str) -> int:
        """As it was started; it may have ended.

        Raises:
            KeyError: no process of this name was started.
        """
        pid = self._recorded[name]["pid"]
        assert pid is not None
        return pid

    def is_alive(self, name: str) -> bool:
        if name not in self._recorded:
            return False
        recorded = self._recorded[name]["start"]  # None: it ended before we could look
        return recorded is not None and start_time(self.pid(name)) == recorded

    def start(
        self, name: str, argv: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start a program in a session of its own, with its output appended to `log`, and record it."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                [str(word) for word in argv],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env=environment,
            )
        self._recorded[name] = {"pid": process.pid, "start": start_time(process.pid)}
        self._save()

    def wait_until(self, name: str, condition: Callable[[], bool], seconds: float, pause: float = 0.1) -> None:
        """Wait until a process that was started is of use.

        Raises:
            LocalClusterError: the time is up, or the process has ended.
        """
        wait_until(name, condition, seconds, pause, is_alive=lambda: self.is_alive(name))

    def end(self, name: str, seconds: float = 5.0) -> None:
        """Ask a process to end, kill it after so many seconds, and strike it off the record."""
        self._signal(name, signal.SIGTERM, seconds)
        self.kill(name)

    def kill(self, name: str) -> None:
        """End a process at once, and strike it off the record."""
        self._signal(name, signal.SIGKILL, SECONDS_AFTER_SIGKILL)
        self._recorded.pop(name, None)
        self._save()

    def _signal(self, name: str, number: signal.Signals, seconds: float) -> None:
        """Send a signal to a live process and wait up to so many seconds for its end."""
        if not self.is_alive(name):
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid(name), number)
        deadline = time.monotonic() + seconds
        while self.is_alive(name) and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):  # whoever restores a node is not its parent
                os.waitpid(self.pid(name), os.WNOHANG)
            time.sleep(0.02)

    def _save(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._recorded, indent=1))
        temporary.rename(self._path)
