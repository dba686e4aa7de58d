"""One writer per run directory: every attempt claims the next number, and only the highest number may write.

The claim. Attempt 3 claims the run by putting the file `attempts/00003.json` in place with link(2), which succeeds for
one process only, on network file systems too. The holder of a claim counts a heartbeat up in its file. The next
attempt may claim as soon as the holder has ended, is a dead process of this machine, belongs to an earlier restart of
this SLURM job, or has not counted for STALE_SECONDS of our own clock (the clocks of other hosts are not compared).

The fence. Whether this process may still write is decided in one place, `Lease.check`. It is handed as `fence` to all
that write files of the run (journal, checkpoints, status.json, config.yaml, pictures), and they call it right before
each write or rename. A holder that was only asleep, or that goes on computing on a node whose slurmd died, finds the
file of a higher number there and writes nothing any more. Between the check and the rename lies an instant: a thread
that is stopped in that very instant still puts one whole file in place when it wakes up, and no second one.

A POSIX lock would not do: a stopped process keeps it, and network file systems may grant it twice.
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
    """The right of one attempt to write into a run directory. `claim` makes it; `check` says whether it still holds.

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
        """Which attempt this is, from 1."""
        return int(self._facts["attempt"])

    def check(self) -> None:
        """The fence: call it before a file is put in place. Raises TakenOver if a later attempt has begun."""
        check_claim(self._path.parent, self.number)

    def note(self, **facts: Any) -> None:
        """Add facts to the attempt's file."""
        with self._writing:
            self._facts |= facts
            self._write()

    def release(self, **facts: Any) -> None:
        """Write down that and how the attempt ended, so that the next attempt need not wait."""
        self._leave.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # perhaps there is no space; then the next attempt finds a dead process
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


def claim(
    directory: Path,
    facts: dict[str, Any],
    at_least: int,
    wait: Callable[[float], None] = time.sleep,
    refusal: tuple[str, str] = ("is being trained", "give another run.name"),
) -> Lease:
    """Become the one attempt that writes; waits while it is not clear whether another one is alive.

    Args:
        directory: `attempts/`; made if it is not there.
        facts: plain JSON about this attempt, in addition to what the lease itself needs.
        at_least: the lowest number to claim, where earlier attempts are known from elsewhere.
        wait: called with the seconds to wait; may raise an exception, which ends the waiting.
        refusal: what a living attempt is doing, and what may be done instead of stopping it; for the message.

    Raises:
        ConfigError: another attempt is alive; the message says where.
        OSError: the folder cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    while True:
        newest = _newest(directory)
        holder = _living_holder(directory / _name(newest), wait) if newest else None
        if holder is not None:
            raise ConfigError(
                f"{directory.parent}: {refusal[0]} by attempt {holder.get('attempt')} ({_holder(holder)}); "
                f"stop that one first, or {refusal[1]}"
            )
        number = max(newest + 1, at_least)
        claimed = {"attempt": number, **_identity(), "started": time.time(), "beat": 0, "ended": None, **facts}
        path, private = directory / _name(number), directory / f".{socket.gethostname()}-{os.getpid()}.claim"
        private.write_bytes(_text(claimed))
        try:
            os.link(private, path)
            _sweep(directory)
            return Lease(path, claimed)
        except FileExistsError:
            continue  # another process was first: look whether it is alive
        finally:
            private.unlink(missing_ok=True)


def check_claim(directory: Path, number: int) -> None:
    """`Lease.check` for the other ranks of an attempt, which know its number from rank 0.

    Args:
        directory: `attempts/`.
        number: of this attempt.

    Raises:
        TakenOver: a later attempt has begun.
    """
    after = directory / _name(number + 1)
    if after.exists():
        raise TakenOver(
            f"{directory.parent}: attempt {number} was taken over by attempt {number + 1} "
            f"({_holder(read_json(after) or {})}); this one writes nothing any more"
        )


def _sweep(directory: Path) -> None:
    """Remove what processes left behind that died while they made their claim."""
    for path in directory.glob(".*.claim"):
        if not seems_alive(read_json(path) or {}):
            path.unlink(missing_ok=True)


def read_attempts(directory: Path) -> list[dict[str, Any]]:
    """What is known of every attempt, ascending."""
    found = (read_json(path) for path in sorted(directory.glob("*.json")))
    return [facts for facts in found if facts is not None]


def seems_alive(facts: dict[str, Any]) -> bool:
    """False if the holder has ended, is a dead process of this machine, or of an earlier restart of this SLURM job.

    True where that cannot be known.

    Args:
        facts: the content of the holder's file.
    """
    if facts.get("ended") is not None:
        return False
    here = _identity()
    if here["slurm_restart"] is not None and facts.get("slurm_job") == here["slurm_job"]:
        # SLURM restarted the job, so it has given the earlier start up; its node may only be cut off.
        earlier = facts.get("slurm_restart")
        if isinstance(earlier, int) and earlier < here["slurm_restart"]:
            return False
    if any(facts.get(name) != here[name] for name in ("host", "boot", "pid_namespace")):
        return True
    return _start_time(facts.get("pid")) == facts.get("pid_started")


def is_held(directory: Path, wait: Callable[[float], None] = time.sleep) -> bool:
    """Whether the newest attempt is alive. To say yes takes a heartbeat, to say no up to STALE_SECONDS."""
    newest = _newest(directory)
    return bool(newest) and _living_holder(directory / _name(newest), wait) is not None


def _living_holder(path: Path, wait: Callable[[float], None]) -> dict[str, Any] | None:
    """Watch a claim until its heartbeat is seen (then return its facts), or its holder is gone (then None)."""
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
    """Which process this is. A pid alone does not say: it is valid within one boot and one PID namespace, and the
    kernel gives it to other processes later, which then differ in their start time.
    """
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
    """Which SLURM job this is, and how often SLURM has restarted it; None outside SLURM."""
    count = os.environ.get("SLURM_RESTART_COUNT", "0")  # not set before the first restart
    job = os.environ.get("SLURM_JOB_ID")
    return {"slurm_job": job, "slurm_restart": int(count) if job and count.isdigit() else None}


def _start_time(pid: Any) -> int | None:
    """When a process started, in clock ticks since boot; None if there is no such process, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):  # ValueError: somebody edited the pid into something that no file can be called
        return None
    return None if fields[0] in "ZX" else int(fields[19])
