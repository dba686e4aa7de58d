"""A cluster of three nodes for the tests of this folder, and the undisturbed run that they compare with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster import Cluster, cluster_of
from harness import train
from submitted import CONFIG, RUN, SubmittedRun

# How long SLURM waits before it kills a job that it has told to stop: 60 s after a preemption, and 30 s, its own
# default, after scancel. The batch script writes down how an attempt ended only after the launcher has ended, and that
# takes long while other tests keep the machine busy. A job that ends sooner is not waited for.
PATIENT = ("--grace", "60", "--kill-wait", "30")


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    with cluster_of("--nodes", "3", "--cpus", "2", "--gpus", "2", *PATIENT) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def user_signal_cluster() -> Iterator[Cluster]:
    """A cluster with preempt_send_user_signal: a preempted job gets its --signal instead of SIGTERM."""
    size = ("--nodes", "3", "--cpus", "2", "--gpus", "0")
    with cluster_of(*size, *PATIENT, "--preempt-user-signal") as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster. Jobs that a test leaves behind are ended before the next test begins."""
    yield running_cluster
    running_cluster.run("scancel", "--user=root", "--signal=KILL")
    running_cluster.run("scancel", "--user=root")
    deadline = time.monotonic() + 30
    while not running_cluster.is_idle() and time.monotonic() < deadline:
        time.sleep(0.1)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of submitted.RUN, trained by one process without any cluster."""
    overrides = (*RUN, "--config", CONFIG)
    return train(1, tmp_path_factory.mktemp("reference"), *overrides, name="undisturbed", timeout=400)


@pytest.fixture(scope="session")
def unattended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, SubmittedRun]]:
    """Runs that take minutes of waiting and hardly any work, on a cluster of their own.

    "lead" and "limit" are jobs with a time limit of one minute. SLURM signals "lead" some seconds before the limit,
    and "limit" only when the limit is reached. Each is cancelled during its third attempt. "crashing" dies before its
    first step, each time.
    """
    root, endless = tmp_path_factory.mktemp("unattended"), ("train.max_steps=1000000", "checkpoint.every=100000")
    size = ("--nodes", "4", "--cpus", "1", "--gpus", "0")
    with cluster_of(*size, *PATIENT) as other, ThreadPoolExecutor() as threads:
        # A process ignores SIGURG unless it asks for it, so "limit" notices nothing before its time is up.
        found = {
            name: SubmittedRun(other, root, (*RUN, *endless), ("--nodes=1", "--time=1", f"--signal={signal}"), name)
            for name, signal in (("lead", "USR2@5"), ("limit", "URG@1"))
        }
        for run in found.values():
            threads.submit(_cancel_third_attempt, run)
        found["crashing"] = _crashing(other, root)
        yield found


def _cancel_third_attempt(run: SubmittedRun) -> None:
    run.wait_for_step(1, attempt=3, timeout=900)
    run.cluster.run("scancel", run.job)


def _crashing(cluster: Cluster, root: Path) -> SubmittedRun:
    """A run whose rank 1 kills itself at each start: Python imports sitecustomize before anything else."""
    bad = root / "bad"
    bad.mkdir()
    (bad / "sitecustomize.py").write_text("import os\nif os.environ.get('RANK') == '1': os.kill(os.getpid(), 9)\n")
    path, soon = cluster.environment["PYTHONPATH"], "distributed.timeout_seconds=30"
    cluster.environment["PYTHONPATH"] = f"{bad}:{path}"  # a job keeps the environment in which it was submitted
    try:
        return SubmittedRun(cluster, root, (*RUN, soon), ("--nodes=2", "--ntasks-per-node=1"), "crashing")
    finally:
        cluster.environment["PYTHONPATH"] = path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the unattended runs before the first test that needs SLURM, since they take minutes."""
    ours = [item for item in items if isinstance(item, pytest.Function) and item.get_closest_marker("slurm")]
    if any("unattended" in item.fixturenames for item in ours):
        ours[0].fixturenames.insert(0, "unattended")
