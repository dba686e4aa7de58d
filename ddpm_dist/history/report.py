"""What happened to a run, from its status, its attempts and its metrics. No torch is imported here.

goodput   the share of the wall time of all attempts that went into steps that counted. The rest went into steps that
          were trained again after a kill (or are going to be), and into starting, saving, drawing previews and
          waiting for lost ranks. An attempt's time begins when it claims the run: the wait for a machine, the start
          of Python and the connection of the ranks come before.
lost      the steps of an attempt that were trained again: those after the checkpoint from which a later attempt
          went on. They are counted in metrics.jsonl, so up to train.log_every - 1 steps too few.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ddpm_dist.errors import ConfigError, DataError, ExitCode
from ddpm_dist.history.attempts import (
    AttemptRecord,
    as_count,
    as_number,
    as_text,
    as_time,
    read_records,
    requeued_job,
)
from ddpm_dist.history.nodes import Suspicion, suspicious_nodes, why_nobody
from ddpm_dist.run.directory import STATES, RunDirectory, no_run
from ddpm_dist.run.files import read_json
from ddpm_dist.tracking.journal import read_lines

RECENT_LINES = 50  # of metrics.jsonl, for the time that a step takes now


class Logged(NamedTuple):
    """What the report needs of a line of metrics.jsonl; time in seconds since 1970."""

    step: int
    time: float
    images_per_second: float | None


@dataclass(frozen=True)
class AttemptReport:
    """An attempt, and which of its steps counted.

    Attributes:
        record: what its file says.
        reached: the last step that it is known to have trained.
        lost: how many of its steps were trained again, or must be.
        seconds: from its start to its end, its last sign of life, or now.
        useful_seconds, lost_seconds: the parts of `seconds` that went into steps that counted, and into lost ones.
    """

    record: AttemptRecord
    reached: int | None
    lost: int
    seconds: float
    useful_seconds: float
    lost_seconds: float


@dataclass(frozen=True)
class Report:
    """What `python -m ddpm_dist.status` says; None for what cannot be known.

    Attributes:
        run: the path of the run directory.
        state: as in status.json, but "died" if the last attempt was killed or crashed before it could write one.
        step: the last step trained.
        target: the step at which the run is finished.
        saved_step: the step of the newest checkpoint, from which the next attempt goes on.
        reason: why the run is in this state; "" where nobody said so.
        seconds: wall time of all attempts.
        goodput, lost_share: shares of `seconds` that went into steps that counted, and into lost ones, in [0, 1].
        seconds_per_step: recent wall time of a step.
        steps_left, seconds_left: to the target, at the recent pace; None if the run is finished or cannot go on.
        suspicions: nodes on which attempts die.
        nodes_note: why no node is suspicious although attempts died.
        requeued_job: the id of the SLURM job that will go on with the run, since it was requeued.
    """

    run: str
    state: str
    step: int | None
    target: int | None
    saved_step: int | None
    reason: str
    attempts: list[AttemptReport]
    seconds: float
    goodput: float | None
    lost_share: float | None
    seconds_per_step: float | None
    steps_left: int | None
    seconds_left: float | None
    suspicions: list[Suspicion]
    nodes_note: str
    requeued_job: str | None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON; each attempt is one flat object."""
        attempts = []
        for each in self.attempts:
            flat = dataclasses.asdict(each)
            attempts.append(flat.pop("record") | flat)
        suspicions = [dataclasses.asdict(each) | {"advice": str(each)} for each in self.suspicions]
        return dataclasses.asdict(self) | {"attempts": attempts, "suspicions": suspicions}


def read_report(path: Path) -> Report:
    """The report of a run directory. Takes some seconds where a heartbeat must be watched for.

    Raises:
        DataError: there is no run.
        OSError: a file cannot be read.
    """
    directory = RunDirectory(path)
    status = read_json(directory.status_file)
    records = read_records(directory.attempts, status or {})
    if status is None and not records and not directory.config_file.exists():
        # A run whose only attempt failed before its first step has no config.yaml.
        raise no_run(path)
    logged, job = read_logged(directory.metrics_file), requeued_job(directory.slurm_log, records)
    return make_report(str(path), status or {}, records, logged, _batch_size(directory), requeued_job=job)


def _batch_size(directory: RunDirectory) -> int | None:
    try:
        return directory.read_config().data.batch_size
    except (ConfigError, DataError):  # the report says less then, and is right all the same
        return None


def read_logged(path: Path) -> dict[int, list[Logged]]:
    """Lines of metrics.jsonl by attempt, ascending in step; lines without sound numbers are left out."""
    found: dict[int, list[Logged]] = {}
    for record, _ in read_lines(path):
        attempt, step, when = as_count(record.get("attempt")), as_count(record["step"]), as_time(record.get("time"))
        if attempt is None or step is None or when is None:
            continue
        lines = found.setdefault(attempt, [])
        if not lines or step > lines[-1].step:
            lines.append(Logged(step, when, as_number(record.get("images_per_second"))))
    return found


def make_report(
    run: str,
    status: dict[str, Any],
    records: Sequence[AttemptRecord],
    logged: dict[int, list[Logged]],
    batch_size: int | None,
    now: float | None = None,
    requeued_job: str | None = None,
) -> Report:
    """The report of what was read.

    Args:
        run: the path of the run directory.
        status: the content of status.json; {} if there is none.
        records: every attempt, ascending.
        logged: lines of metrics.jsonl by attempt (`read_logged`).
        batch_size: data.batch_size, images a step over all ranks; None where not known.
        now: seconds since 1970; None: the present.
        requeued_job: the SLURM job that comes back, if slurm.log names one.
    """
    now = time.time() if now is None else now
    boundaries = kept_steps(records, status)
    attempts = [
        _attempt(record, logged.get(record.number, []), kept, batch_size, now)
        for record, kept in zip(records, boundaries, strict=True)
    ]
    state, reason = _state(records, status)
    saved, target = _saved(records, status), as_count(status.get("target")) or None
    reached = next((each.reached for each in reversed(attempts) if each.reached is not None), None)
    step = as_count(status.get("step")) if reached is None else reached
    pace = seconds_per_step(logged, batch_size)
    left = None
    hopeless = state == "failed" and records[-1:] and records[-1].exit_code == ExitCode.NO_PROGRESS
    if target is not None and state != "finished" and not hopeless:
        left = max(0, target - ((step if state == "running" else saved) or 0))
    seconds = sum(each.seconds for each in attempts)
    can_tell = seconds > 0 and batch_size is not None
    outcomes = [outcome for record in records if (outcome := record.outcome) is not None]
    suspicions = suspicious_nodes(outcomes)
    return Report(
        run=run,
        state=state,
        step=step,
        target=target,
        saved_step=saved,
        reason=reason,
        attempts=attempts,
        seconds=seconds,
        goodput=min(1.0, sum(each.useful_seconds for each in attempts) / seconds) if can_tell else None,
        lost_share=min(1.0, sum(each.lost_seconds for each in attempts) / seconds) if can_tell else None,
        seconds_per_step=pace,
        steps_left=left,
        seconds_left=None if left is None or pace is None else left * pace,
        suspicions=suspicions,
        nodes_note="" if suspicions else why_nobody(outcomes),
        requeued_job=None if state in ("running", "finished") else requeued_job,
    )


def _state(records: Sequence[AttemptRecord], status: dict[str, Any]) -> tuple[str, str]:
    """(state, reason) of the last attempt that began: status.json is out of date if that one was killed."""
    said, reason = as_text(status.get("state")), as_text(status.get("reason"))
    for record in reversed(records):
        if record.how in ("left", "unknown"):
            continue
        if record.how in ("running", "died"):
            return record.how, ""
        return record.how, record.reason or reason
    if said == "running":
        return ("died" if records else "unknown"), ""
    return (said if said in STATES else "unknown"), reason


def _saved(records: Sequence[AttemptRecord], status: dict[str, Any]) -> int | None:
    """The step of the newest checkpoint, from which the next attempt goes on."""
    begun = [record.saved_step for record in records if record.start_step is not None]
    return begun[-1] if begun else as_count(status.get("saved_step"))


def kept_steps(records: Sequence[AttemptRecord], status: dict[str, Any]) -> list[float]:
    """For each attempt the last of its steps that counts; later attempts trained the following ones again, or must."""
    begun = [record for record in records if record.start_step is not None]
    going_on = bool(begun) and begun[-1].how in ("running", "finished")
    boundary = math.inf if going_on else float(_saved(records, status) or 0)
    kept = []
    for record in reversed(records):
        kept.append(boundary)
        if record.start_step is not None:
            boundary = min(boundary, record.start_step)
    return kept[::-1]


def _attempt(
    record: AttemptRecord, lines: Sequence[Logged], kept: float, batch_size: int | None, now: float
) -> AttemptReport:
    known = [step for step in (record.start_step, record.saved_step) if step is not None] + [x.step for x in lines]
    reached = max(known, default=None)
    first = record.start_step if record.start_step is not None else (lines[0].step if lines else 0)
    end = now if record.how == "running" else record.last_sign
    if record.how == "died" and lines:
        end = max(end or 0, lines[-1].time)  # a line may be younger than the last heartbeat
    useful = lost = 0.0
    for before, line in zip([first, *(x.step for x in lines)], lines, strict=False):
        steps, speed = line.step - before, line.images_per_second
        if steps > 0 and speed and batch_size:
            seconds = steps * batch_size / speed
            share = min(1.0, max(0.0, (kept - before) / steps))
            useful, lost = useful + share * seconds, lost + (1 - share) * seconds
    return AttemptReport(
        record=record,
        reached=reached,
        lost=int(max(0, reached - max(first, kept))) if reached is not None else 0,
        seconds=max(0.0, end - record.started) if end is not None and record.started is not None else 0.0,
        useful_seconds=useful,
        lost_seconds=lost,
    )


def seconds_per_step(logged: dict[int, list[Logged]], batch_size: int | None) -> float | None:
    """Wall time of a step, saves and previews included, in the last attempt that logged; None where not known."""
    if not logged:
        return None
    lines = logged[max(logged)][-RECENT_LINES:]
    steps, seconds = lines[-1].step - lines[0].step, lines[-1].time - lines[0].time
    if steps > 0 and seconds > 0:
        return seconds / steps
    speed = lines[-1].images_per_second
    return batch_size / speed if speed and batch_size else None
