"""Files that are either the old one or the new one, whole, whatever happens in between."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

TEMPORARY = ".tmp"
_BUFFER_BYTES, _FLUSH_BYTES = 2**22, 2**24
Fence = Callable[[], None]  # raises if this process may no longer write (see run.lease)


def no_fence() -> None:
    """For files that anybody may write."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system calls on an open file (write, fsync) do not say which file: put its name in."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


class HashingWriter:
    """Writes to a binary file and hashes what is written (sha256), so that it need not be read again.

    Threads hash copies of what was written, and have the disk take it, while more is made and written: that hides
    the better part of both.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._threads = file, ThreadPoolExecutor(2)
        self._hash = hashlib.sha256()
        # Hashed one after the other; handing over less than megabytes costs more than it gains.
        self._filling, self._hashing = bytearray(_BUFFER_BYTES), bytearray(_BUFFER_BYTES)
        self._filled = 0
        self._hashed: Future[None] | None = None
        self._flushed: list[Future[None]] = []
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()  # they hold the file's number, which is soon another file's

    def write(self, data: bytes) -> int:
        self._file.write(data)
        left = memoryview(data).cast("B")  # the caller's, and gone when we return
        self.size += len(left)
        while len(left):
            piece = left[: _BUFFER_BYTES - self._filled]
            self._filling[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            left = left[len(piece) :]
            if self._filled == _BUFFER_BYTES:
                self._hand_over()
        return len(data)

    def _hand_over(self) -> None:
        if self._hashed is not None:
            self._hashed.result()
        self._filling, self._hashing, self._filled = self._hashing, self._filling, 0
        self._hashed = self._threads.submit(self._hash.update, self._hashing)
        if self.size // _FLUSH_BYTES > len(self._flushed):
            self._file.flush()
            self._flushed.append(self._threads.submit(os.fdatasync, self._file.fileno()))

    def flush(self) -> None:
        """Raises OSError, also for what a thread met: the kernel tells of an error only once."""
        self._file.flush()
        for flushed in self._flushed:
            flushed.result()

    def hexdigest(self) -> str:
        """Once all is written."""
        if self._hashed is not None:
            self._hashed.result()
        whole = self._hash.copy()
        whole.update(memoryview(self._filling)[: self._filled])
        return whole.hexdigest()


@contextlib.contextmanager
def replacing(path: Path, fence: Fence = no_fence, durable: bool = True) -> Iterator[BinaryIO]:
    """Write a file beside `path` that takes its name when the block ends well: fsync, rename, fsync of the folder.

    Args:
        fence: called right before the rename; what it raises leaves `path` untouched.
        durable: false leaves both fsyncs out, for what may be lost with the machine.

    Raises:
        OSError: no space, read-only, ...; `path` is untouched then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{TEMPORARY}")
    try:
        with naming(path), open(temporary, "wb") as file:
            yield cast(BinaryIO, file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        fence()
        os.replace(temporary, path)
        if durable:
            sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Make the renames inside a folder durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, values: dict[str, Any], fence: Fence = no_fence) -> None:
    """Replace a JSON file. Raises OSError, or what the fence raises; the old one stays then."""
    with replacing(path, fence) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file's object, or None where it is missing or damaged. Raises other OSErrors."""
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
