"""NaN on one rank: all ranks leave out the same update, no weight becomes NaN, and if it goes on, the run fails."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from harness import call_train, committed, differences, final_state, metrics, start, status, train

from ddpm_dist.data.batches import Batch, Inputs, StepBatches

pytestmark = pytest.mark.slow

RUN = ("train.max_steps=8", "train.log_every=2", "checkpoint.every=4")


def _poison(*steps: int) -> None:
    """Make the noise of the last rank NaN at these steps."""
    sound = StepBatches.__getitem__

    def poisoned(self: StepBatches, step: int) -> Batch:
        batch = sound(self, step)
        last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
        return batch._replace(noise=batch.noise * float("nan")) if last and step in steps else batch

    StepBatches.__getitem__ = poisoned  # type: ignore[method-assign]


def nan_at_5(argv: Sequence[str]) -> int:
    """The train command with NaN on the last rank at step 5."""
    _poison(5)
    return call_train(argv)


def nan_from_3_on(argv: Sequence[str]) -> int:
    """The train command with NaN on the last rank from step 3 on."""
    _poison(*range(3, 100))
    return call_train(argv)


@pytest.mark.parametrize(
    "options", [("train.precision=fp32",), ("optim.fused=no",), ("train.precision=bf16", "optim.grad_clip=1")]
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_update_with_nan_on_one_rank_is_skipped_by_all(
    tmp_path: Path, options: tuple[str, ...], world_size: int
) -> None:
    run = train(world_size, tmp_path, *RUN, *options, function=nan_at_5)
    state = final_state(run)
    assert all(torch.isfinite(value).all() for name in ("model", "ema") for value in state[name].values())
    assert [record["skipped"] for record in metrics(run)] == [0, 0, 1, 0]
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 for record in metrics(run))
    assert state["step"] == 8
    # Adam's bias correction depends on its own count of updates, which must not count the one that was left out.
    assert {float(entry["step"]) for entry in state["optimizer"]["state"].values()} == {7.0}


def test_what_follows_a_skipped_update_is_as_if_it_had_not_been(tmp_path: Path) -> None:
    """With a constant learning rate only the average changes: it moves once towards weights that did not change."""
    stop = ("train.max_steps=6", "checkpoint.every=5", "train.log_every=1")
    state = final_state(train(2, tmp_path, *stop, name="poisoned", function=nan_at_5))
    before = torch.load(tmp_path / "poisoned" / "checkpoints" / "step-00000005.pt", weights_only=True)
    assert differences(before["model"], state["model"]) == []
    assert differences(before["optimizer"], state["optimizer"]) == []
    assert differences(before["ema"], state["ema"]) != []


@pytest.mark.parametrize("world_size", [1, 2])
def test_nan_step_after_step_ends_the_run_with_76_and_saves_nothing_bad(tmp_path: Path, world_size: int) -> None:
    options = (*RUN, "train.max_steps=60", "train.max_skipped=6", "checkpoint.every=2")
    with start(world_size, tmp_path, *options, function=nan_from_3_on) as job:
        assert job.wait() == [76] * world_size
        errors = [line for line in job.output().splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, job.output()
        assert "NaN or inf" in errors[0]
        assert "Traceback" not in job.output()
    run = tmp_path / "run"
    assert (status(run)["state"], status(run)["exit_code"]) == ("failed", 76)
    assert metrics(run)[-1]["step"] == 10, "the sixth NaN comes at step 9, and they are counted when step 10 is logged"
    assert metrics(run)[-1]["loss"] is None
    for step in committed(run):
        state = torch.load(run / "checkpoints" / f"step-{step:08d}.pt", weights_only=True)
        assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_as_many_skips_in_a_row_as_are_allowed_end_the_run_and_no_fewer(tmp_path: Path) -> None:
    options = ("train.log_every=1", "checkpoint.every=60", "train.max_steps=60", "train.max_skipped=3")
    with start(1, tmp_path, *options, function=nan_from_3_on) as job:
        assert job.wait() == [76]
    assert metrics(tmp_path / "run")[-1]["step"] == 6, "three finished steps, and three that were skipped"


def test_a_series_of_skips_goes_on_over_a_resume(tmp_path: Path) -> None:
    options = ("train.log_every=2", "checkpoint.every=5", "train.max_skipped=6")
    train(2, tmp_path, *options, "train.max_steps=5", function=nan_from_3_on)
    with start(2, tmp_path, *options, "train.max_steps=60", function=nan_from_3_on) as job:
        assert job.wait() == [76, 76]
    assert metrics(tmp_path / "run")[-1]["step"] == 10


def drifts_at_4(argv: Sequence[str]) -> int:
    """The train command, but one bit of one weight of rank 2 flips after step 4."""
    from ddpm_dist.training.step import Trainer

    sound = Trainer.train_step

    def drifting(self: Trainer, micro_batches: Sequence[Inputs]) -> None:
        sound(self, micro_batches)
        if self.step == 4 and self.ranks.rank == 2:
            parameters = list(self.model.parameters())
            weights = parameters[len(parameters) // 2].detach()
            weights.view(-1)[:1].view(torch.int32).bitwise_xor_(torch.tensor(1, dtype=torch.int32))

    Trainer.train_step = drifting  # type: ignore[method-assign]
    return call_train(argv)


def test_a_rank_whose_weights_drift_by_one_bit_is_named(tmp_path: Path) -> None:
    options = ("train.max_steps=20", "train.check_drift_every=3", "checkpoint.every=3")
    with start(4, tmp_path, *options, function=drifts_at_4) as job:
        assert job.wait() == [76] * 4, job.output()
        assert job.output().count("error: ") == 1
        assert "step 6: the weights of rank(s) 2 are" in job.output()
    assert committed(tmp_path / "run") == [3], "only the step before the flip is to be saved"


def test_sound_ranks_pass_the_check_and_it_changes_nothing(tmp_path: Path) -> None:
    plain = train(2, tmp_path, *RUN, name="plain")
    checked = train(2, tmp_path, *RUN, "train.check_drift_every=1", name="checked")
    assert differences(final_state(plain)["model"], final_state(checked)["model"]) == []


def another_lr_on_rank_1(argv: Sequence[str]) -> int:
    """The train command, but rank 1 is given another config."""
    return call_train([*argv, "optim.lr=1e-3", "train.log_every=3"] if os.environ["RANK"] == "1" else argv)


def test_ranks_that_were_given_different_configs_do_not_train(tmp_path: Path) -> None:
    with start(2, tmp_path, *RUN, function=another_lr_on_rank_1) as job:
        assert job.wait(60) == [78, 78], job.output()
        (line,) = (line for line in job.output().splitlines() if line.startswith("error: "))
    assert "optim.lr: 0.0002 -> 0.001" in line
    assert "train.log_every: 2 -> 3" in line
    assert "rank 1" in line
