"""The attempts log, read after the fact: who trained where, from which step to which, and how it ended.

The files may be old, damaged or edited by hand: what is not what it should be counts as not known.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ddpm_dist.errors import ExitCode
from ddpm_dist.history.nodes import Outcome
from ddpm_dist.run import lease
from ddpm_dist.run.directory import STATES
from ddpm_dist.run.files import read_json

WATCH_SECONDS = 2.5 * lease.BEAT_SECONDS
How = Literal["running", "finished", "preempted", "failed", "died", "left", "unknown"]


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt as the log tells it; None for what is not known. Times in seconds since 1970, on its own clock.

    Attributes:
        last_sign: when it ended; else its last known sign of life.
        nodes: of all ranks, rank 0's first; () where not known.
        failed_node: where the rank sat that is known to be at fault.
        saved_step: its last checkpoint, or the one that it began with.
        how: "died" without a word; "left" without having begun; or "unknown".
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
        """What it says about its nodes: nothing while it runs, and nothing where the user or the weights erred."""
        died = self.how == "died" or (self.how == "failed" and self.exit_code == ExitCode.SOFTWARE)
        if died or self.how in ("finished", "preempted"):
            return Outcome(self.nodes, died, self.failed_node)
        return None


def read_records(directory: Path, status: dict[str, Any]) -> list[AttemptRecord]:
    """Every attempt in `attempts/`, ascending. Takes some seconds where it must watch for a heartbeat.

    Args:
        status: the content of status.json, for attempts that could not leave word in their own file.

    Raises:
        OSError: a file cannot be read.
    """
    paths = {int(path.stem): path for path in directory.glob("*.json") if path.stem.isdecimal()}
    records = []
    for number, path in sorted(paths.items()):
        facts = read_json(path)
        if facts is not None and facts.get("ended") is None and status.get("attempt") == number:
            facts = _with_status(facts, status)
        newest = number == max(paths)  # who was taken over writes nothing any more
        alive = facts is not None and newest and "state" not in facts and is_alive(path, facts)
        records.append(record_of(number, facts, alive))
    return records


def _with_status(facts: dict[str, Any], status: dict[str, Any]) -> dict[str, Any]:
    """An attempt that found no room for its last word in the log may have said it in status.json."""
    if as_text(status.get("state")) not in STATES - {"running"}:
        return facts
    said = {name: status.get(name) for name in ("state", "reason", "exit_code")}
    return facts | said | {"ended": status.get("time")}


def is_alive(path: Path, facts: dict[str, Any]) -> bool:
    """Whether the holder of a claim lives: by its process if it is on this machine, and by its heartbeat.

    The file's age is trusted only to say yes at once: clocks of other machines may be wrong, so before the answer
    is no the heartbeat is watched.
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
    """What a file of the attempts log says; facts are None where it is no JSON object."""
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
    state = facts.get("state")
    if state == "finished" or state == "preempted" or state == "failed":
        return state
    if facts.get("ended") is not None:
        return "left"
    return "running" if alive else "died"


def _nodes(facts: dict[str, Any], world_size: int | None) -> tuple[str, ...]:
    nodes = facts.get("nodes")
    names = [as_text(node) for node in nodes] if isinstance(nodes, list) else []
    if names and all(names):
        return tuple(dict.fromkeys(names))
    host = as_text(facts.get("host"))  # rank 0's: all that older attempts say
    return (host,) if host and world_size == 1 else ()


def as_count(value: Any) -> int | None:
    """A step or another number >= 0; else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**15 else None


def as_number(value: Any) -> float | None:
    """A finite number >= 0; else None."""
    sound = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e15
    return float(value) if sound and math.isfinite(value) else None


def as_time(value: Any) -> float | None:
    """Seconds since 1970 that a calendar knows; else None."""
    number = as_number(value)
    return number if number is not None and number < 2.0**36 else None


def as_text(value: Any) -> str:
    """One printable line; "" for what is no text."""
    line = " ".join(value.split()) if isinstance(value, str) else ""
    return "".join(char for char in line if char.isprintable())
