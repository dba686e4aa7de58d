"""Runs the train command on one or more ranks, as a launcher would, in a fraction of the start-up time.

A fork server imports torch once. Each rank is a fork of it that gets a launcher's environment variables and calls the
real `ddpm_dist.train.main`. Nothing of the trainer is faked.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ddpm_dist.parallel.local import LocalRanks

TINY = (
    "data.name=mnist5k",
    "data.batch_size=8",
    "elastic.shards=4",
    "model.channels=8",
    "train.device=cpu",
    "train.threads=1",
    "train.precision=fp32",
    "train.log_every=1",
    "preview.num_images=0",
    "tracking.enabled=false",
)
"""Overrides for a run that trains dozens of steps a second."""


def call_train(argv: Sequence[str]) -> int:
    """The train command. Returns its exit code."""
    from ddpm_dist.train import main

    return main(argv)


def call_unread(argv: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """Run a command whose standard output is a pipe that no process reads any more, as after `| head`."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as gone:
        return subprocess.run(argv, stdout=gone, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1], timeout=60)


def call_train_hastily(argv: Sequence[str]) -> int:
    """The train command with shorter waits.

    A lease is stale after 3 s without a heartbeat, and a failed save is tried again after 0.3 s.
    """
    from ddpm_dist.run import lease, saver

    lease.BEAT_SECONDS, lease.STALE_SECONDS = 0.3, 3.0
    saver.RETRY_SECONDS = 0.3
    return call_train(argv)


def call_train_slowly(argv: Sequence[str]) -> int:
    """The train command with shorter waits, and a pause before each step as long as run.root has a file `slow`.

    So a run is still under way when a test has seen a step of it and does something to it, however fast the machine is.
    """
    from ddpm_dist.training.step import Trainer

    train_step = Trainer.train_step
    (root,) = (Path(word.removeprefix("run.root=")) for word in argv if word.startswith("run.root="))

    def after_a_pause(self: Trainer, micro_batches: Sequence[Any]) -> None:
        if (root / "slow").exists():
            time.sleep(0.1)
        train_step(self, micro_batches)

    Trainer.train_step = after_a_pause  # type: ignore[method-assign]
    return call_train_hastily(argv)


def _as_launched(world_size: int, function: Callable[..., int], args: Sequence[Any]) -> int:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the tests themselves ignore it
    os.environ["OMP_NUM_THREADS"] = "1"
    if world_size == 1:  # as if there were no launcher
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    return function(*args)


class Job(LocalRanks):
    """Ranks of the train command, or of another function that a test brings. Leaving the `with` ends them."""

    def __init__(self, world_size: int, log: Path, function: Callable[..., int], args: tuple[Any, ...]) -> None:
        preload = ["ddpm_dist.training.session", "torch._dynamo", "matplotlib.figure", "ddpm_dist.models.unet2d"]
        super().__init__(world_size, log, _as_launched, (world_size, function, args), preload)

    @staticmethod
    def argv(root: Path, *overrides: str, name: str) -> list[str]:
        """The arguments of the train command for a tiny run; makes run.root."""
        root.mkdir(parents=True, exist_ok=True)
        return [*TINY, f"run.root={root}", f"run.name={name}", *overrides]

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, timeout: float = 120) -> list[int | None]:
        """Wait for all ranks, which must end within `timeout` seconds. Returns their exit codes."""
        codes = self.exit_codes(timeout)
        assert None not in codes, f"some rank still runs after {timeout} s: {codes}\n{self.output()}"
        return codes


def start(
    world_size: int, root: Path, *overrides: str, name: str = "run", function: Callable[..., int] = call_train
) -> Job:
    """Start the train command on this many ranks, with run.root=root and run.name=name."""
    return Job(world_size, root / f"{name}.log", function, (Job.argv(root, *overrides, name=name),))


def train(
    world_size: int,
    root: Path,
    *overrides: str,
    name: str = "run",
    function: Callable[..., int] = call_train,
    timeout: float = 120,
) -> Path:
    """Train to the target, on this many ranks. Returns the run directory."""
    with start(world_size, root, *overrides, name=name, function=function) as job:
        assert job.wait(timeout) == [0] * world_size, job.output()
    return root / name


def metrics(run: Path) -> list[dict[str, Any]]:
    """Every complete line of metrics.jsonl, in the order of the file."""
    path = run / "metrics.jsonl"
    records = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        if line.endswith(b"\n"):
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


def wait_for_step(job: Job, run: Path, step: int, attempt: int, timeout: float = 120) -> None:
    """Wait until this attempt has logged the step."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if any(record["step"] >= step and record["attempt"] == attempt for record in metrics(run)):
            return
        assert job.alive(), f"the ranks ended before step {step}\n{job.output()}"
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached within {timeout} s\n{job.output()}")


def wait_until(condition: Callable[[], bool], what: Callable[[], str], timeout: float = 60) -> None:
    """Wait until the condition holds; `what` makes the message for when it does not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


def status(run: Path) -> dict[str, Any]:
    """What status.json says."""
    return dict(json.loads((run / "status.json").read_text()))


def write_status(run: Path, state: str, step: int, attempt: int = 1, exit_code: int | None = None) -> None:
    """Write a status.json as rank 0 would, and put it in place in one step."""
    facts = {"state": state, "step": step, "attempt": attempt, "reason": "", "exit_code": exit_code, "target": step}
    facts |= {"saved_step": step, "without_progress": 0, "world_size": 1, "time": time.time()}
    facts |= {"host": socket.gethostname(), "pid": os.getpid(), "slurm_job": None, "slurm_restart": None}
    temporary = run / ".status.new"
    temporary.write_text(json.dumps(facts))
    temporary.replace(run / "status.json")


def committed(run: Path) -> list[int]:
    """The steps of the committed checkpoints, in order."""
    return sorted(int(path.stem.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*.json"))


def final_state(run: Path) -> dict[str, Any]:
    """The content of the newest checkpoint."""
    import torch

    state = torch.load(run / "checkpoints" / f"step-{committed(run)[-1]:08d}.pt", weights_only=True)
    return dict(state)


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """The paths at which two nested states differ, be it in a single bit, a type, a shape or a key."""
    import torch

    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape
        if same and left.numel():
            same = left.contiguous().numpy().tobytes() == right.contiguous().numpy().tobytes()
        return [] if same else [path]
    if type(left) is not type(right):
        return [path]
    if isinstance(left, dict):
        found = [f"{path}/{key}" for key in left.keys() ^ right.keys()]
        return found + [
            line for key in left.keys() & right.keys() for line in differences(left[key], right[key], f"{path}/{key}")
        ]
    if isinstance(left, list | tuple):
        if len(left) != len(right):
            return [path]
        return [
            line
            for index, (a, b) in enumerate(zip(left, right, strict=True))
            for line in differences(a, b, f"{path}/{index}")
        ]
    return [] if left == right else [path]


STATE = ("step", "model", "ema", "optimizer", "scaler", "contract")


def state_differences(left: Path, right: Path) -> list[str]:
    """The paths at which the newest checkpoints of two runs differ to the bit; STATE says what is compared."""
    one, other = final_state(left), final_state(right)
    return differences({key: one[key] for key in STATE}, {key: other[key] for key in STATE})


def random_steps(seed: int, count: int, below: int) -> list[int]:
    """Random steps in ascending order. The seed is printed, so that a failure can be repeated."""
    print(f"seed {seed}")
    return sorted(random.Random(seed).sample(range(2, below), count))


def snapshot(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """{file: (size, mtime, content)} of a whole folder, to show later that no file was touched."""
    files: Iterable[Path] = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns, path.read_bytes()) for path in files}
