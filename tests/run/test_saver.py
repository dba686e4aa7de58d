"""Saving while training goes on: what was there at the call is saved, failures are reported, retries are made."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_dist.config import CheckpointConfig
from ddpm_dist.errors import Diverged, TakenOver
from ddpm_dist.run import saver as saving
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.formats import Damaged
from ddpm_dist.run.saver import Saver
from ddpm_dist.run.store import CheckpointStore


def state(step: int) -> Checkpoint:
    weights = {"w": torch.full((100,), float(step)), "b": torch.tensor(step)}
    average = {name: value * 2 for name, value in weights.items()}
    optimizer = {"state": {0: {"exp_avg": torch.full((100,), step / 2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    return Checkpoint(step, weights, average, optimizer, {}, torch.zeros(6), {}, {"num_images": 3})


class Recorder:
    """A store with a switch for failures, and all that a saver tells."""

    def __init__(self, directory: Path, **config: Any) -> None:
        self.store = CheckpointStore(directory)
        self.failure: Exception | None = None
        self.committed: list[int] = []
        self.said: list[str] = []
        self.may_write = threading.Event()
        self.may_write.set()
        save = self.store.save

        def failing(checkpoint: Checkpoint, facts: dict[str, Any]) -> Path:
            assert self.may_write.wait(20)
            if self.failure is not None:
                raise self.failure
            return save(checkpoint, facts)

        self.store.save = failing  # type: ignore[method-assign]
        self.saver = Saver(
            self.store, CheckpointConfig(**config), lambda: None, self.committed.append, self.said.append
        )


def test_what_training_changes_after_the_call_is_not_saved(tmp_path: Path) -> None:
    recorder, live = Recorder(tmp_path), state(3)
    recorder.may_write.clear()
    recorder.saver.submit(live, {})
    for tensor in (live.model["w"], live.ema["w"], live.optimizer["state"][0]["exp_avg"]):
        tensor.fill_(-1)
    live.optimizer["param_groups"][0]["lr"] = 7
    recorder.may_write.set()
    recorder.saver.finish()
    saved = recorder.store.load(3)
    assert saved.model["w"].unique().tolist() == [3]
    assert saved.ema["w"].unique().tolist() == [6]
    assert saved.optimizer["state"][0]["exp_avg"].unique().tolist() == [1.5]
    assert saved.optimizer["param_groups"][0]["lr"] == 1e-3
    assert recorder.committed == [3]


def test_the_call_returns_before_the_file_is_there_and_one_save_is_under_way_at_most(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.may_write.clear()
    recorder.saver.submit(state(1), {})
    assert recorder.store.committed() == []
    second = threading.Thread(target=recorder.saver.submit, args=(state(2), {}))
    second.start()
    time.sleep(0.2)
    assert second.is_alive(), "it waits: the buffers are in use"
    recorder.may_write.set()
    second.join(20)
    recorder.saver.finish()
    assert recorder.committed == [1, 2]
    assert recorder.store.load(1).model["w"].unique().tolist() == [1]


def test_buffers_are_used_again(tmp_path: Path) -> None:
    recorder, pointers = Recorder(tmp_path), []
    for step in (1, 2, 3):
        recorder.saver.submit(state(step), {})
        recorder.saver.finish()
        pointers.append(recorder.saver._buffers["model", "w"].data_ptr())
    assert len(set(pointers)) == 1
    assert [recorder.store.load(step).model["w"][0].item() for step in (1, 2, 3)] == [1, 2, 3]


def test_old_ones_go_only_once_the_new_one_is_there(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 8):
        recorder.failure = OSError(28, "No space left on device") if step == 6 else None
        recorder.saver.submit(state(step), {})
        recorder.saver.settle()
        if step == 6:
            assert recorder.store.committed() == [4, 5]
    assert recorder.store.committed() == [4, 5, 7]


def test_at_no_moment_are_there_fewer_than_are_to_be_kept(tmp_path: Path) -> None:
    """Looked at when the journal is made durable, which comes first, when the checkpoint counts, and after that."""
    store, seen = CheckpointStore(tmp_path), []

    def look(*_: int) -> None:
        seen.append(store.committed())

    saver = Saver(store, CheckpointConfig(keep_last=2), look, look, lambda text: None)
    for step in range(1, 5):
        saver.submit(state(step), {})
        saver.finish()
        look()
    assert seen == [[], [1], [1], [1], [1, 2], [1, 2], [1, 2], [1, 2, 3], [2, 3], [2, 3], [2, 3, 4], [3, 4]]


def test_what_reads_back_differently_does_not_count_and_costs_no_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path, keep_last=2)
    for step in (1, 2):
        recorder.saver.submit(state(step), {})
        recorder.saver.finish()

    def verify(step: int) -> None:
        raise Damaged(f"step {step} reads back differently")

    monkeypatch.setattr(recorder.store, "verify", verify)
    recorder.saver.submit(state(3), {})
    recorder.saver.settle()
    assert recorder.committed == [1, 2]
    assert {1, 2} <= set(recorder.store.committed())
    assert "reads back differently" in recorder.said[0]


def test_a_save_that_found_another_under_way_is_asked_for_again(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.may_write.clear()
    recorder.saver.submit_unless_busy(state(1), {})
    recorder.saver.submit_unless_busy(state(2), {})
    assert not recorder.saver.wants_save(), "not before the one under way has ended"
    recorder.may_write.set()
    recorder.saver.settle()
    assert recorder.saver.wants_save()
    recorder.saver.submit_unless_busy(state(3), {})
    recorder.saver.finish()
    assert recorder.committed == [1, 3]
    assert not recorder.saver.wants_save()


def test_a_failure_is_said_and_asked_to_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "RETRY_SECONDS", 0.2)
    recorder = Recorder(tmp_path)
    assert not recorder.saver.wants_save()
    recorder.failure = OSError(28, "No space left on device")
    recorder.saver.submit(state(1), {})
    recorder.saver.settle()
    assert "step 1 was not saved" in recorder.said[0]
    assert "No space left" in recorder.said[0]
    assert not recorder.saver.wants_save()
    time.sleep(0.25)
    assert recorder.saver.wants_save()
    recorder.failure = None
    recorder.saver.submit(state(2), {})
    recorder.saver.finish()
    assert recorder.committed == [2]
    assert not recorder.saver.wants_save()


def test_five_failures_in_a_row_and_no_fewer_are_enough(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for step in (1, 2, 3, 4, 5, 6, 7, 8, 9):
        recorder.failure = None if step == 4 else OSError(5, "Input/output error")
        recorder.saver.submit(state(step), {})
        recorder.saver.settle()
        assert recorder.saver.gave_up == (step == 9)
    assert "Input/output error" in recorder.saver.trouble
    with pytest.raises(OSError, match="Input/output error"):
        recorder.saver.finish()
    recorder.failure = None
    recorder.saver.finish()
    assert recorder.committed == [4, 9], "what was pending is not lost while the process lives"


@pytest.mark.parametrize("failure", [TakenOver("by another"), Diverged("NaN")])
def test_what_no_second_try_mends_ends_the_run_at_once(tmp_path: Path, failure: Exception) -> None:
    recorder = Recorder(tmp_path)
    recorder.failure = failure
    recorder.saver.submit(state(1), {})
    recorder.saver.settle()
    assert recorder.saver.gave_up
    with pytest.raises(type(failure)):
        recorder.saver.finish()


def test_every_seconds(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, every_seconds=0.3)
    assert not recorder.saver.wants_save()
    time.sleep(0.35)
    assert recorder.saver.wants_save()
    recorder.saver.submit(state(1), {})
    recorder.saver.settle()
    assert not recorder.saver.wants_save()
