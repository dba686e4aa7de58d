"""What is written, hashed and flushed side by side is what is on disk; no error on the way is lost."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from pathlib import Path
from typing import cast

import pytest

from ddpm_dist.errors import TakenOver
from ddpm_dist.run.files import HashingWriter, naming, replacing


@pytest.mark.parametrize("seed", range(6))
def test_the_digest_is_that_of_the_file_whatever_the_pieces(tmp_path: Path, seed: int) -> None:
    draw, path = random.Random(seed), tmp_path / "file"
    with open(path, "wb") as file, HashingWriter(file) as writer:
        for _ in range(draw.randint(0, 12)):
            piece = bytearray(draw.randbytes(draw.choice([0, 1, 1000, 2**20 + 7, 2**22, 2**22 + 1, 3 * 2**22 + 5])))
            assert writer.write(cast(bytes, piece)) == len(piece)
            piece[:] = b"\0" * len(piece)  # what a caller's memory becomes afterwards
        writer.flush()
    content = path.read_bytes()
    assert writer.size == len(content)
    assert writer.hexdigest() == writer.hexdigest() == hashlib.sha256(content).hexdigest()


def test_an_error_that_the_disk_reports_while_more_is_written_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "file", []
    path.write_bytes(b"old")

    def fdatasync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:  # the kernel tells of it once
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def write_50_megabytes() -> None:
        with replacing(path) as file, HashingWriter(file) as writer:
            for _ in range(50):
                writer.write(b"\1" * 2**20)
            writer.flush()

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with pytest.raises(OSError, match="Input/output error") as caught:
        write_50_megabytes()
    assert len(calls) > 1
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_naming_keeps_a_name_that_is_there_and_leaves_other_errors_alone(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="there") as caught, naming(tmp_path / "here"):
        (tmp_path / "there").read_bytes()
    assert caught.value.filename == str(tmp_path / "there")
    with pytest.raises(ValueError, match="ours"), naming(tmp_path / "here"):
        raise ValueError("ours")


def test_who_is_taken_over_while_it_writes_replaces_nothing(tmp_path: Path) -> None:
    """Writing may take minutes, so the fence is asked once the file is whole, right before the rename."""
    path, taken_over = tmp_path / "file", False
    path.write_bytes(b"old")

    def fence() -> None:
        if taken_over:
            raise TakenOver("by another")

    def write() -> None:
        nonlocal taken_over
        with replacing(path, fence) as file:
            file.write(b"new")
            taken_over = True

    with pytest.raises(TakenOver):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
