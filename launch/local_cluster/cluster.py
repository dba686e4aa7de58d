"""A cluster, from its start to the removal of its last trace."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from pathlib import Path

from .configuration import write_configuration
from .daemons import Daemons
from .description import Description, check_state_path, load
from .errors import LocalClusterError
from .freezer import Freezer
from .hosts import remove_from_hosts
from .identity import choose_identity, digest
from .machine import check_machine, run
from .network import Network, namespaces_work
from .options import Options
from .processes import RecordedProcesses, command_of, environment_of, kill, processes_of_jobs, with_descendants

# All that may lie in a state directory, beside sockets and pid files that the daemons remove when they end.
LOGS = "log"
FOLDERS = ("ctld", "spool", "dev", "mysql")
MOUNT_POINTS = ("cgroup/freezer", "cgroup", "freezer")
FILES = (
    *("options.json", "procs.json", "slurm.conf", "slurmdbd.conf", "gres.conf", "cgroup.conf", "hosts", "env.sh"),
    *("munge.key", "munged.seed", "munge.socket.lock", "jobcomp.txt", "slurmctld.pid"),
)


class LocalCluster:
    """A cluster that is up, or half of one that did not come up.

    Args:
        description: as it was saved.
    """

    def __init__(self, description: Description) -> None:
        self.description = description
        self._processes = RecordedProcesses(description.state)
        self._daemons = Daemons(description, self._processes)
        self._freezer = Freezer(description.state)

    def start(self) -> None:
        """Make the network and start the daemons; returns when all nodes are idle.

        Raises:
            LocalClusterError: it did not come up; what was started of it is still there.
        """
        write_configuration(self.description)
        if self.description.has_namespaces:
            Network(self.description).set_up()
        self._daemons.start_all()

    def take_down(self, keep_logs: bool = False) -> None:
        """End all its processes and remove all its traces.

        Args:
            keep_logs: leave the folder of the daemons' logs.
        """
        self._end_processes()
        if self.description.has_namespaces:
            Network(self.description).take_down()
        else:
            for pid in processes_of_jobs(self.description.slurm_conf):
                kill(pid)
            remove_from_hosts(self.description.state)
        self._freezer.unmount()
        self._remove_files(keep_logs)

    def _end_processes(self) -> None:
        for name in self._processes.names():
            if name.startswith("node"):
                # With the first process of a PID namespace the kernel kills all others, job steps too.
                (self._processes.kill if self.description.has_namespaces else self._processes.end)(name)
        self._processes.end("slurmctld", seconds=10)
        self._processes.end("slurmdbd", seconds=10)
        self._processes.end("mariadbd", seconds=15)
        self._processes.end("munged")

    def _remove_files(self, keep_logs: bool) -> None:
        """The state directory too, unless somebody keeps something else in it."""
        state = self.description.state
        for name in FOLDERS if keep_logs else (*FOLDERS, LOGS):
            shutil.rmtree(state / name, ignore_errors=True)
        for name in FILES:
            (state / name).unlink(missing_ok=True)
        for folder in (*(state / name for name in MOUNT_POINTS), state):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def is_healthy(self) -> bool:
        """Whether every daemon runs, and so does every node: one that crashed is struck off the record."""
        return all(self._processes.is_alive(name) for name in (*self._processes.names(), *self.description.nodes))

    def report(self) -> str:
        """The daemons, then nodes and jobs as SLURM lists them."""
        daemons = "".join(
            f"{name:10} pid {self._processes.pid(name):<7} {'alive' if self._processes.is_alive(name) else 'DEAD'}\n"
            for name in self._processes.names()
        )
        environment = self.description.environment()
        for node in self.description.nodes:
            if node not in self._processes.names():
                daemons += f"{node:10} is down; to start it again: slurm/local-cluster restore {node}\n"
        nodes = run("sinfo", "-N", "-o", "%8N %10P %10T %4c %10G %E", check=False, environment=environment).stdout
        return daemons + nodes + run("squeue", check=False, environment=environment).stdout

    def crash(self, node: str) -> None:
        """Power failure: every process of the node is gone at once.

        Raises:
            LocalClusterError: there is no such node.
        """
        self._check_node(node)
        self._processes.kill(node)
        if self.description.has_namespaces:
            return
        # Step daemons and the tasks they started are no children of slurmd: their environment names the node.
        ours = f"SLURMD_NODENAME={node}".encode()
        for pid in (*processes_of_jobs(self.description.slurm_conf), *self._freezer.processes(node)):
            if ours in environment_of(pid):
                kill(pid)

    def crash_slurmd(self, node: str) -> None:
        """Only the node's slurmd dies; its job steps run on.

        Raises:
            LocalClusterError: there is no such node.
        """
        self._check_node(node)
        if not self.description.has_namespaces:
            self._processes.kill(node)
        elif self._processes.is_alive(node):
            for pid in with_descendants(self._processes.pid(node)):
                if command_of(pid)[0].endswith(b"slurmd"):
                    kill(pid)

    def restore(self, node: str) -> None:
        """Start the node again and wait until it takes jobs.

        Raises:
            LocalClusterError: there is no such node, or it did not come up.
        """
        self._check_node(node)
        self._processes.kill(node)
        self._daemons.start_node(node)
        self._daemons.wait_for_node(node)

    def _check_node(self, node: str) -> None:
        if node not in self.description.nodes:
            raise LocalClusterError(f"no node {node}; valid: {', '.join(self.description.nodes)}")

    def print_ends_of_logs(self) -> None:
        """What the daemons said last, on standard error: it says why a cluster did not come up."""
        for path in sorted((self.description.state / LOGS).glob("*")):
            print(f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-8:], sep="\n", file=sys.stderr)


def find_cluster(state: Path) -> LocalCluster | None:
    """The cluster of this state directory, or None if none is up."""
    description = load(state)
    return LocalCluster(description) if description else None


def bring_up(state: Path, options: Options) -> LocalCluster:
    """Start a fresh cluster, in place of one that may be up in this directory.

    Args:
        state: the directory for all its files; made where it is missing.
        options: of `up`; mode and proctrack may be "auto".

    Returns:
        The cluster, all of whose nodes are idle.

    Raises:
        LocalClusterError: it did not come up; unless `options.keep_failed` nothing is left of it but its logs.
    """
    options.check()
    check_state_path(state)
    check_machine(options)
    if (earlier := find_cluster(state)) is not None:
        earlier.take_down()
    if options.mode == "auto":
        works = namespaces_work(f"dd{digest(state)[:6]}")
        options = dataclasses.replace(options, mode="netns" if works else "ports")
    identity = choose_identity(state, options)
    options = _with_process_tracker(options, state)
    for name in (LOGS, "ctld", "spool"):
        (state / name).mkdir(parents=True, exist_ok=True)
    state.chmod(0o755)
    description = Description(state, options, identity)
    description.save()
    cluster = LocalCluster(description)
    try:
        cluster.start()
    except BaseException:
        if not options.keep_failed:
            cluster.print_ends_of_logs()
            cluster.take_down(keep_logs=True)
        raise
    return cluster


def _with_process_tracker(options: Options, state: Path) -> Options:
    """Mount the freezer unless the options forbid it, and say in the options which tracker it is."""
    if options.proctrack == "proctrack/linuxproc":
        return options
    mounted = Freezer(state).mount()
    if not mounted and options.proctrack == "proctrack/cgroup":
        raise LocalClusterError("cannot mount the cgroup v1 freezer; leave --proctrack at auto")
    return dataclasses.replace(options, proctrack="proctrack/cgroup" if mounted else "proctrack/linuxproc")
