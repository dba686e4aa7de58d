"""The run directory: what a run is (config.yaml), how it fares (status.json), and whether it may go on."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ddpm_dist.config import Config, changes, load_config, to_yaml
from ddpm_dist.errors import ConfigError, DataError, ExitCode
from ddpm_dist.run.files import TEMPORARY, Fence, no_fence, read_json, replacing, write_json
from ddpm_dist.run.lease import Lease, slurm_restart

State = Literal["running", "preempted", "finished", "failed"]
STATES = frozenset(typing.get_args(State))


class RunDirectory:
    """Files of one run below run.root. Only rank 0 of the attempt that holds the lease writes.

    Args:
        path: run.root/run.name.

    Attributes:
        fence: called before anything is renamed into place; raises once another attempt has taken over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.status_file = path / "status.json"
        self.metrics_file = path / "metrics.jsonl"
        self.mlflow_file = path / "mlflow.json"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.attempts = path / "attempts"
        self.fence: Fence = no_fence

    @contextlib.contextmanager
    def its_errors(self) -> Iterator[None]:
        """What the file system says inside, as a ConfigError about run.root."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # pathlib raises RuntimeError for links in a circle
            raise ConfigError(f"run.root={self.path.parent}: cannot be used ({error})") from None

    def create(self) -> None:
        """Make the folder and prove that it can be written.

        Raises:
            ConfigError: it cannot; or a symbolic link leads out of run.root.
        """
        root = self.path.parent
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            probe = self.path / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"run.root={root}: cannot write {self.path} ({error.strerror}); give a writable folder"
            ) from None
        self.refuse_links()

    def sweep(self) -> None:
        """Remove the temporary files of killed attempts. The shipper's are its own: it may be at work."""
        for folder in (self.path, self.samples, self.attempts):
            for leftover in folder.glob(f".*{TEMPORARY}"):
                if not leftover.name.startswith(f".{self.mlflow_file.name}"):
                    leftover.unlink(missing_ok=True)

    def refuse_links(self) -> None:
        """Raises ConfigError where the run directory or a folder inside is a link that leads out of run.root."""
        root = self.path.parent.resolve()
        for folder in (self.path, self.checkpoints, self.samples, self.attempts):
            if folder.exists() and not folder.resolve().is_relative_to(root):
                raise ConfigError(f"run.name: {folder} is a symbolic link that leads out of run.root={root}")

    def read_status(self) -> dict[str, Any]:
        """status.json, or {} before the first attempt, and where it is damaged: the checkpoints decide then."""
        status = read_json(self.status_file) or {}
        types = {"attempt": int, "saved_step": int | None, "pid": int, "host": str}
        sound = all(isinstance(status.get(name), type_) for name, type_ in types.items())
        return status if sound and status.get("state") in STATES else {}

    def read_config(self) -> Config:
        """The config of this run.

        Raises:
            DataError: there is no run here.
            ConfigError: config.yaml is not one.
        """
        if not self.config_file.exists():
            raise DataError(f"{self.path}: no run here (no config.yaml)")
        return load_config(self.config_file)

    def reconcile(self, config: Config) -> list[str]:
        """Compare with the config that this run was started with; the new one is saved by `write_config`.

        Returns:
            the differences that may be, as `key: old -> new`.

        Raises:
            ConfigError: a key that shapes what is learned differs; all such keys are named.
        """
        return self.refuse_changes(self.read_config(), config) if self.config_file.exists() else []

    def refuse_changes(self, old: Config, new: Config) -> list[str]:
        """Raises ConfigError if a key differs that shapes what is learned; returns the other differences."""
        refused, free = changes(old, new)
        if refused:
            raise ConfigError(
                f"{self.path} was started with another config: {'; '.join(refused)}. "
                "Give the old values to go on, or another run.name to start anew"
            )
        return free

    def write_config(self, config: Config) -> None:
        with replacing(self.config_file, self.fence) as file:
            file.write(to_yaml(config).encode())


@dataclass
class Attempt:
    """One life of a run, from start to exit; keeps status.json true.

    Attributes:
        number: from 1.
        target: the step at which the run is finished.
        saved_step: the newest committed checkpoint's step; None before the first. A later attempt that finds
            no checkpoint although one was saved refuses to start at 0.
        lease: the right to write; None on other ranks than 0.
        without_progress: how many attempts before this one ended, one after the other, where they had started.
    """

    directory: RunDirectory
    number: int
    target: int
    world_size: int
    saved_step: int | None
    lease: Lease | None = None
    without_progress: int = 0

    def committed(self, step: int) -> None:
        """A checkpoint of this step counts from now on."""
        self.saved_step, self.without_progress = step, 0
        if self.lease is not None:
            self.lease.note(step=step)
        self.write("running", step, "training")

    def write(self, state: State, step: int, reason: str, exit_code: ExitCode | None = None) -> None:
        """Raises OSError if status.json cannot be written; the old one stays then."""
        write_json(
            self.directory.status_file,
            {
                "state": state,
                "step": step,
                "attempt": self.number,
                "reason": reason,
                "exit_code": None if exit_code is None else int(exit_code),
                "target": self.target,
                "saved_step": self.saved_step,
                "without_progress": self.without_progress,
                "world_size": self.world_size,
                "time": time.time(),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                **slurm_restart(),
            },
            self.directory.fence,
        )


def count_without_progress(attempts: list[dict[str, Any]]) -> int:
    """How many of the last attempts, one after the other, saved nothing beyond where they had started."""
    count = 0
    for facts in reversed(attempts):
        if facts.get("step") != facts.get("start_step"):
            break
        count += 1
    return count
