"""What rank 0 shows to a person: a progress bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 10.0
ESTIMATE_SECONDS = 3.0  # so long the speed is measured before the first word on how long the run will take


class Progress:
    """Shows how far the run is and how fast: on a terminal all the time, in a log file every LINE_SECONDS.

    Args:
        start: the step at which this attempt starts.
        target: the step at which the run is finished.
    """

    def __init__(self, start: int, target: int) -> None:
        self._target = target
        self._since: tuple[int, float] | None = None  # step and time of the first figures; the steps before are slower
        self._last_line, self._estimated = 0.0, False
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(initial=start, total=target, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def update(self, record: dict[str, Any]) -> None:
        """Show the figures of a line of metrics.jsonl: step, epoch, loss, learning rate, speed, and the time left."""
        step, now = record["step"], time.monotonic()
        if self._since is None:
            self._since = step, now
        left = self._left(step, now)
        if not self._estimated and now - self._since[1] >= ESTIMATE_SECONDS:
            self._estimated = True
            self.say(f"on this machine it takes about {left} more to step {self._target}")
        figures = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['images_per_second']:.0f} images/s"
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(figures)
            return
        if now - self._last_line >= LINE_SECONDS or step == self._target:
            self._last_line = now
            ending = f"  {left} left" if left else ""
            self.say(f"step {step}/{self._target}  epoch {record['epoch']:.2f}  {figures}{ending}")

    def _left(self, step: int, now: float) -> str:
        """The time left at the speed so far, for a person; empty if there is no speed yet."""
        first_step, first_time = self._since or (step, now)
        if step == first_step:
            return ""
        seconds = (now - first_time) / (step - first_step) * (self._target - step)
        if seconds < 90:
            return f"{seconds:.0f} s"
        return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

    def close(self) -> None:
        """Leave the terminal to others."""
        if self._bar is not None:
            self._bar.close()
