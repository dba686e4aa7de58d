"""Run directories as a trainer leaves them, without the training."""

from __future__ import annotations

from pathlib import Path

from harness import TINY, write_status

from ddpm_dist.config import load_config, to_yaml
from ddpm_dist.errors import ExitCode
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.tracking.journal import Journal


def make_run(root: Path, name: str, *overrides: str, steps: int = 20, state: str = "finished") -> RunDirectory:
    config = load_config(
        None, [*TINY, f"run.root={root}", f"run.name={name}", f"tracking.experiment={name}", *overrides]
    )
    directory = RunDirectory(config.directory)
    directory.create()
    directory.config_file.write_text(to_yaml(config))
    append(directory, range(1, steps + 1), attempt=1)
    set_state(directory, state, steps)
    return directory


def set_state(directory: RunDirectory, state: str, step: int) -> None:
    exit_code = ExitCode.FINISHED if state == "finished" else None
    write_status(directory.path, state, step, exit_code=exit_code)


def append(directory: RunDirectory, steps: range, attempt: int, **changes: float) -> None:
    journal = Journal(directory.metrics_file)
    for step in steps:
        record = {"step": step, "epoch": step / 10, "attempt": attempt, "time": 1.7e9 + attempt * 1e4 + step / 3}
        record |= {"loss": 1 / step + attempt, "lr": 1e-4 / step, "grad_norm": 0.1 + step, "images_per_second": 7.0}
        record["skipped"] = 0
        journal.append(record | changes)
    journal.close()
