"""The part of `make torture` that needs a real SLURM."""

from __future__ import annotations

import random
import time
from pathlib import Path

from cluster import Cluster, cluster_of, why_no_slurm
from harness import train
from submitted import CONFIG, SubmittedRun

PREEMPTIONS, PAIRS = 5, 20
BITWISE = ("elastic.mode=bitwise", "optim.warmup_steps=2", "checkpoint.every=1000")


def preemptions(root: Path, count: int, seed: int) -> str:
    """Preempt one run PREEMPTIONS times at random steps, for each signal that SLURM can send. Returns the figures."""
    if lack := why_no_slurm():
        return f"skipped: {lack}"
    draw, steps = random.Random(seed), 600
    keys = (*BITWISE, f"train.max_steps={steps}")
    undisturbed = train(1, root, *keys, "--config", CONFIG, name="undisturbed", timeout=300)
    words = []
    for name, options in (("SIGTERM", ()), ("--signal's USR2", ("--preempt-user-signal",))):
        with cluster_of("--nodes", "3", "--cpus", "2", "--gpus", "0", *options) as cluster:
            words.append(f"{name}: {_preempt(cluster, root / name[:3], keys, draw, steps, undisturbed)}")
    return "; ".join(words)


def _preempt(
    cluster: Cluster, root: Path, keys: tuple[str, ...], draw: random.Random, steps: int, undisturbed: Path
) -> str:
    root.mkdir()
    run = SubmittedRun(cluster, root, (*keys, "tracking.enabled=true"))
    at = sorted(draw.sample(range(5, steps - 60), PREEMPTIONS))
    saved, back = [], []
    for attempt, step in enumerate(at, 1):
        run.wait_for_step(max(step, run.attempts()[-1].get("start_step", 0) + 1 if run.attempts() else 1), attempt, 120)
        begun = time.time()
        cluster.preempt()

        def saved_it(number: int = attempt) -> bool:
            return run.attempts()[number - 1].get("ended") is not None

        run.wait_until(saved_it, "the save")
        saved.append(run.attempts()[attempt - 1]["ended"] - begun)
        run.wait_for_step(1, attempt + 1, 120)
        back.append(run.first_step_after_start(attempt + 1))
    run.wait_for_finish(300)
    run.assert_no_step_twice(steps)
    run.assert_same_bits_as(undisturbed)
    assert {line["job"] for line in run.slurm_log()} == {run.job}
    assert run.in_mlflow() == ("FINISHED", list(range(1, steps + 1)))
    assert max(saved) < 10, f"saved after {saved} s, in a grace of 10 s"
    assert max(back) < 15, f"first new step after {back} s"
    return (
        f"preempted {PREEMPTIONS} times: 0 steps lost, one job, one MLflow run, bitwise equal; "
        f"saved {max(saved):.1f} s after the order at worst, first new step {max(back):.1f} s after SLURM's start"
    )


def pairs(root: Path, count: int, seed: int) -> str:
    """Start two jobs at once on one node, PAIRS times. Returns the figures."""
    if lack := why_no_slurm():
        return f"skipped: {lack}"
    keys = (*BITWISE, "train.max_steps=3")
    with cluster_of("--nodes", "1", "--cpus", "4", "--gpus", "0") as cluster:
        for number in range(PAIRS):
            both = [
                SubmittedRun(cluster, root, keys, ("--nodes=1", "--ntasks-per-node=2"), f"run-{number}-{one}")
                for one in range(2)
            ]
            for run in both:
                run.wait_for_finish()
                assert run.ends() == [("0", "none")], run.output()
    return f"{PAIRS} pairs of jobs on one node: each job finished at its first attempt"
