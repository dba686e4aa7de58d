"""`local-cluster drill`: rehearses on a workstation what a cluster does to a run, with the user's own config.

Submits it with train.sbatch on a throw-away SLURM of three nodes, preempts it, signals it, has an admin requeue it,
its time run out and a node crash, and reports steps lost and time to come back.
PYTHON=... is the interpreter that has ddpm_dist.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
GIVE_UP_SECONDS = 300.0
SETTLE_SECONDS = 3.0  # of training between two accidents


class Rehearsal:
    """One run on a cluster that is up.

    Args:
        root: run.root, and where the job's log goes.
        environment: with SLURM_CONF and PYTHON.
        local_cluster: runs a command of slurm/local-cluster, such as ("crash", "node2").
    """

    def __init__(self, root: Path, environment: dict[str, str], local_cluster: Callable[..., None]) -> None:
        self.root, self.environment, self.local_cluster = root, environment, local_cluster
        self.run, self.log, self.job = root / "drill", root / "drill.out", ""

    def submit(self, ranks: int, config: str, overrides: list[str]) -> None:
        sizes = ("--nodes=2", f"--ntasks-per-node={ranks}", "--time=1-0", f"--output={self.log}")
        keys = (f"run.root={self.root}", "run.name=drill", "train.log_every=1", "tracking.enabled=false")
        self.job = self.slurm("sbatch", "--parsable", *sizes, "slurm/train.sbatch", config, *keys, *overrides).strip()

    def slurm(self, *argv: str) -> str:
        done = subprocess.run(
            argv, cwd=PROJECT, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"drill: error: {' '.join(argv[:2])}: {done.stderr.strip()}")
        return done.stdout

    def steps(self) -> list[dict[str, Any]]:
        path, found = self.run / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                found.append(json.loads(line))
            except ValueError:  # it is being written
                continue
        return found

    def wait_for_attempt(self, number: int) -> dict[str, Any]:
        """Until it has trained a step; returns that step's line of metrics.jsonl."""
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while time.monotonic() < deadline:
            for line in self.steps():
                if line["attempt"] == number:
                    return line
            state = self.slurm("squeue", "--noheader", f"--jobs={self.job}", "--states=all", "--format=%T").strip()
            if state in ("FAILED", "CANCELLED", "COMPLETED"):
                sys.exit(f"drill: error: the job is {state}; its log says:\n{tail(self.log)}")
            time.sleep(0.1)
        sys.exit(f"drill: error: attempt {number} trained no step in {GIVE_UP_SECONDS:.0f} s\n{tail(self.log)}")

    def accident(self, name: str, act: Callable[[], object], attempt: int) -> bool:
        """Have it happen to this attempt, wait for the next one, print a line; returns whether no step was lost."""
        time.sleep(SETTLE_SECONDS)
        happened = time.time()
        act()
        first = self.wait_for_attempt(attempt + 1)
        last = max(line["step"] for line in self.steps() if line["attempt"] == attempt)
        lost = last - first["step"] + 1
        begun = max(float(line.split()[0].removeprefix("time=")) for line in self.begins())
        print(
            f"{name:28} {last:>8} {first['step']:>11} {lost:>10} {begun - happened:>12.0f} s "
            f"{first['time'] - begun:>10.0f} s",
            flush=True,
        )
        return lost == 0

    def begins(self) -> list[str]:
        return [line for line in (self.run / "slurm.log").read_text().splitlines() if "event=begin" in line]

    def preempt(self) -> None:
        self.slurm("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")

    def set_time_limit(self, limit: str) -> None:
        self.slurm("scontrol", "update", f"jobid={self.job}", f"timelimit={limit}")

    def rehearse(self) -> int:
        """Returns 0 if only what must be lost was lost: the steps since the last checkpoint before a crash."""
        first = self.wait_for_attempt(1)
        started = first["time"] - float(self.begins()[0].split()[0].removeprefix("time="))
        print(f"job {self.job} trains on two nodes; first step {started:.0f} s after its start")
        columns = ("at step", "goes on at", "steps lost", "SLURM took", "we took")
        print(f"{'accident':28} {columns[0]:>8} {columns[1]:>11} {columns[2]:>10} {columns[3]:>14} {columns[4]:>12}")
        ok = self.accident("preempted", self.preempt, 1)
        ok &= self.accident("scancel --signal=USR2", lambda: self.slurm("scancel", "--signal=USR2", self.job), 2)
        ok &= self.accident("scontrol requeue", lambda: self.slurm("scontrol", "requeue", self.job), 3)
        ok &= self.accident("time limit", lambda: self.set_time_limit("1"), 4)
        self.set_time_limit("1-0")
        node = self.slurm("squeue", "--noheader", f"--jobs={self.job}", "--format=%N").strip()
        last_node = f"node{node.rstrip(']')[-1]}"
        self.accident(f"{last_node} crashes", lambda: self.local_cluster("crash", last_node), 5)
        self.slurm("scancel", self.job)
        print("\nno step lost but those since the last checkpoint before the crash" if ok else "\nSTEPS WERE LOST")
        return 0 if ok else 1


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else "(no log)"


def drill(
    root: Path, config: str, overrides: list[str], ranks: int, slurm_conf: Path, local_cluster: Callable[..., None]
) -> int:
    """Returns an exit code."""
    venv = PROJECT / ".venv" / "bin" / "python"
    python = os.environ.get("PYTHON") or (str(venv) if venv.exists() else shutil.which("python") or sys.executable)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
    environment |= {"SLURM_CONF": str(slurm_conf), "PYTHON": python}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))
    rehearsal = Rehearsal(root, environment, local_cluster)
    rehearsal.submit(ranks, config, overrides)
    return rehearsal.rehearse()
