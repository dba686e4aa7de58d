"""Starts the daemons of a cluster, and waits until each is of use."""

from __future__ import annotations

import os
import socket

from .description import Description
from .machine import run, succeeds
from .network import Network, enter
from .processes import RecordedProcesses, wait_until

WORKING = ("idle", "mixed", "allocated", "completing")


class Daemons:
    """munged, slurmdbd with its database, slurmctld and one slurmd a node.

    Args:
        description: of the cluster, whose configuration is written.
        processes: where they are recorded.
    """

    def __init__(self, description: Description, processes: RecordedProcesses) -> None:
        self._description = description
        self._processes = processes

    def start_all(self) -> None:
        """Start every daemon, and wait until all nodes are idle.

        Raises:
            LocalClusterError: one of them ended, or did not come up in time.
        """
        nodes = self._description.nodes
        self._start_munged()
        if self._description.options.dbd:
            self._start_mariadbd()
            self._start_slurmdbd()
        self._start_slurmctld()
        for name in nodes:
            self.start_node(name)
        wait_until("nodes to be idle", lambda: list(self.node_states().values()).count("idle") == len(nodes), 30)
        if self._description.options.dbd:  # sacct sees the first job only once the cluster has registered itself
            wait_until("cluster in slurmdbd", lambda: "local" in self._ask("sacctmgr", "-n", "show", "cluster"), 20)

    def start_node(self, name: str) -> None:
        """Start a node's slurmd, in mode netns below an init of its own; does not wait for it."""
        description, environment = self._description, self._description.environment()
        (description.state / "spool" / name).mkdir(parents=True, exist_ok=True)
        log = description.log(f"{name}.out")
        if not description.has_namespaces:
            self._processes.start(name, ["slurmd", "-D", "-N", name], log, environment)
            return
        # A shell is the node's init: it adopts and reaps orphans, and it outlives slurmd (see crash-slurmd).
        init = (
            f"hostname {name} && mount --bind {description.state}/hosts /etc/hosts || exit 1; trap : TERM; "
            f"slurmd -D -N {name} & echo started; while :; do sleep 3600 & wait $!; done"
        )
        namespace = Network(description).namespace(description.nodes[name])
        self._processes.start(name, [*enter(namespace), "bash", "-c", init], log, environment)

    def wait_for_node(self, name: str) -> None:
        """Wait until a node takes jobs.

        Raises:
            LocalClusterError: not within 30 s.
        """
        wait_until(name, lambda: self.node_states().get(name) in WORKING, 30)

    def node_states(self) -> dict[str, str]:
        """{node: its state, such as "idle"}, as slurmctld says."""
        answer = self._ask("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T")
        lines = (line.split() for line in answer.splitlines() if line.startswith("node"))
        return {words[0]: words[1] for words in lines}

    def _start_munged(self) -> None:
        state, sock = self._description.state, self._description.munge_socket
        key = state / "munge.key"
        if not key.exists():
            descriptor = os.open(key, os.O_WRONLY | os.O_CREAT, 0o600)
            os.write(descriptor, os.urandom(128))
            os.close(descriptor)
        argv = (
            *("munged", "--foreground", "--force", "--num-threads=4"),
            *(f"--key-file={key}", f"--socket={sock}", f"--seed-file={state}/munged.seed"),
            *(f"--pid-file={state}/munged.pid", f"--log-file={self._description.log('munged.log')}"),
        )
        self._processes.start("munged", argv, self._description.log("munged.out"))
        self._processes.wait_until("munged", lambda: succeeds("munge", "-n", "-S", sock), 10, 0.05)

    def _start_mariadbd(self) -> None:
        state, sock = self._description.state, self._database_socket
        data = state / "mysql"
        if not (data / "mysql").exists():
            data.mkdir(exist_ok=True)
            user = ("--user=root", "--skip-test-db", "--auth-root-authentication-method=normal")
            run("mariadb-install-db", "--no-defaults", f"--datadir={data}", *user)
        argv = (
            *("mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={sock}", "--user=root"),
            *("--skip-networking", f"--pid-file={state}/mariadbd.pid", "--innodb-flush-log-at-trx-commit=0"),
            *("--innodb-lock-wait-timeout=900", "--innodb-buffer-pool-size=128M"),
        )
        self._processes.start("mariadbd", argv, self._description.log("mariadbd.log"))
        ping = ("mariadb-admin", "--no-defaults", f"--socket={sock}", "-uroot", "ping")
        self._processes.wait_until("mariadbd", lambda: succeeds(*ping), 30)

    def _start_slurmdbd(self) -> None:
        # slurmdbd.conf has no option for the socket; libmariadb takes its default from this variable.
        environment = {**self._description.environment(), "MYSQL_UNIX_PORT": self._database_socket}
        self._processes.start("slurmdbd", ["slurmdbd", "-D"], self._description.log("slurmdbd.out"), environment)
        self._processes.wait_until("slurmdbd", self._database_answers, 30)

    @property
    def _database_socket(self) -> str:
        return str(self._description.state / "mysql.sock")

    def _database_answers(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self._description.database_port)) == 0

    def _start_slurmctld(self) -> None:
        log = self._description.log("slurmctld.out")
        self._processes.start("slurmctld", ["slurmctld", "-D", "-i"], log, self._description.environment())
        self._processes.wait_until("slurmctld", lambda: "is UP" in self._ask("scontrol", "ping"), 30)

    def _ask(self, *argv: str) -> str:
        """What one of SLURM's programs prints, errors too."""
        return run(*argv, check=False, environment=self._description.environment()).stdout
