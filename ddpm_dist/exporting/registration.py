"""Registers the network of a run as a model in MLflow, linked to the run."""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from ddpm_dist.errors import ConfigError, ExitCode, UserError
from ddpm_dist.loading import LoadedRun
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.tracking.address import address_of, choose_uri, without_password
from ddpm_dist.tracking.delivery import sync
from ddpm_dist.tracking.destination import Destination, prepare_client, save_model
from ddpm_dist.tracking.shipped import Shipped
from ddpm_dist.tracking.shipper import NotDelivered
from ddpm_dist.tracking.signs import no_sign

UPLOAD_SECONDS = "300"  # the shipper's own limit of 5 s for an answer is too short for a large file


def register(run: LoadedRun, name: str) -> str:
    """Register the network as the next version of a model. A run that MLflow has not got yet is delivered first.

    Args:
        run: loaded from its directory, on the CPU.
        name: of the model in MLflow.

    Returns:
        the version.

    Raises:
        ConfigError: torch.export makes no graph of the network.
        UserError: MLflow did not take it (exit code 70).
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", UPLOAD_SECONDS)
    prepare_client()
    uri = choose_uri(run.directory.read_config(), run.directory)
    address = address_of(uri, run.directory)
    try:
        run_id = _run_id(run.directory, uri)
    except NotDelivered as error:
        raise _not_taken(name, str(error)) from None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        try:
            save_model(folder, run_id, run.network, example_of(run), _requirements())
        except OSError:
            raise
        except Exception as error:  # whatever torch.export says about a network of the user's own
            first, *_ = str(error).strip().splitlines() or [""]
            raise ConfigError(
                f"--register {name}: torch.export makes no graph of model.name={run.config.model.name} "
                f"({type(error).__name__}: {first})"
            ) from None
        try:
            return Destination(address, no_sign).register_model(run_id, name, folder, run.step)
        except Exception as error:  # MLflow, requests and SQLAlchemy each bring exceptions of their own
            why = f"{without_password(address)}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise _not_taken(name, without_password(why)) from error


def _run_id(directory: RunDirectory, uri: str | None) -> str:
    """The MLflow run of a run directory. Raises NotDelivered."""
    if Shipped.read(directory.mlflow_file, uri).run_id is None:
        sync(directory)
    run_id = Shipped.read(directory.mlflow_file, uri).run_id
    assert run_id is not None, "sync notes which MLflow run it has delivered to"
    return run_id


def _not_taken(name: str, why: str) -> UserError:
    error = UserError(f"--register {name}: MLflow did not take the model; what --out names is written ({why})")
    error.exit_code = ExitCode.SOFTWARE
    return error


@torch.no_grad()
def example_of(run: LoadedRun) -> dict[str, Tensor]:
    """Two images of noise, the first and the last timestep, labels if the network has them, and its output."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *run.image_shape, generator=generator)
    inputs = {"x": x, "t": torch.tensor([0, run.process.num_timesteps - 1])}
    if run.num_classes:
        inputs["labels"] = torch.tensor([0, run.num_classes])
    return {**inputs, "output": run.network(*inputs.values())}


def _requirements() -> list[str]:
    """What pip has to install before the model can be loaded: the graph needs nothing but torch."""
    return [f"{package}=={version(package)}" for package in ("torch", "mlflow", "numpy")]
