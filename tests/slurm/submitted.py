"""Runs that the tests submit with slurm/train.sbatch or launch.submit, and what their files say afterwards."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import TINY, committed, metrics, state_differences, status

from ddpm_dist.run.lease import read_attempts

if TYPE_CHECKING:
    from cluster import Cluster

CONFIG = "configs/quickstart.yaml"
STEPS = 100
RUN = ("elastic.mode=bitwise", "optim.warmup_steps=2", "checkpoint.every=1000", f"train.max_steps={STEPS}")
SLOW_MOTION = Path(__file__).parent / "slow_motion"
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")
ONE_NODE = ("--nodes=1", "--ntasks-per-node=2")


@contextlib.contextmanager
def slow_motion(cluster: Cluster, while_there: Path, seconds: float = 0.15) -> Iterator[None]:
    """Jobs that are submitted inside the `with` train in slow motion, until their first restart.

    Args:
        cluster: the cluster that gets them.
        while_there: a file; once it is removed, they train at full speed.
        seconds: how long each step pauses.
    """
    while_there.write_text(str(seconds))
    before = dict(cluster.environment)
    path = os.pathsep.join((str(SLOW_MOTION), before["PYTHONPATH"]))
    cluster.environment |= {"PYTHONPATH": path, "SLOW_MOTION": str(while_there)}
    try:
        yield
    finally:
        cluster.environment.clear()
        cluster.environment.update(before)


class SubmittedRun:
    """One run, submitted with slurm/train.sbatch as one job.

    Args:
        cluster: the cluster that gets the job.
        root: run.root; the job's log lies there too.
        overrides: `key=value`, for the config.
        options: options of sbatch.
        name: run.name.
        slow: how many seconds each step pauses until the first restart, since the test is going to do something to the
            run while it trains; 0 for full speed.
    """

    def __init__(
        self,
        cluster: Cluster,
        root: Path,
        overrides: Sequence[str],
        options: Sequence[str] = TWO_BY_TWO,
        name: str = "run",
        slow: float = 0.0,
    ) -> None:
        self.cluster, self.root, self.overrides, self.name = cluster, root, tuple(overrides), name
        self.directory, self.log = root / name, root / f"{name}.out"
        self.slow_motion = root / f"{name}.slow"
        with slow_motion(cluster, self.slow_motion, slow) if slow else contextlib.nullcontext():
            self.job = self.submit(options)

    def submit(self, options: Sequence[str], log: Path | None = None) -> str:
        """Submit the run, as one more job if it was submitted before. Returns the job's id."""
        keys = (*TINY, f"run.root={self.root}", f"run.name={self.name}", *self.overrides)
        return self.cluster.submit(log or self.log, *options, "slurm/train.sbatch", CONFIG, *keys)

    def at_full_speed(self) -> None:
        """End the slow motion."""
        self.slow_motion.unlink()

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float = 240) -> None:
        self.cluster.wait_until(condition, what, self.log, timeout)

    def wait_for_step(self, step: int, attempt: int = 1, timeout: float = 240) -> None:
        """Wait until this attempt has logged the step."""
        self.wait_until(
            lambda: any(line["attempt"] == attempt and line["step"] >= step for line in metrics(self.directory)),
            f"step {step} of attempt {attempt}",
            timeout,
        )

    def wait_for_finish(self, timeout: float = 300) -> None:
        fields = self.cluster.wait_for_end(self.job, self.log, timeout)
        assert fields["JobState"] == "COMPLETED", f"{fields}\n{self.output()}"
        assert self.status()["state"] == "finished", self.output()

    def status(self) -> dict[str, Any]:
        return status(self.directory)

    def slurm_log(self) -> list[dict[str, str]]:
        """The lines of slurm.log: the beginning and the end of each attempt, as {field: value}."""
        path = self.directory / "slurm.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [dict(field.partition("=")[::2] for field in line.split(" ")) for line in lines]

    def ends(self) -> list[tuple[str, str]]:
        """(exit code, what came next) of each attempt that ended by itself."""
        return [(line["code"], line["next"]) for line in self.slurm_log() if line["event"] == "end"]

    def in_mlflow(self) -> tuple[str, list[int]]:
        """(status, steps whose loss was shipped) of the only run in MLflow's database."""
        with contextlib.closing(sqlite3.connect(self.root / "mlflow.db")) as database:
            ((name, state),) = database.execute("select run_uuid, status from runs").fetchall()
            steps = database.execute("select step from metrics where run_uuid=? and key='loss' order by step", (name,))
            return str(state), [int(step) for (step,) in steps]

    def first_step_after_start(self, attempt: int) -> float:
        """Seconds from the batch script's start to the first new step of an attempt."""
        begins = [int(line["time"]) for line in self.slurm_log() if line["event"] == "begin"]
        first = next(line for line in metrics(self.directory) if line["attempt"] == attempt)
        return float(first["time"]) - begins[attempt - 1]

    def attempts(self) -> list[dict[str, Any]]:
        return read_attempts(self.directory / "attempts")

    def assert_no_step_twice(self, target: int) -> None:
        assert [line["step"] for line in metrics(self.directory)] == list(range(1, target + 1)), "steps were lost"

    def assert_same_bits_as(self, other: Path) -> None:
        assert state_differences(other, self.directory) == []

    def committed(self) -> list[int]:
        return committed(self.directory)


class SubmititRun(SubmittedRun):
    """One run, submitted with launch.submit; options of sbatch are translated into its own."""

    def submit(self, options: Sequence[str], log: Path | None = None) -> str:
        own = [option.replace("--ntasks-per-node", "--tasks-per-node") for option in options]
        keys = (*TINY, f"run.root={self.root}", f"run.name={self.name}", *self.overrides)
        argv = (sys.executable, "-m", "launch.submit", "--config", CONFIG, *own, *keys)
        code, output = self.cluster.run(*argv)
        assert code == 0, output
        job = output.partition("job ")[2].partition(":")[0]
        self.log = self.root / ".submitit" / self.name / job / f"{job}_0_log.out"
        return job
