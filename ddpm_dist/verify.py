"""Prove on this machine that a run which is killed and moved learns the same bits as one left alone.

    python -m ddpm_dist.verify
    python -m ddpm_dist.verify --config configs/mnist.yaml --worlds 1,2 elastic.mode=bitwise

It trains the same run twice, in a folder of its own. One is left undisturbed. In the other, all
ranks or one of them are killed at random instants, and each attempt takes the next of the given
numbers of ranks. Then it compares weights, moving average, optimizer and scaler.
Without --config: 5,000 MNIST images, 16 channels, elastic.mode=bitwise.
"""

from __future__ import annotations

import argparse
import pkgutil
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_dist.command import CommandLine, exit_codes, refuse
from ddpm_dist.config import Config, check_world_size, load_config
from ddpm_dist.errors import ConfigError, ExitCode, UserError
from ddpm_dist.parallel.local import LocalRanks
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.run.lease import read_attempts
from ddpm_dist.tracking.journal import read_metrics

EPILOG = exit_codes((65, 70, 75, 76, 78, 130), {0: "equal", 1: "not equal"})
DEFAULT = ("data.name=mnist5k", "model.channels=16", "data.batch_size=32", "elastic.mode=bitwise")
COMMAND = "ddpm_dist.train:main"
PATIENCE_SECONDS = 600.0  # how long the ranks that were not killed may take to end


@dataclass(frozen=True)
class Attempt:
    """One attempt at the disturbed or the undisturbed run, and how it went.

    Attributes:
        world_size: its number of ranks.
        newest: step of the newest checkpoint when it began, 0 if there was none. The attempt has to start there.
        start: the step at which it did start.
        end: the last step that it logged.
        kill: which ranks were killed, in words; "" if none were.
    """

    world_size: int
    newest: int
    start: int
    end: int
    kill: str


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. Raises ConfigError."""
    parser = CommandLine(prog="python -m ddpm_dist.verify", description=__doc__, epilog=EPILOG)
    parser.add_argument("--config", metavar="FILE", help="the config to rehearse [none]")
    parser.add_argument(
        "--worlds", default="1,2,4", metavar="N,...", help="numbers of ranks, one after the other [1,2,4]"
    )
    parser.add_argument("--kills", type=int, default=5, metavar="N", help="how often it is killed [5]")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="how many steps both runs have [60]")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the kills, which is printed [random]")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave both run directories there [they are deleted]")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="config keys; they beat the file")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code; a stop signal raises SystemExit."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, handler in before.items():
            if handler == signal.SIG_DFL:
                signal.signal(number, _leave)  # raises SystemExit, so that LocalRanks ends its ranks
        args = parse(argv)
        worlds = _read_worlds(args.worlds)
        if args.kills < 1:
            raise ConfigError(f"--kills {args.kills}: expected at least 1 kill")
        least = 2 * (args.kills + 1)
        if args.steps < least:
            raise ConfigError(f"--steps {args.steps}: expected at least {least} steps for --kills {args.kills}")
        every = args.steps // least
        fixed = (
            f"train.max_steps={args.steps}",
            f"checkpoint.every={every}",
            "train.log_every=1",
            "preview.num_images=0",
            "tracking.enabled=false",
        )
        overrides = [*(() if args.config else DEFAULT), *args.overrides]
        overrides += [*_schedule(load_config(args.config, overrides), args.steps), *fixed]
        _check(load_config(args.config, overrides), worlds)
        seed = random.randrange(10**6) if args.seed is None else args.seed
        print(f"seed {seed}", flush=True)
        with tempfile.TemporaryDirectory(prefix="verify-", ignore_cleanup_errors=True) as folder:
            root = args.keep or Path(folder)
            command = [*(["--config", args.config] if args.config else []), *overrides, f"run.root={root}"]
            equal = Rehearsal(root, command, steps=args.steps, worlds=worlds, kills=args.kills, seed=seed).run()
            return 0 if equal else 1
    except (UserError, OSError) as error:
        return refuse(error)
    except CannotTrain as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)


def _read_worlds(text: str) -> list[int]:
    try:
        worlds = [int(part) for part in text.split(",")]
    except ValueError:
        worlds = []
    if not worlds or min(worlds) < 1:
        raise ConfigError(f"--worlds {text}: expected numbers of ranks, like 1,2,4")
    return worlds


def _schedule(config: Config, steps: int) -> list[str]:
    """Overrides that keep the cosine as long as the config makes it, although both runs here are shorter.

    A config that counts in epochs does not say how many steps they are: then the cosine ends with these runs.
    """
    if config.optim.schedule != "cosine" or config.optim.decay_steps is not None:
        return []
    return [f"optim.decay_steps={config.train.max_steps or max(steps, config.optim.warmup_steps + 1)}"]


def _check(config: Config, worlds: Sequence[int]) -> None:
    for world_size in worlds:
        check_world_size(config, world_size)
    if config.elastic.mode == "stream" and len(set(worlds)) > 1:
        raise ConfigError(
            f"--worlds {','.join(map(str, worlds))}: elastic.mode=stream gives the same bits on one number of ranks "
            "only; give one number, like --worlds 2, or elastic.mode=bitwise"
        )


class Rehearsal:
    """Trains the undisturbed run and the disturbed one, and compares them.

    Args:
        root: folder of both run directories. Neither may exist yet.
        command: arguments of `ddpm_dist.train` for both runs.
        steps: length of both runs.
        worlds: numbers of ranks. The undisturbed run takes the first one, the disturbed run takes all in turn.
        kills: how often the disturbed run is killed.
        seed: decides when each kill comes, and which ranks it hits.

    Raises:
        ConfigError: a run directory exists already.
    """

    def __init__(self, root: Path, command: list[str], *, steps: int, worlds: list[int], kills: int, seed: int) -> None:
        if root.exists() and not root.is_dir():
            raise ConfigError(f"--keep {root}: is a file; give a folder")
        for name in ("undisturbed", "disturbed"):
            if (root / name).exists():
                raise ConfigError(f"--keep {root}: {root / name} exists already; give another folder")
        root.mkdir(parents=True, exist_ok=True)
        self._root, self._command = root, command
        self._steps, self._worlds, self._kills, self._draw = steps, worlds, kills, random.Random(seed)

    def run(self) -> bool:
        """Train both runs, print how they went, and compare them.

        Returns:
            whether they end with the same bits, and each attempt started at the newest checkpoint.

        Raises:
            CannotTrain: an attempt failed although none of its ranks was killed.
        """
        undisturbed = self._attempt("undisturbed", self._worlds[0], None)
        print(f"undisturbed: {undisturbed.world_size} rank(s), {undisturbed.end} steps", flush=True)
        print("disturbed:   ranks  starts at step (newest checkpoint)  ends at step")
        attempts: list[Attempt] = []
        while not attempts or attempts[-1].kill:
            number = len(attempts)
            world_size = self._worlds[number % len(self._worlds)]
            attempts.append(self._attempt("disturbed", world_size, self._kills - number))
            one = attempts[-1]
            newest = f"({one.newest})"
            how = one.kill or "finished"
            print(
                f"{number + 1:>11}  {one.world_size:>5}  {one.start:>14} {newest:<20}  {one.end:>12}  {how}", flush=True
            )
        return self._compare(attempts)

    def _attempt(self, name: str, world_size: int, kills_left: int | None) -> Attempt:
        """Make one attempt at a run: kill it if kills are left, else let it finish."""
        from ddpm_dist.run.store import CheckpointStore  # it takes torch; a wrong command line is refused without

        run = self._root / name
        store = CheckpointStore(run / "checkpoints")
        newest = max(store.committed(), default=0)
        kill_at, victim = None, ""
        if kills_left:
            # Early enough to leave room for the other kills, even if some come later than planned.
            kill_at = newest + self._draw.randint(1, max(1, (self._steps - newest) // (kills_left + 1)))
            victim = self._draw.choice(["all ranks", *(f"rank {rank}" for rank in range(world_size))])
        argv = [*self._command, f"run.name={name}"]
        log = self._root / f"{name}.log"
        with LocalRanks(world_size, log, _call, (COMMAND, argv), preload=["ddpm_dist.training.session"]) as ranks:
            number = 1 + len(read_attempts(run / "attempts"))
            while ranks.alive() and not (kill_at and _last_step(run, number) >= kill_at and store.committed()):
                time.sleep(0.005)  # it waits for a checkpoint too, so that the next attempt has one to resume
            killed = bool(kill_at) and ranks.alive()
            if killed:
                time.sleep(self._draw.uniform(0, _step_seconds(run, number)))  # so that kills hit any part of a step
                ranks.kill(None if victim == "all ranks" else int(victim.split()[1]))
            codes = ranks.exit_codes(PATIENCE_SECONDS)
        if None in codes:
            raise CannotTrain(codes, log)
        if RunDirectory(run).read_status().get("state") == "finished":
            killed = False  # the kill came too late, when the run was finished already
        elif not killed:
            raise CannotTrain(codes, log)
        facts = read_attempts(run / "attempts")[number - 1]
        end = _last_step(run, number)
        return Attempt(world_size, newest, facts["start_step"], end, f"{victim} killed" if killed else "")

    def _compare(self, attempts: Sequence[Attempt]) -> bool:
        """Print what is equal and what is not. Returns whether all is well."""
        from ddpm_dist.run.digest import digests
        from ddpm_dist.run.store import CheckpointStore

        ends = []
        for name in ("undisturbed", "disturbed"):
            ends.append(digests(CheckpointStore(self._root / name / "checkpoints").load(self._steps)))
        print(f"\n{'after step ' + str(self._steps):<16}  {'undisturbed':<16}  disturbed")
        for part, digest in ends[0].items():
            same = digest == ends[1][part]
            print(f"{part:<16}  {digest:<16}  {ends[1][part]:<16}  {'equal' if same else 'DIFFERENT'}")
        complaints = [f"{part} differ" for part in ends[0] if ends[0][part] != ends[1][part]]
        for attempt in attempts[1:]:
            if attempt.start != attempt.newest:
                complaints.append(f"an attempt started at step {attempt.start} instead of {attempt.newest}")
        if not any(attempt.start for attempt in attempts):
            complaints.append("no attempt resumed a checkpoint: the kills came too early to show anything")
        moved = "->".join(str(attempt.world_size) for attempt in attempts)
        kills = sum(bool(attempt.kill) for attempt in attempts)
        words = "; ".join(complaints) or "the same bits"
        print(f"\n{'NOT EQUAL' if complaints else 'EQUAL'}: killed {kills} times, ranks {moved}: {words}", flush=True)
        return not complaints


class CannotTrain(Exception):
    """An attempt failed although none of its ranks was killed. The message holds the last lines of its log.

    Args:
        codes: the exit code of each rank; None for one that did not end.
        log: the output of all ranks.
    """

    def __init__(self, codes: Sequence[int | None], log: Path) -> None:
        said = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-20:])
        super().__init__(f"{said}error: {log.stem}: the ranks ended with {', '.join(map(str, codes))}")
        self.exit_code = next((code for code in codes if code and code > 0), ExitCode.SOFTWARE)


def _call(command: str, argv: Sequence[str]) -> int:
    """Call a command by its name. Runs on a rank."""
    return int(pkgutil.resolve_name(command)(argv))


def _step_seconds(run: Path, attempt: int) -> float:
    """How many seconds a step of this attempt takes on average; 0 if it has logged one line only."""
    lines = _lines(run, attempt)
    steps = lines[-1]["step"] - lines[0]["step"]
    return float((lines[-1]["time"] - lines[0]["time"]) / steps) if steps else 0.0


def _last_step(run: Path, attempt: int) -> int:
    """The last step that this attempt logged; 0 if it logged none."""
    return max((line["step"] for line in _lines(run, attempt)), default=0)


def _lines(run: Path, attempt: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that this attempt logged."""
    return [line for line in read_metrics(run / "metrics.jsonl") if line["attempt"] == attempt]


if __name__ == "__main__":
    sys.exit(main())
