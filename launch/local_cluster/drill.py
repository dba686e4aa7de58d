"""`local-cluster drill`: rehearses on a workstation what a cluster does to a run, with the user's own config.

It submits the run with train.sbatch to a throw-away SLURM of three nodes, has it preempted, signalled, requeued by an
administrator and cut off at its time limit, crashes one of its nodes, and reports the steps lost and the time to come
back. PYTHON=... is the interpreter that has ddpm_dist.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .cluster import LocalCluster
from .errors import RehearsalError

PROJECT = Path(__file__).resolve().parents[2]
GIVE_UP_SECONDS = 300.0
SETTLE_SECONDS = 3.0  # of training between two accidents
FOR_GOOD = ("FAILED", "CANCELLED", "COMPLETED")
COLUMNS = f"{'accident':28} {'at step':>8} {'goes on at':>11} {'steps lost':>10} {'SLURM took':>14} {'we took':>12}"


class Rehearsal:
    """One run on a cluster that is up.

    Args:
        root: run.root of the run, and where the job's log goes.
        environment: for SLURM's programs, with SLURM_CONF and PYTHON.
        crash: makes a node, given by its name, crash.
    """

    def __init__(self, root: Path, environment: Mapping[str, str], crash: Callable[[str], None]) -> None:
        self._root, self._environment, self._crash = root, environment, crash
        self._run, self._log = root / "drill", root / "drill.out"

    def submit(self, config: Path, overrides: Sequence[str], ranks: int) -> str:
        """Submit the run to two nodes; returns the job's id.

        Args:
            config: a config file.
            overrides: of its keys, as section.key=value.
            ranks: on each node.

        Raises:
            RehearsalError: SLURM refuses it.
        """
        sizes = ("--nodes=2", f"--ntasks-per-node={ranks}", "--time=1-0", f"--output={self._log}")
        keys = (f"run.root={self._root}", "run.name=drill", "train.log_every=1", "tracking.enabled=false")
        script = ("slurm/train.sbatch", str(config), *keys, *overrides)
        return self._slurm("sbatch", "--parsable", *sizes, *script).strip()

    def rehearse(self, job: str) -> bool:
        """Have every accident happen to a job, one after the other, and print a line about each.

        Returns:
            Whether only a crash cost steps: those since the last checkpoint before it.

        Raises:
            RehearsalError: the job ended for good, or trains no more.
        """
        first = self.wait_for_step(job)
        started = first["time"] - self._beginnings()[0]
        print(f"job {job} trains on two nodes; first step {started:.0f} s after its start")
        print(COLUMNS)
        nothing_lost = [
            self.accident("preempted", self._preempt, job),
            self.accident("scancel --signal=USR2", lambda: self._slurm("scancel", "--signal=USR2", job), job),
            self.accident("scontrol requeue", lambda: self._slurm("scontrol", "requeue", job), job),
            self.accident("time limit", lambda: self._run_out_of_time(job), job),
        ]
        nodes = self._slurm("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()
        last_node = f"node{nodes.rstrip(']')[-1]}"  # of a list such as node[1-2]
        self.accident(f"{last_node} crashes", lambda: self._crash(last_node), job)
        self._slurm("scancel", job)
        return all(nothing_lost)

    def wait_for_step(self, job: str, after: int = 0) -> dict[str, Any]:
        """Wait for the first step that is trained by a later attempt than this one; returns its line of the journal.

        Raises:
            RehearsalError: the job ended first, or the time is up.
        """
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while time.monotonic() < deadline:
            for line in self._journal():
                if line["attempt"] > after:
                    return line
            self._state(job)
            time.sleep(0.1)
        raise RehearsalError(
            f"no attempt after {after} trained a step in {GIVE_UP_SECONDS:.0f} s; the job's log says:\n"
            f"{self._end_of_log()}"
        )

    def accident(self, name: str, cause: Callable[[], object], job: str) -> bool:
        """Have an accident happen to the attempt that trains, wait for another one, and print a line about it.

        Returns:
            Whether training went on where it had stopped, so that no step was lost.

        Raises:
            RehearsalError: no other attempt trains.
        """
        time.sleep(SETTLE_SECONDS)
        happened = time.time()
        attempt = self._journal()[-1]["attempt"]
        cause()
        first = self.wait_for_step(job, after=attempt)
        last = max(line["step"] for line in self._journal() if line["attempt"] == attempt)
        lost = last - first["step"] + 1
        started = max(self._beginnings())
        print(
            f"{name:28} {last:>8} {first['step']:>11} {lost:>10} {started - happened:>12.0f} s "
            f"{first['time'] - started:>10.0f} s",
            flush=True,
        )
        return bool(lost == 0)

    def _journal(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, but for one that is being written."""
        path, found = self._run / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def _beginnings(self) -> list[float]:
        """When SLURM started the job, once for each of its restarts too, in seconds since 1970."""
        lines = (self._run / "slurm.log").read_text().splitlines()
        return [float(line.split()[0].removeprefix("time=")) for line in lines if "event=begin" in line]

    def _preempt(self) -> None:
        """A job of higher priority wants all three nodes for a second."""
        self._slurm("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")

    def _run_out_of_time(self, job: str) -> None:
        """Give the job a time limit of a minute, until that has cut it off; then a day again.

        train.sbatch asks for its signal two minutes ahead of the limit, so that it comes at once. If the limit stayed,
        so it would in every later attempt, and one that starts slowly would be cut off before it trains.
        """
        starts = len(self._beginnings())
        self._slurm("scontrol", "update", f"jobid={job}", "timelimit=1")
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while self._state(job) != "PENDING" and len(self._beginnings()) == starts:
            if time.monotonic() > deadline:
                raise RehearsalError(f"the time limit did not end the attempt in {GIVE_UP_SECONDS:.0f} s")
            time.sleep(0.1)
        self._slurm("scontrol", "update", f"jobid={job}", "timelimit=1-0")

    def _state(self, job: str) -> str:
        """SLURM's word for it, such as RUNNING.

        Raises:
            RehearsalError: the job has ended for good, so that there is nothing to wait for.
        """
        state = self._slurm("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T").strip()
        if state in FOR_GOOD:
            raise RehearsalError(f"the job is {state}; its log says:\n{self._end_of_log()}")
        return state

    def _slurm(self, *argv: str) -> str:
        """What one of SLURM's programs prints."""
        done = subprocess.run(
            argv, cwd=PROJECT, env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            raise RehearsalError(f"{' '.join(argv[:2])}: {done.stderr.strip()}")
        return done.stdout

    def _end_of_log(self) -> str:
        if not self._log.exists():
            return "(no log)"
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])


def rehearse(cluster: LocalCluster, root: Path, config: Path, overrides: Sequence[str], ranks: int) -> int:
    """Submit a run to a cluster of three nodes, and rehearse all accidents on it.

    Args:
        cluster: all of whose nodes are idle.
        root: the directory for the run.
        config: a config file, an absolute path.
        overrides: of its keys, as section.key=value.
        ranks: on each of two nodes.

    Returns:
        The exit code: 0 if no step was lost but those since the last checkpoint before the crash, else 1.

    Raises:
        RehearsalError: the run does not train.
    """
    rehearsal = Rehearsal(root, _environment(cluster), cluster.crash)
    as_it_should_be = rehearsal.rehearse(rehearsal.submit(config, overrides, ranks))
    print(
        "\nno step lost but those since the last checkpoint before the crash"
        if as_it_should_be
        else "\nSTEPS WERE LOST"
    )
    return 0 if as_it_should_be else 1


def _environment(cluster: LocalCluster) -> dict[str, str]:
    """For the job: this project, and an interpreter that has what it needs."""
    in_project = PROJECT / ".venv" / "bin" / "python"
    python = str(in_project) if in_project.exists() else shutil.which("python") or sys.executable
    path = os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))
    return {**cluster.description.environment(), "PYTHON": os.environ.get("PYTHON") or python, "PYTHONPATH": path}
