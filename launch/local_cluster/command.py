"""A real SLURM of several nodes on one machine, thrown away afterwards: to try and to test jobs without a cluster.

    export LOCAL_SLURM_STATE=$(mktemp -d)   # a short path: Unix sockets live below it
    slurm/local-cluster up --nodes 2 --cpus 2
    . $LOCAL_SLURM_STATE/env.sh             # from here on plain sbatch, srun, squeue, scancel, scontrol
    slurm/local-cluster status
    slurm/local-cluster crash node2         # power failure;  crash-slurmd: only its slurmd dies, the tasks run on
    slurm/local-cluster restore node2
    slurm/local-cluster down

    slurm/local-cluster drill configs/mnist.yaml   # all of it, with accidents that befall a run

Needs root, no systemd, and
    apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2
(for `up --dbd`, which makes sacct work, also slurmdbd and mariadb-server).

Two partitions: low (default; its jobs are requeued after --grace seconds) and high (preempts low). Fake GPUs.

netns mode (default where permitted): every node is its own network, UTS, PID and mount namespace (own IP, own
hostname, own process tree), linked by a bridge in a namespace of its own. ports mode: several slurmd on the
host's network, one port each. All nodes share this machine's files.

Clusters with different state directories do not meet: names, addresses and ports are derived from that path. All
files are below it; the only other traces are its links, namespaces and freezer cgroup, and (ports mode) one marked
line in /etc/hosts. `down` removes them. Only what this cluster started is ended: by recorded pid and start time,
by PID namespace, or by a cgroup of its own; never by name. `up` starts afresh.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from .cluster import LocalCluster, bring_up, find_cluster
from .drill import rehearse
from .errors import LocalClusterError
from .machine import find_system_programs
from .options import MODES, PROCESS_TRACKERS, Options


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
    _running(arguments).crash(arguments.node)
    return 0


def _crash_slurmd(arguments: argparse.Namespace) -> int:
    _running(arguments).crash_slurmd(arguments.node)
    return 0


def _restore(arguments: argparse.Namespace) -> int:
    _running(arguments).restore(arguments.node)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="local-cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("LOCAL_SLURM_STATE") or os.path.join(tempfile.gettempdir(), "local-slurm")
    parser.add_argument("--state", type=Path, default=Path(default), help="beats LOCAL_SLURM_STATE (now: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser(
        "up",
        help="start a fresh cluster (up --help: its options)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_options_of_up(up)
    up.set_defaults(obey=_up)
    for name, obey, text in (
        ("down", _down, "end it and remove all traces"),
        ("status", _status, "daemons, nodes and jobs; exit code 1 if a daemon is dead"),
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
    drill = commands.add_parser("drill", help="rehearse accidents on a run: a config file, and overrides of its keys")
    drill.add_argument("config", type=Path, metavar="CONFIG")
    drill.add_argument("overrides", nargs="*", metavar="section.key=value")
    drill.add_argument("--ranks", type=int, default=1, help="per node, of 2 nodes (default: %(default)s)")
    drill.set_defaults(obey=_drill)
    return parser


def _add_options_of_up(up: argparse.ArgumentParser) -> None:
    """One for each field of Options, whose defaults hold."""
    up.add_argument("--nodes", type=int)
    up.add_argument("--cpus", type=int, help="per node, as SLURM sees it; may exceed the machine's")
    up.add_argument("--gpus", type=int, help="fake GPUs per node")
    up.add_argument("--memory", type=int, help="MiB per node, as SLURM sees it")
    up.add_argument("--mode", choices=MODES)
    up.add_argument("--dbd", action="store_true", help="slurmdbd and mariadb, so that sacct works")
    up.add_argument("--grace", type=int, help="GraceTime of partition low, seconds")
    up.add_argument("--kill-wait", type=int, help="seconds from SIGTERM to SIGKILL at time limit or scancel")
    up.add_argument("--slurmd-timeout", type=int, help="seconds until a silent node is DOWN")
    up.add_argument("--message-timeout", type=int, help="seconds; adds to --slurmd-timeout")
    up.add_argument("--requeue-delay", type=int, help="seconds before a requeued job may start, at least 5")
    up.add_argument("--preempt-user-signal", action="store_true", help="send --signal's signal at preemption")
    up.add_argument(
        "--proctrack",
        choices=PROCESS_TRACKERS,
        help="auto: cgroup (v1 freezer) where it can be mounted, else linuxproc",
    )
    up.add_argument("--debug", help="level of SLURM's logs")
    up.add_argument("--keep-failed", action="store_true", help="leave a cluster that did not come up for inspection")
    up.set_defaults(**dataclasses.asdict(Options()))
