"""Runs on real file systems that become full or read-only keep what was saved, and go on or say why they cannot."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from harness import (
    Job,
    call_train_hastily,
    call_train_slowly,
    committed,
    metrics,
    start,
    state_differences,
    status,
    train,
    wait_for_step,
    wait_until,
)

pytestmark = pytest.mark.slow

RUN = ("checkpoint.every=10", "train.log_every=1", "checkpoint.keep_last=2", "train.max_steps=120")


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, timeout=30).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB. A checkpoint of these tests takes 1 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() != 0 or not mount("-t", "tmpfs", "-o", "size=24m", "none", str(path)):
        pytest.skip("mounting a small file system takes root")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True, timeout=30)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of RUN, trained by two ranks."""
    return train(2, tmp_path_factory.mktemp("undisturbed"), *RUN)


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    """Fill the file system until no byte is left; free the space again after the `with`."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        for size in (2**16, 2**10, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)
    yield
    filler.unlink()


def wait_for_words(job: Job, words: str) -> None:
    wait_until(lambda: words in job.output(), lambda: f"the log does not say {words!r}\n{job.output()}")


def test_a_full_disk_delays_saves_and_changes_nothing_in_what_is_learned(disk: Path, undisturbed: Path) -> None:
    (disk / "slow").touch()
    with start(2, disk, *RUN, function=call_train_slowly) as job:
        wait_for_step(job, disk / "run", 25, attempt=1)
        with full(disk):
            before = committed(disk / "run")
            wait_for_words(job, "No space left on device")
            assert committed(disk / "run")[-1] >= before[-1]
        (disk / "slow").unlink()
        assert job.wait() == [0, 0], job.output()
        assert "was not saved" in job.output()
    assert state_differences(undisturbed, disk / "run") == []
    assert [record["step"] for record in metrics(disk / "run")] == list(range(1, 121)), "lines are lost or out of order"
    assert status(disk / "run")["state"] == "finished"


def test_a_disk_that_stays_full_ends_the_run_with_its_reason_and_the_run_goes_on_later(
    disk: Path, undisturbed: Path
) -> None:
    run = disk / "run"
    (disk / "slow").touch()
    with start(2, disk, *RUN, function=call_train_slowly) as job:
        wait_for_step(job, run, 25, attempt=1)
        with full(disk):
            assert job.wait() == [70, 70], job.output()
            assert "No space left on device" in job.output()
            assert "Traceback" not in job.output()
            saved = committed(run)
            assert saved
    train(2, disk, *RUN, function=call_train_hastily)
    assert min(record["step"] for record in metrics(run) if record["attempt"] == 2) == saved[-1] + 1
    assert state_differences(undisturbed, run) == []


def test_checkpoints_on_a_read_only_file_system_end_the_run_with_that_reason(disk: Path, tmp_path: Path) -> None:
    run, checkpoints = disk / "run", str(disk / "run" / "checkpoints")
    undisturbed = train(1, tmp_path, *RUN)
    (disk / "slow").touch()
    with start(1, disk, *RUN, function=call_train_slowly) as job:
        wait_for_step(job, run, 25, attempt=1)
        assert mount("--bind", checkpoints, checkpoints)
        try:
            # The kernel refuses this as long as a save has a file open there.
            wait_until(lambda: mount("-o", "remount,bind,ro", checkpoints), lambda: "it could not be made read-only")
            assert job.wait() == [70], job.output()
        finally:
            subprocess.run(["umount", checkpoints], check=True, timeout=30)
    assert "Read-only file system" in job.output()
    assert "Read-only file system" in status(run)["reason"]
    assert committed(run)
    train(1, disk, *RUN, function=call_train_hastily)
    assert state_differences(undisturbed, run) == []


def call_train_on_a_slow_disk(argv: Sequence[str]) -> int:
    """The train command, but each save takes 7 s, which is longer than the ranks wait for each other in this test."""
    from ddpm_dist.run.store import CheckpointStore

    verify = CheckpointStore.verify

    def slow(self: CheckpointStore, step: int) -> None:
        time.sleep(7)
        verify(self, step)

    CheckpointStore.verify = slow  # type: ignore[method-assign]
    return call_train_hastily(argv)


def test_a_slow_disk_stalls_nobody_and_a_stop_signal_waits_for_its_save(tmp_path: Path) -> None:
    run, options = tmp_path / "run", ("checkpoint.every=10", "train.max_steps=100000", "distributed.timeout_seconds=3")
    with start(2, tmp_path, *options, function=call_train_on_a_slow_disk) as job:
        wait_for_step(job, run, 60, attempt=1)
        job.signal(1, signal.SIGTERM)
        assert job.wait() == [75, 75], job.output()
    ended = status(run)
    assert (ended["state"], ended["step"]) == ("preempted", metrics(run)[-1]["step"])
    assert committed(run)[-1] == ended["step"]
    assert len(committed(run)) <= 3, "saves were not postponed while one was under way"
