"""The shipper as a process: how it is started, waited for, and where it ships to. Neither torch nor mlflow here."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from ddpm_dist.config import Config
from ddpm_dist.errors import ConfigError
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.run.files import read_json

REVIVE_SECONDS = 5.0
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")


def choose_uri(config: Config, directory: RunDirectory) -> str | None:
    """tracking.uri, else where this run was begun, else $MLFLOW_TRACKING_URI, else None: the database in run.root.

    So a run stays one MLflow run, whatever the shell of a later attempt or of `sync` has in its environment.

    Raises:
        ConfigError: it is no address of a server or database.
    """
    noted = read_json(directory.mlflow_file) or {}
    uri = config.tracking.uri or (noted["uri"] if "uri" in noted else os.environ.get("MLFLOW_TRACKING_URI")) or None
    if uri is not None and re.split(r"[+:]", str(uri))[0] not in SCHEMES:
        raise ConfigError(
            f"tracking.uri={uri} (or $MLFLOW_TRACKING_URI): expected http://..., sqlite:///... or another database "
            "(MLflow refuses folders); null: mlflow.db in run.root"
        )
    return uri


def address_of(uri: str | None, directory: RunDirectory) -> str:
    """A tracking URI for MLflow. The default database lies beside the run, wherever that was moved to."""
    return uri or f"sqlite:///{directory.path.resolve().parent / 'mlflow.db'}"


class ShipperProcess:
    """Mirrors a run directory into MLflow while the trainer lives, and a little longer."""

    def __init__(self, process: subprocess.Popen[bytes], directory: RunDirectory) -> None:
        self._process, self._directory, self._started = process, directory, time.monotonic()
        self._uri = address_of(choose_uri(directory.read_config(), directory), directory)

    @classmethod
    def start(cls, run_directory: Path) -> ShipperProcess:
        """Start it in a session of its own, since launchers signal whole process groups."""
        return cls(cls._spawn(run_directory), RunDirectory(run_directory))

    def revive(self) -> None:
        """Start it again if it was killed. Cheap enough for every line that is logged."""
        if self._process.poll() is None or time.monotonic() - self._started < REVIVE_SECONDS:
            return
        self._started = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk, perhaps: the next attempt or `sync` delivers
            self._process = self._spawn(self._directory.path)

    @staticmethod
    def _spawn(run_directory: Path) -> subprocess.Popen[bytes]:
        # It is no rank, and must not take cores from one.
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment["OMP_NUM_THREADS"] = "1"
        with open(run_directory / "shipper.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "ddpm_dist.tracking.shipper", str(run_directory), "--follow", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def wait(self, timeout_seconds: float) -> None:
        """Until everything is delivered, but no longer than this: it goes on without us."""
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            path = self._directory.path
            words = (path / "shipper.log").read_text(errors="replace").splitlines()
            reason = f" ({words[-1]})" if words else ""
            print(f"MLflow has not got everything{reason}; later: python -m ddpm_dist.sync {path}", flush=True)

    def how_to_look(self) -> str:
        """A command or an address for a person."""
        if self._uri.startswith("sqlite:"):
            return f"mlflow ui --backend-store-uri {self._uri}"
        return self._uri
