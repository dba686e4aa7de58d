"""What an attempt says of itself in the run directory."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ddpm_dist.errors import ExitCode
from ddpm_dist.run import lease
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.run.outcome import Attempt


def attempt(path: Path) -> Attempt:
    return Attempt(RunDirectory(path), 1, [socket.gethostname()])


def test_what_the_attempt_before_saved_while_we_waited_for_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "seems_alive", lambda facts: facts.get("ended") is None)
    earlier, later = attempt(tmp_path), attempt(tmp_path)
    earlier.claim(lambda seconds: None)
    earlier.target = 100

    def save_and_leave(seconds: float) -> None:
        earlier.committed(40)
        earlier.release()

    later.claim(save_and_leave)
    assert (later.saved_step, later.step, later.target) == (40, 40, 100)
    later.fail(ExitCode.DATA, "images are missing")
    assert later.directory.read_status()["saved_step"] == 40
