"""A throw-away SLURM for the tests, made with slurm/local-cluster and always taken down again."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL")
PROGRAMS = ("slurmctld", "slurmd", "srun", "munged", "ip")
HOW_TO_GET_IT = (
    "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2, and be root "
    "(in a container too)"
)


class Cluster:
    """SLURM's commands on a cluster that is up.

    Args:
        state: the folder of the cluster, with its slurm.conf.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        # Without the variables of a job that the tests themselves may run in.
        outer = ("SLURM", "SBATCH", "SRUN", "SALLOC", "PET_", "MASTER_")
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
        self.environment |= {
            "SLURM_CONF": str(state / "slurm.conf"),
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH")))),
        }

    def popen(self, argv: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen(
                argv, cwd=PROJECT, env=self.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    def run(self, *argv: str, timeout: float = 120) -> tuple[int, str]:
        """(exit code, standard output and error together)."""
        done = subprocess.run(
            argv,
            cwd=PROJECT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        return done.returncode, done.stdout

    def batch(self, log: Path, *argv: str, timeout: float = 300) -> tuple[int, str]:
        """Submit a batch script and wait for its end. Returns (exit code, output)."""
        fields = self.wait_for_end(self.submit(log, *argv), log, timeout)
        return int(fields["ExitCode"].split(":")[0]), text_of(log)

    def submit(self, log: Path, *argv: str) -> str:
        """Submit a batch script. Returns the job's id."""
        code, job = self.run("sbatch", "--parsable", f"--output={log}", *argv)
        assert code == 0, job
        return job.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, as {field: value}."""
        shown = self.run("scontrol", "show", "job", "--oneliner", job)[1]
        return dict(field.partition("=")[::2] for field in shown.split())

    def wait_for_end(self, job: str, log: Path, timeout: float = 300) -> dict[str, str]:
        """Wait until the job has ended for good; returns its fields. `sbatch --wait` would look too rarely."""
        return self.wait_for(job, ENDED, log, timeout)

    def wait_for(self, job: str, states: Sequence[str], log: Path, timeout: float = 300) -> dict[str, str]:
        """Wait until the job is in one of these states; returns its fields."""
        deadline = time.monotonic() + timeout
        while (fields := self.job(job)).get("JobState") not in states:
            assert time.monotonic() < deadline, f"not {states} after {timeout} s: {fields}\n{text_of(log)}"
            time.sleep(0.1)
        return fields

    def wait_until(self, condition: Callable[[], bool], what: str, log: Path, timeout: float = 300) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {timeout} s\n{text_of(log)}"
            time.sleep(0.05)

    def preempt(self, nodes: int = 3, seconds: int = 1) -> str:
        """Submit a job of higher priority that wants nodes for itself; returns its id."""
        size = (f"--nodes={nodes}", "--exclusive")
        return self.submit(Path("/dev/null"), "--partition=high", *size, f"--wrap=sleep {seconds}")

    def is_idle(self) -> bool:
        nodes = self.run("sinfo", "--noheader", "--Node", "--format=%T", "--partition=low")[1].split()
        return set(nodes) == {"idle"} and not self.run("squeue", "--noheader")[1].strip()

    def control(self, *argv: str) -> None:
        """Run a command of slurm/local-cluster: crash, crash-slurmd, restore, down."""
        local_cluster(self.state, *argv)


def text_of(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


def why_no_slurm() -> str:
    """What this machine lacks for a local SLURM; an empty string if it lacks nothing."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"))
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        return f"no {', '.join(missing)}: {HOW_TO_GET_IT}"
    return "" if os.geteuid() == 0 else f"a cluster takes root: {HOW_TO_GET_IT}"


def local_cluster(state: Path, *argv: str) -> None:
    done = subprocess.run(
        [sys.executable, str(PROJECT / "slurm" / "local-cluster"), *argv],
        env=os.environ | {"LOCAL_SLURM_STATE": str(state)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"slurm/local-cluster {argv[0]}:\n{done.stdout}"


@contextlib.contextmanager
def cluster_of(*options: str) -> Iterator[Cluster]:
    """A cluster that is up inside the `with`. Skips the test where this machine cannot have one.

    With DDPM_REQUIRE_SLURM=1 the test fails instead.
    """
    lack = why_no_slurm()
    if lack and os.environ.get("DDPM_REQUIRE_SLURM") == "1":
        pytest.fail(f"DDPM_REQUIRE_SLURM=1, but {lack}")
    if lack:
        pytest.skip(lack)
    # Not tmp_path: the cluster puts Unix sockets here, whose paths must be short.
    state = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        local_cluster(state, "up", *options)
        yield Cluster(state)
    finally:
        local_cluster(state, "down")
        shutil.rmtree(state, ignore_errors=True)
