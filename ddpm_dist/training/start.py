"""Where a run stands, and whether it may go on: all that is decided before the first step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ddpm_dist.config import Config, changes, from_flat, to_flat
from ddpm_dist.data.datasets import Images
from ddpm_dist.errors import ConfigError, DataError, StopRequested
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.directory import RunDirectory, count_without_progress
from ddpm_dist.run.lease import Lease, claim, read_attempts
from ddpm_dist.run.store import CheckpointStore
from ddpm_dist.tracking.process import choose_uri
from ddpm_dist.training.contract import new_contract


@dataclass(frozen=True)
class Start:
    """Where a run stands, as rank 0 found it. Plain JSON, since it travels to the others."""

    finished: bool
    attempt: int
    saved_step: int | None
    sha256: str | None
    changed: list[str]
    without_progress: int = 0
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


class Starter:
    """Looks at a run directory. `find` is for rank 0, the rest for every rank.

    Args:
        nodes: the node of every rank, by rank; only rank 0's counts.

    Attributes:
        lease: the right to write, once `find` has claimed it.
    """

    def __init__(
        self, config: Config, directory: RunDirectory, store: CheckpointStore, world_size: int, nodes: list[str]
    ) -> None:
        self.config, self.directory, self.store = config, directory, store
        self.world_size, self.nodes = world_size, nodes
        self.lease: Lease | None = None

    def target(self, num_images: int) -> int:
        """The step at which the run is finished."""
        return self.config.train.max_steps or self.config.train.epochs * (num_images // self.config.data.batch_size)

    def find(self, should_stop: Callable[[], bool]) -> Start:
        """Rank 0: may this run go on, and from where? Writes nothing where the run is finished."""
        with self.directory.its_errors():
            self.directory.refuse_links()
            changed = self.directory.reconcile(self.config)
            if self._is_finished():
                return self._nothing_to_do()
            if self.config.tracking.enabled:
                choose_uri(self.config, self.directory)  # refused now rather than noticed at the end
            self.directory.create()
        # From here on an error of the file system is no mistake of the user's, and may pass.
        self._claim(should_stop)
        if self._is_finished():  # by the attempt that we have just waited for
            return self._nothing_to_do()
        return self._look_for_checkpoint(changed)

    def _nothing_to_do(self) -> Start:
        status = self.directory.read_status()
        return Start(True, status["attempt"], status["saved_step"], None, [])

    def _is_finished(self) -> bool:
        """Neither the images nor the weights of a finished run need be there any more."""
        status = self.directory.read_status()
        saved = status.get("saved_step")
        if status.get("state") != "finished" or saved is None:
            return False
        num_images = self.store.read_manifest(saved).get("contract", {}).get("num_images")
        return num_images is not None and saved >= self.target(num_images)

    def _claim(self, should_stop: Callable[[], bool]) -> None:
        """Become the one attempt that writes."""

        def wait(seconds: float) -> None:
            if should_stop():
                raise StopRequested
            time.sleep(seconds)

        at_least = self.directory.read_status().get("attempt", 0) + 1
        # In the claim itself: an attempt that dies in its first second has said where.
        facts = {"world_size": self.world_size, "nodes": list(dict.fromkeys(self.nodes))}
        self.lease = claim(self.directory.attempts, facts, at_least, wait)
        self.directory.fence = self.lease.check

    def _look_for_checkpoint(self, changed: list[str]) -> Start:
        assert self.lease is not None
        attempts = read_attempts(self.directory.attempts)
        without_progress = count_without_progress(attempts[:-1])  # the last one is ours
        found, saved = self.store.newest_valid(), self.directory.read_status().get("saved_step")
        if found is None and saved is not None:
            raise DataError(
                f"{self.store.directory}: no checkpoint, although status.json says that step {saved} was saved; "
                "restore it, or move the run directory away to start at step 0"
            )
        step = found.checkpoint.step if found else 0
        if found is not None:
            self.directory.refuse_changes(
                from_flat(found.checkpoint.config), self.config
            )  # whatever became of config.yaml
            for path in self.store.set_aside(newer_than=step):
                print(f"warning: {path} is damaged; it was renamed, and the run goes on from step {step}", flush=True)
        self.store.sweep()
        self.directory.sweep()
        self.lease.note(start_step=step, step=step)
        sha256 = found.sha256 if found else None
        saved_step = step if found else None
        return Start(False, self.lease.number, saved_step, sha256, changed, without_progress, to_flat(self.config))

    def load(self, start: Start) -> Checkpoint | None:
        """Exactly the checkpoint that rank 0 chose, by step and hash.

        Raises:
            ConfigError: this rank was given another config than rank 0: each node reads its own files.
            DataError: this rank does not find that checkpoint.
        """
        refused, free = changes(from_flat(start.config), self.config)
        if refused or free:
            raise ConfigError(f"not all ranks were given the same config: {'; '.join(refused + free)}")
        if start.saved_step is None:
            return None
        return self.store.load(start.saved_step, start.sha256)

    def contract(
        self, images: Images, target: int, checkpoint: Checkpoint | None, device: torch.device
    ) -> dict[str, Any]:
        """What is decided once and binds every attempt; by rank 0 alone, since machines may differ. Plain JSON.

        Raises:
            ConfigError: this attempt would change it.
        """
        decay_steps = None
        if self.config.optim.schedule == "cosine":
            decay_steps = self.config.optim.decay_steps or target
            if decay_steps <= self.config.optim.warmup_steps:
                raise ConfigError(
                    f"optim.warmup_steps={self.config.optim.warmup_steps}: "
                    f"must be below the last decay step, {decay_steps}"
                )
        if checkpoint is None:
            return new_contract(self.config, images, decay_steps, device)
        contract = checkpoint.contract
        if contract["decay_steps"] != decay_steps:
            raise ConfigError(
                f"the cosine of this run ends at step {contract['decay_steps']}, and a target of {target} steps "
                f"would move it to {decay_steps}: learning rates already used would have been others; "
                "only a run that was started with a fixed optim.decay_steps can be prolonged"
            )
        return contract
