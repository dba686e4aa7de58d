"""Loads a trained run, from its directory or from exported weights, as sampling, evaluation and export need it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_dist.build import build_model, build_prediction, build_process, check_names
from ddpm_dist.config import Config, from_flat
from ddpm_dist.diffusion.denoiser import Denoiser
from ddpm_dist.diffusion.predictions import Prediction
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.errors import ConfigError, DataError
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.directory import RunDirectory, is_weights_file, no_run
from ddpm_dist.run.store import CheckpointStore
from ddpm_dist.run.weights_file import WeightsFile, read_weights_file

WEIGHTS: dict[str, Callable[[Checkpoint], Mapping[str, Tensor]]] = {
    "ema": lambda checkpoint: checkpoint.ema,
    "model": lambda checkpoint: checkpoint.model,
}
"""The weights of a checkpoint, by the name that users give them."""


@dataclass(frozen=True)
class LoadedRun:
    """A network with trained weights, and what is needed to draw images from it.

    Attributes:
        path: what was loaded: the run directory, or a weights file.
        directory: the run directory; for a weights file, the folder in which it lies.
        config: the config that is stored in the checkpoint.
        contract: what was decided at step 0.
        step: the checkpoint's step.
        weights: which weights of the checkpoint the network has: `ema`, `model`, ...
        source_sha256: of the checkpoint's file.
        network: in evaluation mode, on the device.
        process: the forward process, with its tables on the device.
        prediction: what the output of the network means.
        image_shape: (C, H, W).
    """

    path: Path
    directory: RunDirectory
    config: Config
    contract: Mapping[str, Any]
    step: int
    weights: str
    source_sha256: str
    network: nn.Module
    process: GaussianDiffusion
    prediction: Prediction
    image_shape: tuple[int, int, int]

    def denoiser(self, clip: bool) -> Denoiser:
        """A denoiser for samplers: (x_t, t) -> Denoised.

        Args:
            clip: whether x_start is clipped to [-1, 1] at each step.
        """
        return Denoiser(self.network, self.process, self.prediction, clip)


def load_run(
    path: Path, step: int | None = None, weights: str | None = None, device: torch.device | str = "cpu"
) -> LoadedRun:
    """Read a checkpoint of a run, or weights that were exported from one, and build the network. Nothing is written.

    Args:
        path: the run directory, or a file that `python -m ddpm_dist.export RUN_DIR --to safetensors` wrote.
        step: step of the checkpoint; None for the newest valid one, or for that of the file.
        weights: a name in WEIGHTS; None for `ema`, or for those of the file.
        device: where the network and the tables go.

    Raises:
        DataError: there is no such run, file, checkpoint or name of weights; or the checkpoint or the file is damaged.
        ConfigError: the config has a key that this version does not know, or a package is missing.
    """
    if is_weights_file(path):
        found = read_weights_file(path)
        if step not in (None, found.step):
            raise DataError(f"{path}: holds step {found.step} and no step {step}")
        if weights not in (None, found.weights):
            raise DataError(f"{path}: holds the weights {found.weights!r} and no {weights!r}")
        directory = RunDirectory(path.parent)
    else:
        directory = RunDirectory(path)
        found = _read_checkpoint(directory, step, "ema" if weights is None else weights)
    return _build(found, path, directory, torch.device(device))


def _read_checkpoint(directory: RunDirectory, step: int | None, weights: str) -> WeightsFile:
    """What `--to safetensors` would write of this checkpoint. Raises DataError as `load_run` does."""
    if not directory.config_file.exists():
        raise no_run(directory.path)
    if weights not in WEIGHTS:
        raise DataError(f"{directory.path}: no weights called {weights!r}; valid: {', '.join(WEIGHTS)}")
    store = CheckpointStore(directory.checkpoints)
    if step is not None:
        checkpoint = store.load(step)
    elif found := store.newest_valid():
        checkpoint = found.checkpoint
    else:
        every = directory.read_config().checkpoint.every
        raise DataError(f"{directory.checkpoints}: no checkpoint yet; this run saves one every {every} steps")
    source = str(store.read_manifest(checkpoint.step)["sha256"])
    state = WEIGHTS[weights](checkpoint)
    return WeightsFile(state, checkpoint.config, checkpoint.contract, checkpoint.step, weights, source)


def _build(found: WeightsFile, path: Path, directory: RunDirectory, device: torch.device) -> LoadedRun:
    """Build the network and what else belongs to it. Raises as `load_run` does."""
    contract, config = found.contract, from_flat(found.config)
    try:
        check_names(config)
    except ConfigError as error:  # the run was trained by another version, or with a part that is not there now
        raise DataError(f"{path}: step {found.step} cannot be used here: {error}") from None
    channels, height, width = contract["image_shape"]
    shape = (channels, height, width)
    # The memory format is that of training, so that images are rounded as in the run's previews.
    network = build_model(config, shape, contract.get("num_classes", 0), device, contract["channels_last"]).eval()
    network.load_state_dict(dict(found.state))
    process = build_process(config, device)
    return LoadedRun(
        path=path,
        directory=directory,
        config=config,
        contract=contract,
        step=found.step,
        weights=found.weights,
        source_sha256=found.source_sha256,
        network=network,
        process=process,
        prediction=build_prediction(config, process),
        image_shape=shape,
    )
