"""Submit a run to SLURM; it comes back after preemptions, time limits and lost nodes until it ends.

    python -m launch.submit --config configs/mnist.yaml --nodes 2 --gpus-per-node 4 --time 4:00:00
    python -m launch.submit --config configs/mnist.yaml --sweep optim.lr=1e-4,2e-4
From the root of a checkout. The same command again resumes a run that has stopped for good.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from ddpm_dist.command import CommandLine, exit_codes, nobody_reads, refuse
from ddpm_dist.config import to_yaml
from ddpm_dist.errors import ConfigError, UserError
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.tracking.address import refuse_password
from launch.batch import LIFECYCLE, REQUEUE
from launch.cluster import expand, read_cluster, sacct_answers
from launch.cores import default_cores
from launch.executor import build_executor, private_folder, sbatch_text, submit
from launch.follow import follow, follow_all
from launch.request import AS_SBATCH_HAS_IT, Request, add_arguments, from_arguments
from launch.sweep import grid
from launch.task import Task

USAGE = "%(prog)s [OPTIONS] [--config FILE] [section.key=value ...]"
EPILOG = f"""\
{exit_codes((70, 78, 130), {0: "the run is submitted"})}
With --wait or --cluster debug also that of the run: 65, 75 or 76, and 0 if it is finished.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandLine(
        prog="python -m launch.submit", hints=AS_SBATCH_HAS_IT, description=__doc__, usage=USAGE, epilog=EPILOG
    )
    parser.add_argument(
        "--cluster",
        choices=("slurm", "local", "debug"),
        default="slurm",
        metavar="NAME",
        help="slurm, local (this machine) or debug (this process) [slurm]",
    )
    sweep_help = "one run for each value; repeat it for a grid"
    parser.add_argument("--sweep", action="append", default=[], metavar="KEY=A,B,...", help=sweep_help)
    parser.add_argument("--at-once", type=int, default=4, metavar="N", help="jobs of a sweep that run at once [4]")
    parser.add_argument("--wait", action="store_true", help="follow the log until the job ends, not those after it")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch text and the config; submit nothing")
    add_arguments(parser)
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse(argv)
        request = from_arguments(args)
        runs = grid(request, args.sweep)
        if args.at_once < 1:
            raise ConfigError(f"--at-once {args.at_once}: must be at least 1")
        for script in (LIFECYCLE, REQUEUE):
            if not script.exists():
                raise ConfigError(f"no {script}: launch.submit works from a checkout, with `pip install -e .`")
        if args.cluster == "debug":
            return _debug(runs)
        if not args.dry_run:
            _ask_run_directories(runs)
        cores = _cores(request) if args.cluster == "slurm" else request.cpus_per_task or 1
        request, *runs = (dataclasses.replace(each, cpus_per_task=cores) for each in (request, *runs))
        return _submit(request, runs, args)
    except UserError as error:
        return refuse(error)
    except BrokenPipeError:
        return nobody_reads()
    except KeyboardInterrupt:
        return 130


def _ask_run_directories(runs: Sequence[Request]) -> None:
    """Refuse now what the trainer would refuse once the job has waited for its nodes.

    Raises:
        ConfigError: a run was started with another config, or its config would give away a password.
    """
    for run in runs:
        directory = RunDirectory(run.config.directory)
        try:
            refuse_password(run.config, directory)
            directory.reconcile(run.config)
        except OSError:  # this machine does not see run.root as the nodes do
            continue


def _debug(runs: Sequence[Request]) -> int:
    """In this process, one rank: to step through with a debugger."""
    from ddpm_dist.train import main as train

    return max(train(arguments_of(run)) for run in runs)


def _cores(request: Request) -> int:
    """Cores for each rank; with GPUs and no word from the user SLURM is asked what their share is."""
    if request.cpus_per_task is not None:
        return request.cpus_per_task
    if not request.gpus_per_node:
        return 1
    try:
        cluster, excluded = read_cluster(), expand(request.exclude) if request.exclude else frozenset[str]()
        cores, why = default_cores(request, cluster, excluded), "scontrol knows no node with these GPUs"
    except ConfigError:
        cores, why = None, "no scontrol answers here"
    if cores is None:
        print(f"note: {why}, so each rank asks for 1 core; give --cpus-per-task=N for more", file=sys.stderr)
    return cores or 1


def arguments_of(request: Request) -> list[str]:
    """What `ddpm_dist.train` is given for this run."""
    config = [] if request.config_file is None else ["--config", str(request.config_file.resolve())]
    return [*config, *request.overrides]


def _show(runs: Sequence[Request], text: str) -> int:
    """The text that sbatch would be given, if any, and the resolved config of every run."""
    if text:
        print(text)
    for run in runs:
        print(f"# {run.config.directory}\n{to_yaml(run.config)}", flush=True)
    return 0


def _submit(request: Request, runs: Sequence[Request], args: argparse.Namespace) -> int:
    folder = private_folder(request, make=False)
    executor = build_executor(request, runs, folder, cluster=args.cluster, at_once=args.at_once)
    if args.dry_run:
        return _show(runs, sbatch_text(executor, len(runs)) if args.cluster == "slurm" else "")
    private_folder(request, make=True)
    jobs = submit(executor, [Task(tuple(arguments_of(run))) for run in runs])
    for job, run in zip(jobs, runs, strict=True):
        print(f"job {job.job_id}: {run.config.directory}")
        print(f"  log     {job.paths.stdout}")
    print(f"  follow  tail -F {jobs[0].paths.stdout}; python -m ddpm_dist.status {runs[0].config.directory}")
    if args.cluster == "slurm":
        print(f"  stop    scancel {jobs[0].job_id.partition('_')[0]}  (saves; the same command goes on)")
        if not sacct_answers():
            print("  note    no accounting (sacct) here: SLURM forgets jobs soon after their end; status.json does not")
    sys.stdout.flush()
    if not args.wait:
        return 0
    if len(jobs) > 1:
        return follow_all([(job, run.config.directory) for job, run in zip(jobs, runs, strict=True)])
    return follow(jobs[0], runs[0].config.directory)


if __name__ == "__main__":
    sys.exit(main())
