"""What a run does about its log: a line that cannot be written is dropped, and the run goes on.

A log can be closed (`>&-`), lie on a full disk, or be a pipe whose reader has ended. None of that is a reason to stop
training: status.json and metrics.jsonl tell all that matters. Commands that answer a person keep Python's own streams.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TextIO

DESCRIPTORS = {"stdout": 1, "stderr": 2}


class _DroppingFile(io.FileIO):
    """A file that takes every byte: those that the system refuses are lost, and nobody is told."""

    def write(self, data: Any, /) -> int:
        """Write bytes (any buffer). Returns how many the caller may forget: those written, or all after an error."""
        try:
            written = super().write(data)
        except OSError:  # closed, full, no reader, terminal gone
            written = None
        return memoryview(data).nbytes if written is None else written  # None: a reader who does not keep up


def open_closed_descriptors() -> None:
    """Point descriptors 0, 1 and 2 to /dev/null where they are closed. Call it before any file is opened.

    The system gives the lowest free number to the next file that is opened. Were that 1 or 2, a library that prints
    would write its words into a checkpoint or into the journal.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(null, True)  # the processes that we start need a valid descriptor as well
            assert null == descriptor, "all lower descriptors are open"


def drop_what_cannot_be_written(*names: str) -> None:
    """Replace these of Python's own output streams by streams whose writing never fails.

    A stream that somebody else has put there (a test, a notebook) is left alone.

    Args:
        names: "stdout", "stderr".
    """
    open_closed_descriptors()
    for name in names:
        if getattr(sys, name) is getattr(sys, f"__{name}__"):  # both are None where the descriptor was closed
            setattr(sys, name, _dropping_stream(getattr(sys, name), DESCRIPTORS[name]))


def _dropping_stream(stream: TextIO | None, descriptor: int) -> TextIO:
    """Every line is written at once, so that a log can be followed and a killed process has said its last words."""
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_DroppingFile(descriptor, "w", closefd=False)),
        encoding=stream.encoding if stream is not None else "utf-8",
        errors="backslashreplace",  # a letter that the log's encoding lacks is no reason to stop either
        line_buffering=True,
    )
