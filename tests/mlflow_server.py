"""A real MLflow server on a port of its own, and the shipper processes that are at work on a run."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

SHIPPER = "ddpm_dist.tracking.delivery"


@contextlib.contextmanager
def mlflow_server(place: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start `mlflow server`, with its database, files and log in a folder. The processes are killed at the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{place}/server.db", "--artifacts-destination", str(place / "files")]
    with server_process(command, place) as process:
        yield process


@contextlib.contextmanager
def server_process(
    command: Sequence[str], place: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command that becomes `mlflow server`, in a folder, with one worker. It is killed at the end.

    Args:
        environment: what it gets beside the environment of this process.
    """
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_WORKERS": "1"}
    with open(place / "server.log", "ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=place,
            env=os.environ | quiet | dict(environment or {}),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own session, so uvicorn's workers end with it
        process.wait(30)


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def wait_for_answer(server: subprocess.Popen[bytes], place: Path, port: int, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not answers(port):
        log = (place / "server.log").read_text(errors="replace")
        assert server.poll() is None, log
        assert time.monotonic() < deadline, f"the MLflow server does not answer\n{log}"
        time.sleep(0.1)


def shippers_of(run: Path) -> list[int]:
    """Pids of the shipper processes that are at work on a run directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if SHIPPER in words and str(run) in words:
                found.append(int(path.parent.name))
    return found
