"""Runs that are killed again and again, and compared to the bit with one that was left alone.

In short form in the tests of this folder; `make torture` runs the long one. Everything random is printed as a seed.
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
    """What a campaign came to.

    Attributes:
        attempts: how often the run was started.
        kills: how often it was killed before its end.
        differences: where the end differs from the undisturbed run's; empty is right.
        resumed: the checkpoints at which attempts began that came as far as a step.
        slowest_return: seconds from the start of an attempt to its first new step, at worst.
    """

    attempts: int
    kills: int
    differences: list[str]
    resumed: list[int]
    slowest_return: float


def random_kills(root: Path, undisturbed: Path, seed: int, kills: int, steps: int, world_size: int = 2) -> Outcome:
    """SIGKILL to all ranks or one, at random instants: start-up, steps and saves included."""
    draw, run, done, attempts, slowest = random.Random(seed), root / "run", 0, 0, 0.0
    resumed: list[int] = []
    while status_of(run).get("state") != "finished":
        attempts += 1
        assert attempts <= kills + 3, f"seed {seed}: no end in sight after {attempts} attempts"
        before, newest = len(metrics(run)), max(committed(run), default=0)
        with start(world_size, root, *RUN, f"train.max_steps={steps}", function=call_train_hastily) as job:
            begun = time.monotonic()
            while not committed(run) and job.alive():  # however slow the machine, there is something to lose
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
            assert line["step"] == newest + 1, f"seed {seed}: attempt {attempts} did not begin at its checkpoint"
            resumed.append(newest)
    return Outcome(attempts, done, state_differences(undisturbed, run), resumed, slowest)


def kill(job: Job, victim: str | int) -> None:
    """SIGKILL; the ranks that are left must leave by themselves."""
    if victim == "all":
        job.kill()
        return
    assert isinstance(victim, int)
    if job.processes[victim].is_alive():
        job.signal(victim, signal.SIGKILL)
    deadline = time.monotonic() + 40
    while job.alive():
        assert time.monotonic() < deadline, f"ranks outlive rank {victim}\n{job.output()}"
        time.sleep(0.01)


def wait_or_ended(job: Job, seconds: float) -> bool:
    """True if the job ended by itself meanwhile."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not job.alive():
            return True
        time.sleep(0.005)
    return False


def status_of(run: Path) -> dict[str, Any]:
    return status(run) if (run / "status.json").exists() else {}


# Every call that changes what is on disk is a crash point: a process of ours dies right before its k-th.

CHANGES = ("replace", "link", "fsync", "unlink", "mkdir", "rename", "open")


def call_train_dying(argv: Sequence[str]) -> int:
    """The real command, whose rank 0 is killed right before its k-th change of the disk (argv[0] is k)."""
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
    assert pathlib.os is os  # type: ignore[attr-defined]  # so that pathlib's calls die too


def crash_points(root: Path, undisturbed: Path, numbers: Sequence[int], steps: int) -> list[str]:
    """A run per crash point: it dies there, is started again, and must end with the undisturbed run's bits.

    Returns:
        what went wrong; empty is right. Points beyond the run's last change are left out.
    """
    wrong = []
    options = ("checkpoint.every=3", "checkpoint.keep_last=2", "train.log_every=1", f"train.max_steps={steps}")
    for number in numbers:
        name = f"point-{number}"
        argv = Job.argv(root, *options, name=name)
        with Job(1, root / f"{name}.log", call_train_dying, ([str(number), *argv],)) as job:
            (code,) = job.wait(60)
        if code not in (0, -signal.SIGKILL):
            wrong.append(f"{name}: exit code {code} before the crash")
        untouched = status_of(root / name).get("state") == "finished"  # it is left as it is
        with start(1, root, *options, name=name, function=call_train_hastily) as job:
            if job.wait(60) != [0]:
                wrong.append(f"{name}: does not come back: {job.output()[-500:]}")
                continue
        wrong += [f"{name}: {path} differs" for path in state_differences(undisturbed, root / name)]
        if not untouched and list((root / name).rglob("*.tmp")):
            wrong.append(f"{name}: left temporary files")
        if code == 0:
            break  # there are no more changes than this
    return wrong


# Damage


LAYOUTS = [
    {"net": net, "precision": precision, "channels_last": nhwc, "flip": flip, "grad_clip": clip}
    for net, precision, nhwc, flip, clip in itertools.product(
        ("reference", "attention and dropout"), ("fp32", "bf16"), ("true", "false"), ("true", "false"), ("null", "0.5")
    )
]
"""What must not keep a run from ending alike on 1, 2, 4 and 8 ranks; one rank accumulates over eight shards."""


def end_on_each_world(root: Path, layout: dict[str, str], steps: int) -> list[Path]:
    """Run directories of the same run on 1, 2, 4 and 8 ranks, of 8 shards, on real MNIST, with 16 channels."""
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
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def zero_a_page(path: Path, draw: random.Random) -> None:
    """A page that was not zero before: an unwritten block after a power failure."""
    content = path.read_bytes()
    pages = [start for start in range(0, len(content), 4096) if any(content[start : start + 4096])]
    place = draw.choice(pages)
    length = len(content[place : place + 4096])
    path.write_bytes(content[:place] + bytes(length) + content[place + length :])


DAMAGES = (flip_a_bit, truncate, zero_a_page)


def newest_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / f"step-{committed(run)[-1]:08d}.pt"
