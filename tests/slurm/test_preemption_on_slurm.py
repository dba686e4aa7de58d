"""A real SLURM stops a run in each way that it has. The run goes on, loses no step and ends with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster
from submitted import ONE_NODE, RUN, STEPS, SubmititRun, SubmittedRun

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.mark.parametrize("kind", [SubmittedRun, SubmititRun], ids=["sbatch", "submitit"])
@pytest.mark.parametrize("signal", ["SIGTERM", "SIGUSR2"])
def test_preempted_by_a_job_of_higher_priority(
    request: pytest.FixtureRequest, tmp_path: Path, reference: Path, kind: type[SubmittedRun], signal: str
) -> None:
    cluster = request.getfixturevalue("cluster" if signal == "SIGTERM" else "user_signal_cluster")
    run = kind(cluster, tmp_path, (*RUN, "tracking.enabled=true"), slow=0.15)
    run.wait_for_step(20)
    cluster.preempt()
    run.wait_for_finish()
    assert run.in_mlflow() == ("FINISHED", list(range(1, STEPS + 1)))
    assert run.ends() == [("75", "again"), ("0", "none")]
    assert {line["job"] for line in run.slurm_log()} == {run.job}
    assert run.attempts()[0]["reason"] == f"stopped by {signal}"
    run.assert_no_step_twice(STEPS)
    run.assert_same_bits_as(reference)


def test_requeued_by_an_admin_onto_one_node_instead_of_two(cluster: Cluster, tmp_path: Path, reference: Path) -> None:
    run = SubmittedRun(cluster, tmp_path, RUN, slow=0.15)
    run.wait_for_step(20)
    cluster.run("scontrol", "requeue", run.job)
    cluster.wait_for(run.job, ["PENDING"], run.log)
    assert cluster.run("scontrol", "update", f"jobid={run.job}", "numnodes=1-1", "numtasks=2", "numcpus=2") == (0, "")
    run.wait_for_finish()
    assert [attempt["world_size"] for attempt in run.attempts()] == [4, 2]
    run.assert_no_step_twice(STEPS)
    run.assert_same_bits_as(reference)


def test_cancelled_by_its_user_stays_stopped(cluster: Cluster, tmp_path: Path) -> None:
    run = SubmittedRun(cluster, tmp_path, RUN, ONE_NODE, slow=0.15)
    run.wait_for_step(20)
    cluster.run("scancel", run.job)
    assert cluster.wait_for_end(run.job, run.log)["JobState"] == "CANCELLED"
    run.wait_until(lambda: bool(run.ends()), "the end of the job")
    assert run.ends() == [("75", "none")]
    assert "cancelled: stays stopped" in run.output()
    assert run.status()["state"] == "preempted"
    assert run.committed() == [run.status()["step"]]
    assert cluster.job(run.job)["JobState"] == "CANCELLED"


def test_a_signal_to_the_batch_shell_saves_and_comes_back(cluster: Cluster, tmp_path: Path, reference: Path) -> None:
    """With --signal=B:USR2@120 only the batch shell gets the signal. The script has to pass it on to the tasks."""
    run = SubmittedRun(cluster, tmp_path, RUN, ONE_NODE, slow=0.15)
    run.wait_for_step(20)
    assert cluster.run("scancel", "--batch", "--signal=USR2", run.job)[0] == 0
    run.wait_for_finish()
    assert run.ends() == [("75", "again"), ("0", "none")]
    run.assert_no_step_twice(STEPS)
    run.assert_same_bits_as(reference)


def test_a_signal_before_there_are_tasks_is_remembered(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python, real = tmp_path / "python", cluster.environment["PYTHON"]
    wait = f"touch {tmp_path}/begun; while [ ! -e {tmp_path}/signalled ]; do sleep 0.1; done; sleep 2"
    python.write_text(f'#!/bin/sh\n[ -e {tmp_path}/begun ] || {{ {wait}; }}\nexec {real} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setitem(cluster.environment, "PYTHON", str(python))
    run = SubmittedRun(cluster, tmp_path, RUN, ONE_NODE)
    run.wait_until((tmp_path / "begun").exists, "the start of the batch script")
    assert cluster.run("scancel", "--batch", "--signal=USR2", run.job)[0] == 0
    (tmp_path / "signalled").touch()
    run.wait_for_finish()
    assert run.ends() == [("none", "again"), ("0", "none")]
    assert len(run.attempts()) == 1


@pytest.mark.parametrize("kind", [SubmittedRun, SubmititRun], ids=["sbatch", "submitit"])
def test_where_slurm_cancels_and_does_not_requeue_a_successor_goes_on(
    cluster: Cluster, tmp_path: Path, reference: Path, kind: type[SubmittedRun]
) -> None:
    cluster.run("scontrol", "update", "partition=low", "preemptmode=cancel")
    try:
        run = kind(cluster, tmp_path, RUN, ONE_NODE, slow=0.15)
        cluster.run("scontrol", "update", f"jobid={run.job}", "requeue=0")
        run.wait_for_step(20)
        cluster.preempt()
        run.wait_until(lambda: len(run.attempts()) == 2, "the second attempt")
        run.job = run.slurm_log()[-1]["job"]
        run.wait_for_finish()
    finally:
        cluster.run("scontrol", "update", "partition=low", "preemptmode=requeue")
    assert run.ends() == [("75", "again"), ("0", "none")]
    assert len({line["job"] for line in run.slurm_log()}) == 2
    assert len({line["chain"] for line in run.slurm_log()}) == 1
    run.assert_no_step_twice(STEPS)
    run.assert_same_bits_as(reference)
