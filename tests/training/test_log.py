"""What a line of metrics.jsonl says beside the loss: how far the run is, and how fast."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest
from harness import metrics, train

pytestmark = pytest.mark.slow
BATCH_SIZE, NUM_IMAGES, EVERY = 8, 5000, 5


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    options = ("train.max_steps=62", f"train.log_every={EVERY}", "checkpoint.every=1000")
    return metrics(train(2, tmp_path_factory.mktemp("log"), *options))


def test_there_is_a_line_at_each_multiple_of_the_period_and_at_the_end(records: list[dict[str, float]]) -> None:
    assert [record["step"] for record in records] == [*range(EVERY, 62, EVERY), 62]


def test_the_epoch_counts_what_was_seen(records: list[dict[str, float]]) -> None:
    steps_per_epoch = NUM_IMAGES // BATCH_SIZE
    assert [record["epoch"] for record in records] == [round(record["step"] / steps_per_epoch, 4) for record in records]


def test_images_per_second_are_those_of_all_ranks_together(records: list[dict[str, float]]) -> None:
    """Held against the times of the lines themselves; the median, since any single line may be delayed."""
    shares = [
        later["images_per_second"]
        * (later["time"] - earlier["time"])
        / (BATCH_SIZE * (later["step"] - earlier["step"]))
        for earlier, later in pairwise(records)
    ]
    assert statistics.median(shares) == pytest.approx(1, abs=0.2)
