"""When a rank hangs, the others exit in time and say which rank it was."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import Job, call_train, committed, start, status, wait_for_step

pytestmark = pytest.mark.slow

TIMEOUT = 4.0
LONG = ("train.max_steps=100000", "train.log_every=1", "checkpoint.every=5", f"distributed.timeout_seconds={TIMEOUT}")


def wait_for_rank(job: Job, rank: int, seconds: float) -> float:
    """Wait until a rank has ended. Returns how many seconds that took."""
    begun = time.monotonic()
    job.processes[rank].join(seconds)
    assert job.processes[rank].exitcode is not None, f"rank {rank} did not exit within {seconds} s\n{job.output()}"
    return time.monotonic() - begun


def test_the_live_ranks_leave_and_name_the_one_that_hangs(tmp_path: Path) -> None:
    with start(4, tmp_path, *LONG) as job:
        wait_for_step(job, tmp_path / "run", 7, attempt=1)
        job.signal(2, signal.SIGSTOP)
        for rank in (0, 1, 3):
            wait_for_rank(job, rank, TIMEOUT + 10)
            assert job.processes[rank].exitcode == 70, job.output()
        assert "silent: rank 2\n" in job.output()
        assert "Traceback" not in job.output()
    ended = status(tmp_path / "run")
    assert (ended["state"], ended["exit_code"]) == ("failed", 70)
    assert "silent: rank 2" in ended["reason"]
    assert committed(tmp_path / "run")[-1] >= 5


def test_rank_zero_that_hangs_is_left_too(tmp_path: Path) -> None:
    """Here rank 0 keeps the store, as under srun. So the other ranks can only say that contact was lost."""
    with start(2, tmp_path, *LONG) as job:
        wait_for_step(job, tmp_path / "run", 7, attempt=1)
        job.signal(0, signal.SIGSTOP)
        wait_for_rank(job, 1, TIMEOUT + 10)
        assert job.processes[1].exitcode == 70
        assert "rank 1" in job.output()


def test_a_stop_signal_ends_a_rank_that_waits_for_one_that_hangs(tmp_path: Path) -> None:
    """It must end long before the time-out of the collective, since a scheduler kills the job sooner than that."""
    options = ("distributed.timeout_seconds=300",)
    with start(2, tmp_path, *LONG, *options) as job:
        wait_for_step(job, tmp_path / "run", 7, attempt=1)
        job.signal(1, signal.SIGSTOP)
        time.sleep(1)
        job.signal(0, signal.SIGTERM)
        assert wait_for_rank(job, 0, 25) < 20
        assert job.processes[0].exitcode == 70
        assert "of a stop signal; silent: rank 1" in job.output()
    assert status(tmp_path / "run")["state"] == "failed"
    attempt = json.loads((tmp_path / "run" / "attempts" / "00001.json").read_text())
    assert (attempt["state"], attempt["exit_code"]) == ("failed", 70)
    assert attempt["ended"] is not None
    assert "silent: rank 1" in attempt["reason"]
    assert attempt["failed_node"] == attempt["nodes"][0], "both ranks sit on this machine"


def call_train_dying_at_its_data(argv: Sequence[str]) -> int:
    """The train command, but rank 1 is killed while it loads the images, when no collective is under way."""
    from ddpm_dist.data import datasets

    module: Any = datasets
    if os.environ["RANK"] == "1":
        module.load = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    return call_train(argv)


def test_a_rank_that_dies_before_the_first_step_is_named_and_not_waited_for_twice(tmp_path: Path) -> None:
    with start(4, tmp_path, *LONG, function=call_train_dying_at_its_data) as job:
        for rank in (0, 2, 3):
            wait_for_rank(job, rank, TIMEOUT + 10)
            assert job.processes[rank].exitcode == 70, job.output()
        assert "rank 1 has been silent" in job.output()
    assert status(tmp_path / "run")["exit_code"] == 70
