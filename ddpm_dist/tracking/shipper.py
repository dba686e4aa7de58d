"""Mirrors metrics.jsonl, pictures and the true state of a run into MLflow, from a process of its own.

The trainer never waits for MLflow and never imports it. What was acknowledged is remembered in mlflow.json:
whoever ships next, this process, the next attempt's or `ddpm_dist.sync`, goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import os
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ddpm_dist.config import Config, to_flat
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.run.files import TEMPORARY, read_json, write_json
from ddpm_dist.run.lease import is_held
from ddpm_dist.tracking.journal import read_lines
from ddpm_dist.tracking.process import address_of, choose_uri

POLL_SECONDS = 2.0
LAST_TRIES_SECONDS = 60.0
METRICS = ("loss", "lr", "grad_norm", "skipped", "images_per_second", "epoch")
RECORDS_PER_BATCH = 1000 // len(METRICS)  # MLflow takes at most 1000 metrics at once
STATUS = {"running": "RUNNING", "finished": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}
IDENTITY_TAG = "ddpm_dist.identity"


class NotDelivered(Exception):
    """MLflow could not be reached or refused; what it has acknowledged so far is noted."""


@dataclass
class Shipped:
    """What MLflow has acknowledged (mlflow.json).

    Attributes:
        uri: where the run is kept; None is the database in run.root.
        run_id: which MLflow run this is; None until it was created.
        identity: a tag that finds the run again if we died between its creation and our note of it.
        offset: bytes of metrics.jsonl that were dealt with.
        last_step: lines up to this step are there; steps trained again after a kill are not sent twice.
        artifacts: {path below the run directory: [size, mtime_ns]}.
        params: config as it was logged; MLflow lets no parameter change.
    """

    uri: str | None
    run_id: str | None = None
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    offset: int = 0
    last_step: int = -1
    artifacts: dict[str, list[int]] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)


class Shipper:
    """Ships one run directory.

    Args:
        directory: the run's.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._config: Config = directory.read_config()
        self._client: Any = None
        uri = choose_uri(self._config, directory)
        noted = read_json(directory.mlflow_file)
        known = noted is not None and set(noted) == set(asdict(Shipped(uri))) and noted["uri"] == uri
        self._shipped = Shipped(**noted) if known and noted else Shipped(uri)
        if noted and not known and isinstance(noted.get("identity"), str):
            # Another server, that has got nothing yet or had its turn before: the identity finds its run again,
            # and points that are sent twice are stored once.
            self._shipped.identity = noted["identity"]

    def ship(self, state: str) -> None:
        """Everything that is new, then the run's state ("running", "finished", "preempted" or "failed").

        Raises:
            NotDelivered: try again later.
        """
        try:
            self._connect()
            self._ship_metrics()
            self._ship_artifacts()
            if state == "running":
                self._client.update_run(self._shipped.run_id, status=STATUS[state])
            else:
                self._client.set_terminated(self._shipped.run_id, status=STATUS[state])  # with the time of the end
        except Exception as error:  # MLflow, requests and SQLAlchemy each bring exceptions of their own
            self._client = None
            raise NotDelivered(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}") from error

    def _note(self) -> None:
        write_json(self._directory.mlflow_file, asdict(self._shipped))

    def _connect(self) -> None:
        """Find or create the run; write its parameters once."""
        if self._client is not None:
            return
        from mlflow import MlflowClient

        self._note()  # our identity is on disk before the run exists
        uri = address_of(self._shipped.uri, self._directory)
        database = database_file(uri)
        folder = self._directory.path.parent if database is None else database.parent
        with _locked(folder / ".mlflow.lock"):  # two runs may create the same database
            if database is not None and not database.exists():
                create_database(database)
            client = MlflowClient(uri)
            experiment_id = self._experiment(client)
            if self._shipped.run_id is None:
                self._shipped.run_id = self._find_or_create(client, experiment_id)
                self._note()
        self._client = client
        self._ship_params()

    def _experiment(self, client: Any) -> str:
        name = self._config.tracking.experiment
        found = client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        location = None
        if address_of(self._shipped.uri, self._directory).startswith("sqlite:"):
            location = (self._directory.path.parent.resolve() / "mlartifacts").as_uri()
        return client.create_experiment(name, artifact_location=location)

    def _find_or_create(self, client: Any, experiment_id: str) -> str:
        query = f"tags.`{IDENTITY_TAG}` = '{self._shipped.identity}'"
        for run in client.search_runs([experiment_id], query, max_results=1):
            return run.info.run_id
        tags = {IDENTITY_TAG: self._shipped.identity, "ddpm_dist.directory": str(self._directory.path.resolve())}
        return client.create_run(experiment_id, tags=tags, run_name=self._config.run.name).info.run_id

    def _ship_params(self) -> None:
        """The resolved config as parameters; what later attempts changed as tags."""
        from mlflow.entities import Param, RunTag

        flat = {key: "null" if value is None else str(value) for key, value in to_flat(self._config).items()}
        if not self._shipped.params:  # perhaps we died before we could note them
            self._shipped.params = dict(self._client.get_run(self._shipped.run_id).data.params)
        if not self._shipped.params:
            params = [Param(key, value) for key, value in flat.items()]
            self._client.log_batch(self._shipped.run_id, params=params)
            self._shipped.params = flat
        else:
            changed = {key: value for key, value in flat.items() if self._shipped.params.get(key) != value}
            tags = [RunTag(f"changed.{key}", value) for key, value in changed.items()]
            if tags:
                self._client.log_batch(self._shipped.run_id, tags=tags)
        self._note()

    def _ship_metrics(self) -> None:
        from mlflow.entities import Metric

        lines = read_lines(self._directory.metrics_file, self._shipped.offset)
        while batch := list(itertools.islice(lines, RECORDS_PER_BATCH)):
            last_step, metrics = self._shipped.last_step, []
            for record, _ in batch:
                if record["step"] > last_step and isinstance(record.get("time"), int | float):
                    last_step, when = record["step"], int(record["time"] * 1000)
                    given = ((key, record.get(key)) for key in METRICS)
                    metrics += [Metric(key, value, when, last_step) for key, value in given if value is not None]
            if metrics:
                self._client.log_batch(self._shipped.run_id, metrics=metrics)
            self._shipped.offset, self._shipped.last_step = batch[-1][1], last_step
            self._note()

    def _ship_artifacts(self) -> None:
        directory = self._directory
        files = [directory.config_file, directory.path / "curves.png", *sorted(directory.samples.glob("step-*.png"))]
        for path in files:
            with contextlib.suppress(FileNotFoundError):
                stat, name = path.stat(), str(path.relative_to(directory.path))
                mark = [stat.st_size, stat.st_mtime_ns]
                if self._shipped.artifacts.get(name) != mark:
                    folder = str(path.parent.relative_to(directory.path))
                    self._client.log_artifact(self._shipped.run_id, str(path), "" if folder == "." else folder)
                    self._shipped.artifacts[name] = mark
                    self._note()


def database_file(uri: str) -> Path | None:
    """The file of `sqlite:///path`; None for what is no such file."""
    path = uri.removeprefix("sqlite:///")
    return Path(path) if path != uri and path and "?" not in path else None


def create_database(path: Path) -> None:
    """MLflow's tables, whole or not at all: MLflow itself does not survive a kill half-way through making them."""
    from mlflow import MlflowClient

    new = path.with_name(f".{path.name}{TEMPORARY}")
    for leftover in (new, new.with_name(f"{new.name}-journal")):
        leftover.unlink(missing_ok=True)
    MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
    new.rename(path)


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """An advisory lock that is free again when its holder dies.

    Raises:
        NotDelivered: another process holds it, and we are not to wait.
    """
    with open(path, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            raise NotDelivered("the shipper of a live run is at work on it") from None
        yield


def true_state(directory: RunDirectory, trainer_alive: bool) -> str:
    """What status.json says, except that a dead trainer is not running: it died without a word."""
    state = directory.read_status().get("state", "running")
    return "failed" if state == "running" and not trainer_alive else state


def sync(directory: RunDirectory) -> str:
    """Ship everything at once, and the true state.

    Returns:
        the state that MLflow was told.

    Raises:
        NotDelivered: try again later.
    """
    running = directory.read_status().get("state", "running") == "running"
    state = true_state(directory, trainer_alive=running and is_held(directory.attempts))
    prepare_client()
    with _locked(directory.path / ".shipper.lock", wait=False):
        Shipper(directory).ship(state)
    return state


def prepare_client() -> None:
    """MLflow's client waits up to four minutes for a dead server by default; and it need not call home."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


def follow(directory: RunDirectory, trainer_pid: int) -> int:
    """Ship until the trainer is gone and all is delivered, or the last tries are over.

    Returns:
        an exit code: 0 if all is delivered.
    """
    shipper = Shipper(directory)
    give_up: float | None = None
    while True:
        state = true_state(directory, trainer_alive=os.getppid() == trainer_pid)
        try:
            shipper.ship(state)
            if state != "running":
                return 0
            wait = POLL_SECONDS
        except NotDelivered as error:
            print(f"{time.strftime('%F %T')} not delivered yet: {error}", flush=True)
            wait = 2 * POLL_SECONDS
        if state != "running":
            give_up = give_up or time.monotonic() + LAST_TRIES_SECONDS
            if time.monotonic() > give_up:
                print(f"gave up; later: python -m ddpm_dist.sync {directory.path}", flush=True)
                return 1
        _sleep_while_running(wait, directory, trainer_pid)


def _sleep_while_running(seconds: float, directory: RunDirectory, trainer_pid: int) -> None:
    """Sleep, but wake early when the attempt ends: the trainer may be waiting for us."""
    was_running = true_state(directory, os.getppid() == trainer_pid) == "running"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if was_running and true_state(directory, os.getppid() == trainer_pid) != "running":
            return
        time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ddpm_dist.tracking.shipper", description=__doc__)
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("--follow", type=int, required=True, metavar="PID", help="the trainer, our parent")
    args = parser.parse_args()
    prepare_client()
    directory = RunDirectory(args.run_directory)
    with _locked(directory.path / ".shipper.lock"):  # the last attempt's shipper may still be at work
        return follow(directory, args.follow)


if __name__ == "__main__":
    sys.exit(main())
