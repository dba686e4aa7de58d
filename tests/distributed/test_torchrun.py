"""The real torchrun, started with launch/torchrun.sh as a user would start it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import TINY, committed, metrics, state_differences, status, train

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "launch" / "torchrun.sh"


@contextmanager
def torchrun(root: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHON": sys.executable, "NPROC": "2"}
    argv = [str(SCRIPT), *TINY, f"run.root={root}", "run.name=run", *overrides]
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


def test_error_in_the_config_is_said_once(tmp_path: Path) -> None:
    with torchrun(tmp_path, "optim.lrr=3") as process:
        output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert lines == ["error: command line: unknown key 'optim.lrr'; did you mean 'optim.lr'?"]
    assert "exitcode  : 78" in output


def test_max_restarts_of_torchrun_goes_on_at_the_checkpoint(tmp_path: Path) -> None:
    """torchrun keeps its store when it restarts the ranks, so it still holds what the killed ranks wrote into it."""
    run, options = tmp_path / "run", ("train.max_steps=400", "checkpoint.every=10")
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
