"""One MLflow server or database: the only module that imports mlflow, and only when it is asked for something."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_dist.run.files import TEMPORARY
from ddpm_dist.tracking.address import database_file
from ddpm_dist.tracking.description import Dataset
from ddpm_dist.tracking.locks import locked
from ddpm_dist.tracking.signs import ANSWERED, LOCAL, UNANSWERED, Sign

STATUS = {"running": "RUNNING", "finished": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}
IDENTITY_TAG = "ddpm_dist.identity"
KIND_TAG = "mlflow.experimentKind"


@dataclass(frozen=True)
class Point:
    """A metric's value at a step, and when it was logged (milliseconds since 1970)."""

    name: str
    value: float
    time_ms: int
    step: int


@dataclass(frozen=True)
class KnownRun:
    """What MLflow has of a run beside its curves. Datasets are their digests."""

    experiment_id: str
    tags: dict[str, str]
    params: dict[str, str]
    datasets: frozenset[str]


def prepare_client() -> None:
    """Set what MLflow's client reads from the environment, unless the user has set it.

    By default the client waits up to four minutes for a dead server, calls home, draws bars into logs, and prints a
    link of its own to each run that ends, which opens the wrong workspace.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


def http_status(error: Exception) -> int | None:
    """The HTTP status of a server's answer that MLflow's client or requests made an error of; None if there is none."""
    answer = getattr(error, "response", None)  # of requests
    if answer is not None:
        return int(answer.status_code)
    status = getattr(error, "get_http_status_code", None)  # of mlflow
    return None if status is None else int(status())


def save_model(
    folder: Path, run_id: str, network: Any, example: Mapping[str, Any], requirements: Sequence[str]
) -> None:
    """Write a network in MLflow's own form for networks of torch, as a graph that torch.export makes, without a pickle.

    Args:
        folder: that is made.
        run_id: the MLflow run that it belongs to.
        network: in evaluation mode, on the CPU; called with the inputs in their order, it returns one tensor.
        example: {name: tensor} of the inputs and, last, of the output, all with the same number of rows, at least 2.
            The graph then takes any number of rows. `mlflow` has no place for an example of several inputs, so it
            goes beside the graph, as example.npz.
        requirements: lines for pip.
    """
    import numpy as np
    from mlflow import pytorch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    arrays = {name: tensor.numpy() for name, tensor in example.items()}
    specs: list[Any] = [TensorSpec(array.dtype, (-1, *array.shape[1:]), name) for name, array in arrays.items()]
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of weights on other devices, whatever device they are on
        file = Path(scratch) / "example.npz"
        np.savez(file, **arrays)
        pytorch.save_model(
            network,
            str(folder),
            mlflow_model=Model(run_id=run_id),
            signature=ModelSignature(Schema(specs[:-1]), Schema(specs[-1:])),
            input_example=list(arrays.values())[:-1],
            pip_requirements=list(requirements),
            extra_files=[str(file)],
            serialization_format="pt2",
        )


def create_database(path: Path) -> None:
    """MLflow's tables, whole or not at all: MLflow itself does not survive a kill half-way through making them."""
    from mlflow import MlflowClient

    new = path.with_name(f".{path.name}{TEMPORARY}")
    for leftover in (new, new.with_name(f"{new.name}-journal")):
        leftover.unlink(missing_ok=True)
    MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
    new.rename(path)


class Destination:
    """MLflow's client, reduced to what is shipped.

    Any method raises what MLflow, requests or SQLAlchemy raise where it is not reached or refuses.

    Args:
        address: tracking URI. A database file that does not exist is made.
        sign: told before the first question and at each answer (see tracking.signs).
    """

    def __init__(self, address: str, sign: Sign) -> None:
        from mlflow import MlflowClient

        database = database_file(address)
        if database is not None:
            with locked(database.parent / ".mlflow.lock"):  # two runs may make the same database
                if not database.exists():
                    create_database(database)
        self._sign, self._answered = sign, ANSWERED if database is None else LOCAL
        sign(UNANSWERED if database is None else LOCAL)
        self._client: Any = MlflowClient(address)

    def _ask(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        answer = function(*args, **options)
        self._sign(self._answered)
        return answer

    def experiment(self, name: str, artifacts: str | None) -> str:
        """The id of the experiment of this name, which is created if there is none.

        Args:
            artifacts: URI of a folder for the files of a new experiment's runs; None leaves that to MLflow.
        """
        found = self._ask(self._client.get_experiment_by_name, name)
        if found is None:
            try:
                return str(self._ask(self._client.create_experiment, name, artifact_location=artifacts))
            except Exception:
                # Another run may have been quicker, between our question and our wish.
                found = self._ask(self._client.get_experiment_by_name, name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def mark_as_training(self, experiment_id: str) -> None:
        """Have MLflow's page show the experiment as model training, in the versions that obey this tag.

        What somebody else has chosen stays, and a server that does not let us is not asked twice.
        """
        with contextlib.suppress(Exception):
            tags = self._ask(self._client.get_experiment, experiment_id).tags
            if KIND_TAG not in tags:
                self._ask(self._client.set_experiment_tag, experiment_id, KIND_TAG, "custom_model_development")

    def find_or_create_run(self, experiment_id: str, name: str, identity: str, tags: Mapping[str, str]) -> str:
        """The id of the run with this identity."""
        query = f"tags.`{IDENTITY_TAG}` = '{identity}'"
        for run in self._ask(self._client.search_runs, [experiment_id], query, max_results=1):
            return str(run.info.run_id)
        tags = {IDENTITY_TAG: identity, **tags}
        return str(self._ask(self._client.create_run, experiment_id, tags=tags, run_name=name).info.run_id)

    def read_run(self, run_id: str) -> KnownRun:
        run = self._ask(self._client.get_run, run_id)
        datasets = run.inputs.dataset_inputs if run.inputs else []
        digests = frozenset(str(each.dataset.digest) for each in datasets)
        return KnownRun(str(run.info.experiment_id), dict(run.data.tags), dict(run.data.params), digests)

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        self._ask(self._client.log_batch, run_id, params=[Param(key, value) for key, value in params.items()])

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        if tags:
            self._ask(self._client.log_batch, run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_points(self, run_id: str, points: Sequence[Point]) -> None:
        """At most 1000. Points that MLflow has already are not stored twice."""
        from mlflow.entities import Metric

        metrics = [Metric(point.name, point.value, point.time_ms, point.step) for point in points]
        self._ask(self._client.log_batch, run_id, metrics=metrics)

    def log_file(self, run_id: str, path: Path, folder: str) -> None:
        """Store a file under its own name, in a folder below the run's ("" for none)."""
        self._ask(self._client.log_artifact, run_id, str(path), folder)

    def log_dataset(self, run_id: str, dataset: Dataset) -> None:
        from mlflow import entities

        source = json.dumps({"uri": dataset.source})
        described = entities.Dataset(dataset.name, dataset.digest, "local", source, profile=json.dumps(dataset.profile))
        role = [entities.InputTag("mlflow.data.context", "training")]
        self._ask(self._client.log_inputs, run_id, [entities.DatasetInput(described, role)])

    def set_state(self, run_id: str, state: str) -> None:
        """Args: state: "running", "finished", "preempted" or "failed"; the last three come with the time of the end."""
        if state == "running":
            self._ask(self._client.update_run, run_id, status=STATUS[state])
        else:
            self._ask(self._client.set_terminated, run_id, status=STATUS[state])

    def register_model(self, run_id: str, name: str, folder: Path, step: int) -> str:
        """Store what `save_model` wrote with a run, and register it as the next version of the model of this name.

        Args:
            step: of the run, whose weights the model has.

        Returns:
            the version.
        """
        from mlflow.entities import LoggedModelOutput
        from mlflow.exceptions import MlflowException

        experiment_id = self._ask(self._client.get_run, run_id).info.experiment_id
        model = self._ask(self._client.create_logged_model, experiment_id, name, run_id)
        model_id = model.model_id
        self._ask(self._client.log_model_artifacts, model_id, str(folder))
        self._ask(self._client.finalize_logged_model, model_id, "READY")
        self._ask(self._client.log_outputs, run_id, [LoggedModelOutput(model_id, step)])
        try:
            self._ask(self._client.create_registered_model, name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = model.artifact_location
        made = self._ask(self._client.create_model_version, name, source, run_id=run_id, model_id=model_id)
        return str(made.version)
