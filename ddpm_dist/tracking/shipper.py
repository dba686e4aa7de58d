"""Ships one run directory: metrics.jsonl, pictures, config and true state, each thing once.

What MLflow has acknowledged is noted in mlflow.json. Whoever ships next, be it this process, the shipper of the next
attempt, or `ddpm_dist.sync`, goes on from there.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Mapping
from http import HTTPStatus

from ddpm_dist.config import Config, to_flat
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.tracking.address import address_of, choose_uri, without_password
from ddpm_dist.tracking.description import dataset_of, lineage_of, tags_of
from ddpm_dist.tracking.destination import Destination, Point, http_status
from ddpm_dist.tracking.journal import read_lines
from ddpm_dist.tracking.shipped import Shipped
from ddpm_dist.tracking.signs import REFUSED, UNANSWERED, Sign, no_sign

METRICS = ("loss", "lr", "grad_norm", "skipped", "images_per_second", "epoch")
_REFUSALS = HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN
RECORDS_PER_BATCH = 1000 // len(METRICS)  # MLflow takes at most 1000 metrics at once


class NotDelivered(Exception):
    """MLflow could not be reached or refused; what it has acknowledged so far is noted."""


class Shipper:
    """Ships one run directory.

    Args:
        directory: the run's.
        surroundings: of the attempt for which we ship (see tracking.description); None where there is no attempt.
        sign: told when we ask MLflow and when it answers (see tracking.signs).
    """

    def __init__(
        self,
        directory: RunDirectory,
        surroundings: Mapping[str, str] | None = None,
        sign: Sign = no_sign,
    ) -> None:
        self._directory, self._sign = directory, sign
        self._config: Config = directory.read_config()
        self._uri = choose_uri(self._config, directory)
        self._shipped = Shipped.read(directory.mlflow_file, self._uri)
        self._surroundings = dict(surroundings or {})
        self._shipped.origin = self._shipped.origin or self._surroundings
        self._connected: list[tuple[Destination, str]] = []

    def ship(self, state: str) -> None:
        """Everything that is new, then the run's state ("running", "finished", "preempted" or "failed").

        Raises:
            NotDelivered: try again later.
        """
        try:
            if not self._connected:
                self._connected = [self._connect()]
            destination, run_id = self._connected[0]
            self._ship_metrics(destination, run_id)
            self._ship_dataset(destination, run_id)
            self._ship_artifacts(destination, run_id)
            destination.set_state(run_id, state)
        except Exception as error:  # MLflow, requests and SQLAlchemy each bring exceptions of their own
            self._connected = []
            self._sign(REFUSED if http_status(error) in _REFUSALS else UNANSWERED)
            raise NotDelivered(self._why(error)) from error

    def _why(self, error: Exception) -> str:
        """What stands in the way, in one line, and what the user can do where we know it."""
        server, status = without_password(address_of(self._uri, self._directory)), http_status(error)
        if status == HTTPStatus.UNAUTHORIZED:
            return (
                f"{server} does not accept the user name and password, or got none (401); set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        if status == HTTPStatus.FORBIDDEN:
            return (
                f"{server} does not permit this user to write into tracking.experiment="
                f"{self._config.tracking.experiment} (403); its owner can give the permission EDIT"
            )
        text = " ".join(str(error).split())
        # Inside MLflow's text these are the words of requests about a server that cannot be reached.
        if "Max retries exceeded" in text:
            reason = re.search(r"\[Errno -?\d+\] ([\w ]+)", text)
            return f"{server} does not answer ({reason[1] if reason else 'no connection'}); is it running?"
        return without_password(f"{type(error).__name__}: {text[:500]}")

    def _note(self) -> None:
        self._shipped.write(self._directory.mlflow_file)

    def _connect(self) -> tuple[Destination, str]:
        """Find or create the run, and tell MLflow what it is. Returns the run's id, too."""
        self._note()  # our identity is on disk before the run exists
        address = address_of(self._uri, self._directory)
        destination, shipped, tags = Destination(address, self._sign), self._shipped, self._tags()
        if shipped.run_id is None:
            artifacts = None
            if address.startswith("sqlite:"):
                artifacts = (self._directory.path.parent.resolve() / "mlartifacts").as_uri()
            experiment_id = destination.experiment(self._config.tracking.experiment, artifacts)
            shipped.run_id = destination.find_or_create_run(
                experiment_id, self._config.run.name, shipped.identity, tags
            )
            self._note()
        known = destination.read_run(shipped.run_id)
        shipped.experiment_id = known.experiment_id
        if shipped.dataset not in known.datasets:
            shipped.dataset = None
        destination.mark_as_training(known.experiment_id)
        # A person may have written a description of their own, and a run of an older version has none of these.
        destination.set_tags(shipped.run_id, {name: value for name, value in tags.items() if name not in known.tags})
        self._ship_params(destination, shipped.run_id, known.params)
        return destination, shipped.run_id

    def _tags(self) -> dict[str, str]:
        path = str(self._directory.path.resolve())
        return {"ddpm_dist.directory": path, **tags_of(self._config, self._directory, self._shipped.origin)}

    def _ship_params(self, destination: Destination, run_id: str, known: dict[str, str]) -> None:
        """The resolved config as parameters; what later attempts changed, their code included, as tags."""
        flat = {key: "null" if value is None else str(value) for key, value in to_flat(self._config).items()}
        shipped = self._shipped
        shipped.params = shipped.params or known  # perhaps we died before we could note them
        if not shipped.params:
            destination.log_params(run_id, flat)
            shipped.params = flat
        changed = {f"changed.{key}": value for key, value in flat.items() if shipped.params.get(key) != value}
        commit = self._surroundings.get("commit")
        if commit and commit != shipped.origin.get("commit"):
            changed["changed.commit"] = commit
        destination.set_tags(run_id, changed)
        self._note()

    def _ship_metrics(self, destination: Destination, run_id: str) -> None:
        shipped = self._shipped
        lines = read_lines(self._directory.metrics_file, shipped.offset)
        while batch := list(itertools.islice(lines, RECORDS_PER_BATCH)):
            last_step, points = shipped.last_step, []
            for record, _ in batch:
                if record["step"] > last_step and isinstance(record.get("time"), int | float):
                    last_step, when = record["step"], int(record["time"] * 1000)
                    given = ((name, record.get(name)) for name in METRICS)
                    points += [Point(name, value, when, last_step) for name, value in given if value is not None]
            if points:
                destination.log_points(run_id, points)
            shipped.offset, shipped.last_step = batch[-1][1], last_step
            self._note()

    def _ship_dataset(self, destination: Destination, run_id: str) -> None:
        if self._shipped.dataset is None:
            dataset = dataset_of(self._config, self._directory, self._shipped.origin)
            if dataset is not None:
                destination.log_dataset(run_id, dataset)  # MLflow stores one that it has already once
                destination.set_tags(run_id, lineage_of(self._directory))
                self._shipped.dataset = dataset.digest
                self._note()

    def _ship_artifacts(self, destination: Destination, run_id: str) -> None:
        directory = self._directory
        files = [directory.config_file, directory.path / "curves.png", *sorted(directory.samples.glob("step-*.png"))]
        for path in files:
            with contextlib.suppress(FileNotFoundError):
                stat, name = path.stat(), str(path.relative_to(directory.path))
                mark = [stat.st_size, stat.st_mtime_ns]
                if self._shipped.artifacts.get(name) != mark:
                    folder = str(path.parent.relative_to(directory.path))
                    destination.log_file(run_id, path, "" if folder == "." else folder)
                    self._shipped.artifacts[name] = mark
                    self._note()
