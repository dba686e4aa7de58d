"""A run goes on when its log is closed, full or a pipe without a reader, and its files say how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import TINY, metrics, state_differences, status, train, wait_until

from ddpm_dist.output import drop_what_cannot_be_written

ROOT = Path(__file__).parents[2]
SHORT = ("train.max_steps=12", "checkpoint.every=5")
BOTH_FULL = ">/dev/full 2>/dev/full"
NO_READER = "no reader"
SINKS = [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", BOTH_FULL, NO_READER]


@contextmanager
def started(command: Sequence[str], sink: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command, running inside the `with`. A shell redirects its output, or it writes to a pipe without a reader."""
    reading, writing = os.pipe()
    os.close(reading)
    redirection = f">&{writing} 2>&{writing}" if sink == NO_READER else sink
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" {redirection}', "bash", *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables,
        pass_fds=[writing],
    )
    os.close(writing)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


def train_command(root: Path, *overrides: str) -> list[str]:
    options = [*TINY, f"run.root={root}", "run.name=run", *overrides]
    return [sys.executable, "-m", "ddpm_dist.train", *options]


def ends_with(command: Sequence[str], sink: str) -> int:
    with started(command, sink) as process:
        return process.wait(120)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(1, tmp_path_factory.mktemp("undisturbed"), *SHORT)


def holds(run: Path, undisturbed: Path) -> None:
    """Assert that the run finished with the same bits, and that metrics.jsonl holds nothing but its own lines."""
    assert status(run)["state"] == "finished"
    assert [record["step"] for record in metrics(run)] == list(range(1, 13))
    assert len((run / "metrics.jsonl").read_bytes().splitlines()) == 12, "a library has written into metrics.jsonl"
    assert state_differences(undisturbed, run) == []


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.slow
def test_a_run_without_its_log_finishes_with_the_same_bits(sink: str, tmp_path: Path, undisturbed: Path) -> None:
    assert ends_with(train_command(tmp_path, *SHORT), sink) == 0
    holds(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_its_loader_worker_and_its_shipper_go_on_without_a_log(tmp_path: Path, undisturbed: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    options = ("data.num_workers=1", "tracking.enabled=true", f"tracking.uri={uri}")
    assert ends_with(train_command(tmp_path, *SHORT, *options), "<&- >&- 2>&-") == 0
    holds(tmp_path / "run", undisturbed)
    shipped = json.loads((tmp_path / "run" / "mlflow.json").read_text())
    assert shipped["last_step"] == 12


@pytest.mark.parametrize("sink", ["<&- >&- 2>&-", BOTH_FULL])
@pytest.mark.slow
def test_a_stop_signal_is_obeyed_without_a_log(sink: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(train_command(tmp_path, "train.max_steps=100000"), sink) as process:
        wait_until(lambda: process.poll() is not None or len(metrics(run)) > 5, lambda: "training did not begin")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert (status(run)["state"], status(run)["reason"]) == ("preempted", "stopped by SIGTERM")


@pytest.mark.parametrize("sink", ["2>&-", BOTH_FULL, NO_READER])
def test_a_refused_config_keeps_its_exit_code_where_nobody_can_read_why(sink: str, tmp_path: Path) -> None:
    assert ends_with(train_command(tmp_path, "optim.lrr=3"), sink) == 78


@pytest.mark.slow
def test_an_unusable_data_set_keeps_its_exit_code_too(tmp_path: Path) -> None:
    nowhere = ("data.name=mnist", "data.download=false", f"data.root={tmp_path / 'none'}")
    assert ends_with(train_command(tmp_path, *nowhere), BOTH_FULL) == 65
    assert status(tmp_path / "run")["state"] == "failed"


@pytest.mark.parametrize("sink", ["<&- >&- 2>&-", BOTH_FULL])
@pytest.mark.slow
def test_two_ranks_of_torchrun_finish_without_a_log(sink: str, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert ends_with([*launcher, *train_command(tmp_path, *SHORT)[1:]], sink) == 0
    holds(tmp_path / "run", train(2, tmp_path, *SHORT, name="undisturbed"))


@pytest.mark.parametrize("sink", [">&- 2>&-", BOTH_FULL, NO_READER])
@pytest.mark.slow
def test_the_start_script_finishes_without_a_log(sink: str, tmp_path: Path) -> None:
    script = [str(ROOT / "launch" / "torchrun.sh"), *train_command(tmp_path, *SHORT)[3:]]
    with started(script, sink, PYTHON=sys.executable, NPROC="2") as process:
        assert process.wait(120) == 0
    holds(tmp_path / "run", train(2, tmp_path, *SHORT, name="undisturbed"))


def test_answers_for_a_script_are_not_lost_in_silence(tmp_path: Path) -> None:
    """Launchers read the answer to `--where`. If it was lost but the exit code 0, they would use a wrong directory."""
    assert ends_with([*train_command(tmp_path), "--where"], ">/dev/full") != 0


def test_a_letter_that_the_log_cannot_spell_is_spelled_out(tmp_path: Path) -> None:
    code = "from ddpm_dist.output import *; drop_what_cannot_be_written('stdout'); print('run \\xfc', flush=True)"
    with started([sys.executable, "-c", code], f">{tmp_path / 'log'}", PYTHONIOENCODING="ascii") as process:
        assert process.wait(60) == 0
    assert (tmp_path / "log").read_text() == "run \\xfc\n"


def test_a_stream_that_a_test_or_a_notebook_has_put_there_stays(capsys: pytest.CaptureFixture[str]) -> None:
    theirs = sys.stdout, sys.stderr
    drop_what_cannot_be_written("stdout", "stderr")
    assert (sys.stdout, sys.stderr) == theirs
