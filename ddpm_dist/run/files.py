"""Writing files so that a reader finds either the whole old one or the whole new one, whatever happens."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

TEMPORARY = ".tmp"
_BUFFER_BYTES, _FLUSH_BYTES = 2**22, 2**24
Fence = Callable[[], None]  # raises TakenOver if this process may no longer write: Lease.check (see run.lease)


def no_fence() -> None:
    """The fence of who holds no lease: readers, and writers of files that any process may write."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name into errors that lack it: those of system calls on an open file, as write and fsync."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


class HashingWriter:
    """Writes to a binary file and computes the sha256 of what is written, so that the file need not be read for it.

    While the caller makes and writes more, two threads hash copies of what was written and flush it to the disk.
    So most of the time that both take is hidden.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._threads = file, ThreadPoolExecutor(2)
        self._hash = hashlib.sha256()
        # One buffer is filled while the other is hashed. Smaller ones would cost more time than they save.
        self._filling, self._hashing = bytearray(_BUFFER_BYTES), bytearray(_BUFFER_BYTES)
        self._filled = 0
        self._hashed: Future[None] | None = None
        self._flushed: list[Future[None]] = []
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()  # they hold the file's descriptor, whose number is another file's once it is closed

    def write(self, data: bytes) -> int:
        self._file.write(data)
        left = memoryview(data).cast("B")  # the memory is the caller's, who uses it again once we return
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
        """Raises OSError, also for an error that a thread met: the kernel reports an error only once."""
        self._file.flush()
        for flushed in self._flushed:
            flushed.result()

    def hexdigest(self) -> str:
        """The sha256 of all that was written so far."""
        if self._hashed is not None:
            self._hashed.result()
        whole = self._hash.copy()
        whole.update(memoryview(self._filling)[: self._filled])
        return whole.hexdigest()


@contextlib.contextmanager
def replacing(path: Path, fence: Fence = no_fence, durable: bool = True) -> Iterator[BinaryIO]:
    """Write a temporary file that is renamed to `path` when the block ends without an exception.

    The order is: fsync of the file, fence, rename, fsync of the folder.

    Args:
        fence: called right before the rename; if it raises, `path` is untouched.
        durable: False leaves both fsyncs out, for a file that may be lost when the machine crashes.

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


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Fill a temporary folder beside `folder`, which gets that name when the block ends without an exception.

    Args:
        folder: a path where nothing is, or an empty folder.

    Raises:
        OSError: no space, read-only, something lies there now, ...; there is no part of the new folder then.
    """
    folder = Path(os.path.abspath(folder))
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}{TEMPORARY}")
    try:
        temporary.mkdir()
        yield temporary
        for path in [temporary, *temporary.rglob("*")]:
            sync_directory(path)  # a file is flushed in the same way
        os.rename(temporary, folder)
        sync_directory(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_directory(directory: Path) -> None:
    """Have the renames inside a folder survive a crash of the machine."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, values: dict[str, Any], fence: Fence = no_fence) -> None:
    """Replace a JSON file. Raises OSError, or what the fence raises; the old file stays then."""
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
