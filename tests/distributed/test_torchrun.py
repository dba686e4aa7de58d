"""The real torchrun, started with launch/torchrun.sh as a user would start it."""

from __future__ import annotations

import contextlib
import os
import pty
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import TINY, committed, metrics, state_differences, status, train, wait_until

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "launch" / "torchrun.sh"


def command(root: Path, *overrides: str) -> list[str]:
    return [str(SCRIPT), *TINY, f"run.root={root}", "run.name=run", *overrides]


@contextmanager
def torchrun(root: Path, *overrides: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHON": sys.executable, "NPROC": "2"} | variables
    argv = command(root, *overrides)
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


def wait_for_attempt(process: subprocess.Popen[str], run: Path, attempt: int, lines: int) -> None:
    """Wait until this attempt has logged this many lines."""
    deadline = time.monotonic() + 90
    while sum(record["attempt"] == attempt for record in metrics(run)) < lines:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes_of(run: Path) -> list[str]:
    """The command lines of all running processes that name this run's root."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(run.parent) in line:
            found.append(line)
    return found


def test_sigterm_to_the_launcher_saves_and_the_same_command_finishes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with torchrun(tmp_path, "train.max_steps=5000", "checkpoint.every=5000") as process:
        wait_for_attempt(process, run, attempt=1, lines=5)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert status(run)["state"] == "preempted"
    stopped_at = committed(run)[-1]
    assert stopped_at == metrics(run)[-1]["step"]
    target = stopped_at + 10
    with torchrun(tmp_path, f"train.max_steps={target}", "checkpoint.every=5000") as process:
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert output.count(f"resumes at step {stopped_at}") == 1, "another rank than rank 0 printed it too"
    assert status(run)["state"] == "finished"
    straight = train(2, tmp_path, f"train.max_steps={target}", name="straight")
    assert state_differences(straight, run) == []


def test_killed_launcher_takes_its_ranks_with_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with torchrun(tmp_path, "train.max_steps=5000", "checkpoint.every=5000") as process:
        wait_for_attempt(process, run, attempt=1, lines=5)
        process.kill()
        deadline = time.monotonic() + 20
        while processes_of(run) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert processes_of(run) == []
    assert status(run)["state"] == "preempted", "the ranks did not save before they ended"


def assert_calm_end(output: str, root: Path, *overrides: str) -> None:
    """The last line is the command that goes on, and nothing of torchrun's own is shown."""
    typed = f"NPROC=2 PYTHON={sys.executable} {shlex.join(command(root, *overrides))}"
    assert output.splitlines()[-1].strip() == typed
    assert "torch/distributed/run.py" not in output
    assert "SignalException" not in output
    assert "ChildFailedError" not in output
    assert "closing signal" not in output


class Terminal:
    """A command in the foreground of a terminal of its own, as if a user had typed it there."""

    def __init__(self, argv: list[str], **variables: str) -> None:
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            os.execve(argv[0], argv, os.environ | variables)
        self._output = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self._master, 65536)
            except OSError:  # all processes of the terminal have ended
                return
            if not part:
                return
            self._output += part

    @property
    def output(self) -> str:
        return self._output.decode().replace("\r\n", "\n")

    def press_control_c(self) -> None:
        """Have the terminal send SIGINT to all processes in its foreground."""
        os.write(self._master, b"\x03")

    def wait_for(self, words: str, times: int) -> None:
        """Wait until the words are in the output so many times."""
        wait_until(lambda: self.output.count(words) >= times, lambda: self.output)

    def exit_code(self, timeout: float = 90) -> int:
        """Wait for the end of the command."""
        ended: list[int] = []

        def has_ended() -> bool:
            pid, how = os.waitpid(self.pid, os.WNOHANG)
            ended.extend([how] if pid else [])
            return pid != 0

        wait_until(has_ended, lambda: f"it still runs\n{self.output}", timeout)
        self._reader.join(10)
        return os.waitstatus_to_exitcode(ended[0])

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self._reader.join(10)
        os.close(self._master)


def ranks_of(agent: int) -> list[int]:
    """The pids of the ranks that this torchrun has started."""
    children = (Path("/proc") / str(agent) / "task" / str(agent) / "children").read_text()
    return [int(pid) for pid in children.split()]


def test_control_c_saves_however_often_it_is_pressed_and_the_last_lines_say_how_to_go_on(tmp_path: Path) -> None:
    run, options = tmp_path / "run", ("train.max_steps=5000", "checkpoint.every=5000")
    terminal = Terminal(command(tmp_path, *options), PYTHON=sys.executable, NPROC="2")
    try:
        wait_until(lambda: len(metrics(run)) > 5, lambda: terminal.output, 90)
        ranks = ranks_of(terminal.pid)
        assert len(ranks) == 2
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)  # so that all the signals come before the ranks could save
        try:
            for number in (1, 2, 3, 4):
                terminal.press_control_c()
                terminal.wait_for("please wait", number)
        finally:
            for pid in ranks:
                os.kill(pid, signal.SIGCONT)
        code = terminal.exit_code()
    finally:
        terminal.close()
    assert code == 75
    step = metrics(run)[-1]["step"]
    assert (status(run)["state"], status(run)["reason"], committed(run)) == ("preempted", "stopped by SIGINT", [step])
    assert_calm_end(terminal.output, tmp_path, *options)
    assert f"step {step} is saved" in terminal.output.splitlines()[-2]
    assert "Traceback" not in terminal.output


def test_a_killed_rank_is_named_and_the_last_lines_say_how_to_go_on(tmp_path: Path) -> None:
    run, options = tmp_path / "run", ("train.max_steps=5000", "checkpoint.every=5")
    with torchrun(tmp_path, *options) as process:
        wait_for_attempt(process, run, attempt=1, lines=12)
        (rank_1,) = set(ranks_of(process.pid)) - {status(run)["pid"]}
        os.kill(rank_1, signal.SIGKILL)
        output = process.communicate(timeout=90)[0]
    assert process.returncode == 70
    assert f"rank 1 (pid {rank_1}) was ended by SIGKILL" in output
    assert_calm_end(output, tmp_path, *options)
    assert f"step {committed(run)[-1]} is saved" in output.splitlines()[-2]


PLANTED_BUG = """
import os
if os.environ.get("RANK") == "1":
    from ddpm_dist.config import Config
    def target(self, num_images):
        raise ZeroDivisionError("a planted bug")
    Config.target = target
"""


def test_the_traceback_of_a_bug_is_shown_whole_and_torchrun_adds_none(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(PLANTED_BUG)
    with torchrun(tmp_path, PYTHONPATH=f"{tmp_path}:{SCRIPT.parents[1]}") as process:
        output = process.communicate(timeout=90)[0]
    assert process.returncode == 70
    assert "Traceback (most recent call last)" in output
    assert "ZeroDivisionError: a planted bug" in output
    assert 'raise ZeroDivisionError("a planted bug")' in output, "the lines of the traceback are there, too"
    assert_calm_end(output, tmp_path)


def test_max_restarts_of_torchrun_goes_on_at_the_checkpoint(tmp_path: Path) -> None:
    """torchrun keeps its store when it restarts the ranks, so it still holds what the killed ranks wrote into it."""
    run, options = tmp_path / "run", ("train.max_steps=150", "checkpoint.every=10")
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    argv += ["-m", "ddpm_dist.train", *TINY, f"run.root={tmp_path}", "run.name=run", *options]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for_attempt(process, run, attempt=1, lines=25)
        os.kill(status(run)["pid"], signal.SIGKILL)
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert (status(run)["state"], status(run)["attempt"]) == ("finished", 2)
    assert min(record["step"] for record in metrics(run) if record["attempt"] == 2) > 10
    assert state_differences(train(2, tmp_path, *options, name="undisturbed"), run) == []
