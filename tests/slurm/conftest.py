"""A throw-away SLURM of two nodes for the tests of this folder: slurm/local-cluster, up once and always taken down."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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
    """SLURM's commands, on a cluster that runs."""

    def __init__(self, state: Path) -> None:
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

    def run(self, *argv: str, timeout: float = 60) -> tuple[int, str]:
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

    def batch(self, log: Path, *argv: str, timeout: float = 90) -> tuple[int, str]:
        """Submit a batch script and wait for its end: (exit code, output). `sbatch --wait` looks too rarely."""
        code, job = self.run("sbatch", "--parsable", f"--output={log}", *argv)
        assert code == 0, job
        deadline = time.monotonic() + timeout
        while True:
            shown = self.run("scontrol", "show", "job", "--oneliner", job.strip())[1]
            fields = dict(field.partition("=")[::2] for field in shown.split())
            output = log.read_text(errors="replace") if log.exists() else ""
            if fields.get("JobState") in ENDED:
                return int(fields["ExitCode"].split(":")[0]), output
            assert time.monotonic() < deadline, f"not ended after {timeout} s: {shown}\n{output}"
            time.sleep(0.1)


def why_no_slurm() -> str:
    """What this machine lacks, or an empty string."""
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


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    lack = why_no_slurm()
    if lack and os.environ.get("DDPM_REQUIRE_SLURM") == "1":
        pytest.fail(f"DDPM_REQUIRE_SLURM=1, but {lack}")
    if lack:
        pytest.skip(lack)
    # Not tmp_path: Unix sockets live here, and their paths are short.
    state = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        local_cluster(state, "up", "--nodes", "2", "--cpus", "2", "--gpus", "2")
        yield Cluster(state)
    finally:
        local_cluster(state, "down")
        shutil.rmtree(state, ignore_errors=True)


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster; whatever jobs a test leaves are ended."""
    yield running_cluster
    running_cluster.run("scancel", "--user=root", "--signal=KILL")
    running_cluster.run("scancel", "--user=root")
