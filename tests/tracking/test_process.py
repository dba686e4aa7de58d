"""How long the trainer waits for its shipper process, and what it says about it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from handmade import make_run, set_state
from harness import wait_until
from mlflow_server import shippers_of

from ddpm_dist.parallel.local import free_port
from ddpm_dist.run import lease as leases
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.run.lease import claim
from ddpm_dist.tracking import process
from ddpm_dist.tracking.delivery import sync
from ddpm_dist.tracking.process import ShipperProcess
from ddpm_dist.tracking.shipper import NotDelivered
from ddpm_dist.tracking.signs import ANSWERED, sign_into


@contextlib.contextmanager
def shipping(directory: RunDirectory) -> Iterator[ShipperProcess]:
    """This process is the trainer. Its shippers are killed at the end."""
    shipper = ShipperProcess.start(directory.path)
    try:
        yield shipper
    finally:
        for pid in shippers_of(directory.path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not shippers_of(directory.path), lambda: "a shipper is still alive")


def log_of(directory: RunDirectory) -> str:
    path = directory.path / "shipper.log"
    return path.read_text(errors="replace") if path.exists() else ""


@pytest.mark.parametrize("kind", ["closed", "silent"])
@pytest.mark.slow
def test_finished_run_waits_five_seconds_at_most_for_a_server_that_does_not_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes connections and never says a word
        port = listener.getsockname()[1] if kind == "silent" else free_port()
        directory = make_run(tmp_path, kind, f"tracking.uri=http://127.0.0.1:{port}", state="running")
        with shipping(directory) as shipper:
            wait_until(lambda: "not delivered yet" in log_of(directory), lambda: log_of(directory))
            set_state(directory, "finished", 20)
            begun = time.monotonic()
            shipper.wait(60)
            assert time.monotonic() - begun < 6.5
            assert shippers_of(directory.path), "the shipper goes on trying without the trainer"
    assert f"ddpm_dist.sync {directory.path}" in capsys.readouterr().out, "nobody is told how to deliver later"


# A shipper that is a few lines of Python


PRELUDE = f"""#!{sys.executable}
import os, sys, time
pipe = int(sys.argv[sys.argv.index("--signs") + 1])
def ask(): os.write(pipe, b"?")
def answer(): os.write(pipe, b"!")
def local(): os.write(pipe, b"-")
def refuse(): os.write(pipe, b"x")
"""


@pytest.mark.parametrize(
    ("behaviour", "seconds", "delivered"),
    [
        ("time.sleep(3)", (3.0, 9.0), True),  # it imports mlflow and makes a database: nobody has been asked yet
        ("for i in range(8): answer(); time.sleep(0.5)", (4.0, 9.0), True),  # MLflow answers, and much is left
        ("ask(); time.sleep(20)", (0.0, 3.5), False),  # the server hangs
        ("for i in range(80): ask(); time.sleep(0.2)", (0.0, 3.5), False),  # the server refuses at once
        ("for i in range(3): answer(); time.sleep(0.5)\ntime.sleep(20)", (0.0, 5.0), False),  # it goes down
        ("for i in range(80): answer(); time.sleep(0.5)", (9.0, 12.0), False),  # even so there is an end
        ("for i in range(5): ask(); time.sleep(0.2)\nanswer()", (1.0, 9.0), True),  # it was down for a second
        ("ask(); local(); time.sleep(3)", (3.0, 9.0), True),  # a database file, after a try in vain
        ("local(); ask(); time.sleep(20)", (0.0, 3.5), False),  # a database file that cannot be written
        ("for i in range(80): answer(); refuse(); time.sleep(0.2)", (0.0, 3.5), False),  # it knows us, and forbids it
        ("ask(); sys.exit(1)", (0.0, 3.5), False),  # the shipper gave up
        ("os.kill(os.getpid(), 9)", (0.0, 3.5), False),
    ],
    ids=[
        "starts",
        "busy",
        "silent",
        "refuses",
        "goes-down",
        "too-busy",
        "comes-back",
        "file",
        "broken-file",
        "forbids",
        "gave-up",
        "killed",
    ],
)
@pytest.mark.slow
def test_trainer_waits_while_mlflow_answers_and_no_longer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    behaviour: str,
    seconds: tuple[float, float],
    delivered: bool,
) -> None:
    monkeypatch.setattr(process, "SILENCE_SECONDS", 1.5)
    script = tmp_path / "python"
    script.write_text(PRELUDE + behaviour + "\n")
    script.chmod(0o755)
    directory = make_run(tmp_path, "run")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(script))
        running = shipping(directory)
        shipper = running.__enter__()
    begun = time.monotonic()
    try:
        shipper.wait(9)
        assert seconds[0] - 0.5 <= time.monotonic() - begun <= seconds[1]
    finally:
        running.__exit__(None, None, None)
    assert ("ddpm_dist.sync" in capsys.readouterr().out) != delivered


@pytest.mark.slow
def test_a_server_that_refused_at_first_and_answers_now_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, directory = tmp_path / "python", make_run(tmp_path, "run")
    said = directory.path / "said"
    script.write_text(f"{PRELUDE}refuse(); open({str(said)!r}, 'w')\nfor i in range(4): time.sleep(0.5); answer()\n")
    script.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(script))
        running = shipping(directory)
        shipper = running.__enter__()
    try:
        wait_until(said.exists, lambda: "the shipper does not begin")
        shipper.wait(60)
    finally:
        running.__exit__(None, None, None)
    assert "ddpm_dist.sync" not in capsys.readouterr().out


def test_signs_never_stop_the_shipper() -> None:
    """The trainer does not read them before its end, and may have gone."""
    reading, writing = os.pipe()
    sign = sign_into(writing)
    for _ in range(100_000):  # more than a pipe holds
        sign(ANSWERED)
    os.close(reading)
    sign(ANSWERED)
    os.close(writing)


HOLD = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"


@pytest.mark.parametrize("state", ["finished", "running"])
@pytest.mark.slow
def test_sync_waits_for_the_shipper_of_a_run_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """It may go on trying for a minute after its trainer. Where the trainer lives there is nothing to wait for."""
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.1)
    directory = make_run(tmp_path, "run", state=state)
    lease = claim(directory.attempts, {}, 1)
    if state == "finished":
        lease.release()
    command = [sys.executable, "-c", HOLD, str(directory.path / ".shipper.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            holder.stdout.readline()
            begun = time.monotonic()
            threading.Timer(2.0, holder.stdin.close).start()
            if state == "finished":
                assert sync(directory) == "finished"
                assert time.monotonic() - begun > 2.0
            else:
                with pytest.raises(NotDelivered):
                    sync(directory)
                assert time.monotonic() - begun < 2.0
        finally:
            holder.kill()
    if state == "running":
        lease.release()


@pytest.mark.slow
def test_a_shipper_whose_log_is_full_goes_on_trying(tmp_path: Path) -> None:
    """It says that the server does not answer, which a full disk does not take, and asks again."""
    directory = make_run(tmp_path, "full-log", f"tracking.uri=http://127.0.0.1:{free_port()}", state="running")
    reading, writing = os.pipe()
    argv = [sys.executable, "-m", "ddpm_dist.tracking.delivery", str(directory.path), "--follow", str(os.getpid())]
    with open("/dev/full", "wb") as full:
        shipper = subprocess.Popen(
            [*argv, "--signs", str(writing)],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=full,
            pass_fds=[writing],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
    try:
        os.close(writing)
        signs = [os.read(reading, 1) for _ in range(4)]  # empty once the shipper has ended
        assert signs == [b"?"] * 4, "it asked, failed, said so, and asked again"
        assert shipper.poll() is None
    finally:
        shipper.kill()
        shipper.wait(10)
        os.close(reading)
