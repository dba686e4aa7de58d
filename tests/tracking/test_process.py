"""How long the trainer waits for its shipper process, and what it says about it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from handmade import make_run, set_state
from harness import wait_until
from mlflow_server import shippers_of

from ddpm_dist.parallel.local import free_port
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.tracking.process import ShipperProcess


@contextlib.contextmanager
def shipping(directory: RunDirectory) -> Iterator[ShipperProcess]:
    """This process is the trainer. Its shippers are killed at the end."""
    process = ShipperProcess.start(directory.path)
    try:
        yield process
    finally:
        for pid in shippers_of(directory.path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not shippers_of(directory.path), lambda: "a shipper is still alive")


def log_of(directory: RunDirectory) -> str:
    path = directory.path / "shipper.log"
    return path.read_text(errors="replace") if path.exists() else ""


@pytest.mark.parametrize("kind", ["closed", "silent"])
@pytest.mark.xfail(strict=True, reason="a finished run waits for a dead server for as long as for a living one")
def test_finished_run_waits_five_seconds_at_most_for_a_server_that_does_not_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes connections and never says a word
        port = listener.getsockname()[1] if kind == "silent" else free_port()
        directory = make_run(tmp_path, kind, f"tracking.uri=http://127.0.0.1:{port}", state="running")
        with shipping(directory) as process:
            wait_until(lambda: "not delivered yet" in log_of(directory), lambda: log_of(directory))
            set_state(directory, "finished", 20)
            begun = time.monotonic()
            process.wait(15)
            assert time.monotonic() - begun < 6.5
            assert shippers_of(directory.path), "the shipper goes on trying without the trainer"
    assert f"ddpm_dist.sync {directory.path}" in capsys.readouterr().out, "nobody is told how to deliver later"
