"""What a user asks of the cluster, in the arguments that `launch.submit` and `launch.doctor` share."""

from __future__ import annotations

import argparse
import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path

from ddpm_dist.config import Config, check_world_size, load_config, named_parts
from ddpm_dist.errors import ConfigError

SIGNAL = "USR2"  # NCCL may use USR1
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_GPUS = re.compile(r"(?:([A-Za-z_][^:=,\s]*):)?(\d+)")


@dataclass(frozen=True)
class Request:
    """Nodes, time and the rest, checked on their own but not yet against a cluster.

    Attributes:
        gpus_per_node: 0 for CPUs only.
        gpu_type: as SLURM names it, like `a100`; None for any.
        tasks_per_node: ranks on a node; one per GPU, or as many as asked for.
        cpus_per_task: cores of each rank; None for what launch.cores finds to be this request's share.
        minutes: the time limit of one attempt; None for the partition's default.
        total_minutes: the bound on the time of all attempts together; None for no bound.
        max_requeues: how often the job may come back in all.
        signal_seconds: how long before the time limit the run is told to save.
        extra: further options of sbatch, without the dashes; "" for one without a value.
        setup: lines of shell that run on the first node before the run starts.
    """

    config_file: Path | None
    overrides: tuple[str, ...]
    config: Config
    nodes: int
    gpus_per_node: int
    gpu_type: str | None
    tasks_per_node: int
    cpus_per_task: int | None
    mem: str | None
    minutes: int | None
    total_minutes: int | None
    max_requeues: int
    signal_seconds: int
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    exclude: str | None
    python: str | None
    extra: dict[str, str] = field(default_factory=dict)
    setup: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def gpus_as_asked(self) -> str:
        """`4` or `a100:4`, as sbatch takes it."""
        return f"{self.gpu_type}:{self.gpus_per_node}" if self.gpu_type else str(self.gpus_per_node)


# Options of sbatch that people know, and what they are called here.
AS_SBATCH_HAS_IT = {
    **{short: f"write --{name}" for short, name in (("-p", "partition"), ("-A", "account"), ("-q", "qos"))},
    **{short: f"write --{name}" for short, name in (("-C", "constraint"), ("-x", "exclude"), ("-N", "nodes"))},
    **{short: f"write --{name}" for short, name in (("-t", "time"), ("-c", "cpus-per-task"))},
    "--ntasks-per-node": "write --tasks-per-node, the number of ranks on a node",
    "--ntasks": "write --nodes and --tasks-per-node, the number of ranks on a node",
    "-n": "write --nodes and --tasks-per-node, the number of ranks on a node",
    "--gres": "write --gpus-per-node, as in --gpus-per-node a100:4",
    "-J": "the job has the name of the run; write run.name=NAME",
    "--job-name": "the job has the name of the run; write run.name=NAME",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file with what differs from the defaults [none]")
    overrides = parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    overrides.help = argparse.SUPPRESS  # the usage shows them
    size = parser.add_argument_group("size")
    size.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes [1]")
    size.add_argument("--gpus-per-node", default="0", metavar="[TYPE:]N", help="like a100:4; 0 is CPUs only [0]")
    size.add_argument("--tasks-per-node", type=int, metavar="N", help="ranks on a node [its GPUs, or else 1]")
    size.add_argument("--cpus-per-task", type=int, metavar="N", help="cores of each rank [a GPU's share, or else 1]")
    size.add_argument("--mem", metavar="32G", help="memory of each node [the partition's default]")
    size.add_argument("--time", metavar="D-H:M:S", help="time limit of one attempt [the partition's default]")
    size.add_argument("--total-time", metavar="D-H:M:S", help="it comes back until this is used up in all [no limit]")
    size.add_argument(
        "--max-requeues", type=int, default=1000, metavar="N", help="it comes back at most N times [1000]"
    )
    size.add_argument("--signal-lead", type=int, default=120, metavar="S", help="save S seconds before the limit [120]")
    where = parser.add_argument_group("where (also --account, --qos, --constraint and --exclude, as of sbatch)")
    where.add_argument("--partition", metavar="NAME", help="SLURM's partition [the cluster's default]")
    for option in ("account", "qos", "constraint", "exclude"):
        where.add_argument(f"--{option}", metavar="NAME", help=argparse.SUPPRESS)
    where.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION[=VALUE]", help="any other option; may be repeated"
    )
    where.add_argument(
        "--setup", action="append", default=[], metavar="LINE", help="shell before the run, like `module load cuda`"
    )
    where.add_argument("--python", metavar="COMMAND", help="like `apptainer exec --nv image.sif python` [this Python]")


def check_config(config: Config, world_size: int) -> None:
    """Raises ConfigError for what would end a job after its time in the queue: the number of ranks, unknown names."""
    check_world_size(config, world_size)
    # A login node may lack torch where jobs run in a container; then the job says it.
    if named_parts(config) != named_parts(Config()) and importlib.util.find_spec("torch") is not None:
        from ddpm_dist.build import check_names

        check_names(config)


def from_arguments(args: argparse.Namespace) -> Request:
    """Raises ConfigError for what cannot work on any cluster."""
    for name, least in (("nodes", 1), ("cpus_per_task", 1), ("max_requeues", 0)):
        _at_least(f"--{name.replace('_', '-')}", getattr(args, name), least)
    _at_least("--signal-lead", args.signal_lead, 1)
    gpu_type, gpus = _gpus(args.gpus_per_node)
    tasks = gpus or 1 if args.tasks_per_node is None else args.tasks_per_node
    _at_least("--tasks-per-node", tasks, 1)
    if gpus and tasks > gpus:
        raise ConfigError(f"--tasks-per-node {tasks}: more ranks than --gpus-per-node {gpus}; one rank uses one GPU")
    if args.mem is not None and not re.fullmatch(r"\d+[KMGTkmgt]?", args.mem):
        raise ConfigError(f"--mem {args.mem}: expected the memory of a node, like 32G or 500M")
    config = load_config(args.config, args.overrides)
    check_config(config, args.nodes * tasks)
    minutes = None if args.time is None else minutes_of("--time", args.time)
    total = None if args.total_time is None else minutes_of("--total-time", args.total_time)
    return Request(
        config_file=None if args.config is None else Path(args.config),
        overrides=tuple(args.overrides),
        config=config,
        nodes=args.nodes,
        gpus_per_node=gpus,
        gpu_type=gpu_type,
        tasks_per_node=tasks,
        cpus_per_task=args.cpus_per_task,
        mem=args.mem,
        minutes=minutes,
        total_minutes=total,
        max_requeues=args.max_requeues,
        signal_seconds=args.signal_lead,
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        constraint=args.constraint,
        exclude=args.exclude,
        python=args.python,
        extra=_extra(args.sbatch),
        setup=tuple(args.setup),
    )


def minutes_of(option: str, text: str) -> int:
    """SLURM's forms `M`, `M:S`, `H:M:S`, `D-H`, `D-H:M`, `D-H:M:S`, rounded up to minutes.

    Raises:
        ConfigError: the text has none of them, or is no time at all.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise ConfigError(f"{option} {text}: is no time; valid are minutes, H:M:S and D-H:M:S, like 4:00:00")
    days, first, second, third = (int(group or 0) for group in match.groups())
    if match[1] is not None:
        seconds = ((days * 24 + first) * 60 + second) * 60 + third
    elif match[4] is not None:
        seconds = (first * 60 + second) * 60 + third
    else:
        seconds = first * 60 + second
    if seconds == 0:
        raise ConfigError(f"{option} {text}: expected more than 0; leave {option} out to set no such limit")
    return -(-seconds // 60)


def _gpus(text: str) -> tuple[str | None, int]:
    """`4` -> (None, 4), `a100:4` -> ("a100", 4)."""
    match = _GPUS.fullmatch(text)
    if match is None:
        raise ConfigError(f"--gpus-per-node {text}: valid is a number, or a type and a number as in a100:4")
    return match[1], int(match[2])


def _at_least(option: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{option} {value}: must be at least {least}")


# Options that the job needs as they are to come back, or that have an option of their own here.
_OURS = frozenset(
    [
        "array",
        "config",
        "cpus-per-task",
        "error",
        "export",
        "gpus-per-node",
        "job-name",
        "mem",
        "no-requeue",
        "nodes",
        "ntasks",
        "ntasks-per-node",
        "open-mode",
        "output",
        "partition",
        "account",
        "qos",
        "constraint",
        "exclude",
        "requeue",
        "signal",
        "time",
        "gpus-per-task",
        "wrap",
    ]
)


def _extra(texts: list[str]) -> dict[str, str]:
    extra = {}
    for text in texts:
        name, _, value = text.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            raise ConfigError(f"--sbatch {text}: valid are long options of sbatch, as reservation=name")
        if name in _OURS:
            raise ConfigError(f"--sbatch {text}: {name} is set by launch.submit itself; see its --help")
        if "\n" in value:
            raise ConfigError(f"--sbatch {name}: the value is more than one line")
        extra[name] = value
    return extra
