"""On two nodes of a real SLURM, srun and sbatch train one run, not one run per node."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import TINY, committed, metrics, snapshot, state_differences, status, train
from submitted import slow_motion

if TYPE_CHECKING:
    from cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]

CONFIG = "configs/quickstart.yaml"
SHORT = ("train.max_steps=6", "checkpoint.every=3", "optim.warmup_steps=2")
SRUN = ("srun", "-N2", "--ntasks-per-node=1")


def overrides_of(root: Path, name: str, *overrides: str) -> list[str]:
    return [*TINY, f"run.root={root}", f"run.name={name}", *overrides]


def srun_argv(root: Path, name: str, *overrides: str) -> list[str]:
    train_command = (sys.executable, "-m", "ddpm_dist.train", "--config", CONFIG)
    return [*SRUN, f"--job-name={name}", *train_command, *overrides_of(root, name, *overrides)]


def sbatch(cluster: Cluster, root: Path, name: str, *overrides: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
    argv = ("--nodes=2", *options, "slurm/train.sbatch", CONFIG, *overrides_of(root, name, *overrides))
    return cluster.batch(root / f"{name}.out", *argv)


@contextmanager
def running(cluster: Cluster, argv: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = cluster.popen(argv, log)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


def wait_until(condition: Callable[[], bool], what: str, log: Path, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout} s\n{log.read_text()}"
        time.sleep(0.02)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in metrics(run)]


def nodes(run: Path) -> list[str]:
    """The nodes of the first attempt, as its file says."""
    return list(json.loads((run / "attempts" / "00001.json").read_text())["nodes"])


@pytest.fixture(scope="module")
def srun_run(running_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that srun trained on two nodes, with no other launcher."""
    root = tmp_path_factory.mktemp("srun")
    code, output = running_cluster.run(*srun_argv(root, "plain", *SHORT), timeout=240)
    assert code == 0, output
    assert output.count("2 rank(s)") == 1, f"each rank trained alone, or rank 1 printed this line too:\n{output}"
    return root / "plain"


@pytest.fixture(scope="module")
def one_process_losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = train(1, tmp_path_factory.mktemp("one"), *SHORT, "--config", CONFIG)
    assert len(losses(run)) == 6
    return losses(run)


def test_srun_trains_one_run_across_two_nodes(srun_run: Path, one_process_losses: list[float]) -> None:
    assert (status(srun_run)["state"], status(srun_run)["world_size"]) == ("finished", 2)
    assert committed(srun_run) == [3, 6]
    assert nodes(srun_run) == ["node1", "node2"]
    assert losses(srun_run) == pytest.approx(one_process_losses, rel=1e-4)


def test_the_same_srun_again_exits_0_and_changes_nothing(cluster: Cluster, srun_run: Path) -> None:
    before = snapshot(srun_run)
    code, output = cluster.run(*srun_argv(srun_run.parent, "plain", *SHORT), timeout=240)
    assert code == 0, output
    assert output.count("nothing to do") == 1
    assert snapshot(srun_run) == before


def test_sbatch_ends_with_the_same_bits_as_srun(
    cluster: Cluster, tmp_path: Path, srun_run: Path, one_process_losses: list[float]
) -> None:
    code, output = sbatch(cluster, tmp_path, "batch", *SHORT)
    assert code == 0, output
    run = tmp_path / "batch"
    assert (status(run)["state"], status(run)["world_size"]) == ("finished", 2)
    assert nodes(run) == ["node1", "node2"], "every node once, as --exclude wants it"
    assert state_differences(srun_run, run) == []
    assert losses(run) == pytest.approx(one_process_losses, rel=1e-4)


@pytest.mark.parametrize("resource", ["--cpus-per-task=2", "--gpus-per-node=2"])
def test_sbatch_starts_one_rank_per_gpu_or_else_per_cpu(
    cluster: Cluster, tmp_path: Path, one_process_losses: list[float], resource: str
) -> None:
    code, output = sbatch(cluster, tmp_path, "four", *SHORT, "train.device=cpu", options=(resource,))
    assert code == 0, output
    assert status(tmp_path / "four")["world_size"] == 4
    assert losses(tmp_path / "four") == pytest.approx(one_process_losses, rel=1e-4)


def test_sigterm_to_the_step_stops_all_ranks_together_and_the_same_srun_finishes(
    cluster: Cluster, tmp_path: Path
) -> None:
    run, log = tmp_path / "stopped", tmp_path / "stopped.log"
    long = ("train.max_steps=100", "checkpoint.every=1000", "optim.warmup_steps=2")
    argv = srun_argv(tmp_path, "stopped", *long)
    with slow_motion(cluster, tmp_path / "slow"), running(cluster, argv, log) as srun:
        wait_until(lambda: len(metrics(run)) >= 5 or srun.poll() is not None, "step 5", log)
        job = cluster.run("squeue", "--noheader", "--name=stopped", "--format=%i")[1].strip()
        code, output = cluster.run("scancel", "--signal=TERM", f"{job}.0")
        assert code == 0, output
        assert srun.wait(60) == 75, log.read_text()
    last = metrics(run)[-1]["step"]
    assert last < 100
    assert committed(run) == [last], "the step that was reached is the step that was saved"
    ended = status(run)
    assert (ended["state"], ended["step"], ended["exit_code"]) == ("preempted", last, 75)
    # Both tasks exited by themselves. srun reports equal endings of two tasks in one line or in two.
    assert set(re.findall(r"tasks? [-,\d]+: (.*)", log.read_text())) == {"Exited with exit code 75"}
    assert "Traceback" not in log.read_text()

    code, output = cluster.run(*argv, timeout=240)
    assert code == 0, output
    assert [record["step"] for record in metrics(run)] == list(range(1, 101))
    assert min(record["step"] for record in metrics(run) if record["attempt"] == 2) == last + 1
    assert (status(run)["state"], status(run)["attempt"]) == ("finished", 2)
    undisturbed = train(2, tmp_path, *long, "--config", CONFIG, name="undisturbed")
    assert state_differences(undisturbed, run) == []


def test_nodes_that_resolve_their_own_names_to_loopback_still_meet(cluster: Cluster, tmp_path: Path) -> None:
    """Debian's /etc/hosts gives a node's own name 127.0.1.1, which gloo would announce to the others."""
    as_debian = (
        'own=$(hostname); { echo "127.0.1.1 $own"; grep -vw "$own" /etc/hosts; } >"$0.$own"; '
        'mount --bind "$0.$own" /etc/hosts; getent ahostsv4 "$own"; exec "$@"'
    )
    code, output = cluster.run(
        *SRUN,
        *("unshare", "--mount", "bash", "-c", as_debian, str(tmp_path / "hosts")),
        *srun_argv(tmp_path, "debian", *SHORT, "distributed.timeout_seconds=30")[len(SRUN) + 1 :],
        timeout=120,
    )
    assert code == 0, output
    assert output.count("127.0.1.1") >= 2, f"the nodes did not resolve their names as Debian's do:\n{output}"
    assert (status(tmp_path / "debian")["state"], status(tmp_path / "debian")["world_size"]) == ("finished", 2)


def test_config_error_under_srun_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    code, output = cluster.run(*srun_argv(tmp_path, "wrong", "optim.learning=1"), timeout=240)
    assert code == 78, output
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, output
    assert "optim.learning" in errors[0]
    assert "Traceback" not in output


def test_sbatch_without_its_config_file_says_so_in_one_line(cluster: Cluster, tmp_path: Path) -> None:
    code, output = cluster.batch(tmp_path / "out", "slurm/train.sbatch", "configs/none.yaml", timeout=120)
    assert code == 78
    assert len(output.splitlines()) == 1
    assert output.startswith("error: no config file configs/none.yaml")
