"""elastic.mode=bitwise: a run ends with the same bits on any number of ranks, even if that number changes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from campaign import LAYOUTS, end_on_each_world
from harness import (
    call_train,
    committed,
    final_state,
    metrics,
    start,
    state_differences,
    train,
    wait_for_step,
)
from nets import call_train_attentive

from ddpm_dist.data.batches import Batch, StepBatches
from ddpm_dist.run.store import CheckpointStore
from ddpm_dist.tracking.journal import read_metrics

BITWISE = ("elastic.mode=bitwise", "elastic.shards=8", "data.batch_size=16")


def untimed(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, without what depends on the clock or on the number of attempts."""
    return [
        {key: value for key, value in line.items() if key not in ("time", "images_per_second", "attempt")}
        for line in read_metrics(run / "metrics.jsonl")
    ]


# `make torture` tries all combinations. In these four, each value of an option meets the values of the others.
@pytest.mark.parametrize(
    "layout", [LAYOUTS[0], LAYOUTS[11], LAYOUTS[21], LAYOUTS[30]], ids=lambda layout: "-".join(layout.values())
)
@pytest.mark.slow
def test_one_state_on_1_2_4_and_8_ranks(tmp_path: Path, layout: dict[str, str]) -> None:
    runs = end_on_each_world(tmp_path, layout, steps=30)
    for run in runs[1:]:
        assert state_differences(runs[0], run) == []
        assert untimed(run) == untimed(runs[0]), "the metrics depend on the number of ranks"


@pytest.mark.parametrize("shards", [12, 24])
@pytest.mark.slow
def test_shards_need_not_be_a_power_of_two(tmp_path: Path, shards: int) -> None:
    options = (*BITWISE, f"elastic.shards={shards}", "data.batch_size=24", "train.max_steps=5", "train.precision=fp16")
    one, *others = (train(size, tmp_path, *options, name=f"w{size}") for size in (1, 2, 4))
    assert [state_differences(one, other) for other in others] == [[], []]


@pytest.mark.slow
def test_killed_and_moved_from_4_to_1_to_2_to_8_ranks(tmp_path: Path) -> None:
    options = (*BITWISE, "train.max_steps=80", "checkpoint.every=5", "model.dropout=0.1", "optim.grad_clip=0.5")
    undisturbed = train(2, tmp_path, *options, name="undisturbed")
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw, run, started = random.Random(seed), tmp_path / "moved", []
    for attempt, world_size in enumerate((4, 1, 2), start=1):
        with start(world_size, tmp_path, *options, name="moved") as job:
            wait_for_step(job, run, 20 * attempt - draw.randint(0, 12), attempt)
            job.kill()
        started.append(committed(run)[-1])
    train(8, tmp_path, *options, name="moved")
    began = [min(line["step"] for line in metrics(run) if line["attempt"] == attempt) for attempt in (2, 3, 4)]
    assert began == [step + 1 for step in started], "an attempt did not start at its checkpoint"
    assert state_differences(undisturbed, run) == []
    assert untimed(run) == untimed(undisturbed)


def nan_in_shard_6(argv: Sequence[str]) -> int:
    """The train command, but the noise of shard 6 is NaN at step 5."""
    sound = StepBatches._shard

    def poisoned(self: StepBatches, step: int, shard: int) -> Batch:
        batch = sound(self, step, shard)
        return batch._replace(noise=batch.noise * float("nan")) if (step, shard) == (5, 6) else batch

    StepBatches._shard = poisoned  # type: ignore[method-assign]
    return call_train(argv)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.slow
def test_nan_in_one_shard_is_skipped_alike_on_any_number_of_ranks(tmp_path: Path, precision: str) -> None:
    options = (*BITWISE, "train.max_steps=8", f"train.precision={precision}")
    runs = [train(size, tmp_path, *options, name=f"w{size}", function=nan_in_shard_6) for size in (1, 4)]
    assert [line["skipped"] for line in metrics(runs[0])] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert state_differences(*runs) == []
    if precision == "fp16":
        assert final_state(runs[0])["scaler"]["scale"] == 2.0**15, "the scaler did not halve its scale exactly once"


def has_dropout_follow_the_rank(argv: Sequence[str]) -> int:
    """The train command with a bug: dropout depends on the rank that computes a shard, not on the shard."""
    from ddpm_dist.parallel.reduction import TreeReduction

    def wrong(self: TreeReduction, index: int) -> tuple[int, ...]:
        return (self._shards.start, index)

    TreeReduction.dropout_name = wrong  # type: ignore[method-assign]
    return call_train_attentive(argv)


@pytest.mark.slow
def test_the_comparison_sees_a_layout_that_is_wrong(tmp_path: Path) -> None:
    options = (*BITWISE, "train.max_steps=2", "model.dropout=0.1")
    runs = [train(size, tmp_path, *options, name=f"w{size}", function=has_dropout_follow_the_rank) for size in (1, 2)]
    assert state_differences(*runs) != []


def forgets_to_warm_up(argv: Sequence[str]) -> int:
    """The train command without the trainer's warm-up."""
    from ddpm_dist.training.step import Trainer

    Trainer.warm_up = lambda self, images: None  # type: ignore[method-assign]
    return call_train(argv)


def interrupt_stream(root: Path, world_size: int, function: Callable[[Sequence[str]], int]) -> list[str]:
    """The differences between a run in stream mode that is killed twice and one that is not."""
    options = ("elastic.shards=12", "data.batch_size=24", "train.max_steps=30", "checkpoint.every=4")
    undisturbed = train(world_size, root, *options, name="undisturbed", function=function)
    for attempt, step in enumerate((9, 18), start=1):
        with start(world_size, root, *options, name="killed", function=function) as job:
            wait_for_step(job, root / "killed", step, attempt)
            job.kill()
    return state_differences(undisturbed, train(world_size, root, *options, name="killed", function=function))


@pytest.mark.parametrize("world_size", [3, 4])
@pytest.mark.slow
def test_stream_mode_resumes_to_the_bit_on_three_and_more_ranks(tmp_path: Path, world_size: int) -> None:
    assert interrupt_stream(tmp_path, world_size, call_train) == []


@pytest.mark.slow
def test_without_the_warm_up_it_would_not(tmp_path: Path) -> None:
    assert interrupt_stream(tmp_path, 4, forgets_to_warm_up) != []


@pytest.mark.slow
def test_a_resume_that_would_round_otherwise_is_refused_key_by_key(tmp_path: Path) -> None:
    train(2, tmp_path, *BITWISE, "train.max_steps=2")
    with start(2, tmp_path, *BITWISE, "train.max_steps=4", "train.threads=2") as job:
        assert job.wait() == [78, 78]
        errors = [line for line in job.output().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    assert "train.threads: 1 -> 2" in errors[0]
    assert "elastic.on_mismatch=warn" in errors[0]
    assert committed(tmp_path / "run") == [2], "nothing was trained"
    with start(1, tmp_path, *BITWISE, "train.max_steps=4", "train.threads=2", "elastic.on_mismatch=warn") as job:
        assert job.wait() == [0]
        assert "warning: from here on results may be rounded differently: train.threads: 1 -> 2" in job.output()
    contract = final_state(tmp_path / "run")["contract"]
    assert contract["threads"] == 2, "the contract did not take the new value"
    assert len(contract["deviations"]) == 1
    assert contract["deviations"][0].startswith("from step 2 on: train.threads: 1 -> 2"), (
        "the contract does not say what changed"
    )
    train(2, tmp_path, *BITWISE, "train.max_steps=5", "train.threads=2")
    with start(2, tmp_path, *BITWISE, "train.max_steps=6") as job:
        assert job.wait() == [78, 78]


def test_a_machine_that_rounds_otherwise_than_the_one_before_is_refused(tmp_path: Path) -> None:
    run = train(1, tmp_path, *BITWISE, "train.max_steps=2")
    store = CheckpointStore(run / "checkpoints")
    saved = store.load(2)
    store.save(dataclasses.replace(saved, contract=saved.contract | {"canary": "0123456789abcdef"}), {})
    with start(2, tmp_path, *BITWISE, "train.max_steps=4") as job:
        assert job.wait() == [78, 78], job.output()
        assert "this machine rounds differently" in job.output()
    assert committed(run) == [2], "nothing was trained"


def another_torch_on_rank_1(argv: Sequence[str]) -> int:
    """The train command, but rank 1 seems to have another version of torch."""
    import os

    if os.environ["RANK"] == "1":
        torch.__version__ = "2.0.0"  # type: ignore[assignment]
    return call_train(argv)


@pytest.mark.slow
def test_ranks_that_differ_are_named(tmp_path: Path) -> None:
    with start(2, tmp_path, *BITWISE, "train.max_steps=2", function=another_torch_on_rank_1) as job:
        assert job.wait() == [78, 78]
        assert "version of torch" in job.output()
        assert "seen by rank 1" in job.output()
    with start(2, tmp_path, "train.max_steps=2", name="stream", function=another_torch_on_rank_1) as job:
        assert job.wait() == [0, 0]
        assert "rounded differently (on rank 1)" in job.output()


@pytest.mark.slow
def test_stream_mode_warns_and_goes_on(tmp_path: Path) -> None:
    with start(1, tmp_path, "train.max_steps=2", "train.threads=null") as job:
        assert job.wait() == [0]
    with start(2, tmp_path, "train.max_steps=4", "train.threads=null", "elastic.on_mismatch=fail") as job:
        assert job.wait() == [0, 0], "stream mode refused another number of ranks, and of threads per rank"
        assert "warning" not in job.output()
    options = ("train.max_steps=4", "train.threads=1")
    train(1, tmp_path, *options, name="fixed")
    with start(1, tmp_path, *options, "train.threads=2", "train.max_steps=6", name="fixed") as job:
        assert job.wait() == [0]
        assert "train.threads: 1 -> 2" in job.output()
    with start(1, tmp_path, *options, "train.max_steps=8", "elastic.on_mismatch=fail", name="fixed") as job:
        assert job.wait() == [78]


@pytest.mark.slow
def test_the_contract_is_in_every_checkpoint(tmp_path: Path) -> None:
    """With the config beside it, whose keys the contract does not repeat."""
    run = train(1, tmp_path, *BITWISE, "train.max_steps=2", "checkpoint.every=1")
    for step in committed(run):
        saved = torch.load(run / "checkpoints" / f"step-{step:08d}.pt", weights_only=True)
        keys = {
            "run.seed": 0,
            "elastic.mode": "bitwise",
            "elastic.shards": 8,
            "data.batch_size": 16,
            "train.matmul_precision": "highest",
        }
        assert {key: saved["config"][key] for key in keys} == keys
        terms = {
            "precision": "fp32",
            "threads": 1,
            "channels_last": True,
            "compile": False,
            "device": "cpu",
            "torch": str(torch.__version__),
        }
        assert {key: saved["contract"][key] for key in terms} == terms
        assert len(saved["contract"]["canary"]) == 16


def on_a_processor_with_bf16(argv: Sequence[str]) -> int:
    torch.cpu.get_capabilities = lambda: {"avx512_bf16": True}  # type: ignore[assignment]
    return call_train(argv)


def on_a_processor_without_bf16(argv: Sequence[str]) -> int:
    torch.cpu.get_capabilities = lambda: {}  # type: ignore[assignment]
    return call_train(argv)


@pytest.mark.slow
def test_what_auto_meant_at_step_0_holds_on_another_processor(tmp_path: Path) -> None:
    options = ("train.precision=auto", "train.channels_last=auto", "model.dropout=0.1")
    undisturbed = train(1, tmp_path, *options, "train.max_steps=6", name="one", function=on_a_processor_with_bf16)
    train(1, tmp_path, *options, "train.max_steps=3", name="moved", function=on_a_processor_with_bf16)
    moved = train(1, tmp_path, *options, "train.max_steps=6", name="moved", function=on_a_processor_without_bf16)
    assert state_differences(undisturbed, moved) == []
    assert final_state(moved)["contract"]["precision"] == "bf16"
