"""One writer per run directory: every attempt claims the next number, and only the highest number may write.

An attempt's claim is the file `attempts/00003.json`, put in place by link(2), which succeeds for one process only, on
network file systems too. The holder counts a heartbeat up in it. A claim is free when its holder has ended, is a
dead process of this machine, is an earlier life of this SLURM job, or has not counted for STALE_SECONDS of our own
clock (clocks of other hosts are not compared). Who was only asleep, or lives on where only slurmd died, finds a
higher number and writes nothing any more.

A POSIX lock would say less: a stopped process keeps it, and network file systems may grant it twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpm_dist.errors import ConfigError, TakenOver
from ddpm_dist.run.files import read_json, replacing

BEAT_SECONDS = 2.0
STALE_SECONDS = 20.0
POLL_SECONDS = 0.2


class Lease:
    """The right of one attempt to write into a run directory. Made by `claim`.

    Args:
        path: `attempts/00003.json`, which is in place.
        facts: its content.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self._path, self._facts = path, facts
        self._next = path.with_name(_name(self.number + 1))
        self._leave, self._writing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")
        self._thread.start()

    @property
    def number(self) -> int:
        return int(self._facts["attempt"])

    def check(self) -> None:
        """Call it before anything is renamed into place. Raises TakenOver if a later attempt has begun."""
        if self._next.exists():
            other = read_json(self._next) or {}
            raise TakenOver(
                f"{self._path.parent.parent}: attempt {self.number} was taken over by attempt {self.number + 1} "
                f"({_holder(other)}); this one writes nothing any more"
            )

    def note(self, **facts: Any) -> None:
        """Add facts to the attempt's file."""
        with self._writing:
            self._facts |= facts
            self._write()

    def release(self, **facts: Any) -> None:
        """Say how the attempt ended; whoever comes next need not wait."""
        self._leave.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # no space, perhaps: then the next attempt finds a dead holder
            self.note(ended=time.time(), **facts)

    def _beat(self) -> None:
        while not self._leave.wait(BEAT_SECONDS):
            if self._next.exists():
                return
            with contextlib.suppress(OSError), self._writing:
                self._facts["beat"] += 1
                self._write()

    def _write(self) -> None:
        with replacing(self._path, durable=False) as file:
            file.write(_text(self._facts))


def claim(directory: Path, facts: dict[str, Any], at_least: int, wait: Callable[[float], None] = time.sleep) -> Lease:
    """Become the one attempt that writes.

    Args:
        directory: `attempts/`; made if it is not there.
        facts: plain JSON about this attempt, beside what the lease itself needs.
        at_least: the lowest number to claim, where earlier attempts are known from elsewhere.
        wait: called with seconds; may raise to give up.

    Raises:
        ConfigError: another attempt is alive; says whose.
        OSError: the folder cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    while True:
        newest = _newest(directory)
        holder = _living_holder(directory / _name(newest), wait) if newest else None
        if holder is not None:
            raise ConfigError(
                f"{directory.parent}: is being trained by attempt {holder.get('attempt')} ({_holder(holder)}); "
                "stop that one first, or give another run.name"
            )
        number = max(newest + 1, at_least)
        facts = {"attempt": number, **_identity(), "started": time.time(), "beat": 0, "ended": None, **facts}
        path, private = directory / _name(number), directory / f".{socket.gethostname()}-{os.getpid()}.claim"
        private.write_bytes(_text(facts))
        try:
            os.link(private, path)
            _sweep(directory)
            return Lease(path, facts)
        except FileExistsError:
            continue  # another was first: is it alive?
        finally:
            private.unlink(missing_ok=True)


def _sweep(directory: Path) -> None:
    """Remove the claims of processes that died while they made them."""
    for path in directory.glob(".*.claim"):
        if not seems_alive(read_json(path) or {}):
            path.unlink(missing_ok=True)


def read_attempts(directory: Path) -> list[dict[str, Any]]:
    """What is known of every attempt, ascending."""
    found = (read_json(path) for path in sorted(directory.glob("*.json")))
    return [facts for facts in found if facts is not None]


def seems_alive(facts: dict[str, Any]) -> bool:
    """False if the holder has ended, is a dead process of this machine or an earlier life of this SLURM job.

    True where that cannot be known.
    """
    if facts.get("ended") is not None:
        return False
    here = _identity()
    if here["slurm_restart"] is not None and facts.get("slurm_job") == here["slurm_job"]:
        # SLURM has started us anew, so it takes that life for dead: it may be one whose node was cut off.
        earlier = facts.get("slurm_restart")
        if isinstance(earlier, int) and earlier < here["slurm_restart"]:
            return False
    if any(facts.get(name) != here[name] for name in ("host", "boot", "pid_namespace")):
        return True
    return _start_time(facts.get("pid")) == facts.get("pid_started")


def is_held(directory: Path, wait: Callable[[float], None] = time.sleep) -> bool:
    """Whether the newest attempt is alive. Takes a heartbeat to say yes, and up to STALE_SECONDS to say no."""
    newest = _newest(directory)
    return bool(newest) and _living_holder(directory / _name(newest), wait) is not None


def _living_holder(path: Path, wait: Callable[[float], None]) -> dict[str, Any] | None:
    """Watches a claim until its heartbeat is seen (then its facts), or the holder is gone (then None)."""
    seen, since = path.read_bytes(), time.monotonic()
    while time.monotonic() - since <= STALE_SECONDS:
        facts = read_json(path) or {}
        if facts and not seems_alive(facts):
            return None
        if path.read_bytes() != seen:
            return facts
        wait(POLL_SECONDS)
    return None


def _newest(directory: Path) -> int:
    return max((int(path.stem) for path in directory.glob("*.json") if path.stem.isdigit()), default=0)


def _name(number: int) -> str:
    return f"{number:05d}.json"


def _text(facts: dict[str, Any]) -> bytes:
    return (json.dumps(facts, indent=2) + "\n").encode()


def _holder(facts: dict[str, Any]) -> str:
    job = f", SLURM job {facts['slurm_job']}" if facts.get("slurm_job") else ""
    return f"host {facts.get('host')}, pid {facts.get('pid')}{job}"


def _identity() -> dict[str, Any]:
    """Which process this is: a pid means something only within one boot and one PID namespace, and is used again."""
    pid = os.getpid()
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else None,
        "pid_namespace": os.readlink(namespace) if namespace.exists() else None,
        "pid": pid,
        "pid_started": _start_time(pid),
        **slurm_restart(),
    }


def slurm_restart() -> dict[str, Any]:
    """Which job this is, and how often SLURM has started it anew; None outside SLURM."""
    count = os.environ.get("SLURM_RESTART_COUNT", "0")  # not set in a job's first life
    job = os.environ.get("SLURM_JOB_ID")
    return {"slurm_job": job, "slurm_restart": int(count) if job and count.isdigit() else None}


def _start_time(pid: Any) -> int | None:
    """In clock ticks since boot; None if there is no such process, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):  # ValueError: edited by hand into what is no name of a file
        return None
    return None if fields[0] in "ZX" else int(fields[19])
