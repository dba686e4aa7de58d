"""A batch is a function of the step alone: not of the number of ranks, of workers, or of where training began."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from harness import TINY, metrics, status
from PIL import Image
from torch import Tensor

from ddpm_dist.data.batches import Batch, StepBatches, iterate, join
from ddpm_dist.data.folder import ImageFolder
from ddpm_dist.data.in_memory import ImagesInMemory
from ddpm_dist.diffusion.timesteps import UniformTimesteps
from ddpm_dist.errors import DataError
from ddpm_dist.run.preemption import SIGNALS

NUM_SHARDS = 8
BATCH_SIZE = 16
NUM_IMAGES = 103  # 6 steps of 16 and 7 images left over


class Numbered:
    """Images that show their own index: image i is i everywhere, but for a left-right ramp in the first row."""

    num_workers = 0
    num_classes = 0
    fingerprint = "numbered"

    def __init__(self, length: int = NUM_IMAGES) -> None:
        self.shape = (1, 4, 4)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def fetch(self, indices: Sequence[int]) -> Tensor:
        pictures = torch.tensor(indices, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 4, 4)
        pictures[:, :, 0] = torch.arange(4, dtype=torch.uint8)
        return pictures

    def conditions(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return {}


def make(
    shards: range = range(NUM_SHARDS), *, seed: int = 0, images: object = None, flip: bool = False, **changes: Any
) -> StepBatches:
    given: dict[str, Any] = {"batch_size": BATCH_SIZE, "num_shards": NUM_SHARDS, "num_timesteps": 1000} | changes
    timesteps = UniformTimesteps(given.pop("num_timesteps"))
    images = images or Numbered()
    return StepBatches(images, seed=seed, shards=shards, timesteps=timesteps, flip=flip, **given)  # type: ignore[arg-type]


def shards_of(rank: int, world_size: int) -> range:
    per_rank = NUM_SHARDS // world_size
    return range(rank * per_rank, (rank + 1) * per_rank)


def equal(one: Batch, other: Batch) -> bool:
    pairs = [(one.images, other.images), (one.t, other.t), (one.noise, other.noise)]
    pairs += [(one.cond[name], other.cond[name]) for name in one.cond]
    return one.cond.keys() == other.cond.keys() and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def numbers(batch: Batch) -> list[int]:
    """Which of the Numbered images these are."""
    return batch.images[:, 0, 1, 0].tolist()


# Any number of ranks


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_together_see_what_one_rank_sees(world_size: int) -> None:
    alone = make(flip=True)
    ranks = [make(shards_of(rank, world_size), flip=True) for rank in range(world_size)]
    for step in (0, 1, 5, 6, 7, 100):
        assert equal(join([batches[step] for batches in ranks]), alone[step])
        indices = [batches.indices(step, shard) for batches in ranks for shard in batches._shards]
        assert indices == [alone.indices(step, shard) for shard in range(NUM_SHARDS)]


def test_images_of_a_batch_are_those_of_its_indices() -> None:
    batches = make()
    for step in (0, 4, 9):
        expected = [index for shard in range(NUM_SHARDS) for index in batches.indices(step, shard)]
        assert numbers(batches[step]) == expected


def test_batch_has_the_documented_types_and_ranges() -> None:
    batch = make(num_timesteps=3)[0]
    assert (batch.images.dtype, batch.t.dtype, batch.noise.dtype) == (torch.uint8, torch.int64, torch.float32)
    assert batch.images.shape == batch.noise.shape == (BATCH_SIZE, 1, 4, 4)
    assert batch.t.shape == (BATCH_SIZE,)
    seen = torch.cat([make(num_timesteps=3)[step].t for step in range(20)])
    assert seen.unique().tolist() == [0, 1, 2]


def test_noise_is_standard_normal_and_timesteps_are_uniform() -> None:
    batches = make(images=Numbered(250), batch_size=128, num_timesteps=1000)
    drawn = [batches[step] for step in range(40)]
    noise = torch.cat([batch.noise for batch in drawn]).flatten()
    t = torch.cat([batch.t for batch in drawn]).double()
    assert noise.mean().abs() < 5 / noise.numel() ** 0.5
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert t.mean() == pytest.approx(499.5, abs=5 * 289 / t.numel() ** 0.5)


# Epochs


def test_every_epoch_visits_all_images_but_the_remainder_once() -> None:
    batches = make()
    assert batches.steps_per_epoch == 6
    for epoch in range(5):
        seen = [number for step in range(6) for number in numbers(batches[epoch * 6 + step])]
        assert len(seen) == len(set(seen)) == 96


def test_epochs_differ_in_order_and_in_what_is_left_over() -> None:
    batches = make()
    epochs = [[number for step in range(6) for number in numbers(batches[epoch * 6 + step])] for epoch in range(4)]
    for one, other in itertools.combinations(epochs, 2):
        assert one != other
    left_over = [frozenset(range(NUM_IMAGES)) - set(epoch) for epoch in epochs]
    assert len(set(left_over)) == 4, "an image would never be seen"


def test_60000_images_in_batches_of_128_are_468_steps_an_epoch() -> None:
    batches = make(images=Numbered(60000), batch_size=128)
    assert batches.steps_per_epoch == 468
    seen = {index for step in range(468) for shard in range(NUM_SHARDS) for index in batches.indices(step, shard)}
    assert len(seen) == 468 * 128


# Seeds, shards, steps


def test_seeds_differ_in_order_timesteps_and_noise() -> None:
    one, other = make(seed=0)[3], make(seed=1)[3]
    assert numbers(one) != numbers(other)
    assert not torch.equal(one.t, other.t)
    assert not torch.equal(one.noise, other.noise)
    assert equal(one, make(seed=0)[3])


def test_no_two_images_of_any_shards_and_steps_share_their_noise() -> None:
    """The well-known bug: every rank seeds alike, and W ranks draw the same noise."""
    drawn = [make(shards_of(rank, 4))[step] for rank in range(4) for step in range(12)]
    noise = torch.cat([batch.noise for batch in drawn]).flatten(1)
    assert len(noise) == 12 * BATCH_SIZE
    assert len({row.numpy().tobytes() for row in noise}) == len(noise)
    correlation = torch.corrcoef(noise.T)  # between pixels, over all images
    assert (correlation - torch.eye(16)).abs().max() < 0.4


def test_shards_and_steps_draw_timesteps_of_their_own() -> None:
    batches = make(images=Numbered(250), batch_size=128)
    drawn = {tuple(t.tolist()) for step in range(6) for t in batches[step].t.chunk(NUM_SHARDS)}
    assert len(drawn) == 6 * NUM_SHARDS


def test_flip_changes_neither_order_nor_timesteps_nor_noise() -> None:
    plain, flipped = make()[2], make(flip=True)[2]
    assert numbers(plain) == numbers(flipped)
    assert torch.equal(plain.t, flipped.t)
    assert torch.equal(plain.noise, flipped.noise)


def test_flip_mirrors_about_half_of_the_images_left_right_only() -> None:
    batches, plain = make(flip=True), make()
    mirrored = []
    for step in range(60):
        for image, original in zip(batches[step].images, plain[step].images, strict=True):
            mirrored.append(torch.equal(image, original.flip(-1)))
            assert mirrored[-1] or torch.equal(image, original)
    share = sum(mirrored) / len(mirrored)
    assert share == pytest.approx(0.5, abs=4 * 0.5 / len(mirrored) ** 0.5)
    per_step = [sum(mirrored[at : at + BATCH_SIZE]) for at in range(0, len(mirrored), BATCH_SIZE)]
    assert all(0 < count < BATCH_SIZE for count in per_step), "an image at a time, not a batch at a time"


def test_which_images_are_mirrored_differs_between_steps_shards_and_seeds() -> None:
    def mirrored(batches: StepBatches, step: int) -> tuple[bool, ...]:
        # The first row of every image is 0 .. 3, or 3 .. 0 once it is mirrored.
        return tuple((batches[step].images[:, 0, 0, 0] != 0).tolist())

    of_a_step = {mirrored(make(flip=True, seed=seed), step) for seed in range(3) for step in range(20)}
    assert len(of_a_step) > 50
    per_shard = BATCH_SIZE // NUM_SHARDS
    of_a_shard = [mirrored(make(flip=True), step) for step in range(20)]
    for shard in range(1, NUM_SHARDS):
        parts = slice(shard * per_shard, (shard + 1) * per_shard)
        assert any(flips[parts] != flips[:per_shard] for flips in of_a_shard)


def test_without_flip_no_image_is_mirrored() -> None:
    batches = make()
    for step in range(12):
        assert (batches[step].images[:, 0, 0] == torch.arange(4)).all()


# Any order, any start


def test_step_after_a_jump_is_the_step_that_was_walked_to() -> None:
    walked = make(flip=True)
    steps = [walked[step] for step in range(30)]
    jumping = make(flip=True)
    for step in random.Random(0).sample(range(30), 30):
        assert equal(jumping[step], steps[step])
    assert equal(make(flip=True)[29], steps[29])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_iterating_from_a_step_gives_the_tail_of_iterating_from_zero(num_workers: int) -> None:
    stop = 15
    whole = list(iterate(make(flip=True), 0, stop, num_workers=0, pin_memory=False))
    assert len(whole) == stop
    assert all(equal(batch, make(flip=True)[step]) for step, batch in enumerate(whole))
    for start in (0, 1, 6, 13, stop):  # the last one is a finished run
        tail = list(iterate(make(flip=True), start, stop, num_workers, pin_memory=False))
        assert len(tail) == stop - start
        assert all(equal(one, other) for one, other in zip(tail, whole[start:], strict=True))


def test_a_loader_worker_that_gets_a_stop_signal_goes_on() -> None:
    """Launchers and terminals signal whole process groups, and the trainer needs its images until it has saved."""
    with contextlib.closing(iterate(make(), 0, 40, num_workers=1, pin_memory=False)) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        assert worker.pid is not None
        for number in SIGNALS:
            os.kill(worker.pid, number)
        assert sum(1 for _ in batches) == 39


@pytest.mark.parametrize("num_workers", [0, 2])
def test_global_random_generators_are_left_alone(num_workers: int) -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), cast(Any, np.random.get_state())[1].tolist()
    iterator = iterate(make(flip=True), 0, 5, num_workers, pin_memory=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert len(list(iterator)) == 5
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert cast(Any, np.random.get_state())[1].tolist() == before[2]


def test_what_training_draws_in_between_changes_no_batch() -> None:
    expected = list(iterate(make(flip=True), 0, 8, 0, pin_memory=False))
    for batch, other in zip(iterate(make(flip=True), 0, 8, 0, pin_memory=False), expected, strict=True):
        assert equal(batch, other)
        torch.randn(7)
        torch.manual_seed(3)


def test_images_in_memory_are_not_changed_by_making_or_changing_batches() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 1, 4, 4), dtype=np.uint8)
    batches = make(images=ImagesInMemory(pixels.copy()), flip=True)
    for step in range(7):
        batches[step].images.zero_()
    np.testing.assert_array_equal(ImagesInMemory(pixels).fetch(range(NUM_IMAGES)), batches._images.fetch(range(103)))


# Workers


@pytest.mark.parametrize("num_workers", [0, 2])
def test_image_that_cannot_be_read_arrives_as_one_line(tmp_path: Path, num_workers: int) -> None:
    for number in range(BATCH_SIZE * 2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    (tmp_path / "07.png").write_bytes(b"not a picture")
    batches = make(images=ImageFolder(tmp_path, 8))
    with pytest.raises(DataError) as caught:
        list(iterate(batches, 0, 2, num_workers, pin_memory=False))
    assert type(caught.value) is DataError
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "07.png") in str(caught.value)


def children() -> set[int]:
    """The processes whose parent is this one."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z":
            found.add(int(path.parent.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_signal_to_the_loader_workers_does_not_end_them(number: signal.Signals) -> None:
    """torchrun and SLURM signal whole process groups; the trainer must still get the batches of its last step."""
    before = children()
    iterator = iterate(make(), 0, 40, num_workers=2, pin_memory=False)
    begun = [next(iterator), next(iterator)]  # one of each worker: both have begun to work
    workers = children() - before
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, number)
    batches = begun + list(iterator)
    assert len(batches) == 40
    assert all(equal(batch, make()[step]) for step, batch in enumerate(batches))
    assert not children() & workers, "workers end with the iterator"


def test_workers_end_when_training_stops_early() -> None:
    before = children()
    iterator = iterate(make(), 0, 1000, num_workers=2, pin_memory=False)
    next(iterator)
    assert len(children() - before) == 2
    del iterator
    assert children() - before == set()


@pytest.mark.parametrize("end", ["finished", "stopped"])
@pytest.mark.slow
def test_run_with_loader_workers_exits_when_it_has_ended(tmp_path: Path, end: str) -> None:
    """A real process: at its exit Python waits for all children, and these do not obey SIGTERM."""
    steps = 3 if end == "finished" else 100_000
    argv = [*TINY, f"run.root={tmp_path}", "run.name=run", f"train.max_steps={steps}", "data.num_workers=2"]
    with open(tmp_path / "log", "wb") as log:
        command = [sys.executable, "-m", "ddpm_dist.train", *argv]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not any(record["step"] >= 3 for record in metrics(tmp_path / "run")):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        if end == "stopped":
            process.terminate()
        assert process.wait(15) == (0 if end == "finished" else 75)
    finally:
        process.kill()  # its workers notice within seconds that they have lost it
        process.wait(10)
    assert status(tmp_path / "run")["state"] == ("finished" if end == "finished" else "preempted")
