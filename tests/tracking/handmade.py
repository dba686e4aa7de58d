"""Run directories as a trainer leaves them, without the training."""

from __future__ import annotations

from pathlib import Path

from harness import TINY

from ddpm_dist.config import load_config
from ddpm_dist.errors import ExitCode
from ddpm_dist.run.directory import Attempt, RunDirectory
from ddpm_dist.tracking.journal import Journal


def make_run(root: Path, name: str, *overrides: str, steps: int = 20, state: str = "finished") -> RunDirectory:
    config = load_config(
        None, [*TINY, f"run.root={root}", f"run.name={name}", f"tracking.experiment={name}", *overrides]
    )
    directory = RunDirectory(config.directory)
    directory.create()
    directory.write_config(config)
    append(directory, range(1, steps + 1), attempt=1)
    set_state(directory, state, steps)
    return directory


def set_state(directory: RunDirectory, state: str, step: int) -> None:
    exit_code = ExitCode.FINISHED if state == "finished" else None
    Attempt(directory, 1, step, 1, step).write(state, step, "", exit_code)  # type: ignore[arg-type]


def append(directory: RunDirectory, steps: range, attempt: int, **changes: float) -> None:
    journal = Journal(directory.metrics_file)
    for step in steps:
        record = {"step": step, "epoch": step / 10, "attempt": attempt, "time": 1.7e9 + attempt * 1e4 + step / 3}
        record |= {"loss": 1 / step + attempt, "lr": 1e-4 / step, "grad_norm": 0.1 + step, "images_per_second": 7.0}
        record["skipped"] = 0
        journal.append(record | changes)
    journal.close()
