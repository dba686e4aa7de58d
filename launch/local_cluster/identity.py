"""What a cluster has on this machine and no other cluster has: names, addresses and ports, derived from its path.

Clusters with different state directories therefore do not meet.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
from dataclasses import dataclass
from pathlib import Path

from .errors import LocalClusterError
from .machine import run
from .options import Options

MOST_TRIES = 50


def digest(state: Path) -> str:
    """64 hexadecimal digits that belong to this state directory."""
    return hashlib.sha256(str(state).encode()).hexdigest()


@dataclass(frozen=True)
class Identity:
    """What this cluster has on the machine, and no other cluster.

    Attributes:
        prefix: of its namespaces and links.
        subnet: the first three numbers of its addresses; a /24 of 198.18.0.0/15, which RFC 2544 reserves for tests.
        port: the first of its ports.
    """

    prefix: str
    subnet: str
    port: int


def choose_identity(state: Path, options: Options) -> Identity:
    """Derive names, addresses and ports from the path; go on to the next ones while somebody has them.

    Raises:
        LocalClusterError: all that were tried are taken.
    """
    for attempt in range(MOST_TRIES):
        number = int(digest(Path(f"{state}{attempt or ''}"))[:12], 16)
        identity = Identity(
            prefix=f"dd{number % 16**6:06x}",
            subnet=f"198.{18 + number % 2}.{number // 2 % 256}",
            port=17000 + number % 150 * 100,  # below 32768, where Linux starts handing out ports to clients
        )
        if not _is_taken(identity, options):
            return identity
    raise LocalClusterError("no free names, addresses and ports found")


def _is_taken(identity: Identity, options: Options) -> bool:
    """Whether somebody has one of these names, addresses or ports already."""
    if Path(f"/run/netns/{identity.prefix}sw").exists() or Path(f"/sys/class/net/{identity.prefix}h").exists():
        return True
    if options.mode == "netns" and f" {identity.subnet}." in run("ip", "-4", "-o", "addr").stdout:
        return True
    with contextlib.ExitStack() as stack:
        for port in range(identity.port, identity.port + 11 + options.nodes):
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("", port))
            except OSError:
                return True
    return False
