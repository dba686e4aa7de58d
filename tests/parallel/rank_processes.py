"""Real ranks for tests: processes of this machine that call a function of the test's module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness import Job

from ddpm_dist.parallel.environment import read_environment
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.run.preemption import StopSignal


def connect(timeout_seconds: float = 30.0) -> tuple[Ranks, StopSignal]:
    import torch

    torch.set_num_threads(1)
    stop = StopSignal().install(under_launcher=False)
    return Ranks(read_environment(), torch.device("cpu"), timeout_seconds, stop.requested), stop


def run_ranks(tmp_path: Path, world_size: int, function: Callable[[], int]) -> list[int | None]:
    with Job(world_size, tmp_path / "ranks.log", function, ()) as job:
        codes = job.wait(60)
        print(job.output())
        return codes
