"""What is decided before the first step: where the run stands, and whether this attempt may go on with it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ddpm_dist.build import check_names, check_previews
from ddpm_dist.config import Config, changes, cosine_end, from_flat, to_flat
from ddpm_dist.data.images import Images
from ddpm_dist.errors import ConfigError, DataError, StopRequested
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.run.outcome import Attempt
from ddpm_dist.run.snapshots import SnapshotStore
from ddpm_dist.run.store import CheckpointStore
from ddpm_dist.tracking.address import choose_uri, refuse_password
from ddpm_dist.training.contract import LATER_TERMS, branched_contract, new_contract
from ddpm_dist.training.origin import Origin, find_origin, read_parent


@dataclass(frozen=True)
class ResumePoint:
    """Where a run stands, as rank 0 found it. Its fields are plain JSON, since rank 0 sends them to the other ranks.

    Attributes:
        finished: whether there is nothing left to do.
        step: the step of the checkpoint to go on from; 0 for a new run.
        sha256: hash of that checkpoint; None for a new run.
        origin: what a new run starts from, as `Origin` has it; None for random weights, and for a resume.
        changed: how the config differs from that of the attempt before, as `key: old -> new`.
        config: rank 0's config, as {dotted key: value}.
    """

    finished: bool
    step: int
    sha256: str | None = None
    changed: list[str] = dataclasses.field(default_factory=list)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    origin: dict[str, Any] | None = None

    def starts_from(self) -> Origin | None:
        """What a new run starts from; None for random weights, and for a resume."""
        return None if self.origin is None else Origin(**self.origin)


def find_resume_point(
    config: Config, ranks: Ranks, attempt: Attempt, store: CheckpointStore
) -> tuple[ResumePoint, list[Checkpoint]]:
    """Rank 0 claims the run and reads its newest valid checkpoint; the others load the same one. Collective.

    If the run is finished, nothing is written.

    Returns:
        where the run stands, and a list with its checkpoint, or an empty list if it has none. A checkpoint takes as
        much memory as the weights, their average and the optimizer together. The caller takes it out of the list, so
        that this memory is free once the state is loaded.

    Raises:
        UserError: the run cannot go on; the message says why.
        OSError: the run directory cannot be read or written.
        StopRequested: a stop signal came while rank 0 waited for another attempt to end.
        RankZeroFailed: on other ranks, for the error that rank 0 reports.
    """
    read: list[Checkpoint] = []

    def find(should_stop: Callable[[], bool]) -> dict[str, Any]:
        point = _claim(config, attempt, store, should_stop)
        if not point.finished:
            point = _look_for_checkpoint(config, attempt, store, point, read)
        return dataclasses.asdict(point)

    point = ResumePoint(**ranks.on_rank_zero(find))
    if not point.finished:
        ranks.all_succeed(lambda: None if ranks.is_zero else _load_the_same(config, store, point, read))
    return point, read


def _claim(config: Config, attempt: Attempt, store: CheckpointStore, should_stop: Callable[[], bool]) -> ResumePoint:
    """Rank 0: check that this run may go on, and claim it. From then on no other attempt writes into its directory.

    Nothing is written and nothing is claimed if the run is finished.
    """
    directory = attempt.directory
    check_names(config)
    check_previews(config)
    with directory.its_errors():
        directory.refuse_links()
        refuse_password(config, directory)
        changed = directory.reconcile(config)
        finished = _finished(config, directory, store)
        if finished is not None:
            return finished
        if config.tracking.enabled:
            choose_uri(config, directory)  # refuses a wrong address now, before hours of training
        directory.create()

    # The folder could be written a moment ago: an error of the file system from here on is not the user's mistake.
    def wait(seconds: float) -> None:
        if should_stop():
            raise StopRequested
        time.sleep(seconds)

    attempt.claim(wait)
    # If we waited for another attempt, that one may have finished the run.
    return _finished(config, directory, store) or ResumePoint(False, 0, None, changed, to_flat(config))


def _finished(config: Config, directory: RunDirectory, store: CheckpointStore) -> ResumePoint | None:
    """Where a finished run ended; None if the run is not finished.

    Only status.json and a manifest are read: the user may have removed the images and the weights since then.
    """
    status = directory.read_status()
    saved = status.get("saved_step")
    if status.get("state") != "finished" or saved is None:
        return None
    num_images = store.read_manifest(saved).get("contract", {}).get("num_images")
    is_finished = num_images is not None and saved >= config.target(num_images)
    return ResumePoint(True, saved) if is_finished else None


def _look_for_checkpoint(
    config: Config, attempt: Attempt, store: CheckpointStore, point: ResumePoint, read: list[Checkpoint]
) -> ResumePoint:
    """Rank 0: find the newest valid checkpoint, append it to `read`, and return `point` with its step and hash.

    Raises:
        DataError: there is no checkpoint although one was saved.
        ConfigError: the checkpoint was made with a config that differs in what shapes learning.
    """
    directory, saved = attempt.directory, attempt.saved_step
    found = store.newest_valid()
    if found is None and saved is not None:
        raise DataError(
            f"{store.directory}: no checkpoint, although status.json says that step {saved} was saved; "
            "restore it, or move the run directory away to start at step 0"
        )
    step = found.checkpoint.step if found else 0
    if found is not None:
        # `reconcile` has compared with config.yaml, but that file may have been lost or edited.
        directory.refuse_changes(from_flat(found.checkpoint.config), config)
        for path in store.set_aside(newer_than=step):
            print(f"warning: {path} is damaged; it was renamed, and the run goes on from step {step}", flush=True)
        read.append(found.checkpoint)
    store.sweep()
    SnapshotStore(directory.ema_snapshots).sweep()
    directory.sweep()
    if found is None:
        begun_from = attempt.begun_from(config)
        origin, parent = find_origin(config, Origin(**begun_from) if begun_from else None)
        read.extend(parent)
        first_step = origin.first_step if origin else 0
        attempt.start_from(None, first_step)
        return dataclasses.replace(point, step=first_step, origin=dataclasses.asdict(origin) if origin else None)
    attempt.start_from(step)
    return dataclasses.replace(point, step=step, sha256=found.sha256)


def _load_the_same(config: Config, store: CheckpointStore, point: ResumePoint, read: list[Checkpoint]) -> None:
    """Other ranks: load the checkpoint that rank 0 chose, by step and hash, and append it to `read`.

    Raises:
        ConfigError: this rank was given another config than rank 0, for instance because its node has another file.
        DataError: this rank does not find that checkpoint.
    """
    refused, free = changes(from_flat(point.config), config)
    if refused or free:
        raise ConfigError(f"not all ranks were given the same config: {'; '.join(refused + free)}")
    if point.sha256 is not None:
        read.append(store.load(point.step, point.sha256))
    elif origin := point.starts_from():
        read.extend(read_parent(origin))


def settle_contract(
    config: Config,
    images: Images,
    target: int,
    saved: Checkpoint | None,
    origin: Origin | None,
    device: torch.device,
) -> dict[str, Any]:
    """The contract of the run, as plain JSON. Rank 0 alone decides it, since machines may differ.

    Args:
        target: the step at which the run is finished.
        saved: the checkpoint that this attempt goes on from, or that is branched; None if there is none.
        origin: what a new run starts from; None for random weights, and for a resume.
        device: the device of rank 0.

    Raises:
        ConfigError: this attempt would change where the cosine ends.
    """
    decay_steps = cosine_end(config.optim, target)
    if origin is not None:
        contract = new_contract(config, images, decay_steps, device)
        if saved is not None:
            refused, free = changes(from_flat(saved.config), config)
            changed = {change.partition(":")[0] for change in (*refused, *free)}
            contract = branched_contract(contract, saved.contract, changed)
        return {**contract, "lineage": origin.terms()}
    if saved is None:
        return new_contract(config, images, decay_steps, device)
    old = saved.contract
    if old["decay_steps"] != decay_steps:
        raise ConfigError(
            f"the cosine of this run ends at step {old['decay_steps']}, and a target of {target} steps "
            f"would move it to {decay_steps}, which would change learning rates that were already used; "
            "only a run that was started with a fixed optim.decay_steps can be prolonged"
        )
    return {**LATER_TERMS, **old}
