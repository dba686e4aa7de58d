"""Exit codes, and the errors that a user can mend: each is one line and an exit code, never a traceback."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """How a rank ends (sysexits.h where a meaning fits). torchrun flattens them to 1: status.json says it too."""

    FINISHED = 0
    DATA = 65  # data or checkpoint unusable
    SOFTWARE = 70  # our fault
    PREEMPTED = 75  # run me again
    NO_PROGRESS = 76  # diverged, or taken over: do not requeue
    CONFIG = 78


class UserError(ValueError):
    """Something the user can mend. The message says, in one line, what, where, and what would be valid.

    Attributes:
        ranks: who met it, where that was another rank than the one that says it.
    """

    exit_code = ExitCode.CONFIG
    ranks: tuple[int, ...] = ()

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class ConfigError(UserError):
    """A key, a value, or a combination with this machine that cannot work."""


class DataError(UserError):
    """Images or checkpoints that are missing, truncated or not what they say they are."""

    exit_code = ExitCode.DATA


class Diverged(UserError):
    """Gradients that are no finite numbers, step after step: going on would waste the machine."""

    exit_code = ExitCode.NO_PROGRESS


class TakenOver(UserError):
    """Another attempt writes into this run directory now; what this one goes on to do would be lost."""

    exit_code = ExitCode.NO_PROGRESS


class StopRequested(Exception):
    """Raised inside work that a stop signal may cut short (sampling, waiting); nothing is lost by it."""
