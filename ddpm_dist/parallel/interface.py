"""The network interface through which gloo meets the other nodes.

gloo announces the address that the node's own name resolves to. Debian writes `127.0.1.1 <own name>` into
/etc/hosts, and there no other node can reach it; a node with several networks may announce the wrong one. NCCL finds
its interfaces itself, but the group on which ranks vote (vote.py) is a gloo group even then.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from torch._C._distributed_c10d import Store

VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface, netdevice(7)


def choose_interface(store: Store, rank: int, world_size: int) -> None:
    """Set GLOO_SOCKET_IFNAME to the interface by which MASTER_ADDR is reached. Collective.

    A value that the user has set is kept. On the master's own node MASTER_ADDR may be a loopback address; ranks there
    take the interface by which they reach some other node. Every rank waits for all the others, for as long as the
    store's time-out.

    Args:
        store: one in which no other keys begin with `address/`.
        rank, world_size: of this process.

    Raises:
        torch.distributed.DistStoreError: a rank did not come.
    """
    address = local_address_towards(os.environ.get("MASTER_ADDR", "localhost"))
    keys = [f"address/{number}" for number in range(world_size)]
    store.set(keys[rank], address)
    store.wait(keys)
    if _is_loopback(address):
        addresses = [store.get(key).decode() for key in keys]
        elsewhere = next((other for other in addresses if not _is_loopback(other)), None)
        address = local_address_towards(elsewhere) if elsewhere else address
    interface = interface_with(address)
    if interface and not _is_loopback(address):
        os.environ.setdefault(VARIABLE, interface)


def local_address_towards(host: str) -> str:
    """This node's IPv4 address for packets to a host, by its routing table; 127.0.0.1 if it has no way there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:  # no IPv4 address or no route
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def interface_with(address: str) -> str | None:
    """The interface that has this IPv4 address as its first."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _is_loopback(address: str) -> bool:
    return address.startswith("127.")
