"""A pipe from the shipper to its trainer, with a byte for what MLflow does: so the trainer knows what to wait for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

UNANSWERED = b"?"  # a server has been asked for the first time, or a try has failed
ANSWERED = b"!"  # a server has answered
REFUSED = b"x"  # a server has answered that this user may not: to ask again is in vain until somebody mends that
LOCAL = b"-"  # a database file has been opened or has taken something: slow perhaps, but nobody keeps us waiting
NOT_YET = "not delivered yet: "  # in shipper.log, before the reason
Sign = Callable[[bytes], None]


def no_sign(sign: bytes) -> None:
    """For a shipper that nobody waits for."""


def sign_into(pipe: int) -> Sign:
    """Writes into the pipe, except where it is full (the trainer reads it only at its end) or broken."""
    os.set_blocking(pipe, False)

    def write(sign: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(pipe, sign)

    return write


def read_signs(pipe: int) -> bytes:
    """All that have come since the last call; the pipe does not block."""
    signs = b""
    with contextlib.suppress(BlockingIOError):
        while more := os.read(pipe, 4096):
            signs += more
    return signs
