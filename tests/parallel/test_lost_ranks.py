"""What a rank learns of another's failure."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from ddpm_dist.errors import ConfigError, DataError, ExitCode
from ddpm_dist.parallel.failures import (
    Failure,
    RankLost,
    is_lost_contact,
    leave_note,
    lost_contact,
    read_note,
    user_error,
)


def test_a_note_says_who_ended_and_why() -> None:
    store = HashStore()
    assert read_note(store) is None
    leave_note(store, 65, 3, 'no images in "data"')
    assert read_note(store) == Failure(65, 'rank 3: no images in "data"', (3,))


class GoneStore:
    """As a store of torch answers whose process has died."""

    def __getattr__(self, name: str) -> object:
        raise dist.DistNetworkError("Connection reset by peer")


def test_a_store_that_is_gone_adds_no_error_of_its_own() -> None:
    leave_note(GoneStore(), 65, 3, "no images")  # type: ignore[arg-type]
    assert read_note(GoneStore()) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "says_so"),
    [
        (RankLost("rank 2 has been silent", [2]), True),
        (dist.DistNetworkError("The client socket has timed out"), True),
        (dist.DistBackendError("NCCL error"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ConnectionError("Connection refused"), False),  # the tracking server's, say
        (DataError("no images"), False),
    ],
)
def test_lost_contact_is_told_from_errors_of_this_rank(error: Exception, says_so: bool) -> None:
    assert is_lost_contact(error) == says_so


def test_lost_contact_is_one_line_that_keeps_the_ranks_known_so_far() -> None:
    error = lost_contact(RankLost("rank 2 has\nbeen silent", [2]), None)
    assert str(error) == "lost contact to another rank (rank 2 has been silent)"
    assert error.ranks == (2,)


@pytest.mark.parametrize(("code", "kind"), [(65, DataError), (78, ConfigError), (76, ConfigError), (70, ConfigError)])
def test_an_error_of_another_rank_keeps_its_exit_code_and_names_the_rank(code: int, kind: type[Exception]) -> None:
    error = user_error(code, "what happened", 3)
    assert type(error) is kind
    assert (error.exit_code, error.ranks, str(error)) == (ExitCode(code), (3,), "what happened")
