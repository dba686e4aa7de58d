"""The attempt of this process, and what it writes into the run directory about itself: how far it is, how it ended.

Only this module writes status.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
    """Stands for the lease until the attempt claims the run. On every rank except rank 0 it stays for good."""

    number = 0

    def check(self) -> None:
        raise AssertionError("only an attempt that has claimed the run writes")

    def note(self, **facts: Any) -> None:
        self.check()

    def release(self, **facts: Any) -> None:
        pass


class Attempt:
    """One attempt at a run, from the start of this process to its exit.

    Every rank has an Attempt, but only that of rank 0 claims the run and writes. It writes nothing before the claim,
    since the run may belong to another attempt.

    Args:
        directory: the run directory.
        world_size: number of ranks.
        nodes: the node of every rank, by rank.

    Attributes:
        step: finished steps. The training loop sets it.
        target: the step at which the run is finished. The session sets it.
        saved_step: step of the newest committed checkpoint; None before the first one. If a later attempt finds no
            checkpoint although this is set, it refuses to start at step 0.
        without_progress: how many attempts in a row, up to the one before this one, saved no new step.
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
        """The number of this attempt, counted from 1; 0 before the claim."""
        return self._lease.number

    def claim(self, wait: Callable[[float], None]) -> None:
        """Become the one attempt that writes into the run directory.

        Args:
            wait: called with seconds to sleep, as long as another attempt may still be running. May raise to give up.

        Raises:
            ConfigError: another attempt is running; the message says where.
            OSError: the folder cannot be written.
        """
        at_least = self.directory.read_status().get("attempt", 0) + 1
        # These facts are part of the claim, so that they are known of an attempt that dies in its first second too.
        facts = {"world_size": self._world_size, "nodes": self._nodes}
        self._lease = claim(self.directory.attempts, facts, at_least, wait)
        # What the attempt before wrote, perhaps while this one waited for it, holds until this one has found its
        # checkpoint and its target.
        status = self.directory.read_status()
        self.target, self.saved_step = status.get("target", 0), status.get("saved_step")
        self.step = self.saved_step or 0
        before = read_attempts(self.directory.attempts)[:-1]  # the last one is ours
        self.without_progress = count_without_progress(before)

    def check(self) -> None:
        """Make sure that this attempt may still write. Called before each file is put in place.

        Raises:
            TakenOver: a later attempt has begun.
        """
        self._lease.check()

    def start_from(self, saved_step: int | None, first_step: int = 0) -> None:
        """Record where this attempt starts.

        Args:
            saved_step: the step of the checkpoint that it goes on from; None if the run has none.
            first_step: the step at which the run begins, if it has no checkpoint.
        """
        self.saved_step, self.step = saved_step, first_step if saved_step is None else saved_step
        self._lease.note(start_step=self.step, step=self.step)

    def begin(self, config: Config, origin: dict[str, Any] | None = None) -> None:
        """Record that training begins, and write its config to config.yaml.

        Args:
            origin: what a new run starts from, as plain JSON; None for random weights, and for a resume.

        Raises:
            OSError: a file cannot be written.
            TakenOver: a later attempt has begun.
        """
        if origin is not None:
            self._lease.note(init=dataclasses.asdict(config.init), origin=origin)
        self._write("running", "training")
        with replacing(self.directory.config_file, self.check) as file:
            file.write(to_yaml(config).encode())

    def begun_from(self, config: Config) -> dict[str, Any] | None:
        """What the newest attempt that began with this `init` section started from; None if there is none."""
        init = dataclasses.asdict(config.init)
        noted = [facts for facts in read_attempts(self.directory.attempts) if "origin" in facts]
        return next((dict(facts["origin"]) for facts in reversed(noted) if facts.get("init") == init), None)

    def committed(self, step: int) -> None:
        """Record that the checkpoint of this step is committed. Raises as `begin` does."""
        self.saved_step, self.without_progress = step, 0
        self._lease.note(step=step)
        self._write("running", "training", step=step)

    def end(self, code: ExitCode, reason: str) -> None:
        """Record that the run is finished, or that this attempt was stopped and has saved. Raises as `begin` does."""
        self._end("finished" if code == ExitCode.FINISHED else "preempted", reason, code)

    def stop_early(self, reason: str) -> None:
        """Record that this attempt was stopped before its first step. Does nothing where `fail` would do nothing."""
        self._end_if_possible("preempted", reason, ExitCode.PREEMPTED)

    def fail(self, code: int, reason: str, failed_node: str | None = None) -> None:
        """Record that this attempt failed. Does nothing if it does not hold the run or its files cannot be written.

        Args:
            code: exit code of the attempt.
            reason: why it failed, in one line.
            failed_node: the node of the ranks at fault; None if it is not known.
        """
        if failed_node is not None:
            self._ending["failed_node"] = failed_node
        self._end_if_possible("failed", reason, ExitCode(code))

    def _end_if_possible(self, state: State, reason: str, code: ExitCode) -> None:
        if isinstance(self._lease, _NoLease):
            return
        with contextlib.suppress(OSError, TakenOver):
            self._end(state, reason, code)

    def _end(self, state: State, reason: str, code: ExitCode) -> None:
        self._ending |= {"state": state, "reason": reason, "exit_code": int(code)}
        self._write(state, reason, code)

    def release(self) -> None:
        """Give the run free for the next attempt, and write into the file of this attempt how it ended."""
        self._lease.release(**self._ending)

    def _write(self, state: State, reason: str, code: ExitCode | None = None, step: int | None = None) -> None:
        """Replace status.json. If that fails, the old file stays.

        Raises:
            OSError: it cannot be written.
            TakenOver: a later attempt has begun.
        """
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
    """How many attempts in a row, up to the last one, saved no step after the one at which they started.

    Args:
        attempts: the facts of each attempt in order, as `read_attempts` returns them.
    """
    count = 0
    for facts in reversed(attempts):
        if facts.get("step") != facts.get("start_step"):
            break
        count += 1
    return count
