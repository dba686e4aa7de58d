"""Which device a rank takes, whom it meets, and how ranks leave."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rank_processes import connect, run_ranks
from torch._C._distributed_c10d import HashStore

from ddpm_dist.errors import ConfigError
from ddpm_dist.parallel import connection
from ddpm_dist.parallel.connection import pick_device
from ddpm_dist.parallel.environment import RankEnvironment

# The device


def test_more_ranks_than_gpus_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="4 ranks on a node with 2 GPUs"):
        pick_device("auto", RankEnvironment(3, 3, 4, 4, "torchrun"))
    assert pick_device("auto", RankEnvironment(1, 1, 2, 2, "torchrun")) == torch.device("cuda", 1)
    assert pick_device("cpu", RankEnvironment(3, 3, 4, 4, "torchrun")) == torch.device("cpu")


def test_a_task_of_srun_that_sees_one_gpu_takes_it_whatever_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda", RankEnvironment(3, 3, 4, 4, "slurm")) == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="4 ranks on a node with 1 GPUs"):
        pick_device("cuda", RankEnvironment(3, 3, 4, 4, "torchrun"))


def test_without_cuda_auto_means_cpu_and_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    env = RankEnvironment(0, 0, 1, 1, "none")
    assert pick_device("auto", env) == pick_device("cpu", env) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"train\.device=cuda.*valid here: auto, cpu"):
        pick_device("cuda", env)


# Meeting and leaving


def test_ranks_that_torchrun_restarts_do_not_read_what_those_before_them_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's store outlives the ranks."""
    store = HashStore()
    monkeypatch.setattr(connection, "rendezvous", lambda url, timeout: iter([(store, 0, 2)]))
    env, timeout = RankEnvironment(0, 0, 2, 2, "torchrun"), timedelta(seconds=30)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    connection._meet(env, timeout).set("failure", "rank 1 had no images")
    assert connection._meet(env, timeout).check(["failure"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not connection._meet(env, timeout).check(["failure"])


def nodes_of_their_own() -> int:
    os.environ["SLURMD_NODENAME"] = f"node-{os.environ['RANK']}"
    ranks, _ = connect()
    expected = [f"node-{rank}" for rank in range(3)] if ranks.is_zero else [f"node-{ranks.rank}"]
    assert ranks.nodes == expected, ranks.nodes
    ranks.leave()
    return 0


def test_rank_zero_knows_the_node_of_every_rank(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, 3, nodes_of_their_own) == [0, 0, 0]


def leave_at_different_times() -> int:
    ranks, _ = connect()
    time.sleep(0.5 * ranks.rank)
    begin = time.monotonic()
    ranks.leave()
    return 0 if ranks.rank == 2 or time.monotonic() - begin > 0.3 else 1


def test_no_rank_leaves_under_another(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, 3, leave_at_different_times) == [0, 0, 0]


def leave_without_rank_one() -> int:
    ranks, _ = connect(timeout_seconds=2.0)
    if ranks.rank == 1:
        return 0
    begin = time.monotonic()
    ranks.leave()
    return 0 if 1.5 < time.monotonic() - begin < 15 else 1


@pytest.mark.slow
def test_a_rank_that_does_not_come_to_leave_is_not_waited_for_longer_than_the_timeout(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, 2, leave_without_rank_one) == [0, 0]


def test_rank_zero_which_may_host_the_store_leaves_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store and a watchdog that are only looked at here: rank 1 is this thread."""
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    store, watchdog = HashStore(), SimpleNamespace(close=lambda: None)
    values: dict[str, Any] = {"device": torch.device("cpu"), "group_timeout": timedelta(seconds=30), "nodes": ["a"]}
    values |= {"timeout_seconds": 30.0, "watchdog": watchdog, "store": store, "heartbeats": store, "flags": None}
    rank_zero = threading.Thread(target=connection.Connection(rank=0, world_size=2, **values).leave, daemon=True)
    rank_zero.start()
    store.add("arrived", 1)
    rank_zero.join(0.5)
    assert rank_zero.is_alive(), "rank 1 has come, and still needs the store to say that it has left"
    store.add("left", 1)
    rank_zero.join(20)
    assert not rank_zero.is_alive()
