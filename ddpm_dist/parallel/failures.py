"""What a rank learns of another's failure."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from ddpm_dist.command import one_line
from ddpm_dist.errors import ConfigError, DataError, ExitCode, UserError
from ddpm_dist.parallel.watchdog import Watchdog

_NOTE = "failure"  # the key of the store under which a rank that ends alone says why


class FailedElsewhere(Exception):
    """Another rank met an error and reports it; this rank ends with the same exit code and prints nothing."""

    def __init__(self, exit_code: int, who: str = "another rank") -> None:
        super().__init__(f"{who} failed with exit code {exit_code}")
        self.exit_code = exit_code


class RankZeroFailed(FailedElsewhere):
    """Rank 0 met an error and reports it, and all other ranks know that."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code, "rank 0")


class RankLost(RuntimeError):
    """Another rank is dead or hangs.

    Attributes:
        ranks: which ranks those are, as far as they are known.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


@dataclass(frozen=True)
class Failure:
    """Why a job ends, as rank 0 is to report it.

    Attributes:
        ranks: the other ranks at fault, as far as they are known.
    """

    exit_code: int
    reason: str
    ranks: tuple[int, ...] = ()


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone; the true reason is then that rank's."""
    return isinstance(error, RankLost | dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection"))
    )


def user_error(exit_code: int, message: str, rank: int) -> UserError:
    """Another rank's error, for rank 0 to report."""
    error = DataError(message) if exit_code == ExitCode.DATA else ConfigError(message)
    error.exit_code, error.ranks = ExitCode(exit_code), (rank,)
    return error


def lost_contact(error: BaseException, watchdog: Watchdog | None) -> RankLost:
    """The error of a collective, with the names of the ranks that have fallen silent. Takes some seconds.

    Args:
        watchdog: this rank's, which is disarmed; None where there is only one process.
    """
    who, ranks = "", getattr(error, "ranks", ())
    if watchdog is not None:
        watchdog.disarm()
        who = f"; {watchdog.who_is_silent()}"
        ranks = watchdog.silent or ranks
    return RankLost(f"lost contact to another rank ({' '.join(str(error).split())}){who}", ranks)


def leave_note(store: Store, exit_code: int, rank: int, reason: str) -> None:
    """Say in the store why this rank ends. If the store is gone, so is rank 0, and nobody would read it."""
    with contextlib.suppress(RuntimeError):
        store.set(_NOTE, json.dumps([exit_code, rank, reason]))


def read_note(store: Store) -> Failure | None:
    """What a rank that ended alone has said in the store, if one has."""
    with contextlib.suppress(RuntimeError):
        if store.check([_NOTE]):
            exit_code, rank, reason = json.loads(store.get(_NOTE))
            return Failure(exit_code, f"rank {rank}: {reason}", (rank,))
    return None


def explain(error: Exception, rank: int) -> tuple[int, str]:
    """(exit code, text to print) for an error that ends this rank. An empty text: another rank prints it."""
    if isinstance(error, FailedElsewhere):
        return error.exit_code, ""
    said = one_line(error)
    if said is not None:
        return said
    if is_lost_contact(error):
        return ExitCode.SOFTWARE, f"error: rank {rank}: {' '.join(str(error).split())}"
    return ExitCode.SOFTWARE, f"rank {rank}:\n{''.join(traceback.format_exception(error))}"
