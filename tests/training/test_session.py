"""One attempt as a whole: what it says, saves and leaves behind when something goes wrong on the way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from harness import call_train, committed, start, status, train, wait_until

from ddpm_dist.data.batches import Batch, StepBatches
from ddpm_dist.errors import DataError
from ddpm_dist.history.attempts import read_records


def train_with_slow_saves(argv: Sequence[str]) -> int:
    """Writing step 10 takes longer than the watchdog waits after a stop signal."""
    from ddpm_dist.parallel import watchdog
    from ddpm_dist.run.store import CheckpointStore

    watchdog.STOP_SECONDS = 1.0
    save = CheckpointStore.save

    def slow(store: CheckpointStore, checkpoint: Any, facts: dict[str, Any]) -> Path:
        if checkpoint.step == 10:
            (store.directory / "begun").touch()
            time.sleep(6)
        return save(store, checkpoint, facts)

    CheckpointStore.save = slow  # type: ignore[method-assign, assignment]
    return call_train(argv)


@pytest.mark.slow
def test_a_save_under_way_is_committed_when_a_rank_is_lost_and_the_launcher_says_stop(tmp_path: Path) -> None:
    """As torchrun does when a rank dies: it sends SIGTERM to the others."""
    run = tmp_path / "run"
    with start(2, tmp_path, "checkpoint.every=5", function=train_with_slow_saves) as job:
        wait_until((run / "checkpoints" / "begun").exists, job.output)
        job.kill(1)
        job.signal(0, signal.SIGTERM)
        assert job.wait()[0] == 70, job.output()
        assert "no step ended" not in job.output()
    assert committed(run)[-1] == 10
    assert "lost contact" in status(run)["reason"]


def train_stopped_while_it_builds(argv: Sequence[str]) -> int:
    """As if a stop signal came while rank 0 waits for another rank's test batch."""
    from ddpm_dist.errors import StopRequested
    from ddpm_dist.training import session

    def hold(*args: Any) -> NoReturn:
        raise StopRequested

    session.hold_to_contract = hold  # type: ignore[attr-defined, assignment]
    return call_train(argv)


def test_an_attempt_that_is_stopped_before_its_first_step_says_so(tmp_path: Path) -> None:
    with start(1, tmp_path, function=train_stopped_while_it_builds) as job:
        assert job.wait() == [75], job.output()
    ended = status(tmp_path / "run")
    assert (ended["state"], ended["exit_code"], ended["saved_step"]) == ("preempted", 75, None)
    (record,) = read_records(tmp_path / "run" / "attempts", ended)
    assert (record.how, record.exit_code) == ("preempted", 75)
    assert train(1, tmp_path, "train.max_steps=2") == tmp_path / "run"


def train_with_a_bug(argv: Sequence[str]) -> int:
    from ddpm_dist.training import session

    def build(*args: Any, **options: Any) -> NoReturn:
        cause = KeyError("the true cause")
        raise RuntimeError("what we say of it") from cause

    session.build_trainer = build  # type: ignore[attr-defined]
    return call_train(argv)


def test_a_bug_of_ours_is_shown_with_its_cause(tmp_path: Path) -> None:
    with start(1, tmp_path, function=train_with_a_bug) as job:
        assert job.wait() == [70], job.output()
        assert "KeyError: 'the true cause'" in job.output()


def train_with_a_bug_and_tracking(argv: Sequence[str]) -> int:
    from ddpm_dist.tracking.process import ShipperProcess

    def begin(run_directory: Path) -> Any:
        (run_directory / "ships").touch()

    ShipperProcess.start = begin  # type: ignore[method-assign]
    return train_with_a_bug(argv)


def test_mlflow_and_the_user_learn_of_an_attempt_that_fails_before_its_first_step(tmp_path: Path) -> None:
    options = ("tracking.enabled=true", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
    with start(1, tmp_path, *options, function=train_with_a_bug_and_tracking) as job:
        assert job.wait() == [70], job.output()
        assert "attempt 1 starts at step 0" in job.output()
    assert (tmp_path / "run" / "ships").exists()
    assert status(tmp_path / "run")["state"] == "failed"


def train_with_a_picture_that_rank_1_cannot_read(argv: Sequence[str]) -> int:
    sound = StepBatches.__getitem__

    def one_is_damaged(self: StepBatches, step: int) -> Batch:
        if os.environ["RANK"] == "1" and step == 3:
            raise DataError("photos/7.png: cannot be read as an image")
        return sound(self, step)

    StepBatches.__getitem__ = one_is_damaged  # type: ignore[method-assign]
    return call_train(argv)


@pytest.mark.slow
def test_rank_0_ends_with_the_exit_code_of_the_rank_whose_data_cannot_be_used(tmp_path: Path) -> None:
    """A batch script looks at rank 0's code: after 70 it would try again, which is of no use here."""
    with start(2, tmp_path, function=train_with_a_picture_that_rank_1_cannot_read) as job:
        assert job.wait() == [65, 65], job.output()
        errors = [line for line in job.output().splitlines() if line.startswith("error:")]
    assert errors == ["error: photos/7.png: cannot be read as an image"]
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["exit_code"]) == ("failed", 65)
    assert "photos/7.png" in status(tmp_path / "run")["reason"]
