"""Waits for submitted runs: prints rank 0's log as it grows, and says how each run ended. Needs no sacct."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_dist.errors import ExitCode
from ddpm_dist.run.directory import RunDirectory

POLL_SECONDS = 1.0
_OVER = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL", "DEADLINE"}
)


def follow(job: Any, run: Path) -> int:
    """Print the log of a submitit job until the job is over, and return the run's exit code. Ctrl-C only stops this."""
    log, shown = Path(job.paths.stdout), 0
    try:
        while True:
            over = is_over(job)
            if log.exists():
                with log.open("rb") as file:
                    shown = min(shown, log.stat().st_size)
                    file.seek(shown)
                    new = file.read()
                shown += len(new)
                sys.stdout.write(new.decode(errors="replace"))
                sys.stdout.flush()
            if over:
                return how_it_ended(run)
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print(f"\nno longer followed; job {job.job_id} goes on", flush=True)
        return 0


def follow_all(jobs: Sequence[tuple[Any, Path]]) -> int:
    """Say how each run of a sweep ended, as soon as it has; returns the first exit code that is not 0, else 0."""
    waiting, codes = list(jobs), []
    try:
        while waiting:
            for job, run in [pair for pair in waiting if is_over(pair[0])]:
                waiting.remove((job, run))
                codes.append(how_it_ended(run))
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print(f"\nno longer followed; {len(waiting)} job(s) go on", flush=True)
        return 0
    return next((code for code in codes if code), 0)


def is_over(job: Any) -> bool:
    """Whether a job is over. One that SLURM has forgotten is; one that waits for its restart is not."""
    if "SlurmJob" not in type(job).__name__:
        return bool(job.done())
    argv = ("scontrol", "show", "job", "--oneliner", str(job.job_id))
    try:
        asked = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return False
    if asked.returncode:
        return "Invalid job id" in asked.stderr  # else the controller does not answer just now
    state = next((field for field in asked.stdout.split() if field.startswith("JobState=")), "")
    return state.removeprefix("JobState=") in _OVER


def how_it_ended(run: Path) -> int:
    """Print how the run ended. Returns the exit code in status.json; 70 where a killed attempt wrote none."""
    status = RunDirectory(run).read_status()
    print(f"{run}: {status.get('state', 'did not start')} at step {status.get('step', 0)}: {status.get('reason', '')}")
    code = status.get("exit_code")
    return code if isinstance(code, int) else int(ExitCode.SOFTWARE)
