"""How an attempt comes to the state in which it starts, and whether a new run fits what it is to start from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_dist.build import build_model
from ddpm_dist.config import Config, averages_of, changes, from_flat, width_of
from ddpm_dist.data.images import Images
from ddpm_dist.errors import ConfigError, DataError
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.run.outcome import Attempt
from ddpm_dist.run.snapshots import SnapshotStore
from ddpm_dist.training.contract import LATER_TERMS, facts_of, mismatches
from ddpm_dist.training.origin import Origin, read_weights
from ddpm_dist.training.step import Trainer

SHOWN = 2  # names of weights in a message


@dataclass(frozen=True)
class Start:
    """How the trainer comes to the state in which an attempt starts.

    Attributes:
        step: finished steps at that point.
        load: gives the trainer its state. It may be called once.
        lines: what a person is told about it.
        origin: what a new run starts from; None for random weights, and for a resume.
    """

    step: int
    load: Callable[[Trainer], None]
    lines: list[str] = dataclasses.field(default_factory=list)
    origin: Origin | None = None


def how_to_start(
    origin: Origin | None,
    read: list[Checkpoint],
    config: Config,
    images: Images,
    target: int,
    contract: Mapping[str, Any],
) -> Start:
    """How this attempt starts: from a checkpoint of its run, from an origin, or from random weights.

    Args:
        origin: what a new run starts from; None for random weights, and for a resume.
        read: the checkpoint of this run, or of the one that is branched; empty if there is none. `Start.load` takes it
            out, so that its memory is free afterwards.
        target: the step at which the run is finished.
        contract: of this run.

    Raises:
        UserError: this run cannot start from that origin.
    """
    if origin is None and read:
        return Start(read[0].step, lambda trainer: trainer.load(read.pop()))
    if origin is None:
        return Start(0, lambda trainer: None)
    # A network of its own, since nothing is written yet, and the trainer's may not change before the canary is taken.
    model = build_model(config, images.shape, images.num_classes, torch.device("cpu"), channels_last=False)
    if origin.key == "init.run":
        lines = check_branch(origin, read[0], config, images, model.state_dict(), target)
        differing = mismatches({**LATER_TERMS, **read[0].contract}, contract)
        lines += [f"init.run: there is another {term}" for term in differing]
        return Start(origin.first_step, lambda trainer: branch(trainer, read.pop()), lines, origin)
    weights = [read_weights(origin)]
    lines = fitting(origin, weights[0], model.state_dict())
    return Start(0, lambda trainer: trainer.start_from(weights.pop()), lines, origin)


def adopt_snapshots(origin: Origin, attempt: Attempt) -> None:
    """Rank 0: copy the snapshots of a run that is branched, from which averages are solved.

    Raises:
        OSError: they cannot be read or written.
    """
    if origin.key == "init.run":
        ours = SnapshotStore(attempt.directory.ema_snapshots, attempt.check)
        ours.adopt(SnapshotStore(RunDirectory(Path(origin.path)).ema_snapshots), up_to=origin.first_step)


def fitting(origin: Origin, state: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> list[str]:
    """Compare others' weights with the network of the new run, by name and shape.

    Args:
        state: the weights.
        network: the state dict of the network.

    Returns:
        lines for a person: what matched, and what did not.

    Raises:
        DataError: no name matched, or a weight of a name that matched has another shape.
    """
    shared = [name for name in network if name in state]
    wrong = [
        f"{name}: {list(state[name].shape)} there, {list(network[name].shape)} here"
        for name in shared
        if state[name].shape != network[name].shape
    ]
    if wrong:
        raise DataError(
            f"init.weights={origin.path}: {len(wrong)} of its {len(state)} weights have another shape in this network "
            f"({_some(wrong, '; ')}); set the model section as it was where they were trained"
        )
    if not shared:
        raise DataError(
            f"init.weights={origin.path}: none of its {len(state)} weights has a name that this network knows "
            f"({_some(list(state))} there, {_some(list(network))} here); set model.name to the network they belong to"
        )
    missing, unused = [name for name in network if name not in state], [name for name in state if name not in network]
    lines = [f"init.weights: {len(shared)} of {len(network)} weights of the network are {origin}"]
    if missing:
        lines.append(f"init.weights: {len(missing)} not in the source stay random: {_some(missing)}")
    if unused:
        lines.append(f"init.weights: {len(unused)} of the source are not used: {_some(unused)}")
    return lines


def _some(names: list[str], between: str = ", ") -> str:
    return between.join([*names[:SHOWN], *(["..."] if len(names) > SHOWN else [])])


def check_branch(
    origin: Origin, parent: Checkpoint, config: Config, images: Images, network: Mapping[str, Tensor], target: int
) -> list[str]:
    """Check that a run can be branched under this config.

    Free are the seed, the batch, the loss, the diffusion, the optimizer and how the machine computes. Bound are the
    images, the shapes of the network's weights, and the averages that go back to step 0.

    Args:
        network: the state dict of the network.
        target: the step at which the branch is finished.

    Returns:
        lines for a person: where the branch begins, and in which keys it differs.

    Raises:
        ConfigError, DataError: something bound differs.
    """
    source = f"init.run={origin.path}"
    trained_on = {**LATER_TERMS, **parent.contract}
    for name, value in facts_of(images).items():
        if trained_on[name] != value:
            raise DataError(
                f"{source}: was trained on other images ({name}: {trained_on[name]} -> {value}); "
                "give those images, or take only its weights, with init.weights"
            )
    theirs, ours = ({name: list(value.shape) for name, value in each.items()} for each in (parent.model, network))
    if theirs != ours:
        unlike = [
            f"{name}: {theirs.get(name, 'none')} there, {ours.get(name, 'none')} here"
            for name in {**theirs, **ours}
            if theirs.get(name) != ours.get(name)
        ]
        raise ConfigError(
            f"{source}: its network has other weights ({_some(unlike, '; ')}); give the model section of that run"
        )
    lost = [name for name in averages_of(config) if width_of(name) is not None and name not in parent.averages]
    if lost:
        raise ConfigError(
            f"{source}: kept no {', '.join(lost)}, which go back to step 0; leave checkpoint.ema_snapshots out, or set "
            "it as that run has it"
        )
    if target <= origin.first_step:
        raise ConfigError(
            f"{source}: the branch begins at step {origin.first_step}, and its target is step {target}; set a larger "
            "train.max_steps"
        )
    refused, free = changes(from_flat(parent.config), config)
    unlike = [change for change in (*refused, *free) if not change.startswith(("run.name:", "run.root:", "init."))]
    return [f"init.run: a branch of {origin}", *(f"init.run: changed {change}" for change in unlike)]


def branch(trainer: Trainer, parent: Checkpoint) -> None:
    """Take over the state of another run, but for what the config of the branch says itself.

    The options of the optimizer (betas, eps, decay, ...) are those of the branch, and a loss scale that the other run
    did not have begins anew. An average that it did not keep begins as its weights.
    """
    optimizer, scaler = trainer.update.state_dicts()
    averages = {name: parent.averages.get(name, parent.model) for name in trainer.averages if name != "ema"}
    trainer.load(
        dataclasses.replace(
            parent,
            optimizer={**parent.optimizer, "param_groups": optimizer["param_groups"]},
            scaler=parent.scaler or scaler,
            averages=averages,
        )
    )
