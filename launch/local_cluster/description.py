"""What is known of a cluster: its options, its names, addresses and ports, and where its files are."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import LocalClusterError
from .identity import Identity
from .options import Options

LONGEST_STATE_PATH = 80  # a Unix socket's path holds 107 characters, and sockets live below this one


@dataclass(frozen=True)
class Description:
    """A cluster as options.json in its state directory keeps it.

    Attributes:
        state: the directory that holds all its files, an absolute path.
        options: what the user asked for; mode and proctrack are no longer "auto".
        identity: its names, addresses and ports.
    """

    state: Path
    options: Options
    identity: Identity

    def save(self) -> None:
        """Write options.json: from here on the cluster counts as up."""
        content = {
            **dataclasses.asdict(self.options),
            **dataclasses.asdict(self.identity),
            "state": str(self.state),
        }
        (self.state / "options.json").write_text(json.dumps(content, indent=1))

    @property
    def has_namespaces(self) -> bool:
        """Whether every node lives in namespaces of its own (mode netns)."""
        return self.options.mode == "netns"

    @property
    def nodes(self) -> dict[str, int]:
        """{node's name: its number}, from node1 on."""
        return {f"node{number}": number for number in range(1, self.options.nodes + 1)}

    def node_address(self, number: int) -> str:
        return f"{self.identity.subnet}.{number}" if self.has_namespaces else "127.0.0.1"

    @property
    def host_address(self) -> str:
        """Where the nodes reach this machine, on which slurmctld runs."""
        return f"{self.identity.subnet}.254" if self.has_namespaces else "127.0.0.1"

    @property
    def controller_port(self) -> int:
        return self.identity.port

    @property
    def slurmd_port(self) -> int:
        """The default for nodes, which those with an address of their own share."""
        return self.identity.port + 1

    @property
    def database_port(self) -> int:
        return self.identity.port + 2

    def node_port(self, number: int) -> int:
        return self.slurmd_port if self.has_namespaces else self.identity.port + 10 + number

    @property
    def slurm_conf(self) -> Path:
        return self.state / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        return self.state / "munge.socket"

    def log(self, name: str) -> Path:
        return self.state / "log" / name

    def environment(self) -> dict[str, str]:
        """Our environment without the variables of any job we run in, for SLURM's programs on this cluster."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SALLOC"))}
        return {**ours, "SLURM_CONF": str(self.slurm_conf)}


def load(state: Path) -> Description | None:
    """The cluster of this state directory, or None if none is up."""
    path = state / "options.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text())

    def values_of(kind: type[Options] | type[Identity]) -> dict[str, Any]:
        return {field.name: content[field.name] for field in dataclasses.fields(kind)}

    return Description(state, Options(**values_of(Options)), Identity(**values_of(Identity)))


def check_state_path(state: Path) -> None:
    """See that Unix sockets can live below this path.

    Raises:
        LocalClusterError: it is too long.
    """
    if len(str(state)) > LONGEST_STATE_PATH:
        raise LocalClusterError(
            f"{state}: too long for the Unix sockets below it; set LOCAL_SLURM_STATE to a shorter path"
        )
