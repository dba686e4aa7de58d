"""Where a run is kept in MLflow, and how a person gets to see it there. Neither torch nor mlflow here."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from ddpm_dist.command import as_typed
from ddpm_dist.config import Config
from ddpm_dist.errors import ConfigError
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.run.files import read_json

SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
LOCAL_PAGE = "http://127.0.0.1:5000"  # where `mlflow ui` serves


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


def refuse_password(config: Config, directory: RunDirectory) -> None:
    """Keep the password of a server out of config.yaml, the checkpoints and MLflow's parameters, which many can read.

    A run in whose config.yaml it stands already goes on: there the harm is done.

    Raises:
        ConfigError: tracking.uri holds a password.
    """
    uri = config.tracking.uri
    if uri is None or not uri.startswith("http") or without_password(uri) == uri:
        return
    if not directory.config_file.exists() or directory.read_config().tracking.uri != uri:
        raise ConfigError(
            f"tracking.uri: a password in it would stand in config.yaml and among MLflow's parameters; give "
            f"tracking.uri={without_password(uri)} and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )


def address_of(uri: str | None, directory: RunDirectory) -> str:
    """A tracking URI for MLflow. The default database lies beside the run, wherever that was moved to."""
    return uri or f"sqlite:///{directory.path.resolve().parent / 'mlflow.db'}"


def database_file(address: str) -> Path | None:
    """The file of `sqlite:///path`; None for any other address."""
    path = address.removeprefix("sqlite:///")
    return Path(path) if path != address and path and "?" not in path else None


def how_to_look(directory: RunDirectory) -> str:
    """What a person types and opens to see the run: the command that starts the page, if one is needed, and the link.

    The link is left out until MLflow has the run. It names the workspace for model training, since MLflow's page
    otherwise opens the one for language models, which shows neither runs nor curves. Where there are both, they are
    two lines, indented to stand below each other after `  MLflow    `.
    """
    uri = choose_uri(directory.read_config(), directory)
    address = address_of(uri, directory)
    is_server = address.startswith(("http:", "https:"))
    noted = read_json(directory.mlflow_file) or {}
    experiment, run = noted.get("experiment_id"), noted.get("run_id")
    link = ""
    if experiment and run and noted.get("uri") == uri:
        page = without_password(address).rstrip("/") if is_server else LOCAL_PAGE
        link = f"{page}/#/experiments/{experiment}/runs/{run}?workflowType=machine_learning"
    if is_server:
        return link or without_password(address)
    if address.startswith("databricks"):  # its pages have addresses of their own
        return address
    command = f"{as_typed('mlflow')} ui --backend-store-uri {shlex.quote(without_password(address))}"
    return f"{command}\n{' ' * 12}then open {link}" if link else command


def without_password(address: str) -> str:
    """`https://me:secret@host` as `https://host`; `postgresql://me:secret@host` keeps the user's name."""
    keep = "" if address.startswith("http") else r"\g<user>:***@"
    return re.sub(r"(?<=://)(?P<user>[^:/@]*):[^@/]*@", keep, address)
