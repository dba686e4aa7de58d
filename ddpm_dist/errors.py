"""Exit codes, and the errors that a user can mend. Such an error is shown as one line, never as a traceback."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """How a rank ends. The numbers are those of sysexits.h where one of its meanings fits.

    torchrun turns each of them except 0 into 1; status.json holds the true code.
    """

    FINISHED = 0
    DATA = 65  # the data or a checkpoint cannot be used
    SOFTWARE = 70  # a bug of ours, or a machine, a disk or a network that failed
    PREEMPTED = 75  # stopped by a signal, and saved: the same command goes on
    NO_PROGRESS = 76  # diverged, or another attempt has taken over: the same command would not help
    CONFIG = 78  # the config or the command line is wrong


class UserError(ValueError):
    """Something that the user can mend. The message says in one line what is wrong, where, and what would be valid.

    Attributes:
        exit_code: how the command ends.
        ranks: the ranks that met the error; empty if it is the rank that reports it.
    """

    exit_code = ExitCode.CONFIG
    ranks: tuple[int, ...] = ()

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class ConfigError(UserError):
    """A key, a value or an option cannot work, at all or on this machine."""


class DataError(UserError):
    """Images or checkpoints are missing or damaged, or are not those of this run."""

    exit_code = ExitCode.DATA


class Diverged(UserError):
    """Training does not lead anywhere: the weights or too many gradients in a row are NaN or inf, or ranks differ."""

    exit_code = ExitCode.NO_PROGRESS


class TakenOver(UserError):
    """Another attempt has taken over this run directory, so this attempt must not write into it any more."""

    exit_code = ExitCode.NO_PROGRESS


class StopRequested(Exception):
    """A stop signal has come during work that can be cut short and done again, like sampling or waiting."""
