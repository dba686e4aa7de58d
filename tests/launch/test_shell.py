"""The shell scripts: what shellcheck says of them, and that they stand where each of them looks for the others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
SCRIPTS = ("slurm/requeue.sh", "slurm/train.sbatch", "slurm/lifecycle.sh", "launch/torchrun.sh", ".ci/run")


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script: str) -> None:
    beside_python = str(Path(sys.executable).parent)
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join((beside_python, os.environ["PATH"])))
    if shellcheck is None:
        pytest.skip("no shellcheck here: make install, or apt-get install shellcheck")
    argv = [shellcheck, "--external-sources", script]
    checked = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout


def test_every_shell_script_is_checked() -> None:
    suffixes = (".sh", ".sbatch")
    found = {path for folder in ("slurm", "launch", ".ci") for path in (PROJECT / folder).rglob("*") if path.is_file()}
    shell = {path for path in found if path.suffix in suffixes or path.read_bytes().startswith(b"#!/usr/bin/env bash")}
    assert {str(path.relative_to(PROJECT)) for path in shell} == set(SCRIPTS)


def questions(about_job: str, **variables: str) -> set[str]:
    """Which of the questions of lifecycle.sh are answered with yes."""
    names = ("is_over", "hit_time_limit", "node_failed", "is_preempted", "may_be_requeued", "is_requeued")
    asked = "; ".join(f"! {name} || echo {name}" for name in names)
    text = f"about_job=$1; source slurm/lifecycle.sh; {asked}"
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", **variables}
    argv = ["bash", "-c", text, "bash", about_job]
    done = subprocess.run(argv, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("about_job", "yes"),
    [
        ("JobState=RUNNING Reason=None Requeue=1 Restarts=0 PreemptTime=None", {"may_be_requeued"}),
        ("JobState=COMPLETING Reason=TimeLimit Requeue=0", {"is_over", "hit_time_limit"}),
        ("JobState=NODE_FAIL Reason=NodeDown Requeue=0", {"is_over", "node_failed"}),
        ("JobState=RUNNING Reason=None PreemptTime=2031-01-01T00:00:00", {"is_preempted"}),
        ("JobState=RUNNING Reason=None PreemptTime=N/A", set()),
        ("JobState=PENDING Reason=None Restarts=1", {"is_over", "is_requeued"}),
        ("JobState=SIGNALING", set()),
        ("", set()),
    ],
)
def test_each_question_has_the_answer_that_slurm_gives(about_job: str, yes: set[str]) -> None:
    assert questions(about_job) == yes


def test_a_restart_is_not_taken_for_the_next_one() -> None:
    assert questions("JobState=RUNNING Restarts=2", SLURM_RESTART_COUNT="2") == set()
    assert questions("JobState=RUNNING Restarts=3", SLURM_RESTART_COUNT="2") == {"is_requeued"}


def test_waiting_outlasts_a_signal_and_returns_the_exit_code() -> None:
    text = """
        source slurm/lifecycle.sh
        trap 'echo got it' USR1
        (sleep 0.3; kill -USR1 $$; sleep 0.3; exit 7) &
        wait_through_signals $!
        echo "code $?"
    """
    done = subprocess.run(["bash", "-c", text], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "got it\ncode 7\n"


def test_there_is_a_rank_for_each_core_whatever_openmp_is_told(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "ranks: $2"\n')
    python.chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHON": str(python),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        ["launch/torchrun.sh"], cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60
    )
    cores = len(os.sched_getaffinity(0))
    assert done.stdout == f"ranks: {max(n for n in (1, 2, 4) if n <= cores)}\n"
