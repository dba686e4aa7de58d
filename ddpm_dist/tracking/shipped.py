"""What MLflow has acknowledged of a run, as mlflow.json keeps it for whoever ships next."""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from ddpm_dist.run.files import read_json, write_json

_SINCE_THE_FIRST_VERSION = ("uri", "run_id", "identity", "offset", "last_step", "artifacts", "params")


@dataclass
class Shipped:
    """What MLflow has acknowledged.

    Attributes:
        uri: where the run is kept; None is the database in run.root.
        run_id: which MLflow run this is; None until it was created.
        identity: a tag that finds the run again if we died between its creation and our note of it.
        offset: bytes of metrics.jsonl that were dealt with.
        last_step: lines up to this step are there; steps trained again after a kill are not sent twice.
        artifacts: {path below the run directory: [size, mtime_ns]}.
        params: config as it was logged; MLflow lets no parameter change.
        experiment_id: the MLflow experiment that holds the run; None until we have asked.
        dataset: fingerprint of the images that MLflow was told of; None until then.
        origin: host, working directory and commit of the first attempt that shipped (see tracking.description).
    """

    uri: str | None
    run_id: str | None = None
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    offset: int = 0
    last_step: int = -1
    artifacts: dict[str, list[int]] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    experiment_id: str | None = None
    dataset: str | None = None
    origin: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, uri: str | None) -> Self:
        """What is noted about this uri; a fresh note where there is none, or one about another uri.

        A server that the run has moved to may have had its turn before. The identity, which stays, finds the run
        there, and points that are sent twice are stored once.
        """
        noted: dict[str, Any] = read_json(path) or {}
        names = {each.name for each in fields(cls)}
        if set(_SINCE_THE_FIRST_VERSION) <= set(noted) <= names and noted["uri"] == uri:
            return cls(**noted)
        fresh = cls(uri)
        if isinstance(noted.get("identity"), str):
            fresh.identity = noted["identity"]
        if isinstance(noted.get("origin"), dict):
            fresh.origin = noted["origin"]
        return fresh

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))
