"""launch.doctor on a real SLURM: a sound request, wrong requests, and the probe from inside an allocation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]


def doctor(cluster: Cluster, root: Path, *argv: str) -> tuple[int, str]:
    quick = ("--config", "configs/quickstart.yaml", f"run.root={root}", "train.device=cpu")
    return cluster.run(sys.executable, "-m", "launch.doctor", *quick, *argv)


def test_a_healthy_request(cluster: Cluster, tmp_path: Path) -> None:
    code, output = doctor(cluster, tmp_path, "--nodes=2", "--tasks-per-node=2", "--time=1:00:00")
    assert code == 0, output
    assert "GraceTime 60 s + KillWait 30 s" in output
    assert "error" not in output


def test_three_things_wrong_at_once(cluster: Cluster, tmp_path: Path) -> None:
    code, output = doctor(cluster, tmp_path, "--nodes=2", "--gpus-per-node=4", "--time=1", "--exclude=node[2-3]")
    assert code == 78, output
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert len(errors) == 3, output
    for words, error in zip(("4 CPUs a node asked for", "4 GPUs a node asked for", "at once"), errors, strict=True):
        assert words in error


def test_the_probe_from_inside_an_allocation(cluster: Cluster, tmp_path: Path) -> None:
    keys = ("--config", "configs/quickstart.yaml", f"run.root={tmp_path}", "train.device=cpu")
    probe = (sys.executable, "-m", "launch.doctor", "--on-node", "--seconds=1", *keys)
    code, output = cluster.run("srun", "-N2", "--ntasks-per-node=2", *probe, timeout=240)
    assert code == 0, output
    assert "4 on node1, node2 (cpu)" in output
    assert output.count("all-reduce") == 3
    assert "seen by all within" in output
    assert list(tmp_path.iterdir()) == []


def test_the_probe_sees_a_folder_that_is_not_shared(cluster: Cluster, tmp_path: Path) -> None:
    """Each node has a /mnt of its own, which stands for a run.root that is not shared."""
    own = 'mount -t tmpfs none /mnt && exec "$@"'
    keys = ("--config", "configs/quickstart.yaml", "run.root=/mnt", "train.device=cpu")
    probe = (sys.executable, "-m", "launch.doctor", "--on-node", "--seconds=1", *keys)
    code, output = cluster.run("srun", "-N2", "unshare", "--mount", "bash", "-c", own, "bash", *probe, timeout=240)
    assert code == 78, output
    assert "/mnt is not shared" in output
