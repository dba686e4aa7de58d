"""slurm/local-cluster itself: nodes crash and come back, and `down` leaves no trace, in both of its modes."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import PROJECT, Cluster, cluster_of, local_cluster, why_no_slurm

from launch.local_cluster.description import load
from launch.local_cluster.processes import all_pids, command_of, environment_of

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]


def tasks(cluster: Cluster, node: str) -> int:
    """How many tasks of the test's job run on a node."""
    ours = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={cluster.state}/slurm.conf".encode()}
    return sum(command_of(pid)[:2] == [b"sleep", b"600"] and ours <= {*environment_of(pid)} for pid in all_pids())


@pytest.mark.parametrize("mode", ["auto", "ports"])
def test_a_node_crashes_and_comes_back_and_down_leaves_nothing(tmp_path: Path, mode: str) -> None:
    log, size = tmp_path / "log", ("--nodes", "2", "--cpus", "1", "--gpus", "0")
    patient = ("--slurmd-timeout", "100")  # long enough that SLURM does not end the job of the silent node
    with cluster_of(*size, *patient, "--mode", mode) as cluster:
        job = cluster.submit(log, "--nodes=2", "--no-requeue", "--wrap=exec srun sh -c 'exec sleep 600'")
        cluster.wait_until(lambda: tasks(cluster, "node1") == tasks(cluster, "node2") == 1, "one task per node", log)

        cluster.control("crash-slurmd", "node2")
        assert tasks(cluster, "node2") == 1, "tasks outlive slurmd"
        cluster.control("crash", "node2")
        cluster.wait_until(lambda: tasks(cluster, "node2") == 0, "the end of every process of the node", log, 10)
        assert tasks(cluster, "node1") == 1, "the other node is left alone"
        cluster.control("restore", "node2")
        cluster.run("scancel", job)
        cluster.wait_until(cluster.is_idle, "idle", log)
        assert cluster.run("srun", "--nodes=2", "hostname")[0] == 0

        description = load(cluster.state)
        assert description is not None
        cluster.control("down")
        assert not cluster.state.exists()
        ours = f"SLURM_CONF={description.slurm_conf}".encode()
        assert [pid for pid in all_pids() if ours in environment_of(pid)] == []
        for path in ("/proc/mounts", "/etc/hosts"):
            assert str(description.state) not in Path(path).read_text()
        assert list(Path("/run/netns").glob(f"{description.identity.prefix}*")) == []
        assert not Path(f"/sys/class/net/{description.identity.prefix}h").exists()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_drill_that_is_stopped_takes_its_cluster_down(tmp_path: Path, stop: signal.Signals) -> None:
    if lack := why_no_slurm():
        pytest.skip(lack)
    log, found = tmp_path / "log", None
    argv = [sys.executable, "-u", str(PROJECT / "slurm" / "local-cluster"), "drill", "configs/quickstart.yaml"]

    def heed() -> None:
        """Let the signal end the drill: the tests may run under nohup or in the background, where it is ignored."""
        signal.signal(stop, signal.SIG_DFL)

    with log.open("wb") as file:
        drill = subprocess.Popen(argv, cwd=PROJECT, stdout=file, stderr=file, start_new_session=True, preexec_fn=heed)
    try:
        deadline = time.monotonic() + 240
        while not (found := re.match(r"up in .*; now: \. (.*)/env.sh\n", log.read_text())):
            assert drill.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        state = Path(found[1])
        drill.send_signal(stop)
        assert drill.wait(120) == 128 + stop
        assert not state.parent.exists()
        assert str(state) not in Path("/proc/mounts").read_text()
        assert "Traceback" not in log.read_text()
    finally:
        drill.kill()
        drill.wait(30)
        if found:
            local_cluster(Path(found[1]), "down")
            shutil.rmtree(Path(found[1]).parent, ignore_errors=True)
