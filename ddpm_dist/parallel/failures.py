"""What a rank learns of another's failure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from ddpm_dist.errors import ConfigError, DataError, ExitCode, UserError


class RankZeroFailed(Exception):
    """Rank 0 met an error and has reported it; the others leave with the same exit code, silently."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"rank 0 failed with exit code {exit_code}")
        self.exit_code = exit_code


class RankLost(RuntimeError):
    """Another rank is dead or hangs.

    Attributes:
        ranks: which, as far as that is known.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


@dataclass(frozen=True)
class Failure:
    """Why a job ends, as rank 0 is to say it.

    Attributes:
        ranks: the other ranks at fault, as far as they are known.
    """

    exit_code: int
    reason: str
    ranks: tuple[int, ...] = ()


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone: that rank has the real story."""
    return isinstance(error, RankLost | dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection"))
    )


def user_error(exit_code: int, message: str, rank: int) -> UserError:
    """Another rank's error, for rank 0 to say."""
    error = DataError(message) if exit_code == ExitCode.DATA else ConfigError(message)
    error.exit_code, error.ranks = ExitCode(exit_code), (rank,)
    return error
