"""Train a diffusion model: the same command starts, resumes and finishes a run.

    python -m ddpm_dist.train data.name=mnist5k train.max_steps=100
    torchrun --nproc_per_node 4 -m ddpm_dist.train
    torchrun --nproc_per_node 4 -m ddpm_dist.train --config configs/mnist.yaml optim.lr=1e-4

All that is written goes into the run directory, run.root/run.name [runs/mnist]. Stop the run with
Ctrl-C or SIGTERM: it saves. The same command then goes on at the very next step.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

from ddpm_dist.command import CommandLine, exit_codes, leave_word, nobody_reads, refuse, refuse_on_all
from ddpm_dist.config import Config, check_world_size, describe_keys, load_config, named_parts, to_yaml
from ddpm_dist.errors import UserError
from ddpm_dist.output import drop_what_cannot_be_written
from ddpm_dist.parallel.environment import RankEnvironment, read_environment, srun_wait_seconds
from ddpm_dist.run.preemption import StopSignal, ignore_from_now_on

EPILOG = f"""\
configs/, launch/ (torchrun.sh, which starts one rank for each GPU or core; submit and doctor for
SLURM) and slurm/ are no part of the installed package: they are in a checkout of the project, and
are used from its root.

{exit_codes((65, 70, 75, 76, 78), {0: "the run is finished"})}
torchrun itself does not tell those above 0 apart; launch/torchrun.sh does, and so does the file
status.json in the run directory.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. Raises ConfigError."""
    resume = {"--resume": "there is no such option, and none is needed: the same command resumes the run"}
    parser = CommandLine(prog="python -m ddpm_dist.train", description=__doc__, epilog=EPILOG, hints=resume)
    parser.add_argument("--config", metavar="FILE", help="YAML file with what differs from the defaults [none]")
    parser.add_argument("--dry-run", action="store_true", help="print the config with all its keys, and exit")
    parser.add_argument("--where", action="store_true", help="print the run directory, and exit")
    parser.add_argument("--for-sbatch", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--help-config", action="store_true", help="list all config keys with their defaults, and exit")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="config keys; they beat the file, and the last one wins",
    )
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on this rank. Returns its exit code.

    Args:
        argv: the arguments; None takes those of the process.
    """
    # An error stream that cannot be written must not change the exit code of a refused command. Standard output is
    # treated so only once training begins: until then it carries answers (--where, --dry-run), and the script that
    # reads them must notice if they are lost.
    drop_what_cannot_be_written("stderr")
    code, rank = _main(argv)
    if rank == 0:
        leave_word(code)
    return code


def _main(argv: Sequence[str] | None) -> tuple[int, int]:
    """Run the command on this rank. Returns (exit code, rank)."""
    rank = 0
    try:
        env = read_environment()
        rank = env.rank
        args = parse(argv)
        if args.help_config:
            return _answer(describe_keys()), rank
        config = load_config(args.config, args.overrides)
        check_world_size(config, env.world_size)
        if args.dry_run and (named_parts(config) != named_parts(Config()) or config.preview != Config().preview):
            from ddpm_dist.build import check_names, check_previews  # it takes torch, and so two seconds

            check_names(config)
            check_previews(config)
    except UserError as error:
        return refuse_on_all(error, rank), rank
    if args.dry_run or args.where or args.for_sbatch:
        text = _for_sbatch(config) if args.for_sbatch else to_yaml(config).rstrip()
        return _answer(str(config.directory) if args.where else text) if rank == 0 else 0, rank
    return _train(config, env), rank


def _answer(text: str) -> int:
    """Print what was asked for. Returns the exit code, by which a script notices that the answer was lost."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        return nobody_reads()
    except OSError as error:
        nobody_reads()  # the rest of the text must not fail once more when Python ends
        return refuse(OSError(error.errno, error.strerror, "standard output"))
    return 0


def _for_sbatch(config: Config) -> str:
    """The answer that slurm/train.sbatch needs before it starts ranks: the run directory, then `key=value` lines."""
    wait = srun_wait_seconds(config.distributed.timeout_seconds)
    has_torch = importlib.util.find_spec("torch") is not None
    return f"{config.directory}\nsrun_wait={wait}\ntorch={'yes' if has_torch else 'no'}"


def _train(config: Config, env: RankEnvironment) -> int:
    drop_what_cannot_be_written("stdout")
    # Before torch is imported, which takes seconds: a stop signal that comes meanwhile is obeyed afterwards.
    stop = StopSignal().install(under_launcher=env.launcher != "none")
    from ddpm_dist.parallel.failures import explain
    from ddpm_dist.training.session import run_session

    try:
        return run_session(config, env, stop)
    except Exception as error:
        code, text = explain(error, env.rank)
        if text:
            print(text, file=sys.stderr, flush=True)
        return code
    finally:
        ignore_from_now_on()


if __name__ == "__main__":
    sys.exit(main())
