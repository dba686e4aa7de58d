"""Exit codes, and the errors that a user can mend: each is one line and an exit code, never a traceback."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """How a rank ends. The numbers are those of sysexits.h where a meaning fits.

    torchrun exits with 1 for each of them but 0; status.json holds the true code.
    """

    FINISHED = 0
    DATA = 65  # data or checkpoint unusable
    SOFTWARE = 70  # our fault
    PREEMPTED = 75  # run me again
    NO_PROGRESS = 76  # diverged, or another attempt has taken over: do not requeue
    CONFIG = 78


class UserError(ValueError):
    """Something the user can mend. The message says, in one line, what, where, and what would be valid.

    Attributes:
        ranks: the ranks that met the error, where others than the rank that reports it.
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
    """The gradients were NaN or infinite in too many steps in a row: training on would be a waste."""

    exit_code = ExitCode.NO_PROGRESS


class TakenOver(UserError):
    """Another attempt has taken over this run directory, so this attempt must not write into it any more."""

    exit_code = ExitCode.NO_PROGRESS


class StopRequested(Exception):
    """A stop signal cuts work short that can be done again (sampling, waiting)."""
