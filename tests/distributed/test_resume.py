"""An interrupted run ends with the same bits as an undisturbed one; each attempt starts at the newest checkpoint."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from harness import (
    call_train,
    committed,
    final_state,
    metrics,
    random_steps,
    snapshot,
    start,
    state_differences,
    status,
    train,
    wait_for_step,
)
from torchvision.transforms.functional import to_pil_image

from ddpm_dist.config import load_config
from ddpm_dist.data import datasets
from ddpm_dist.run.store import CheckpointStore

STEPS = 60
RUN = (f"train.max_steps={STEPS}", "checkpoint.every=7", "optim.warmup_steps=10", "optim.schedule=cosine")
HARD = (*RUN, "optim.grad_clip=1.0", "model.dropout=0.1", "data.flip=true", "ema.decay=0.99")


def kill_and_resume(
    world_size: int,
    root: Path,
    kills: list[int],
    overrides: tuple[str, ...],
    function: Callable[..., int] = call_train,
) -> Path:
    """Send SIGKILL to every rank each time one of these steps is logged, then let the run finish."""
    run = root / "killed"
    began = []
    for attempt, step in enumerate(kills, start=1):
        with start(world_size, root, *overrides, name="killed", function=function) as job:
            wait_for_step(job, run, step, attempt)
            job.kill()
        began.append(max(committed(run), default=0))
    train(world_size, root, *overrides, name="killed", function=function)
    first_steps = [
        min(record["step"] for record in metrics(run) if record["attempt"] == attempt)
        for attempt in range(1, len(kills) + 2)
    ]
    assert first_steps == [1, *(step + 1 for step in began)], "an attempt did not start at its checkpoint"
    assert began[-1] > 0
    return run


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_run_killed_three_times_ends_with_the_same_bits(tmp_path: Path, world_size: int, precision: str) -> None:
    overrides = (*HARD, f"train.precision={precision}")
    undisturbed = train(world_size, tmp_path, *overrides, name="undisturbed")
    kills = random_steps(random.randrange(1 << 30), 3, STEPS - 2)
    killed = kill_and_resume(world_size, tmp_path, kills, overrides)
    assert committed(killed)[-1] == STEPS
    assert state_differences(undisturbed, killed) == []


def train_with_huge_scale(argv: Sequence[str]) -> int:
    """The train command, but the loss scale starts so high that fp16 overflows until it has been halved many times."""
    from ddpm_dist.training import precision

    def scaler(self: precision.Numerics, device: torch.device) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(device.type, init_scale=2.0**40)

    precision.Numerics.scaler = scaler  # type: ignore[method-assign]
    return call_train(argv)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.slow
def test_fp16_scaler_survives_kills_although_it_skipped_updates(tmp_path: Path, world_size: int) -> None:
    # The images are tiny, since fp16 convolutions on a CPU take some 40 times as long as those in fp32.
    images = tmp_path / "images"
    images.mkdir()
    pixels = load_config(overrides=["data.name=mnist5k"]).data
    for index, image in enumerate(datasets.load(pixels).fetch(range(0, 5000, 100))):
        to_pil_image(image).resize((8, 8)).save(images / f"{index}.png")
    folder = ("data.name=folder", f"data.root={images}", "data.image_size=8", "data.num_workers=0")
    overrides = (*RUN, *folder, "train.precision=fp16")
    undisturbed = train(world_size, tmp_path, *overrides, name="undisturbed", function=train_with_huge_scale)
    state = final_state(undisturbed)
    updates = int(state["optimizer"]["state"][0]["step"])
    assert 0 < updates < STEPS, "no update was skipped, or all were, so this test shows nothing"
    assert state["scaler"]["scale"] < 2.0**40
    kills = random_steps(random.randrange(1 << 30), 3, STEPS - 2)
    killed = kill_and_resume(world_size, tmp_path, kills, overrides, train_with_huge_scale)
    assert state_differences(undisturbed, killed) == []


@pytest.mark.slow
def test_metrics_of_an_interrupted_run_are_those_of_an_undisturbed_one(tmp_path: Path) -> None:
    overrides = (*RUN, "train.log_every=5")  # the checkpoint of step 7 lies between the lines of steps 5 and 10
    undisturbed = train(2, tmp_path, *overrides, name="undisturbed")
    run = tmp_path / "stopped"
    with start(2, tmp_path, *overrides, name="stopped") as job:
        wait_for_step(job, run, 20, 1)
        job.signal(1, signal.SIGTERM)
        assert job.wait() == [75, 75], job.output()
    train(2, tmp_path, *overrides, name="stopped")
    stopped = {record["step"]: record for record in metrics(run)}
    for record in metrics(undisturbed):
        for key in ("loss", "grad_norm"):
            assert stopped[record["step"]][key] == pytest.approx(record[key], rel=1e-12)
        assert stopped[record["step"]]["lr"] == record["lr"]


@pytest.mark.parametrize(
    ("number", "rank"),
    [
        (signal.SIGTERM, 0),
        (signal.SIGINT, 1),
        (signal.SIGUSR1, 0),
        (signal.SIGUSR2, 1),
        (signal.SIGHUP, 1),
    ],
)
@pytest.mark.slow
def test_signal_to_one_rank_stops_all_at_the_same_step_and_loses_none(
    tmp_path: Path, number: signal.Signals, rank: int
) -> None:
    overrides = ("train.max_steps=5000", "checkpoint.every=5000")
    run = tmp_path / "run"
    with start(2, tmp_path, *overrides) as job:
        wait_for_step(job, run, 8, 1)
        job.signal(rank, number)
        assert job.wait(30) == [75, 75], job.output()
    last = metrics(run)[-1]["step"]
    assert committed(run) == [last], "the step that was reached is the step that was saved"
    assert status(run)["state"] == "preempted"
    assert (status(run)["step"], status(run)["exit_code"]) == (last, 75)
    with start(2, tmp_path, *overrides) as job:
        wait_for_step(job, run, last + 1, 2)
    assert min(record["step"] for record in metrics(run) if record["attempt"] == 2) == last + 1


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.slow
def test_finished_run_exits_0_and_touches_nothing(tmp_path: Path, world_size: int) -> None:
    run = train(world_size, tmp_path, "train.max_steps=4", "preview.num_images=4", "preview.steps=2")
    before = snapshot(run)
    train(world_size, tmp_path, "train.max_steps=4", "preview.num_images=4", "preview.steps=2")
    assert snapshot(run) == before
    assert status(run)["state"] == "finished"


def test_larger_target_continues_a_finished_run_and_equals_one_long_run(tmp_path: Path) -> None:
    train(1, tmp_path, "train.max_steps=6", name="prolonged")
    prolonged = train(1, tmp_path, "train.max_steps=12", name="prolonged")
    assert metrics(prolonged)[6]["step"] == 7
    assert state_differences(train(1, tmp_path, "train.max_steps=12", name="long"), prolonged) == []


def test_larger_target_is_refused_where_it_would_move_a_cosine(tmp_path: Path) -> None:
    train(1, tmp_path, "train.max_steps=6", "optim.schedule=cosine")
    before = snapshot(tmp_path / "run")
    with start(1, tmp_path, "train.max_steps=12", "optim.schedule=cosine") as job:
        assert job.wait() == [78]
    assert "optim.decay_steps" in job.output()
    assert {name: content for name, content in snapshot(tmp_path / "run").items() if "checkpoints" in name} == {
        name: content for name, content in before.items() if "checkpoints" in name
    }


@pytest.mark.slow
def test_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """In stream mode it sees the same images, timesteps and noise; only rounding may differ."""
    overrides = ("train.max_steps=30", "checkpoint.every=10", "train.precision=fp32")
    straight = train(1, tmp_path, *overrides, name="straight")
    train(4, tmp_path, "train.max_steps=10", *overrides[1:], name="moved")
    train(1, tmp_path, "train.max_steps=20", *overrides[1:], name="moved")
    moved = train(2, tmp_path, *overrides, name="moved")
    for one, other in zip(metrics(straight), metrics(moved), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


def in_a_folder_of_its_own(argv: Sequence[str]) -> int:
    """The train command, but each rank has a working directory of its own, as if run.root were not shared."""
    os.chdir(Path(argv[-1].partition("=")[2]) / f"node{os.environ['RANK']}")
    return call_train([*argv[:-1], "run.root=runs"])


def test_a_rank_that_finds_another_checkpoint_of_the_same_step_does_not_train(tmp_path: Path) -> None:
    train(1, tmp_path / "node0" / "runs", "train.max_steps=4")
    shutil.copytree(tmp_path / "node0", tmp_path / "node1")
    store = CheckpointStore(tmp_path / "node1" / "runs" / "run" / "checkpoints")
    model = {name: value + 1 for name, value in store.load(4).model.items()}
    store.save(dataclasses.replace(store.load(4), model=model), {})
    options = ("train.max_steps=8", f"run.root={tmp_path}")
    with start(2, tmp_path, *options, function=in_a_folder_of_its_own) as job:
        assert job.wait() == [65, 65], job.output()
        (line,) = (line for line in job.output().splitlines() if line.startswith("error: "))
    assert "rank 1" in line
    assert "sha256" in line
