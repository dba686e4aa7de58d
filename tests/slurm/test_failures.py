"""On a real SLURM, a run goes on after the death of a node, and a run that can never work fails once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import metrics
from submitted import ONE_NODE, RUN, SubmittedRun

if TYPE_CHECKING:
    from cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(900)]


def test_a_node_that_crashes_is_left_behind(cluster: Cluster, tmp_path: Path, reference: Path) -> None:
    run = SubmittedRun(cluster, tmp_path, (*RUN, "checkpoint.every=10"), slow=0.15)
    run.wait_for_step(25)
    cluster.control("crash", "node2")
    try:
        run.wait_for_finish()
    finally:
        cluster.control("restore", "node2")
    assert [line["nodes"] for line in run.slurm_log() if line["event"] == "begin"] == ["node[1-2]", "node[1,3]"]
    assert run.attempts()[1]["start_step"] >= 10, "it started over"
    run.assert_same_bits_as(reference)


def test_an_attempt_that_slurm_believes_dead_writes_nothing_any_more(cluster: Cluster, tmp_path: Path) -> None:
    """Only slurmd dies: the tasks on its node go on training while SLURM restarts the job on another node."""
    keys = ("optim.warmup_steps=2", "train.max_steps=1000000", "checkpoint.every=50", "checkpoint.keep_last=2")
    run = SubmittedRun(cluster, tmp_path, keys, ONE_NODE)
    run.wait_for_step(60)
    cluster.control("crash-slurmd", "node1")
    try:
        run.wait_for_step(60, attempt=2)
        run.wait_until(lambda: run.attempts()[0].get("ended") is not None, "the end of the first attempt")
        cluster.run("scancel", run.job)
        run.wait_until(lambda: bool(run.ends()), "the end of the second attempt")
    finally:
        cluster.control("restore", "node1")
    first, second = run.attempts()
    assert first["exit_code"] == 76
    assert "taken over" in first["reason"]
    attempts = [line["attempt"] for line in metrics(run.directory)]
    assert attempts == sorted(attempts), "the first attempt wrote after the second had begun"
    assert second["start_step"] >= 50, "it started over"
    assert run.ends() == [("75", "none")], "only the restarted job decides what comes next"


@pytest.mark.parametrize(
    ("key", "code", "words"),
    [
        ("optim.learning=1", 78, "optim.learning"),
        ("data.root=/nowhere", 65, "/nowhere"),
    ],
)
def test_a_broken_config_fails_once(cluster: Cluster, tmp_path: Path, key: str, code: int, words: str) -> None:
    folder = ("data.name=folder", "data.image_size=28") if key.startswith("data") else ()
    run = SubmittedRun(cluster, tmp_path, (*RUN, *folder, key), ONE_NODE)
    fields = cluster.wait_for_end(run.job, run.log)
    assert (fields["JobState"], fields["Restarts"]) == ("FAILED", "0")
    assert fields["ExitCode"] == f"{code}:0"
    errors = [line for line in run.output().splitlines() if line.startswith("error:")]
    assert len(errors) == 1, run.output()
    assert words in errors[0]


def test_submitted_twice_the_second_says_who_holds_it_and_leaves(
    cluster: Cluster, tmp_path: Path, reference: Path
) -> None:
    run = SubmittedRun(cluster, tmp_path, RUN, ONE_NODE, slow=1)  # it still trains when the second job has started
    run.wait_for_step(2)
    log = tmp_path / "second.out"
    second = run.submit(ONE_NODE, log)
    fields = cluster.wait_for_end(second, log)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "78:0", "0")
    assert f"is being trained by attempt 1 (host node1, pid {run.attempts()[0]['pid']}, SLURM job {run.job})" in (
        log.read_text()
    )
    run.at_full_speed()
    run.wait_for_finish()
    run.assert_same_bits_as(reference)


def test_two_jobs_on_one_node_do_not_meet(cluster: Cluster, tmp_path: Path, reference: Path) -> None:
    # The export list is short on purpose: what the batch script itself sets must reach the tasks all the same.
    export = "--export=PATH,HOME,SLURM_CONF,PYTHON,PYTHONPATH"
    half = ("--nodes=1", "--ntasks=1", "--nodelist=node1", export)
    runs = [SubmittedRun(cluster, tmp_path, RUN, half, name=name) for name in ("one", "other")]
    for run in runs:
        run.wait_for_finish()
        run.assert_same_bits_as(reference)
    assert all(line["nodes"] == "node1" for run in runs for line in run.slurm_log() if "nodes" in line)
