"""Loads a trained run from its directory, as sampling, evaluation and export need it."""

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
from ddpm_dist.run.directory import RunDirectory, no_run
from ddpm_dist.run.store import CheckpointStore

WEIGHTS: dict[str, Callable[[Checkpoint], Mapping[str, Tensor]]] = {
    "ema": lambda checkpoint: checkpoint.ema,
    "model": lambda checkpoint: checkpoint.model,
}
"""The weights of a checkpoint, by the name that users give them."""


@dataclass(frozen=True)
class LoadedRun:
    """A network with trained weights, and what is needed to draw images from it.

    Attributes:
        directory: the run directory.
        config: the config that is stored in the checkpoint.
        contract: what was decided at step 0.
        step: the checkpoint's step.
        network: in evaluation mode, on the device.
        process: the forward process, with its tables on the device.
        prediction: what the output of the network means.
        image_shape: (C, H, W).
    """

    directory: RunDirectory
    config: Config
    contract: Mapping[str, Any]
    step: int
    network: nn.Module
    process: GaussianDiffusion
    prediction: Prediction
    image_shape: tuple[int, int, int]

    def denoiser(self, clip: bool) -> Denoiser:
        """A denoiser for samplers: (x_t, t) -> (x_start, eps).

        Args:
            clip: whether x_start is clipped to [-1, 1] at each step.
        """
        return Denoiser(self.network, self.process, self.prediction, clip)


def load_run(
    path: Path, step: int | None = None, weights: str = "ema", device: torch.device | str = "cpu"
) -> LoadedRun:
    """Read a checkpoint of a run, verify it, and build its network. Nothing is written.

    Args:
        path: the run directory.
        step: step of the checkpoint; None for the newest valid one.
        weights: a name in WEIGHTS.
        device: where the network and the tables go.

    Raises:
        DataError: there is no such run, checkpoint or name of weights; or the checkpoint is damaged.
        ConfigError: the checkpoint's config has a key that this version does not know.
    """
    directory = RunDirectory(path)
    if not directory.config_file.exists():
        raise no_run(path)
    if weights not in WEIGHTS:
        raise DataError(f"{path}: no weights called {weights!r}; valid: {', '.join(WEIGHTS)}")
    store = CheckpointStore(directory.checkpoints)
    if step is not None:
        checkpoint = store.load(step)
    elif found := store.newest_valid():
        checkpoint = found.checkpoint
    else:
        every = directory.read_config().checkpoint.every
        raise DataError(f"{directory.checkpoints}: no checkpoint yet; this run saves one every {every} steps")
    contract = checkpoint.contract
    config, device = from_flat(checkpoint.config), torch.device(device)
    try:
        check_names(config)
    except ConfigError as error:  # the run was trained by another version, or with a part that is not there now
        raise DataError(f"{directory.path}: step {checkpoint.step} cannot be used here: {error}") from None
    channels, height, width = contract["image_shape"]
    shape = (channels, height, width)
    # The memory format is that of training, so that images are rounded as in the run's previews.
    network = build_model(config, shape, contract.get("num_classes", 0), device, contract["channels_last"]).eval()
    network.load_state_dict(dict(WEIGHTS[weights](checkpoint)))
    process = build_process(config, device)
    prediction = build_prediction(config, process)
    return LoadedRun(directory, config, contract, checkpoint.step, network, process, prediction, shape)
