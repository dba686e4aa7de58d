"""Names of the nodes: in a hosts file of their own (mode netns), or in one marked line of /etc/hosts (mode ports)."""

from __future__ import annotations

import socket
from pathlib import Path

from .description import Description

HOSTS = Path("/etc/hosts")


def write_hosts(description: Description) -> None:
    """Write the file that is mounted over /etc/hosts in every node, or add our line to /etc/hosts itself."""
    host, lines = socket.gethostname(), _lines_of_others(description.state)
    if not description.has_namespaces:
        _write_in_place([*lines, f"127.0.0.1 {' '.join(description.nodes)} {_mark(description.state)}"])
        return
    # The host's own name must lead to the address that the nodes can reach.
    lines = [line for line in lines if host not in line.split()[1:]] + [f"{description.host_address} {host}"]
    for name, number in description.nodes.items():
        address = description.node_address(number)
        lines += [f"{address} {name}", f"::ffff:{address} {name}"]  # c10d looks up the second, v4-mapped form
    (description.state / "hosts").write_text("\n".join(lines) + "\n")


def remove_from_hosts(state: Path) -> None:
    """Remove our line from /etc/hosts."""
    _write_in_place(_lines_of_others(state))


def _mark(state: Path) -> str:
    return f"# ddpm local-cluster {state}"


def _lines_of_others(state: Path) -> list[str]:
    return [line for line in HOSTS.read_text().splitlines() if not line.endswith(_mark(state))]


def _write_in_place(lines: list[str]) -> None:
    """Not beside it and renamed: in a container /etc/hosts may be a mount."""
    with HOSTS.open("r+") as file:
        file.write("\n".join(lines) + "\n")
        file.truncate()
