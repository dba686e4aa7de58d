"""What the run directory tells of this attempt: who may write, how far it is, and how it ended. Written here alone."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from ddpm_dist.config import Config, to_yaml
from ddpm_dist.errors import ExitCode, TakenOver
from ddpm_dist.run.directory import RunDirectory, State
from ddpm_dist.run.files import replacing, write_json
from ddpm_dist.run.lease import Lease, claim, read_attempts, slurm_restart


class _NoLease:
    """What an attempt has before it claims the run, and on all ranks but 0."""

    number = 0

    def check(self) -> None:
        raise AssertionError("only an attempt that has claimed the run writes")

    def note(self, **facts: Any) -> None:
        self.check()

    def release(self, **facts: Any) -> None:
        pass


class Attempt:
    """From the start of this process to its exit. Every rank has one; only rank 0's claims the run and writes.

    Before the claim nothing is written, since the run may be another attempt's.

    Args:
        directory: the run's.
        world_size: number of ranks.
        nodes: the node of every rank, by rank.

    Attributes:
        step: finished steps; whoever trains keeps it up to date.
        target: the step at which the run is finished.
        saved_step: of the newest committed checkpoint; None before the first. A later attempt that finds no
            checkpoint although one was saved refuses to start at step 0.
        without_progress: how many attempts before this one ended, one after the other, where they had started.
    """

    def __init__(self, directory: RunDirectory, world_size: int, nodes: Sequence[str]) -> None:
        self.directory = directory
        self._world_size, self._nodes = world_size, list(dict.fromkeys(nodes))
        self._lease: Lease | _NoLease = _NoLease()
        self._ending: dict[str, Any] = {}
        self.step, self.target, self.without_progress = 0, 0, 0
        self.saved_step: int | None = None

    @property
    def number(self) -> int:
        """From 1 once the run is claimed."""
        return self._lease.number

    def claim(self, wait: Callable[[float], None]) -> None:
        """Become the one attempt that writes.

        Args:
            wait: called with seconds while another attempt may be alive; may raise to give up.

        Raises:
            ConfigError: another attempt is alive; says whose.
            OSError: the folder cannot be written.
        """
        status = self.directory.read_status()
        # In the claim itself, so that an attempt that dies in its first second has said where it ran.
        facts = {"world_size": self._world_size, "nodes": self._nodes}
        self._lease = claim(self.directory.attempts, facts, status.get("attempt", 0) + 1, wait)
        # Until this attempt has found out better, the words of the one before hold.
        self.target, self.saved_step = status.get("target", 0), status.get("saved_step")
        self.step = self.saved_step or 0
        before = read_attempts(self.directory.attempts)[:-1]  # the last one is ours
        self.without_progress = count_without_progress(before)

    def check(self) -> None:
        """Raises TakenOver once a later attempt has begun. Called before anything is put in place."""
        self._lease.check()

    def start_from(self, saved_step: int | None) -> None:
        """Say which checkpoint this attempt goes on from; None where it starts at step 0."""
        self.saved_step, self.step = saved_step, saved_step or 0
        self._lease.note(start_step=self.step, step=self.step)

    def begin(self, config: Config) -> None:
        """Say that training begins, and with which config."""
        self._write("running", "training")
        with replacing(self.directory.config_file, self.check) as file:
            file.write(to_yaml(config).encode())

    def committed(self, step: int) -> None:
        """Say that a checkpoint of this step counts from now on."""
        self.saved_step, self.without_progress = step, 0
        self._lease.note(step=step)
        self._write("running", "training", step=step)

    def end(self, code: ExitCode, reason: str) -> None:
        """Say that the run is finished, or that this attempt was stopped and has saved."""
        self._end("finished" if code == ExitCode.FINISHED else "preempted", reason, code)

    def fail(self, code: int, reason: str, failed_node: str | None = None) -> None:
        """Say that this attempt failed, as far as it may and can write.

        Args:
            failed_node: where the rank sat that is known to be at fault.
        """
        if isinstance(self._lease, _NoLease):
            return
        if failed_node is not None:
            self._ending["failed_node"] = failed_node
        with contextlib.suppress(OSError, TakenOver):
            self._end("failed", reason, ExitCode(code))

    def _end(self, state: State, reason: str, code: ExitCode) -> None:
        self._ending |= {"state": state, "reason": reason, "exit_code": int(code)}
        self._write(state, reason, code)

    def release(self) -> None:
        """Let the next attempt in, and say in this one's file how it ended."""
        self._lease.release(**self._ending)

    def _write(self, state: State, reason: str, code: ExitCode | None = None, step: int | None = None) -> None:
        """Raises OSError if status.json cannot be written; the old one stays then."""
        facts = {
            "state": state,
            "step": self.step if step is None else step,
            "attempt": self.number,
            "reason": reason,
            "exit_code": None if code is None else int(code),
            "target": self.target,
            "saved_step": self.saved_step,
            "without_progress": self.without_progress,
            "world_size": self._world_size,
            "time": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **slurm_restart(),
        }
        write_json(self.directory.status_file, facts, self.check)


def count_without_progress(attempts: Sequence[dict[str, Any]]) -> int:
    """How many of the last attempts, one after the other, saved nothing beyond where they had started."""
    count = 0
    for facts in reversed(attempts):
        if facts.get("step") != facts.get("start_step"):
            break
        count += 1
    return count
