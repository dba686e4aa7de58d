"""Real signals to real processes: remembered once, by the trainer alone; a dead launcher is a signal too."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ddpm_dist.run.preemption import SIGNALS, StopSignal

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}

ANSWERING = """
import sys
from ddpm_dist.run.preemption import StopSignal
stop = StopSignal().install(under_launcher=False)
print("ready", flush=True)
for line in sys.stdin:
    print(stop.received.name if stop.requested() else "none", flush=True)
"""


class Child:
    """A process that installed the handlers and says, when asked, what it has received."""

    def __init__(self, ignored: signal.Signals | None) -> None:
        def ignore() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the tests themselves ignore it
            if ignored is not None:
                signal.signal(ignored, signal.SIG_IGN)

        self.process = subprocess.Popen(
            [sys.executable, "-c", ANSWERING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            preexec_fn=ignore,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def received(self) -> str:
        """Asked after the signal was sent: the kernel delivers that first. A dead child answers nothing."""
        assert self.process.stdin is not None
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        return self._line()


@contextlib.contextmanager
def child(ignored: signal.Signals | None = None) -> Iterator[Child]:
    one = Child(ignored)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.communicate(timeout=30)


def wait_for(condition: Callable[[], bool], timeout: float = 20) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_the_signals_of_schedulers_terminals_and_launchers_are_handled() -> None:
    """All that launch/torchrun.sh and slurm/train.sbatch have the launcher pass on, and no fewer."""
    assert {number.name for number in SIGNALS} == {"SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT"}
    for script in ("launch/torchrun.sh", "slurm/train.sbatch"):
        passed_on = re.search(r"PET_SIGNALS_TO_HANDLE:-([A-Z0-9,]+)", (ROOT / script).read_text())
        assert passed_on
        assert set(passed_on[1].split(",")) == {number.name for number in SIGNALS}


@pytest.mark.parametrize("number", SIGNALS)
def test_each_stop_signal_sets_the_flag_and_leaves_the_process_alive(number: signal.Signals) -> None:
    with child() as one:
        assert one.received() == "none"
        one.send(number)
        assert wait_for(lambda: one.received() == number.name, 10)
        assert one.process.poll() is None


def test_the_first_signal_is_remembered() -> None:
    with child() as one:
        one.send(signal.SIGUSR1)
        assert wait_for(lambda: one.received() == "SIGUSR1", 10)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
            one.send(number)
            assert one.received() == "SIGUSR1"


def test_an_ignored_hang_up_stays_ignored() -> None:
    with child(ignored=signal.SIGHUP) as one:
        one.send(signal.SIGHUP)
        assert one.received() == "none"
        one.send(signal.SIGTERM)
        assert wait_for(lambda: one.received() == "SIGTERM", 10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_other_ignored_signals_are_taken_over(number: signal.Signals) -> None:
    """A shell starts background jobs with SIGINT ignored; a scheduler's signal must stop them all the same."""
    with child(ignored=number) as one:
        one.send(number)
        assert wait_for(lambda: one.received() == number.name, 10)


def run_code(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_forked_child_does_not_believe_that_it_is_the_trainer() -> None:
    output = run_code(
        "import os, signal\n"
        "from ddpm_dist.run.preemption import SIGNALS, StopSignal\n"
        "stop = StopSignal().install(under_launcher=False)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    for number in SIGNALS:\n"
        "        os.kill(os.getpid(), number)\n"
        "    print('child', stop.received, flush=True)\n"
        "    os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
        "print('parent', stop.received, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGUSR2)\n"
        "print('parent', stop.received.name, flush=True)\n"
    )
    assert output.splitlines() == ["child None", "parent None", "parent SIGUSR2"]


def test_a_loader_worker_outlives_signals_to_the_whole_group() -> None:
    output = run_code(
        "import os\n"
        "from ddpm_dist.run.preemption import SIGNALS, StopSignal, ignore_in_child\n"
        "stop = StopSignal().install(under_launcher=False)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    ignore_in_child()\n"
        "    for number in SIGNALS:\n"
        "        os.kill(os.getpid(), number)\n"
        "    os._exit(5)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    assert output.split() == ["5"]


WORKER = """
import os, pathlib, sys, time
from ddpm_dist.run.preemption import StopSignal
stop = StopSignal().install(under_launcher=sys.argv[1] == "True")
note = pathlib.Path(sys.argv[2])
(note / "pid").write_text(str(os.getpid()))
(note / "ready").touch()
end = time.monotonic() + 30
while not stop.requested() and time.monotonic() < end:
    time.sleep(0.02)
(note / "partial").write_text(stop.received.name if stop.received else "none")
(note / "partial").rename(note / "received")
"""
HANGING_WORKER = WORKER.replace("while not stop.requested() and", "while")
LAUNCHER = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', *sys.argv[1:]])\n"


def is_running(pid: int) -> bool:
    """Not so for a zombie that nobody has waited for yet."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@contextlib.contextmanager
def orphan(folder: Path, under_launcher: bool, worker: str = WORKER) -> Iterator[None]:
    """A worker whose launcher was killed with -9."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, worker, str(under_launcher), str(folder)], env=ENVIRONMENT
    )
    try:
        try:
            assert wait_for((folder / "ready").exists)
        finally:
            launcher.kill()
            launcher.wait(30)
        yield
    finally:
        if (folder / "pid").exists() and not (folder / "received").exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int((folder / "pid").read_text()), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_worker_is_asked_to_stop_when_its_launcher_is_killed(tmp_path: Path) -> None:
    with orphan(tmp_path, under_launcher=True):
        assert wait_for((tmp_path / "received").exists)
        assert (tmp_path / "received").read_text() == "SIGTERM"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_worker_that_cannot_stop_does_not_outlive_its_launcher_for_long(tmp_path: Path) -> None:
    """Its main thread may hang in a collective with ranks that are gone."""
    with orphan(tmp_path, under_launcher=True, worker=HANGING_WORKER):
        pid = int((tmp_path / "pid").read_text())
        assert wait_for(lambda: not is_running(pid), 20)


def test_a_run_started_by_hand_outlives_its_shell(tmp_path: Path) -> None:
    """`nohup python -m ddpm_dist.train &` goes on when the terminal is closed."""
    with orphan(tmp_path, under_launcher=False):
        assert not wait_for((tmp_path / "received").exists, 0.7)


def test_nothing_is_requested_before_a_signal_came() -> None:
    assert not StopSignal().requested()
