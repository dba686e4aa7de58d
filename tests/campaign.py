"""Runs that are killed again and again, and compared to the bit with an undisturbed one.

Tests make a few rounds of each campaign, `make torture` makes many. What is random follows from a seed.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Job, call_train, call_train_hastily, committed, metrics, start, state_differences, status, train
from nets import call_train_attentive

RUN = ("checkpoint.every=10", "train.log_every=1", "checkpoint.keep_last=2", "distributed.timeout_seconds=6")


@dataclass
class Outcome:
    """What happened in a campaign.

    Attributes:
        attempts: how often the run was started.
        kills: how often it was killed before its end.
        differences: the paths at which its last checkpoint differs from the undisturbed run's; right if empty.
        resumed: for each attempt that logged a step, the step of the checkpoint at which it started.
        slowest_return: the longest time in seconds from the start of an attempt to its first new step.
    """

    attempts: int
    kills: int
    differences: list[str]
    resumed: list[int]
    slowest_return: float


def random_kills(root: Path, undisturbed: Path, seed: int, kills: int, steps: int, world_size: int = 2) -> Outcome:
    """Send SIGKILL to all ranks or to one at random instants, be it during start-up, a step or a save."""
    draw, run, done, attempts, slowest = random.Random(seed), root / "run", 0, 0, 0.0
    resumed: list[int] = []
    while status_of(run).get("state") != "finished":
        attempts += 1
        assert attempts <= kills + 3, f"seed {seed}: not finished after {attempts} attempts"
        before, newest = len(metrics(run)), max(committed(run), default=0)
        with start(world_size, root, *RUN, f"train.max_steps={steps}", function=call_train_hastily) as job:
            begun = time.monotonic()
            while not committed(run) and job.alive():  # so that also on a slow machine there is one to resume
                time.sleep(0.01)
            if done < kills and not wait_or_ended(job, draw.uniform(0.05, 1.6)):
                done += 1
                kill(job, draw.choice(["all", *range(world_size)]))
            else:
                while len(metrics(run)) == before and job.alive():
                    time.sleep(0.01)
                slowest = max(slowest, time.monotonic() - begun)
                assert job.wait(300) == [0] * world_size, f"seed {seed}\n{job.output()}"
        assert status_of(run).get("attempt", 0) <= attempts
        for line in metrics(run)[before:][:1]:
            assert line["step"] == newest + 1, f"seed {seed}: attempt {attempts} did not start at the newest checkpoint"
            resumed.append(newest)
    return Outcome(attempts, done, state_differences(undisturbed, run), resumed, slowest)


def kill(job: Job, victim: str | int) -> None:
    """Send SIGKILL to all ranks or to one. The other ranks must then exit by themselves within 40 s."""
    if victim == "all":
        job.kill()
        return
    assert isinstance(victim, int)
    if job.processes[victim].is_alive():
        job.signal(victim, signal.SIGKILL)
    deadline = time.monotonic() + 40
    while job.alive():
        assert time.monotonic() < deadline, f"some rank still runs 40 s after rank {victim} was killed\n{job.output()}"
        time.sleep(0.01)


def wait_or_ended(job: Job, seconds: float) -> bool:
    """Wait. Returns True as soon as the job has ended by itself, False if it still runs after this time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not job.alive():
            return True
        time.sleep(0.005)
    return False


def status_of(run: Path) -> dict[str, Any]:
    """What status.json says; {} if there is none yet."""
    return status(run) if (run / "status.json").exists() else {}


# Crash points: a process is killed right before its k-th call that changes what is on disk.

CHANGES = ("replace", "link", "fsync", "unlink", "mkdir", "rename", "open")


def call_train_dying(argv: Sequence[str]) -> int:
    """The train command, but rank 0 is killed right before its k-th change of the disk; argv[0] is k."""
    if os.environ.get("RANK", "0") == "0":
        _die_before_change(int(argv[0]))
    return call_train_hastily(argv[1:])


def _die_before_change(number: int) -> None:
    left = number

    def dying(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            writes = name != "open" or (len(args) > 1 and isinstance(args[1], int) and args[1] & os.O_CREAT)
            if writes:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for name in CHANGES:
        setattr(os, name, dying(getattr(os, name), name))
    assert pathlib.os is os  # type: ignore[attr-defined]  # so that calls of pathlib are counted too


def crash_points(root: Path, undisturbed: Path, numbers: Sequence[int], steps: int) -> list[str]:
    """For each crash point, a run dies there, is started again, and must end with the bits of the undisturbed run.

    Args:
        numbers: the crash points, ascending. Those after the run's last change of the disk are left out.
        steps: length of each run.

    Returns:
        what went wrong; right if empty.
    """
    wrong = []
    options = ("checkpoint.every=3", "checkpoint.keep_last=2", "train.log_every=1", f"train.max_steps={steps}")
    for number in numbers:
        name = f"point-{number}"
        argv = Job.argv(root, *options, name=name)
        with Job(1, root / f"{name}.log", call_train_dying, ([str(number), *argv],)) as job:
            (code,) = job.wait(60)
        if code not in (0, -signal.SIGKILL):
            wrong.append(f"{name}: ended with exit code {code} instead of SIGKILL")
        untouched = status_of(root / name).get("state") == "finished"  # the next attempt changes nothing then
        with start(1, root, *options, name=name, function=call_train_hastily) as job:
            if job.wait(60) != [0]:
                wrong.append(f"{name}: the next attempt failed: {job.output()[-500:]}")
                continue
        wrong += [f"{name}: {path} differs" for path in state_differences(undisturbed, root / name)]
        if not untouched and list((root / name).rglob("*.tmp")):
            wrong.append(f"{name}: left temporary files")
        if code == 0:
            break  # the run makes fewer changes than this number
    return wrong


# Damage


LAYOUTS = [
    {"net": net, "precision": precision, "channels_last": nhwc, "flip": flip, "grad_clip": clip}
    for net, precision, nhwc, flip, clip in itertools.product(
        ("reference", "attention and dropout"), ("fp32", "bf16"), ("true", "false"), ("true", "false"), ("null", "0.5")
    )
]
"""Combinations of options with which a run must end with the same bits on 1, 2, 4 and 8 ranks."""


def end_on_each_world(root: Path, layout: dict[str, str], steps: int) -> list[Path]:
    """Train the same run on 1, 2, 4 and 8 ranks, with 8 shards, on MNIST images. Returns the run directories."""
    attentive = layout["net"] != "reference"
    options = (
        *("elastic.mode=bitwise", "elastic.shards=8", "data.batch_size=16", "model.channels=16"),
        *(f"train.max_steps={steps}", "ema.decay=0.99", "train.log_every=10"),
        *(f"train.precision={layout['precision']}", f"train.channels_last={layout['channels_last']}"),
        *(f"data.flip={layout['flip']}", f"optim.grad_clip={layout['grad_clip']}"),
        *(["model.dropout=0.1"] if attentive else []),
    )
    function = call_train_attentive if attentive else call_train
    return [train(size, root, *options, name=f"w{size}", function=function, timeout=300) for size in (1, 2, 4, 8)]


def flip_a_bit(path: Path, draw: random.Random) -> None:
    """Flip one bit of the file."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, draw: random.Random) -> None:
    """Cut the file off at a random place."""
    os.truncate(path, draw.randrange(path.stat().st_size))


def zero_a_page(path: Path, draw: random.Random) -> None:
    """Zero a page of the file that was not zero before, as a power failure may leave it."""
    content = path.read_bytes()
    pages = [start for start in range(0, len(content), 4096) if any(content[start : start + 4096])]
    place = draw.choice(pages)
    length = len(content[place : place + 4096])
    path.write_bytes(content[:place] + bytes(length) + content[place + length :])


DAMAGES = (flip_a_bit, truncate, zero_a_page)


def newest_checkpoint(run: Path) -> Path:
    """The file of the newest committed checkpoint."""
    return run / "checkpoints" / f"step-{committed(run)[-1]:08d}.pt"
