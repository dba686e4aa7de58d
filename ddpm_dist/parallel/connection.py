"""How a rank finds its device, meets the other ranks, and leaves together with them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ddpm_dist.errors import ConfigError
from ddpm_dist.parallel.environment import RankEnvironment, node_name, rendezvous_from_slurm
from ddpm_dist.parallel.interface import choose_interface
from ddpm_dist.parallel.watchdog import Watchdog

POLL_SECONDS = 0.02  # between two looks at a key of the store


def pick_device(requested: str, env: RankEnvironment) -> torch.device:
    """The device that this rank computes on: cuda:local_rank or cpu.

    Args:
        requested: auto, cuda or cpu.
        env: this process among its peers.

    Raises:
        ConfigError: CUDA was asked for and there is none, or the node has fewer GPUs than ranks.
    """
    available = torch.cuda.is_available()
    if requested == "cpu" or (requested == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError("train.device=cuda: this machine shows no CUDA device; valid here: auto, cpu")
    count = torch.cuda.device_count()
    if count == 1 and env.launcher == "slurm":
        # srun --gpus-per-task=1 shows each task its own GPU and no other. If tasks did share one, NCCL would say so.
        return torch.device("cuda", 0)
    if env.local_world_size > count:  # every rank of the node comes to this same answer
        raise ConfigError(f"{env.local_world_size} ranks on a node with {count} GPUs; start one rank a GPU")
    return torch.device("cuda", env.local_rank)


@dataclass(frozen=True)
class Connection:
    """What a rank holds while it is connected to at least one other rank. Made by `connect`.

    Attributes:
        rank, world_size: of this process.
        device: what this rank computes on.
        timeout_seconds: how long another rank may be silent.
        group_timeout: of every process group that works on the device.
        nodes: on rank 0 the node of every rank, by rank; on the others their own node alone.
        watchdog: watches this rank's main thread and counts its heartbeat.
        store: keys by which ranks tell each other something outside of any collective.
        heartbeats: the part of the store in which every rank's watchdog counts, at `beat/RANK`.
        flags: a process group on the CPU (gloo), apart from the other one, so that it never waits for a GPU.
    """

    rank: int
    world_size: int
    device: torch.device
    timeout_seconds: float
    group_timeout: timedelta
    nodes: list[str]
    watchdog: Watchdog
    store: Store
    heartbeats: Store
    flags: dist.ProcessGroup

    def leave(self) -> None:
        """End the process group once every rank is here, so that no rank exits while another needs it. Collective.

        A rank that does not come is waited for until `timeout_seconds` are over.
        """
        self._count_to("arrived", self.world_size)
        if self.rank == 0:
            self._count_to("left", self.world_size)  # rank 0 may host the store, so it goes last
        else:
            self.store.add("left", 1)
        self.watchdog.close()
        dist.destroy_process_group()

    def _count_to(self, key: str, number: int) -> None:
        """Add one and wait, outside of any collective, until the key has reached the number or time is up."""
        deadline = time.monotonic() + self.timeout_seconds
        self.store.add(key, 1)
        while self.store.add(key, 0) < number and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def connect(
    env: RankEnvironment, device: torch.device, timeout_seconds: float, stop_requested: Callable[[], bool]
) -> Connection:
    """Meet the other ranks of the job, of which there must be at least one. Collective.

    Args:
        env: this process among its peers.
        device: decides the backend, NCCL for CUDA and gloo for CPU.
        timeout_seconds: how long ranks wait for each other, here and in every collective that follows.
        stop_requested: whether this process was asked to stop; for the watchdog.

    Raises:
        torch.distributed.DistError: some rank did not come in time.
    """
    rank, world_size = env.rank, env.world_size
    timeout = timedelta(seconds=timeout_seconds)
    store = _meet(env, timeout)
    watchdog = Watchdog(PrefixStore("watchdog", store.clone()), rank, world_size, timeout_seconds, stop_requested)
    watchdog.arm()  # gloo knows no time-out while it connects
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    # When its time is up NCCL aborts the process at once. Our watchdog, which says why, must come first.
    group_timeout = timeout + timedelta(seconds=60) if cuda else timeout
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=group_timeout,
        device_id=device if cuda else None,
    )
    watchdog.disarm()
    # A wrong launch can make every process a group of its own; each would then train the whole run by itself.
    assert dist.get_world_size() == world_size, "the process group has another size than the launcher said"
    flags = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
    nodes = [store.get(f"node/{each}").decode() for each in range(world_size)] if rank == 0 else [node_name()]
    return Connection(
        rank=rank,
        world_size=world_size,
        device=device,
        timeout_seconds=timeout_seconds,
        group_timeout=group_timeout,
        nodes=nodes,
        watchdog=watchdog,
        store=PrefixStore("ddpm_dist", store),
        heartbeats=PrefixStore("watchdog", store),
        flags=flags,
    )


def _meet(env: RankEnvironment, timeout: timedelta) -> Store:
    """The store that all ranks share, in which each has entered its node."""
    if env.launcher == "slurm":
        os.environ.update(rendezvous_from_slurm())
        os.environ.update(RANK=str(env.rank), WORLD_SIZE=str(env.world_size))
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    # torchrun --max-restarts keeps its store when it starts the ranks again. Under a prefix that counts the restarts
    # they do not take the keys of the ranks before them for their own.
    store = PrefixStore(f"restart/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    store.set(f"node/{rank}", node_name())
    if env.local_world_size < world_size:
        choose_interface(PrefixStore("interface", store), rank, world_size)
    return store
