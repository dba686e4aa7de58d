"""A real SLURM of several nodes on one machine, thrown away afterwards: to try jobs without a cluster.

    export LOCAL_SLURM_STATE=$(mktemp -d)   # a short path: Unix sockets live below it
    slurm/local-cluster up --nodes 2 --cpus 2
    . $LOCAL_SLURM_STATE/env.sh             # from here on plain sbatch, srun, squeue, scancel
    slurm/local-cluster crash node2         # a power failure
    slurm/local-cluster restore node2
    slurm/local-cluster down
    slurm/local-cluster drill configs/mnist.yaml   # all of it, with accidents that befall a run

It needs root, no systemd, and
    apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2
(for `up --dbd`, which makes sacct work, also slurmdbd and mariadb-server).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from .cluster import LocalCluster, bring_up, find_cluster
from .drill import rehearse
from .errors import LocalClusterError
from .machine import find_system_programs
from .options import MODES, PROCESS_TRACKERS, Options

EPILOG = """\
exit codes:
    0  done; status: the cluster is healthy; drill: no step was lost that need not be
    1  it could not be done, the message says why; status: not healthy, or not up; drill: steps lost
    2  the command line is wrong
  128+N  stopped by signal N; a cluster that was only half up is taken down first
"""
ABOUT_UP = """\
There are two partitions: low (default; its jobs are requeued after --grace seconds) and high,
which preempts low. The GPUs are not real.

netns mode (default where permitted): every node is its own network, UTS, PID and mount namespace
(its own IP, host name and process tree), linked by a bridge in a namespace of its own. ports mode:
several slurmd on the host's network, one port each. All nodes share this machine's files.

Clusters with different state directories do not meet: names, addresses and ports are derived from
that path. All files are below it; the only other traces are links, namespaces, a freezer cgroup,
and (ports mode) one marked line in /etc/hosts. `down` removes them. Only what this cluster started
is ended: by recorded pid and start time, by PID namespace, or by a cgroup of its own; never by
name. `up` starts afresh.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Obey a command line; returns the exit code."""
    find_system_programs()
    arguments = _parser().parse_args(argv)
    arguments.state = arguments.state.resolve()
    try:
        with _exit_at_stop_signals():
            code: int = arguments.obey(arguments)
    except LocalClusterError as error:
        print(error, file=sys.stderr)
        return 1
    return code


@contextlib.contextmanager
def _exit_at_stop_signals() -> Iterator[None]:
    """Let the first stop signal end the program by an exception, so that half a cluster is taken down on the way out.

    Further ones are ignored meanwhile. One that was ignored from the start, such as SIGHUP under nohup, stays so.
    """

    def leave(number: int, _: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    stop_signals = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {each: signal.getsignal(each) for each in stop_signals if signal.getsignal(each) != signal.SIG_IGN}
    try:
        for each in before:
            signal.signal(each, leave)
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _up(arguments: argparse.Namespace) -> int:
    options = Options(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)})
    _bring_up(arguments.state, options)
    return 0


def _bring_up(state: Path, options: Options) -> LocalCluster:
    start = time.monotonic()
    cluster = bring_up(state, options)
    mode = cluster.description.options.mode
    print(f"up in {time.monotonic() - start:.1f} s: {options.nodes} nodes, mode {mode}; now: . {state}/env.sh")
    return cluster


def _down(arguments: argparse.Namespace) -> int:
    cluster, start = find_cluster(arguments.state), time.monotonic()
    if cluster is None:
        print(f"no cluster is up in {arguments.state}")
        return 0
    cluster.take_down()
    print(f"down in {time.monotonic() - start:.1f} s")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    cluster = find_cluster(arguments.state)
    if cluster is None:
        print(f"no cluster is up in {arguments.state}")
        return 1
    print(cluster.report(), end="")
    return 0 if cluster.is_healthy() else 1


def _env(arguments: argparse.Namespace) -> int:
    print((_running(arguments).description.state / "env.sh").read_text(), end="")
    return 0


def _crash(arguments: argparse.Namespace) -> int:
    cluster = _running(arguments)
    cluster.crash(arguments.node)
    print(f"{arguments.node} has crashed: no process of it is left; {_what_follows(cluster, arguments.node)}")
    return 0


def _crash_slurmd(arguments: argparse.Namespace) -> int:
    cluster = _running(arguments)
    cluster.crash_slurmd(arguments.node)
    print(f"slurmd of {arguments.node} is dead, its tasks run on; {_what_follows(cluster, arguments.node)}")
    return 0


def _what_follows(cluster: LocalCluster, node: str) -> str:
    options = cluster.description.options
    seconds = options.slurmd_timeout + options.message_timeout
    return f"SLURM notices within about {seconds} s; to start the node again: slurm/local-cluster restore {node}"


def _restore(arguments: argparse.Namespace) -> int:
    start = time.monotonic()
    _running(arguments).restore(arguments.node)
    print(f"{arguments.node} takes jobs again, after {time.monotonic() - start:.1f} s")
    return 0


def _running(arguments: argparse.Namespace) -> LocalCluster:
    cluster = find_cluster(arguments.state)
    if cluster is None:
        raise LocalClusterError(f"no cluster is up in {arguments.state} (LOCAL_SLURM_STATE or --state says where)")
    return cluster


def _drill(arguments: argparse.Namespace) -> int:
    """On a cluster of its own, which is always taken down again."""
    if not arguments.config.is_file():
        raise LocalClusterError(f"no config file {arguments.config}")
    with tempfile.TemporaryDirectory(prefix="drill-", dir="/tmp") as name:  # short: Unix sockets live below it
        state, root = Path(name) / "slurm", Path(name) / "runs"
        state.mkdir()
        root.mkdir()
        try:
            cluster = _bring_up(state, Options(nodes=3, cpus=arguments.ranks, gpus=0))
            return rehearse(cluster, root, arguments.config.resolve(), arguments.overrides, arguments.ranks)
        finally:
            if (left := find_cluster(state)) is not None:
                left.take_down()


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves descriptions as they are, and makes no line longer than 100 characters or than the terminal is wide."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(100, shutil.get_terminal_size().columns))


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without its usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"local-cluster: error: {message}; `slurm/{self.prog} --help` shows what is valid\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="local-cluster", description=__doc__, epilog=EPILOG, formatter_class=_HelpFormatter)
    default = os.environ.get("LOCAL_SLURM_STATE") or os.path.join(tempfile.gettempdir(), "local-slurm")
    parser.add_argument("--state", type=Path, default=Path(default), help="beats LOCAL_SLURM_STATE (now: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser(
        "up",
        help="start a fresh cluster (up --help: its options)",
        description=ABOUT_UP,
        formatter_class=_HelpFormatter,
    )
    _add_options_of_up(up)
    up.set_defaults(obey=_up)
    for name, obey, text in (
        ("down", _down, "end it and remove all traces"),
        ("status", _status, "show daemons, nodes and jobs"),
        ("env", _env, "print env.sh"),
    ):
        commands.add_parser(name, help=text).set_defaults(obey=obey)
    for name, obey, text in (
        ("crash", _crash, "power failure: every process of the node is gone at once"),
        ("crash-slurmd", _crash_slurmd, "only the node's slurmd dies; its tasks run on"),
        ("restore", _restore, "start the node again"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("node", metavar="NODE")
        command.set_defaults(obey=obey)
    text = "rehearse accidents on a run, on a cluster of its own that is taken down afterwards"
    drill = commands.add_parser("drill", help=text, description=f"{text[0].upper()}{text[1:]}.")
    drill.add_argument("config", type=Path, metavar="CONFIG", help="config file of the run")
    drill.add_argument("overrides", nargs="*", metavar="section.key=value", help="config keys; they beat the file")
    drill.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks on each of the 2 nodes [%(default)s]")
    drill.set_defaults(obey=_drill)
    return parser


def _add_options_of_up(up: argparse.ArgumentParser) -> None:
    """One for each field of Options, whose defaults hold."""

    def add(option: str, metavar: str, text: str, **kind: Any) -> None:
        up.add_argument(option, metavar=metavar, help=f"{text} [%(default)s]", **kind)

    add("--nodes", "N", "number of nodes", type=int)
    add("--cpus", "N", "CPUs of each node, as SLURM sees it; may exceed the machine's", type=int)
    add("--gpus", "N", "GPUs of each node, which are not real", type=int)
    add("--memory", "MIB", "memory of each node, as SLURM sees it", type=int)
    add("--mode", "MODE", ", ".join(MODES), choices=MODES)
    up.add_argument("--dbd", action="store_true", help="start slurmdbd and mariadb too, so that sacct works")
    add("--grace", "S", "GraceTime of partition low, seconds", type=int)
    add("--kill-wait", "S", "seconds from SIGTERM to SIGKILL at time limit or scancel", type=int)
    add("--slurmd-timeout", "S", "seconds until a silent node is DOWN", type=int)
    add("--message-timeout", "S", "seconds; adds to --slurmd-timeout", type=int)
    add("--requeue-delay", "S", "seconds before a requeued job may start, at least 5", type=int)
    up.add_argument("--preempt-user-signal", action="store_true", help="send --signal's signal at preemption")
    add(
        "--proctrack",
        "NAME",
        "auto: cgroup (v1 freezer) where it can be mounted, else linuxproc",
        choices=PROCESS_TRACKERS,
    )
    add("--debug", "LEVEL", "level of SLURM's logs")
    up.add_argument("--keep-failed", action="store_true", help="leave a cluster that did not come up for inspection")
    up.set_defaults(**dataclasses.asdict(Options()))
