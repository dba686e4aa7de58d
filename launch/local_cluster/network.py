"""A network of namespaces: one for each node, and one that holds the bridge between them and the host."""

from __future__ import annotations

import shutil
from pathlib import Path

from .description import Description
from .machine import run, succeeds


class Network:
    """The namespaces and links of one cluster, which carry its prefix.

    Args:
        description: of the cluster.
    """

    def __init__(self, description: Description) -> None:
        self._description = description
        self._bridge = f"{description.identity.prefix}sw"
        self._host_link = f"{description.identity.prefix}h"

    def namespace(self, number: int) -> str:
        """The name of a node's network namespace."""
        return f"{self._description.identity.prefix}{number}"

    def set_up(self) -> None:
        """Make a namespace that holds a bridge, and link the host and every node to it.

        Raises:
            LocalClusterError: a step failed.
        """
        bridge, link = self._bridge, self._host_link
        run("ip", "netns", "add", bridge)
        run("ip", "-n", bridge, "link", "set", "lo", "up")
        run("ip", "-n", bridge, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", bridge, "link", "set", "br0", "up")
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "host", "netns", bridge)
        run("ip", "-n", bridge, "link", "set", "host", "master", "br0", "up")
        run("ip", "addr", "add", f"{self._description.host_address}/24", "dev", link)
        run("ip", "link", "set", link, "up")
        for number in self._description.nodes.values():
            self._link_node(number)

    def _link_node(self, number: int) -> None:
        bridge, node, port = self._bridge, self.namespace(number), f"n{number}"
        run("ip", "netns", "add", node)
        run("ip", "-n", node, "link", "set", "lo", "up")
        run("ip", "-n", node, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", bridge)
        run("ip", "-n", bridge, "link", "set", port, "master", "br0", "up")
        run("ip", "-n", node, "addr", "add", f"{self._description.node_address(number)}/24", "dev", "eth0")
        run("ip", "-n", node, "link", "set", "eth0", "up")
        # There is no default route: name look-ups at an unreachable DNS server then fail at once. c10d and gloo
        # make reverse look-ups, which would wait 10 s each.

    def take_down(self) -> None:
        """Remove whatever of it is there."""
        for name in (self._bridge, *map(self.namespace, self._description.nodes.values())):
            if Path(f"/run/netns/{name}").exists():
                run("ip", "netns", "del", name, check=False)
        if Path(f"/sys/class/net/{self._host_link}").exists():
            run("ip", "link", "del", self._host_link, check=False)


def enter(namespace: str) -> tuple[str, ...]:
    """The start of a command line: what follows it runs in this network namespace, with all others of its own.

    When `unshare` is killed, the first process of the PID namespace dies, and with it the kernel ends all others.
    """
    new = ("--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc")
    return ("nsenter", f"--net=/run/netns/{namespace}", "unshare", *new)


def namespaces_work(prefix: str) -> bool:
    """Try in a namespace of this prefix whether the kernel permits what a node needs."""
    probe = f"{prefix}probe"
    try:
        return (
            succeeds("ip", "netns", "add", probe)
            and succeeds("ip", "-n", probe, "link", "add", "br0", "type", "bridge")
            and succeeds("ip", "-n", probe, "link", "add", "veth-a", "type", "veth", "peer", "name", "veth-b")
            and succeeds(*enter(probe), "hostname", "probe")
        )
    except FileNotFoundError:  # no `ip` or no `nsenter`
        return False
    finally:
        if shutil.which("ip"):
            run("ip", "netns", "del", probe, check=False)
