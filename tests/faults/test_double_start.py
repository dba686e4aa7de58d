"""The same run is started twice, or taken over from a process that only slept: one attempt trains, no other writes."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from pathlib import Path

import pytest
from harness import (
    call_train_hastily,
    committed,
    metrics,
    snapshot,
    start,
    state_differences,
    status,
    train,
    wait_for_step,
)

pytestmark = pytest.mark.slow

SHORT = ("train.max_steps=150", "checkpoint.every=20", "train.log_every=1")
LONG = ("train.max_steps=100000", "checkpoint.every=10", "train.log_every=1")


def test_of_many_simultaneous_starts_exactly_one_trains(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        jobs = []
        for number in range(8):  # 100 claims at once are in tests/run/test_lease.py
            job = stack.enter_context(start(1, tmp_path, *LONG, function=call_train_hastily))
            job.log = tmp_path / f"{number}.log"
            jobs.append(job)
        deadline = time.monotonic() + 120
        while sum(job.alive() for job in jobs) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert sorted(job.processes[0].exitcode or 0 for job in jobs) == [0, *[78] * 7]
        (holder,) = (job for job in jobs if job.alive())
        wait_for_step(holder, tmp_path / "run", 5, attempt=1)
        holder.signal(0, signal.SIGTERM)
        assert holder.wait() == [75]
    said = (tmp_path / "run.log").read_text()
    assert said.count("is being trained by attempt 1") == 7
    assert "Traceback" not in said
    assert status(tmp_path / "run")["attempt"] == 1
    steps = [record["step"] for record in metrics(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))


def test_a_sleeper_that_was_taken_over_writes_nothing_when_it_wakes_up(tmp_path: Path) -> None:
    run, undisturbed = tmp_path / "run", train(2, tmp_path, *SHORT, name="undisturbed")
    with start(2, tmp_path, *SHORT, function=call_train_hastily) as sleeper:
        wait_for_step(sleeper, run, 30, attempt=1)
        for rank in (0, 1):
            sleeper.signal(rank, signal.SIGSTOP)
        with start(2, tmp_path, *SHORT, function=call_train_hastily) as heir:
            assert heir.wait() == [0, 0]
        before = {name: content for name, content in snapshot(run).items() if "00001.json" not in name}
        for rank in (0, 1):
            sleeper.signal(rank, signal.SIGCONT)
        codes = sleeper.wait()
        assert codes[0] == 76, sleeper.output()
        assert codes[1] in (70, 76), sleeper.output()
        assert "was taken over by attempt 2" in sleeper.output()
    after = {name: content for name, content in snapshot(run).items() if "00001.json" not in name}
    assert after == before
    assert state_differences(undisturbed, run) == []


def test_attempts_are_a_log_of_who_did_what_and_how_it_ended(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with start(1, tmp_path, *LONG) as job:
        wait_for_step(job, run, 25, attempt=1)
        job.kill()
    with start(1, tmp_path, *LONG) as job:
        wait_for_step(job, run, 35, attempt=2)
        job.signal(0, signal.SIGUSR1)
        assert job.wait() == [75]
    first, second = (json.loads((run / "attempts" / f"0000{number}.json").read_text()) for number in (1, 2))
    assert (first["start_step"], first["ended"], first.get("exit_code")) == (0, None, None)
    assert (second["start_step"], second["exit_code"], second["state"]) == (first["step"], 75, "preempted")
    assert second["reason"] == "stopped by SIGUSR1"
    assert second["step"] == committed(run)[-1] == status(run)["step"]


def test_attempts_without_progress_are_counted_until_there_is_some(tmp_path: Path) -> None:
    run = tmp_path / "run"
    counts = []
    for attempt in (1, 2, 3):
        with start(1, tmp_path, "train.max_steps=100000", "checkpoint.every=100000") as job:
            wait_for_step(job, run, 1, attempt=attempt)
            counts.append(status(run)["without_progress"])
            job.kill()
    assert counts == [0, 1, 2]
    train(1, tmp_path, "train.max_steps=30", "checkpoint.every=10")
    assert status(run)["without_progress"] == 0
