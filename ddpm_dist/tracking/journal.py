"""metrics.jsonl: one JSON object a line, written at once. The truth about a run's curves."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddpm_dist.errors import TakenOver
from ddpm_dist.run.files import Fence, naming, no_fence


class Journal:
    """Appends lines. Each is one write, so that a kill tears at most the last one.

    Args:
        path: metrics.jsonl.
        fence: called before each write; raises if this process may no longer write.

    Raises:
        OSError: it cannot be opened for appending.
    """

    def __init__(self, path: Path, fence: Fence = no_fence) -> None:
        self._path, self._fence, self._lock = path, fence, threading.Lock()
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._descriptor).st_size
        torn = size and os.pread(self._descriptor, 1, size - 1) != b"\n"
        self._unwritten = b"\n" if torn else b""  # so that our first line starts afresh

    def append(self, record: dict[str, float]) -> None:
        """A figure that is no finite number is written as null: JSON has no NaN.

        Raises:
            OSError: the disk is full or broken; the line is kept, and written before the next one.
        """
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self._write((json.dumps(finite) + "\n").encode())

    def _write(self, line: bytes = b"") -> None:
        """The loop appends while the saver's thread syncs: one at a time, or what either has written is lost."""
        with self._lock, naming(self._path):
            self._unwritten += line
            self._fence()
            while self._unwritten:  # a full disk takes a part of a line
                self._unwritten = self._unwritten[os.write(self._descriptor, self._unwritten) :]

    def sync(self) -> None:
        """Make what was appended durable. Raises OSError."""
        self._write()
        with naming(self._path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        with contextlib.suppress(OSError, TakenOver):
            self._write()
        os.close(self._descriptor)


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """(record, offset after it) of each whole line from a byte offset on; torn lines are passed over."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return  # still being written, or torn by a kill and not yet ended
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record, offset


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """One record a step, ascending; where a step was trained again after a kill, its last line counts."""
    by_step = {record["step"]: record for record, _ in read_lines(path)}
    return [by_step[step] for step in sorted(by_step)]
