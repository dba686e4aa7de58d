"""The shipper as a process: how it is started, waited for, and where it ships to. Neither torch nor mlflow here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ddpm_dist.config import Config
from ddpm_dist.run.directory import RunDirectory


def tracking_uri(config: Config) -> str:
    """tracking.uri, else $MLFLOW_TRACKING_URI, else an SQLite database in run.root."""
    database = Path(config.run.root).resolve() / "mlflow.db"
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{database}"


class ShipperProcess:
    """Mirrors a run directory into MLflow while the trainer lives, and a little longer."""

    def __init__(self, process: subprocess.Popen[bytes], uri: str) -> None:
        self._process, self._uri = process, uri

    @classmethod
    def start(cls, run_directory: Path) -> ShipperProcess:
        """Start it in a session of its own, since launchers signal whole process groups."""
        directory = RunDirectory(run_directory)
        # It is no rank, and must not take cores from one.
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment["OMP_NUM_THREADS"] = "1"
        with open(run_directory / "shipper.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ddpm_dist.tracking.shipper", str(run_directory), "--follow", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        return cls(process, tracking_uri(directory.read_config()))

    def wait(self, timeout_seconds: float) -> None:
        """Until everything is delivered, but no longer than this: it goes on without us."""
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            print(f"MLflow has not got everything yet; later: python -m ddpm_dist.sync (see {self._uri})")

    def how_to_look(self) -> str:
        """A command or an address for a person."""
        if self._uri.startswith("sqlite:"):
            return f"mlflow ui --backend-store-uri {self._uri}"
        return self._uri
