"""The run directory: where a run's files lie, what config.yaml and status.json say, and whether the run may go on."""

from __future__ import annotations

import contextlib
import difflib
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ddpm_dist.config import Config, changes, load_config
from ddpm_dist.errors import ConfigError, DataError
from ddpm_dist.run.files import TEMPORARY, read_json

State = Literal["running", "preempted", "finished", "failed"]
STATES = frozenset(typing.get_args(State))


def is_weights_file(path: Path) -> bool:
    """Whether the path is a file of exported weights, by its name, *.safetensors."""
    return path.suffix == ".safetensors" and path.is_file()


def no_run(path: Path) -> DataError:
    """The error for a path at which there is no run. Its message says where there are runs, if any are near."""
    if _is_run(path):
        return DataError(f"{path}: no config.yaml yet; `python -m ddpm_dist.status {path}` says how far this run came")
    inside = next((parent for parent in path.parents if _is_run(parent)), None)
    if inside is not None:
        return DataError(f"{path}: is a part of a run; give the run directory, {inside}")
    if path.exists():
        what = "no run here (no config.yaml, status.json or attempts)"
        return DataError(f"{path}: {what}{_listed(_runs_in(path))}")
    runs = _runs_in(path.parent)
    near = difflib.get_close_matches(str(path), map(str, runs), n=1)
    hint = f"; did you mean {near[0]}?" if near else _listed(runs)
    return DataError(f"{path}: no such run directory{hint}")


def _is_run(path: Path) -> bool:
    return (path / "attempts").is_dir() or (path / "status.json").is_file()


def _runs_in(folder: Path) -> list[Path]:
    """The runs of a folder, the newest first."""
    return sorted(filter(_is_run, folder.glob("*")), key=lambda path: path.stat().st_mtime, reverse=True)


def _listed(runs: list[Path]) -> str:
    return f"; there are {', '.join(map(str, runs[:5]))}{', ...' * (len(runs) > 5)}" if runs else ""


class RunDirectory:
    """Where the files of one run lie, and what they say.

    An attempt writes through `run.outcome.Attempt`, which makes sure that no later attempt has begun.

    Args:
        path: run.root/run.name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.status_file = path / "status.json"
        self.metrics_file = path / "metrics.jsonl"
        self.mlflow_file = path / "mlflow.json"
        self.slurm_log = path / "slurm.log"  # written by slurm/requeue.sh
        self.checkpoints = path / "checkpoints"
        self.ema_snapshots = path / "ema_snapshots"
        self.samples = path / "samples"
        self.attempts = path / "attempts"

    @contextlib.contextmanager
    def its_errors(self) -> Iterator[None]:
        """Turn an error of the file system into a line for the user.

        Raises:
            ConfigError: about run.root, for an error of the file system inside the `with`.
        """
        try:
            yield
        except (OSError, RuntimeError) as error:  # pathlib raises RuntimeError for links in a circle
            raise ConfigError(f"run.root={self.path.parent}: cannot be used ({error})") from None

    def create(self) -> None:
        """Make the folder, and prove that it can be written.

        Raises:
            ConfigError: it cannot be written, or it is a symbolic link that leads out of run.root.
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
        """Remove the temporary files that killed attempts have left. Those of the shipper may be in use, and stay."""
        for folder in (self.path, self.samples, self.attempts):
            for leftover in folder.glob(f".*{TEMPORARY}"):
                if not leftover.name.startswith(f".{self.mlflow_file.name}"):
                    leftover.unlink(missing_ok=True)

    def refuse_links(self) -> None:
        """Refuse to write through a symbolic link to another place.

        Raises:
            ConfigError: the run directory, or a folder inside it, is a link that leads out of run.root.
        """
        root = self.path.parent.resolve()
        for folder in (self.path, self.checkpoints, self.ema_snapshots, self.samples, self.attempts):
            if folder.exists() and not folder.resolve().is_relative_to(root):
                raise ConfigError(f"run.name: {folder} is a symbolic link that leads out of run.root={root}")

    def read_status(self) -> dict[str, Any]:
        """What status.json says; {} if it is missing or damaged, so that the checkpoints alone decide."""
        status = read_json(self.status_file) or {}
        types = {"attempt": int, "saved_step": int | None, "pid": int, "host": str}
        sound = all(isinstance(status.get(name), type_) for name, type_ in types.items())
        return status if sound and status.get("state") in STATES else {}

    def read_config(self) -> Config:
        """The config of this run.

        Raises:
            DataError: there is no run here.
            ConfigError: config.yaml is not a valid config.
        """
        if not self.config_file.exists():
            raise no_run(self.path)
        return load_config(self.config_file)

    def reconcile(self, config: Config) -> list[str]:
        """Compare with the config that this run was started with, if it has one.

        Returns:
            the differences that are allowed, as `key: old -> new`.

        Raises:
            ConfigError: a key that shapes what is learned differs; the message names all such keys.
        """
        return self.refuse_changes(self.read_config(), config) if self.config_file.exists() else []

    def refuse_changes(self, old: Config, new: Config) -> list[str]:
        """Compare two configs of this run.

        Returns:
            the differences that are allowed, as `key: old -> new`.

        Raises:
            ConfigError: a key that shapes what is learned differs; the message names all such keys.
        """
        refused, free = changes(old, new)
        if refused:
            saved = any(self.checkpoints.glob("*.json"))
            remove = "" if saved else f"; it has no checkpoint yet, so {self.path} may also be removed"
            raise ConfigError(
                f"{self.path} was started with another config: {'; '.join(refused)}. "
                f"No file of it was changed; give the old values to go on, or another run.name to start anew{remove}"
            )
        return free
