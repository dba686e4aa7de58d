"""launch.submit on a real SLURM: a preempted sweep, the GPUs that each rank sees, and following a run to its end."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import TINY, metrics, status
from submitted import CONFIG, RUN, STEPS, slow_motion

if TYPE_CHECKING:
    from cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(900)]


def test_a_sweep_is_an_array_whose_tasks_come_back_one_by_one(cluster: Cluster, tmp_path: Path) -> None:
    sizes = ("--gpus-per-node=2", "--sweep=run.seed=0,1", "--at-once=2", "--wait")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$SLURM_LOCALID sees $CUDA_VISIBLE_DEVICES" >>{tmp_path}/seen\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    keys = (*TINY, *RUN, f"run.root={tmp_path}", "run.name=sweep")
    argv = (sys.executable, "-m", "launch.submit", "--config", CONFIG, *sizes, f"--python={python}", *keys)
    log, runs = tmp_path / "submit.out", [tmp_path / f"sweep-seed={seed}" for seed in (0, 1)]
    with slow_motion(cluster, tmp_path / "slow"):
        submit = cluster.popen(argv, log)
    try:
        cluster.wait_until(lambda: all(len(metrics(run)) >= 20 for run in runs), "step 20 of both", log)
        shown = cluster.run("squeue", "--noheader", "--format=%A %F %K", "--array")[1].split("\n")
        assert len({line.split()[1] for line in shown if line}) == 1, "one array"
        cluster.preempt()
        assert submit.wait(400) == 0, log.read_text()
    finally:
        submit.kill()
        submit.wait()
    for run in runs:
        assert (status(run)["state"], status(run)["attempt"]) == ("finished", 2)
        assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
        assert f"{run}: finished at step {STEPS}" in log.read_text()
    assert set((tmp_path / "seen").read_text().splitlines()) == {"0 sees 0,1", "1 sees 0,1"}


def test_wait_follows_the_log_and_returns_the_runs_exit_code(cluster: Cluster, tmp_path: Path) -> None:
    broken = ("data.name=folder", "data.image_size=28", "data.root=/nowhere")
    keys = (*TINY, *RUN, f"run.root={tmp_path}", "run.name=broken", *broken)
    code, output = cluster.run(sys.executable, "-m", "launch.submit", "--config", CONFIG, "--wait", *keys)
    assert code == 65, output
    assert re.search(r"^error: .*/nowhere", output, re.MULTILINE)
    assert "exit code 65: stays failed" in output
    assert "no accounting (sacct) here" in output
