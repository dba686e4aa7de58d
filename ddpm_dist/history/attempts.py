"""The files in `attempts/`, read afterwards: where each attempt trained, from which step to which, how it ended.

Whether the SLURM job of the last attempt comes back is in slurm.log, which slurm/requeue.sh writes.

The files may be old, damaged or edited by hand: a value that cannot be right counts as not known.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ddpm_dist.errors import ExitCode
from ddpm_dist.history.nodes import Outcome
from ddpm_dist.run import lease
from ddpm_dist.run.files import read_json

WATCH_SECONDS = 2.5 * lease.BEAT_SECONDS
ENDINGS: tuple[Literal["finished", "preempted", "failed"], ...] = ("finished", "preempted", "failed")
How = Literal["running", "finished", "preempted", "failed", "died", "left", "unknown"]


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt as its file tells it; None for what is not known. Times in seconds since 1970, by its own clock.

    Attributes:
        number: from 1.
        how: a state of status.json; "died" if it ended without writing one; "left" if it ended before it began to
            train; "unknown" if its file is damaged.
        last_sign: when it ended; if it did not say so, when its last known heartbeat was.
        nodes: of all ranks, rank 0's first; () where not known.
        failed_node: the node of the rank that is known to be at fault.
        start_step: the step from which it went on.
        saved_step: the step of its last checkpoint, or of the one that it began with.
    """

    number: int
    how: How
    reason: str = ""
    exit_code: int | None = None
    started: float | None = None
    last_sign: float | None = None
    world_size: int | None = None
    nodes: tuple[str, ...] = ()
    failed_node: str | None = None
    start_step: int | None = None
    saved_step: int | None = None

    @property
    def outcome(self) -> Outcome | None:
        """What this attempt says about its nodes.

        None while it runs, and where it failed for a reason that has nothing to do with nodes: a wrong config,
        unusable data, weights that diverged.
        """
        died = self.how == "died" or (self.how == "failed" and self.exit_code == ExitCode.SOFTWARE)
        if died or self.how in ("finished", "preempted"):
            return Outcome(self.nodes, died, self.failed_node)
        return None


def read_records(directory: Path, status: dict[str, Any]) -> list[AttemptRecord]:
    """Every attempt in `attempts/`, ascending. Takes some seconds where a heartbeat must be watched for.

    Args:
        directory: the `attempts/` folder.
        status: the content of status.json; it says how an attempt ended that could not write so into its own file.

    Raises:
        OSError: a file cannot be read.
    """
    paths = {int(path.stem): path for path in directory.glob("*.json") if path.stem.isdecimal()}
    records = []
    for number, path in sorted(paths.items()):
        facts = read_json(path)
        if facts is not None and facts.get("ended") is None and status.get("attempt") == number:
            facts = _with_status(facts, status)
        newest = number == max(paths)  # an attempt that was taken over writes nothing any more
        alive = facts is not None and newest and "state" not in facts and is_alive(path, facts)
        records.append(record_of(number, facts, alive))
    return records


def requeued_job(slurm_log: Path, records: Sequence[AttemptRecord]) -> str | None:
    """The id of the SLURM job that comes back and goes on with the run; None if none does, as far as slurm.log says.

    SLURM is not asked: the job may have been cancelled since.

    Args:
        slurm_log: a line of KEY=VALUE words for the beginning and for the end of each attempt of a job.
        records: every attempt, ascending. If one has begun since the last line, that line says nothing about it.
    """
    try:
        lines = slurm_log.read_text(errors="replace").splitlines()
    except OSError:
        return None
    last = dict(word.partition("=")[::2] for word in lines[-1].split()) if lines else {}
    if last.get("next") != "again" or not last.get("time", "").isdecimal():
        return None
    begun = max((record.started for record in records if record.started is not None), default=0.0)
    return as_text(last.get("job")) or None if int(last["time"]) + 1 >= begun else None


def _with_status(facts: dict[str, Any], status: dict[str, Any]) -> dict[str, Any]:
    """The facts of an attempt, with how it ended according to status.json, where that says so."""
    if as_text(status.get("state")) not in ENDINGS:
        return facts
    said = {name: status.get(name) for name in ("state", "reason", "exit_code")}
    return facts | said | {"ended": status.get("time")}


def is_alive(path: Path, facts: dict[str, Any]) -> bool:
    """Whether an attempt still runs: by its process if that is on this machine, and by its heartbeat.

    A file that was written lately means yes, at once. An old file does not mean no, since clocks of other machines
    may be wrong: then the heartbeat is watched for WATCH_SECONDS.

    Args:
        path: the attempt's file.
        facts: its content.
    """
    if not lease.seems_alive(facts):
        return False
    if abs(time.time() - path.stat().st_mtime) < lease.STALE_SECONDS:
        return True
    seen, since = path.read_bytes(), time.monotonic()
    while time.monotonic() - since < WATCH_SECONDS:
        time.sleep(lease.POLL_SECONDS)
        if path.read_bytes() != seen:
            return True
    return False


def record_of(number: int, facts: dict[str, Any] | None, alive: bool) -> AttemptRecord:
    """What an attempt's file says.

    Args:
        facts: the content of the file; None where it is not a JSON object.
        alive: whether the attempt still runs.
    """
    if facts is None:
        return AttemptRecord(number, "unknown", reason="its file in attempts/ is damaged")
    started, ended = as_time(facts.get("started")), as_time(facts.get("ended"))
    world_size, beats = as_count(facts.get("world_size")), as_count(facts.get("beat"))
    if ended is None and started is not None:
        ended = started + (beats or 0) * lease.BEAT_SECONDS
    return AttemptRecord(
        number=number,
        how=_how(facts, alive),
        reason=as_text(facts.get("reason")),
        exit_code=as_count(facts.get("exit_code")),
        started=started,
        last_sign=ended,
        world_size=world_size,
        nodes=_nodes(facts, world_size),
        failed_node=as_text(facts.get("failed_node")) or None,
        start_step=as_count(facts.get("start_step")),
        saved_step=as_count(facts.get("step")),
    )


def _how(facts: dict[str, Any], alive: bool) -> How:
    for said in ENDINGS:
        if facts.get("state") == said:
            return said
    if facts.get("ended") is not None:
        return "left"
    return "running" if alive else "died"


def _nodes(facts: dict[str, Any], world_size: int | None) -> tuple[str, ...]:
    nodes = facts.get("nodes")
    names = [as_text(node) for node in nodes] if isinstance(nodes, list) else []
    if names and all(names):
        return tuple(dict.fromkeys(names))
    host = as_text(facts.get("host"))  # rank 0's; files of older versions name no other node
    return (host,) if host and world_size == 1 else ()


def as_count(value: Any) -> int | None:
    """A step or another whole number >= 0; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**15 else None


def as_number(value: Any) -> float | None:
    """A finite number >= 0; None for anything else."""
    sound = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e15
    return float(value) if sound and math.isfinite(value) else None


def as_time(value: Any) -> float | None:
    """Seconds since 1970 that can be shown as a date; None for anything else."""
    number = as_number(value)
    return number if number is not None and number < 2.0**36 else None


def as_text(value: Any) -> str:
    """One printable line; "" for anything that is not text."""
    line = " ".join(value.split()) if isinstance(value, str) else ""
    return "".join(char for char in line if char.isprintable())
