"""How fast a run trains, without the time of the work between steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Measures the time that steps take, without the time for saves and previews.

    Args:
        step: finished steps now.
    """

    def __init__(self, step: int) -> None:
        self._step, self._since = step, time.perf_counter()

    def steps_per_second(self, step: int) -> float:
        """The speed since the last call, or since the clock was made.

        Args:
            step: finished steps now.
        """
        now = time.perf_counter()
        rate = (step - self._step) / (now - self._since)
        self._step, self._since = step, now
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside the `with` does not count."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before
