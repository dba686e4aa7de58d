"""What submitit runs in each task: the trainer as a child process, with every stop signal passed on to it.

A child of its own, because submitit's own handlers do nothing at a SIGTERM, and because this process must outlive a
trainer that is killed. It holds no state: a requeued job runs the same command again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from types import FrameType

from ddpm_dist.run.preemption import SIGNALS


@dataclass(frozen=True)
class Task:
    """One rank.

    Attributes:
        arguments: of `ddpm_dist.train`.
    """

    arguments: tuple[str, ...]

    def __call__(self) -> int:
        """Train; returns 0, or ends this process with the trainer's exit code."""
        child: subprocess.Popen[bytes] | None = None
        early: list[int] = []

        def pass_on(number: int, frame: FrameType | None) -> None:
            if child is None:
                early.append(number)
            else:
                child.send_signal(number)

        for number in SIGNALS:
            signal.signal(number, pass_on)
        environment = os.environ | _environment_of_this_rank()
        child = subprocess.Popen([sys.executable, "-m", "ddpm_dist.train", *self.arguments], env=environment)
        for received in early:
            child.send_signal(received)
        code = child.wait()
        if code == 0:
            return 0
        with contextlib.suppress(OSError):  # a log on a full disk must not cost the exit code
            sys.stdout.flush()
        # Past submitit, which would pickle an error: the exit code is all that the batch script wants to know.
        os._exit(128 - code if code < 0 else code)


def _environment_of_this_rank() -> dict[str, str]:
    """Under SLURM the trainer reads the step's own variables; elsewhere submitit knows who is who."""
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        return {}
    from submitit.helpers import TorchDistributedEnvironment

    known = TorchDistributedEnvironment()
    names = ("master_addr", "master_port", "rank", "world_size", "local_rank", "local_world_size")
    return {name.upper(): str(getattr(known, name)) for name in names}
