"""Submit a run to SLURM; it comes back by itself after preemption, time limit and dying nodes until it is finished.

python -m launch.submit --config configs/mnist.yaml --nodes 2 --gpus-per-node 4 --time 4:00:00 optim.lr=1e-4
python -m launch.submit --config configs/mnist.yaml --gpus-per-node 4 --sweep optim.lr=1e-4,2e-4 --sweep run.seed=0,1

From the root of a checkout. The same command again resumes a run that has stopped for good.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import re
import shlex
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_dist.command import CommandLine, nobody_reads, refuse
from ddpm_dist.config import check_world_size, load_config, to_yaml
from ddpm_dist.errors import ConfigError, UserError
from ddpm_dist.parallel.environment import srun_wait_seconds
from launch.cluster import expand, read_cluster, sacct_answers
from launch.cores import default_cores
from launch.follow import follow, follow_all
from launch.request import Request, add_arguments, from_arguments
from launch.task import Task

ROOT = Path(__file__).resolve().parents[1]
REQUEUE = ROOT / "slurm" / "requeue.sh"
LIFECYCLE = ROOT / "slurm" / "lifecycle.sh"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandLine(prog="python -m launch.submit", description=__doc__)
    add_arguments(parser)
    how = parser.add_argument_group("how")
    how.add_argument("--cluster", choices=("slurm", "local", "debug"), default="slurm", help="local: this machine")
    how.add_argument("--sweep", action="append", default=[], metavar="KEY=A,B,...", help="a grid; one key each")
    how.add_argument("--at-once", type=int, default=4, metavar="N", help="jobs of a sweep that run at once (default 4)")
    how.add_argument("--wait", action="store_true", help="follow the log until the job (not a successor) ends")
    how.add_argument("--dry-run", action="store_true", help="print the sbatch text and the config, submit nothing")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse(argv)
        request = from_arguments(args)
        runs = grid(request, args.sweep)
        if args.at_once < 1:
            raise ConfigError(f"--at-once {args.at_once}: must be at least 1")
        if not REQUEUE.exists():
            raise ConfigError(f"no {REQUEUE}: launch.submit works from a checkout, with `pip install -e .`")
        if args.cluster == "debug":
            return _debug(runs)
        cores = _cores(request) if args.cluster == "slurm" else request.cpus_per_task or 1
        request, *runs = (dataclasses.replace(each, cpus_per_task=cores) for each in (request, *runs))
        return _submit(request, runs, args)
    except UserError as error:
        return refuse(error)


def grid(request: Request, sweep: Sequence[str]) -> list[Request]:
    """One request per point of the grid, with a run.name that says which; the request itself without a sweep.

    Raises:
        ConfigError: a key twice, or a point whose config is refused.
    """
    axes: dict[str, list[str]] = {}
    for text in sweep:
        key, _, listed = text.partition("=")
        if not listed or key in axes or key == "run.name":
            why = "is there twice" if key in axes else "valid is KEY=A,B,... with any key but run.name"
            raise ConfigError(f"--sweep {text}: {why}")
        axes[key] = listed.split(",")
    if not axes:
        return [request]
    points = []
    for values in itertools.product(*axes.values()):
        chosen = [f"{key}={value}" for key, value in zip(axes, values, strict=True)]
        suffix = "-".join(re.sub(r"[^A-Za-z0-9.=+_-]", "_", text) for text in _shortened(chosen))
        overrides = (*request.overrides, *chosen, f"run.name={request.config.run.name}-{suffix}")
        config = load_config(request.config_file, overrides)
        check_world_size(config, request.world_size)
        points.append(dataclasses.replace(request, overrides=overrides, config=config))
    if len({point.config.directory for point in points}) < len(points):
        raise ConfigError(f"--sweep {' --sweep '.join(sweep)}: two points have one name; give each value once")
    return points


def _shortened(chosen: Sequence[str]) -> list[str]:
    """`optim.lr=1e-4` -> `lr=1e-4`; whole keys where the last parts are not unique."""
    short = [text.partition("=")[0].rpartition(".")[2] + "=" + text.partition("=")[2] for text in chosen]
    unique = len({text.partition("=")[0] for text in short}) == len(short)
    return short if unique else list(chosen)


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
    """Of `ddpm_dist.train`."""
    config = [] if request.config_file is None else ["--config", str(request.config_file.resolve())]
    return [*config, *request.overrides]


def _submit(request: Request, runs: Sequence[Request], args: argparse.Namespace) -> int:
    folder = _private_folder(request, make=not args.dry_run)
    executor = _executor(request, runs, args, folder)
    if args.dry_run:
        try:
            if args.cluster == "slurm":
                print(sbatch_text(executor, len(runs)))
            for run in runs:
                print(f"# {run.config.directory}\n{to_yaml(run.config)}", flush=True)
        except BrokenPipeError:
            return nobody_reads()
        return 0
    with executor.batch():
        jobs = [executor.submit(Task(tuple(arguments_of(run)))) for run in runs]
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


def _private_folder(request: Request, *, make: bool) -> Path:
    """For submitit's pickles: a job runs what is in them, so nobody else may write there."""
    run = request.config.directory
    folder = run.parent.resolve() / ".submitit" / run.name
    if make:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)
            about = folder.stat()
        except OSError as error:
            raise ConfigError(f"run.root={run.parent}: cannot write {folder} ({error.strerror})") from None
        if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077:
            raise ConfigError(f"{folder}: others can write there, and jobs run what lies there; use another run.root")
    return folder


def _executor(request: Request, runs: Sequence[Request], args: argparse.Namespace, folder: Path) -> Any:
    """submitit's, for one job or an array."""
    try:
        import submitit
    except ImportError:
        raise ConfigError("submitit is not installed; pip install submitit (or `pip install -e '.[slurm]'`)") from None
    options = {"slurm_python": request.python} if args.cluster == "slurm" and request.python else {}
    try:
        executor = submitit.AutoExecutor(folder=folder / "%j", cluster=args.cluster, **options)
    except RuntimeError as error:
        raise ConfigError(f"--cluster {args.cluster}: {error}") from None
    executor.update_parameters(
        name=request.config.run.name,
        nodes=request.nodes,
        tasks_per_node=request.tasks_per_node,
        cpus_per_task=request.cpus_per_task,
        stderr_to_stdout=True,
    )
    if request.gpus_per_node:
        executor.update_parameters(gpus_per_node=request.gpus_per_node)
        if args.cluster == "slurm":
            executor.update_parameters(slurm_gpus_per_node=request.gpus_as_asked)
    if args.cluster == "local":
        executor.update_parameters(timeout_min=request.minutes or 365 * 24 * 60)
    if args.cluster == "slurm":
        executor.update_parameters(**{f"slurm_{name}": value for name, value in _slurm(request, runs, args).items()})
        # None: the partition's default, where submitit's is 5 minutes; and no key that accounting might not know.
        executor._executor.update_parameters(time=request.minutes, wckey=None)
    return executor


def _slurm(request: Request, runs: Sequence[Request], args: argparse.Namespace) -> dict[str, Any]:
    """What is SLURM's own, by submitit's names."""
    wait = max(srun_wait_seconds(run.config.distributed.timeout_seconds) for run in runs)
    extra: dict[str, Any] = {"requeue": True, **{name: value or True for name, value in request.extra.items()}}
    if request.mem is not None:
        extra["mem"] = request.mem
    chosen = {name: getattr(request, name) for name in ("partition", "account", "qos", "constraint", "exclude")}
    return {
        **{name: value for name, value in chosen.items() if value is not None},
        "signal_delay_s": request.signal_seconds,
        "array_parallelism": args.at_once,
        "setup": _setup(request, runs),
        "teardown": ['exec bash "$requeue" end "$run" "$?" bash -c "$again"'],
        "srun_args": [f"--cpus-per-task={request.cpus_per_task}", "--export=ALL", f"--wait={wait}"],
        "additional_parameters": extra,
    }


def _setup(request: Request, runs: Sequence[Request]) -> list[str]:
    """Lines of the batch script before srun: which run this is, and how it comes back."""
    total = request.total_minutes or 0
    again = [f"cd {shlex.quote(os.getcwd())} && {shlex.join(_same_again(run))}" for run in runs]
    return [
        *request.setup,
        "set +e  # what fails is looked at afterwards",
        f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"source {shlex.quote(str(LIFECYCLE))}",
        f"requeue={shlex.quote(str(REQUEUE))}",
        f"runs=({shlex.join(str(run.config.directory.resolve()) for run in runs)})",
        "run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}",
        f"agains=({shlex.join(again)})",
        "again=${agains[${SLURM_ARRAY_TASK_ID:-0}]}",
        f"export MAX_REQUEUES={request.max_requeues} TOTAL_MINUTES={total}",
        "export DDPM_EXIT_CODE_FILE=$(mktemp) OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}",
        "trap : INT HUP USR1 USR2  # the tasks get them too; this shell decides afterwards",
        """trap 'bash "$requeue" told "$run"' TERM""",
        "srun() {",
        '    command srun "$@" &',
        "    wait_through_signals $!",
        "}",
        'bash "$requeue" begin "$run" || exit',
    ]


def _same_again(run: Request) -> list[str]:
    """The command that submits this one run again, for where SLURM does not requeue."""
    options = {
        "config": run.config_file and run.config_file.resolve(),
        "nodes": run.nodes,
        "gpus-per-node": run.gpus_as_asked,
        "tasks-per-node": run.tasks_per_node,
        "cpus-per-task": run.cpus_per_task,
        "mem": run.mem,
        "time": run.minutes,
        "total-time": run.total_minutes,
        "max-requeues": run.max_requeues,
        "signal-lead": run.signal_seconds,
        **{name: getattr(run, name) for name in ("partition", "account", "qos", "constraint", "exclude", "python")},
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    given += [f"--sbatch={name}={value}" if value else f"--sbatch={name}" for name, value in run.extra.items()]
    given += [f"--setup={line}" for line in run.setup]
    return [sys.executable, "-m", "launch.submit", *given, *run.overrides]


def sbatch_text(executor: Any, num_runs: int) -> str:
    """Exactly what sbatch would be given."""
    inner = executor._executor
    if num_runs > 1:
        inner.parameters["map_count"] = num_runs
    return str(inner._make_submission_file_text(inner._submitit_command_str, "dry-run"))


if __name__ == "__main__":
    sys.exit(main())
