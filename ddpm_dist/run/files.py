"""Files that are either the old one or the new one, whole, whatever happens in between."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

TEMPORARY = ".tmp"
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
    """A binary file that hashes what is written to it (sha256), so that it need not be read again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


@contextlib.contextmanager
def replacing(path: Path, fence: Fence = no_fence, durable: bool = True) -> Iterator[HashingWriter]:
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
            yield HashingWriter(cast(BinaryIO, file))
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
