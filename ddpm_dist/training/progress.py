"""What rank 0 shows to a person: a progress bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 10.0


class Progress:
    """Shows how far the run is and how fast: on a terminal all the time, in a log file every LINE_SECONDS.

    Args:
        start: the step at which this attempt starts.
        target: the step at which the run is finished.
    """

    def __init__(self, start: int, target: int) -> None:
        self._target = target
        self._start, self._started, self._last_line = start, time.monotonic(), 0.0
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
        step = record["step"]
        figures = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['images_per_second']:.0f} images/s"
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(figures)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_SECONDS or step == self._target:
            self._last_line = now
            seconds = (now - self._started) / max(1, step - self._start) * (self._target - step)
            left = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
            self.say(f"step {step}/{self._target}  epoch {record['epoch']:.2f}  {figures}  {left} left")

    def close(self) -> None:
        """Leave the terminal to others."""
        if self._bar is not None:
            self._bar.close()
