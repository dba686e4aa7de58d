"""Any number of ranks sees the same data and noise as one rank, and has the same loss curve up to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import metrics, state_differences, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("worlds")
    overrides = ("train.max_steps=50", "train.precision=fp32", "data.flip=true")
    return {size: train(size, root, *overrides, name=f"w{size}") for size in (1, 2, 4)}


@pytest.mark.parametrize("world_size", [2, 4])
def test_loss_curve_is_that_of_one_rank(runs: dict[int, Path], world_size: int) -> None:
    one, many = metrics(runs[1]), metrics(runs[world_size])
    assert len(one) == len(many) == 50
    for left, right in zip(one, many, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-4)
        # Adam divides by the size of the gradient, so the loss would not show that it was summed, not averaged.
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-3)
        assert right["lr"] == left["lr"], "the learning rate depends on the number of ranks"


@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_change_nothing_but_rounding(tmp_path: Path, world_size: int) -> None:
    overrides = ("train.max_steps=10", "train.precision=fp32", "optim.grad_clip=0.5")
    whole = train(world_size, tmp_path, *overrides, name="whole")
    split = train(world_size, tmp_path, *overrides, "train.micro_batch_size=2", name="split")
    for left, right in zip(metrics(whole), metrics(split), strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-4)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-3)
    assert state_differences(whole, split), "equal bits mean that the batch was probably not split into micro-batches"


def test_previews_leave_training_untouched(tmp_path: Path) -> None:
    plain = train(2, tmp_path, "train.max_steps=10", "model.dropout=0.2", name="plain")
    pictures = ("preview.num_images=4", "preview.every=3", "preview.steps=2")
    drawn = train(2, tmp_path, "train.max_steps=10", "model.dropout=0.2", *pictures, name="drawn")
    assert sorted(path.name for path in (drawn / "samples").glob("*.png")) == [
        f"step-{step:08d}.png" for step in (3, 6, 9, 10)
    ]
    assert state_differences(plain, drawn) == []


def test_seed_decides(tmp_path: Path) -> None:
    one = train(1, tmp_path, "train.max_steps=2", "run.seed=1", name="one")
    other = train(1, tmp_path, "train.max_steps=2", "run.seed=2", name="other")
    again = train(1, tmp_path, "train.max_steps=2", "run.seed=1", name="again")
    assert metrics(one)[0]["loss"] != metrics(other)[0]["loss"]
    assert state_differences(one, again) == []
