"""Advisory locks on files, which the kernel frees when their holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import math
import time
from collections.abc import Iterator
from pathlib import Path

_LOOK_SECONDS = 0.2


@contextlib.contextmanager
def locked(path: Path, patience_seconds: float = math.inf) -> Iterator[None]:
    """Hold the lock inside. The file is made, and stays.

    Args:
        patience_seconds: how long to wait for another holder.

    Raises:
        TimeoutError: another process has held it all that time.
    """
    deadline = time.monotonic() + patience_seconds
    with open(path, "a") as file:
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{path}: another process holds this lock") from None
                time.sleep(_LOOK_SECONDS)
        yield
