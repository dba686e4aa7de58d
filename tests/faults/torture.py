"""The long campaigns of `make torture`, over an hour on two cores. Prints a table; exits with 1 if one has failed.

PYTHONPATH=tests:tests/slurm python tests/faults/torture.py [--kills 200] [--seed N] [--only NAME]
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import slurm_campaign
import torch
import tracking_campaign
from campaign import (
    DAMAGES,
    LAYOUTS,
    RUN,
    crash_points,
    end_on_each_world,
    newest_checkpoint,
    random_kills,
    status_of,
    wait_or_ended,
)
from harness import Job, call_train_hastily, metrics, start, state_differences, train

from ddpm_dist.errors import DataError
from ddpm_dist.run.store import CheckpointStore


def kills(root: Path, count: int, seed: int) -> str:
    steps = 30 * count
    undisturbed = train(2, root, *RUN, f"train.max_steps={steps}", name="undisturbed", timeout=1800)
    outcome = random_kills(root, undisturbed, seed, count, steps)
    assert outcome.differences == [], outcome.differences[:5]
    assert outcome.resumed[-1] >= 10, "the attempts started at step 0 again and again"
    return (
        f"{outcome.kills} SIGKILLs (job or one rank), {outcome.attempts} attempts, {steps} steps: bitwise equal; "
        f"{len(set(outcome.resumed))} different checkpoints resumed, "
        f"start to first new step of the last attempt {outcome.slowest_return:.1f} s"
    )


def all_crash_points(root: Path, count: int, seed: int) -> str:
    undisturbed = train(1, root, "checkpoint.every=3", "train.max_steps=8", name="undisturbed")
    numbers = list(range(1, 400))
    wrong = crash_points(root, undisturbed, numbers, steps=8)
    points = len(list(root.glob("point-*.log"))) - 1  # the run with the last number makes fewer changes than that
    assert wrong == [], wrong[:5]
    return f"killed before each of its {points} changes of the disk: all resumed, bitwise equal, no file left over"


def damage_at_the_loader(root: Path, count: int, seed: int) -> str:
    run = train(1, root, "train.max_steps=3")
    store, draw, path = CheckpointStore(run / "checkpoints"), random.Random(seed), newest_checkpoint(run)
    content, words = path.read_bytes(), []
    for damage, times in zip(DAMAGES, (1000, 200, 100), strict=True):
        for _ in range(times):
            path.write_bytes(content)
            damage(path, draw)
            try:
                store.load(3)
            except DataError:
                continue
            raise AssertionError(f"{damage.__name__} was not noticed")
        words.append(f"{times} x {damage.__name__}")
    return f"{', '.join(words)}: all noticed"


def damage_end_to_end(root: Path, count: int, seed: int) -> str:
    draw = random.Random(seed)
    undisturbed = train(2, root, *RUN, "train.max_steps=55", name="undisturbed")
    for damage in DAMAGES:
        for number in range(5):
            name = f"{damage.__name__}-{number}"
            run = train(2, root, *RUN, "train.max_steps=43", name=name)
            damage(newest_checkpoint(run), draw)
            train(2, root, *RUN, "train.max_steps=55", name=name)
            assert state_differences(undisturbed, run) == [], name
    return "5 of each kind between two attempts: all resumed the checkpoint before, bitwise equal"


def signals_in_saves(root: Path, count: int, seed: int) -> str:
    """Send one to three stop signals to any rank, again and again, in a run that saves at nearly every step."""
    import signal

    draw, options = random.Random(seed), ("checkpoint.every=1", "train.log_every=1", "train.max_steps=1500")
    undisturbed = train(2, root, *options, name="undisturbed", timeout=900)
    run, stops, worst = root / "run", 0, 0.0
    while True:
        with start(2, root, *options, function=call_train_hastily) as job:
            end = time.monotonic() + draw.uniform(1.5, 4.0)
            while time.monotonic() < end and job.alive():
                time.sleep(0.01)
            begun = time.monotonic()
            for _ in range(draw.choice([1, 1, 2, 3])):
                for rank in draw.choice([[0], [1], [0, 1]]):
                    if job.processes[rank].is_alive():
                        job.signal(rank, draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]))
            codes = job.wait(60)
            worst = max(worst, time.monotonic() - begun)
        assert codes in ([75, 75], [0, 0]), f"exit codes {codes}\n{job.output()[-2000:]}"
        if codes == [0, 0]:
            break
        stops += 1
        assert not list(run.rglob("*.tmp")), "a clean stop leaves no temporary files"
    steps = [record["step"] for record in metrics(run)]
    assert steps == list(range(1, 1501)), "no step was trained twice, so none was lost"
    assert state_differences(undisturbed, run) == []
    return f"{stops} stops: 0 steps lost, bitwise equal; slowest stop {worst:.1f} s"


def launcher_kills(root: Path, count: int, seed: int) -> str:
    """Send SIGKILL to the real torchrun. Its workers must end within 5 s, and the next attempt must go on."""
    options = (*RUN, "train.max_steps=4000")
    undisturbed = train(2, root, *options, name="undisturbed", timeout=900)
    run, draw, slowest_end, slowest_return = root / "run", random.Random(seed), 0.0, 0.0
    script = Path(__file__).parents[2] / "launch" / "torchrun.sh"
    argv = [str(script), *Job.argv(root, *options, name="run")]
    environment = os.environ | {"PYTHON": sys.executable, "NPROC": "2"}
    for attempt in range(1, 12):
        with (root / "torchrun.log").open("ab") as log:
            begun, before = time.monotonic(), len(metrics(run))
            agent = subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while len(metrics(run)) == before and agent.poll() is None:
                time.sleep(0.02)
            slowest_return = max(slowest_return, time.monotonic() - begun)
            if attempt == 11:
                assert agent.wait(300) == 0, (root / "torchrun.log").read_text()[-2000:]
                break
            time.sleep(draw.uniform(0, 2))
            workers = [path.parent for path in Path("/proc").glob("[0-9]*/stat") if _parent(path) == agent.pid]
            assert len(workers) == 2
            agent.kill()
            killed = time.monotonic()
            agent.wait(30)
            while any(worker.exists() for worker in workers):
                assert time.monotonic() - killed < 30, "some worker still runs 30 s after its launcher was killed"
                time.sleep(0.02)
            slowest_end = max(slowest_end, time.monotonic() - killed)
        finally:
            agent.kill()
            agent.wait(30)
    assert state_differences(undisturbed, run) == []
    assert slowest_end < 5, f"some worker ran on for {slowest_end:.1f} s"
    return (
        f"10 launchers killed: bitwise equal; last worker ended after {slowest_end:.1f} s at worst, "
        f"start of torchrun to first new step {slowest_return:.1f} s at worst"
    )


def layouts(root: Path, count: int, seed: int) -> str:
    wrong = []
    for number, layout in enumerate(LAYOUTS):
        one, *others = end_on_each_world(root / str(number), layout, steps=100)
        wrong += [f"{layout}: {other.name}" for other in others if state_differences(one, other)]
    assert wrong == [], wrong
    return f"{len(LAYOUTS)} combinations of options, each on 1, 2, 4 and 8 ranks, 100 steps: one state each"


def moves(root: Path, count: int, seed: int) -> str:
    """Kill a run at random instants, and give each attempt another number of ranks."""
    options = (*RUN, "elastic.mode=bitwise", "elastic.shards=8", "data.batch_size=16", "model.dropout=0.1")
    steps, draw, run = 1500, random.Random(seed), root / "run"
    world_sizes: list[int] = []
    undisturbed = train(1, root, *options, f"train.max_steps={steps}", name="undisturbed", timeout=600)
    while status_of(run).get("state") != "finished":
        assert len(world_sizes) < 40, "not finished after 40 attempts"
        world_sizes.append(draw.choice([1, 2, 4, 8]))
        function = call_train_hastily
        with start(world_sizes[-1], root, *options, f"train.max_steps={steps}", function=function) as job:
            wait_or_ended(job, draw.uniform(2, 6) if len(world_sizes) <= 20 else 600)
    assert state_differences(undisturbed, run) == []
    return f"{len(world_sizes) - 1} kills, ranks {'->'.join(map(str, world_sizes))}: the state of one undisturbed rank"


def _parent(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


CAMPAIGNS: dict[str, Callable[[Path, int, int], str]] = {
    "damage at the loader": damage_at_the_loader,
    "damage end to end": damage_end_to_end,
    "crash points": all_crash_points,
    "stop signals": signals_in_saves,
    "launcher kills": launcher_kills,
    "random kills": kills,
    "bitwise, layouts": layouts,
    "bitwise, moves": moves,
    "SLURM, preemptions": slurm_campaign.preemptions,
    "SLURM, pairs": slurm_campaign.pairs,
    "MLflow, sqlite": lambda root, count, seed: tracking_campaign.campaign(root, seed, http_server=False),
    "MLflow, server": lambda root, count, seed: tracking_campaign.campaign(root, seed, http_server=True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", choices=list(CAMPAIGNS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"seed {args.seed}", flush=True)
    missed = 0
    for name, campaign in CAMPAIGNS.items():
        if args.only in (None, name):
            begun = time.monotonic()
            try:
                with tempfile.TemporaryDirectory(prefix="torture-") as root:
                    result = campaign(Path(root), args.kills, args.seed)
            except Exception as error:
                traceback.print_exc()
                result, missed = f"MISSED: {' '.join(str(error).split())[:300]}", missed + 1
            print(f"| {name} | {result} | {time.monotonic() - begun:.0f} s |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
