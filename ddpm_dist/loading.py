"""Loads a trained run, from its directory or from exported weights, as sampling, evaluation and export need it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_dist.build import (
    build_denoiser,
    build_model,
    build_process,
    check_names,
    check_weights_fit,
)
from ddpm_dist.config import MAX_WIDTH, POWER, Config, from_flat, width_of
from ddpm_dist.diffusion.denoiser import Denoiser
from ddpm_dist.diffusion.process import GaussianDiffusion
from ddpm_dist.errors import ConfigError, DataError
from ddpm_dist.models.reconstruction import Profile, combine, solve_weights
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.directory import RunDirectory, is_weights_file, no_run
from ddpm_dist.run.snapshots import SnapshotStore
from ddpm_dist.run.store import CheckpointStore
from ddpm_dist.run.weights_file import WeightsFile, read_weights_file

WEIGHTS: dict[str, Callable[[Checkpoint], Mapping[str, Tensor]]] = {
    "ema": lambda checkpoint: checkpoint.ema,
    "model": lambda checkpoint: checkpoint.model,
}
"""The weights that every checkpoint holds, by the name that users give them; `weights_of` knows further ones."""


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
    image_shape: tuple[int, int, int]

    @property
    def num_classes(self) -> int:
        """The number of classes that the network was told of; 0 without labels."""
        return int(self.contract["num_classes"]) if self.config.model.class_labels else 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of these classes, in the order of their numbers; empty if they have none."""
        return tuple(self.contract.get("class_names", ())) if self.config.model.class_labels else ()

    def denoiser(
        self,
        clip: bool,
        guidance: float = 1.0,
        interval: Sequence[int] | None = None,
        dynamic_threshold: float | None = None,
    ) -> Denoiser:
        """A denoiser for samplers; `build_denoiser` describes the arguments."""
        return build_denoiser(
            self.config,
            self.network,
            self.num_classes,
            self.process,
            clip=clip,
            guidance=guidance,
            interval=interval,
            dynamic_threshold=dynamic_threshold,
        )


def weights_of(checkpoint: Checkpoint, name: str, directory: RunDirectory) -> Mapping[str, Tensor]:
    """The weights of a checkpoint that a user calls by this name.

    Args:
        name: one of WEIGHTS, or an average that the run keeps, like `ema-0.999`; or `power-WIDTH` with any width, which
            is computed from the snapshots up to this step and from the checkpoint (see models/reconstruction.py).
        directory: of the run.

    Returns:
        a state dict.

    Raises:
        DataError: there are no such weights, or a snapshot is damaged; the message lists which there are.
    """
    if name in WEIGHTS:
        return WEIGHTS[name](checkpoint)
    if name in checkpoint.averages:
        return checkpoint.averages[name]
    stored = {width: kept for kept in checkpoint.averages if (width := width_of(kept)) is not None}
    wanted = width_of(name)
    if wanted is None or not stored:
        there = ", ".join([*WEIGHTS, *checkpoint.averages, *([f"{POWER}WIDTH for any width"] if stored else [])])
        hint = "; averages of any width need a run with checkpoint.ema_snapshots" if wanted is not None else ""
        raise DataError(f"{directory.path}: step {checkpoint.step} has no weights {name!r}; there are: {there}{hint}")
    if wanted in stored:
        return checkpoint.averages[stored[wanted]]
    if not 0 < wanted <= MAX_WIDTH:
        raise DataError(f"{name}: the width of a power-function average is above 0 and at most {MAX_WIDTH}")
    if checkpoint.step == 0:
        return checkpoint.model  # no step is done that could be averaged
    return _solve(checkpoint, stored, wanted, SnapshotStore(directory.ema_snapshots))


def _solve(
    checkpoint: Checkpoint, stored: Mapping[float, str], wanted: float, snapshots: SnapshotStore
) -> dict[str, Tensor]:
    """The power-function average of the wanted width at the checkpoint's step.

    Args:
        stored: {width: name} of the averages in the checkpoint.
    """
    steps = snapshots.committed(checkpoint.step - 1)
    in_files = [(step, name) for step in steps for name in snapshots.averages(step)]
    named = [(step, width) for step, name in in_files if (width := width_of(name)) is not None]
    profiles = [Profile(step, width) for step, width in [*named, *((checkpoint.step, width) for width in stored)]]

    def states() -> Iterator[Mapping[str, Tensor]]:
        for step in steps:
            yield from snapshots.load(step).values()
        yield from (checkpoint.averages[name] for name in stored.values())

    return combine(states(), solve_weights(profiles, Profile(checkpoint.step, wanted)))


def load_run(
    path: Path, step: int | None = None, weights: str | None = None, device: torch.device | str = "cpu"
) -> LoadedRun:
    """Read a checkpoint of a run, or weights that were exported from one, and build the network. Nothing is written.

    Args:
        path: the run directory, or a file that `python -m ddpm_dist.export RUN_DIR --to safetensors` wrote.
        step: step of the checkpoint; None for the newest valid one, or for that of the file.
        weights: a name as for `weights_of`; None for `ema`, or for those of the file.
        device: where the network and the tables go.

    Raises:
        DataError: there is no such run, file, checkpoint or name of weights; or the checkpoint or the file is damaged;
            or the file names a network of somebody's own, whose code would be run.
        ConfigError: the config has a key that this version does not know, or a package is missing.
    """
    if is_weights_file(path):
        found = read_weights_file(path)
        if step not in (None, found.step):
            raise DataError(f"{path}: holds step {found.step} and no step {step}")
        if weights not in (None, found.weights):
            raise DataError(f"{path}: holds the weights {found.weights!r} and no {weights!r}")
        name = str(found.config.get("model.name"))
        if ":" in name:
            raise DataError(
                f"{path}: its network is model.name={name}, code that a weights file may not choose to run; "
                "give the run directory instead"
            )
        directory = RunDirectory(path.parent)
    else:
        directory = RunDirectory(path)
        found = _read_checkpoint(directory, step, "ema" if weights is None else weights)
    return _build(found, path, directory, torch.device(device))


def _read_checkpoint(directory: RunDirectory, step: int | None, weights: str) -> WeightsFile:
    """What `--to safetensors` would write of this checkpoint. Raises DataError as `load_run` does."""
    if not directory.config_file.exists():
        raise no_run(directory.path)
    store = CheckpointStore(directory.checkpoints)
    if step is not None:
        checkpoint = store.load(step)
    elif found := store.newest_valid():
        checkpoint = found.checkpoint
    else:
        every = directory.read_config().checkpoint.every
        raise DataError(f"{directory.checkpoints}: no checkpoint yet; this run saves one every {every} steps")
    source = str(store.read_manifest(checkpoint.step)["sha256"])
    state = weights_of(checkpoint, weights, directory)
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
    check_weights_fit(config, {name: list(value.shape) for name, value in network.state_dict().items()}, found.state)
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
        image_shape=shape,
    )
