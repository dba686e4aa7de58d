"""A run that is killed, at random instants or at chosen ones, ends with the same bits as an undisturbed one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from campaign import DAMAGES, RUN, crash_points, newest_checkpoint, random_kills
from harness import call_train_hastily, committed, metrics, start, state_differences, train, wait_until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [1])
def test_random_kills_change_nothing(tmp_path: Path, seed: int) -> None:
    steps = 500
    undisturbed = train(2, tmp_path, *RUN, f"train.max_steps={steps}", name="undisturbed")
    outcome = random_kills(tmp_path, undisturbed, seed, kills=10, steps=steps)
    assert outcome.differences == []
    assert outcome.kills == 10
    assert outcome.resumed[-1] >= 10, "the attempts started at step 0 again and again"


def test_a_process_that_dies_before_a_change_of_the_disk_comes_back(tmp_path: Path) -> None:
    """Fourteen of the crash points; `make torture` tries all of them."""
    undisturbed = train(1, tmp_path, "checkpoint.every=3", "train.max_steps=8", name="undisturbed")
    numbers = sorted(random.Random(3).sample(range(1, 90), 14))
    assert crash_points(tmp_path, undisturbed, numbers, steps=8) == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_fallen_back_from_and_set_aside(
    tmp_path: Path, damage: Callable[[Path, random.Random], None]
) -> None:
    undisturbed = train(2, tmp_path, *RUN, "train.max_steps=55", name="undisturbed")
    run = train(2, tmp_path, *RUN, "train.max_steps=43")
    newest = newest_checkpoint(run)
    damage(newest, random.Random(5))
    with start(2, tmp_path, *RUN, "train.max_steps=55", function=call_train_hastily) as job:
        assert job.wait() == [0, 0], job.output()
        assert f"{newest} is damaged; it was renamed, and the run goes on from step 40" in job.output()
    assert state_differences(undisturbed, run) == []
    assert newest.with_name(newest.name + ".damaged").exists()
    assert min(record["step"] for record in metrics(run) if record["attempt"] == 2) == 41
    assert committed(run)[-1] == 55


def test_saves_by_the_clock_are_at_the_same_step_on_all_ranks(tmp_path: Path) -> None:
    """Rank 0's clock decides when to save. The run is killed and resumed, and ends with the same bits."""
    clock = ("checkpoint.every=100000", "checkpoint.every_seconds=1.5", "checkpoint.keep_last=1000")
    options = (*clock, "train.log_every=1")
    run = tmp_path / "run"
    with start(2, tmp_path, *options, "train.max_steps=100000") as job:
        wait_until(lambda: len(committed(run)) >= 3 or not job.alive(), job.output, timeout=120)
        job.kill()
    saved = committed(run)
    assert len(saved) >= 3, job.output()
    assert all(later - earlier > 2 for earlier, later in itertools.pairwise(saved)), (
        f"a save was asked for twice: {saved}"
    )
    target = f"train.max_steps={metrics(run)[-1]['step'] + 30}"
    train(2, tmp_path, *options, target)
    assert min(record["step"] for record in metrics(run) if record["attempt"] == 2) == saved[-1] + 1
    undisturbed = train(2, tmp_path, target, name="undisturbed")
    assert state_differences(undisturbed, run) == []
