"""What ranks do together: start and leave, train through DDP, add up, agree to stop, wait for rank 0."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm_dist.errors import ConfigError, ExitCode, StopRequested, UserError
from ddpm_dist.parallel.environment import RankEnvironment, node_name, rendezvous_from_slurm
from ddpm_dist.parallel.failures import Failure, RankLost, RankZeroFailed, user_error
from ddpm_dist.parallel.interface import choose_interface
from ddpm_dist.parallel.watchdog import Watchdog

T = TypeVar("T")
BEAT_SECONDS = 1.0
POLL_SECONDS = 0.02


class Wish(enum.IntEnum):
    """What a rank may ask of all between two steps; the greatest wins."""

    NONE = 0
    SAVE = 1
    STOP = 2


def pick_device(requested: str, env: RankEnvironment) -> torch.device:
    """cuda:local_rank or cpu.

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
        return torch.device("cuda", 0)  # srun --gpus-per-task=1 shows each task its own (NCCL refuses a shared one)
    if env.local_world_size > count:  # the same answer on every rank of the node
        raise ConfigError(f"{env.local_world_size} ranks on a node with {count} GPUs; start one rank a GPU")
    return torch.device("cuda", env.local_rank)


class Ranks:
    """The ranks of one job. With one process, everything here is local and torch.distributed stays unused.

    Collective methods are marked: every rank must call them in the same order.

    Args:
        env: this process among its peers.
        device: decides the backend, NCCL for CUDA and gloo for CPU.
        timeout_seconds: a collective that takes longer is an error, and so is a rank 0 silent for so long.
        stop_requested: whether this process was asked to stop.

    Attributes:
        nodes: on rank 0, the node of every rank, by rank.
    """

    def __init__(
        self,
        env: RankEnvironment,
        device: torch.device,
        timeout_seconds: float,
        stop_requested: Callable[[], bool],
    ) -> None:
        self.rank, self.world_size = env.rank, env.world_size
        self.device = device
        self._timeout_seconds = timeout_seconds
        self._stop_requested = stop_requested
        self._solo_count = 0
        self.failure_is_shared = False  # whether the error that ends us is known to all ranks
        self._pending_wish: tuple[dist.Work, Tensor] | None = None
        self.watchdog: Watchdog | None = None
        self.nodes = [node_name()]
        if self.world_size > 1:
            self._connect(env, timedelta(seconds=timeout_seconds))

    def _connect(self, env: RankEnvironment, timeout: timedelta) -> None:
        if env.launcher == "slurm":
            os.environ.update(rendezvous_from_slurm())
            os.environ.update(RANK=str(env.rank), WORLD_SIZE=str(env.world_size))
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun --max-restarts keeps its store over the lives of the ranks, stale keys and all.
        store = dist.PrefixStore(f"life/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        store.set(f"node/{rank}", node_name())
        if env.local_world_size < world_size:
            choose_interface(dist.PrefixStore("interface", store), rank, world_size)
        watched = dist.PrefixStore("watchdog", store.clone())
        self.watchdog = Watchdog(watched, rank, world_size, timeout.total_seconds(), self._stop_requested)
        self.watchdog.arm()  # gloo's own connecting knows no time-out
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self.device)
        # NCCL aborts the process: our watchdog, which leaves word, comes first.
        self._group_timeout = timeout + timedelta(seconds=60) if cuda else timeout
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=self._group_timeout,
            device_id=self.device if cuda else None,
        )
        self.watchdog.disarm()
        # Several worlds of one are what a wrong launch looks like; training would go on, N times over.
        assert dist.get_world_size() == self.world_size, "the process group has another size than the launcher said"
        self._store = dist.PrefixStore("ddpm_dist", store)
        self._beats = dist.PrefixStore("watchdog", store)
        # Flags travel on the CPU and in a group of their own, so that they never wait for a GPU.
        self._flags = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
        if self.is_zero:
            self.nodes = [store.get(f"node/{each}").decode() for each in range(world_size)]

    @property
    def is_zero(self) -> bool:
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose backward averages gradients over the ranks. Collective."""
        if self.world_size == 1:
            return module
        return DistributedDataParallel(
            module,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )

    def partners_by_bit(self) -> list[dist.ProcessGroup]:
        """For each bit of a rank's number, lowest first: the group of the two ranks that differ in it. Collective.

        For a power of two of ranks.
        """
        if self.world_size == 2:
            return [cast(dist.ProcessGroup, dist.group.WORLD)]
        if self.watchdog is not None:
            self.watchdog.arm()  # gloo's own connecting knows no time-out
        groups = []
        for bit in range(self.world_size.bit_length() - 1):
            pairs = [[rank, rank | 1 << bit] for rank in range(self.world_size) if not rank >> bit & 1]
            mine, _ = dist.new_subgroups_by_enumeration(pairs, timeout=self._group_timeout)
            groups.append(cast(dist.ProcessGroup, mine))
        if self.watchdog is not None:
            self.watchdog.disarm()
        return groups

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place. Collective."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: int) -> list[int]:
        """An int64 of every rank, by rank. Waits for the device. Collective."""
        if self.world_size == 1:
            return [value]
        values = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        values[self.rank] = value
        dist.all_reduce(values)
        return [int(each) for each in values.tolist()]

    def agree(self, wish: Wish = Wish.NONE) -> Wish:
        """The strongest wish of any rank, the same on every rank at the same call. Collective.

        A rank that was asked to stop wishes that, whatever it is called with.

        The answer is that of the wishes at the previous call: the all-reduce runs beside the step in between,
        so nobody waits for it.
        """
        wish = Wish.STOP if self._stop_requested() else wish
        if self.world_size == 1:
            return wish
        answer = self._finish_pending_wish()
        if self.watchdog is not None:
            self.watchdog.tick()
        flag = torch.tensor([wish], dtype=torch.int32)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._flags, async_op=True)
        assert work is not None
        self._pending_wish = (work, flag)
        return answer

    def _finish_pending_wish(self) -> Wish:
        if self._pending_wish is None:
            return Wish.NONE
        work, flag = self._pending_wish
        self._pending_wish = None
        work.wait()
        return Wish(int(flag.item()))

    def on_rank_zero(self, work: Callable[[Callable[[], bool]], Any]) -> Any:
        """Rank 0 does the work alone while the others wait outside of any collective. Collective.

        However long it takes, no collective times out: the others look at a key of the store, rank 0 beats
        from a thread. If rank 0 is silent for timeout_seconds the others give up. A stop signal that reaches
        any rank meanwhile is passed to the work, which may raise StopRequested; all ranks then see that.

        Args:
            work: called on rank 0 with `should_stop() -> bool`. What it returns must be plain JSON.

        Returns:
            what the work returned, on every rank.

        Raises:
            StopRequested: on every rank, if the work raised it.
            RankZeroFailed: on the other ranks, if the work raised anything else (rank 0 gets that itself).
            RankLost: on the other ranks, if rank 0 fell silent.
        """
        if self.world_size == 1:
            return work(self._stop_requested)
        if self.watchdog is not None:
            self.watchdog.disarm()
        self._solo_count += 1
        name = f"solo/{self._solo_count}"
        if not self.is_zero:
            return self._wait_for_rank_zero(name)
        outcome: dict[str, Any] = {"failed": ExitCode.SOFTWARE}
        try:
            with self._beating(name) as should_stop:
                value = work(should_stop)
            outcome = {"value": value}
        except StopRequested:
            outcome = {"stopped": True}
            raise
        except UserError as error:
            outcome = {"failed": error.exit_code}
            raise
        except RankLost:
            outcome["lost"] = True
            raise
        finally:
            # Who is lost will not come to leave together with the others.
            self.failure_is_shared = "failed" in outcome and "lost" not in outcome
            self._store.set(f"{name}/outcome", json.dumps(outcome))
        return value

    @contextlib.contextmanager
    def _beating(self, name: str) -> Iterator[Callable[[], bool]]:
        """Beats in the store until left; yields whether any rank was asked to stop."""
        leave, stop_elsewhere = threading.Event(), threading.Event()

        def beat() -> None:
            while not leave.wait(BEAT_SECONDS):
                self._store.add(f"{name}/beat", 1)
                if self._store.check([f"{name}/stop"]):
                    stop_elsewhere.set()

        thread = threading.Thread(target=beat, daemon=True, name="beat")
        thread.start()
        try:
            yield lambda: self._stop_requested() or stop_elsewhere.is_set()
        finally:
            leave.set()
            thread.join()

    def _wait_for_rank_zero(self, name: str) -> Any:
        last_beat, last_change, told = -1, time.monotonic(), False
        next_look = last_change
        while not self._store.check([f"{name}/outcome"]):
            now = time.monotonic()
            if self._stop_requested() and not told:
                self._store.set(f"{name}/stop", "1")
                told = True
            if now >= next_look:
                next_look = now + BEAT_SECONDS
                beat = self._store.add(f"{name}/beat", 0)
                if beat != last_beat:
                    last_beat, last_change = beat, now
                elif now - last_change > self._timeout_seconds:
                    raise RankLost(f"rank 0 has been silent for {self._timeout_seconds:g} s", [0])
            time.sleep(POLL_SECONDS)
        outcome = json.loads(self._store.get(f"{name}/outcome"))
        if "stopped" in outcome:
            raise StopRequested
        if "failed" in outcome:
            self.failure_is_shared = "lost" not in outcome
            raise RankZeroFailed(outcome["failed"])
        return outcome["value"]

    def all_succeed(self, work: Callable[[], T]) -> T:
        """Every rank does the work; one failure is everybody's. Collective.

        Returns:
            what this rank's work returned.

        Raises:
            UserError: this rank's own (rank 0 also gets that of another rank, which it is to report).
            RankZeroFailed: on the other ranks, if any rank failed.
        """
        if self.world_size == 1:
            return work()
        name = f"each/{self._solo_count}"
        value: T | None = None

        def work_and_collect(should_stop: Callable[[], bool]) -> None:
            nonlocal value
            value = work()
            for rank in range(1, self.world_size):
                outcome = json.loads(self._await_from(rank, f"{name}/{rank}", should_stop))
                if outcome["failed"]:
                    raise user_error(outcome["failed"], outcome["message"], rank)

        if not self.is_zero:
            outcome: dict[str, Any] = {"failed": 0}
            try:
                value = work()
            except UserError as error:
                outcome = {"failed": error.exit_code, "message": f"{error} (seen by rank {self.rank})"}
            except Exception as error:
                message = f"rank {self.rank}: {type(error).__name__}: {error}"
                self._store.set(f"{name}/{self.rank}", json.dumps({"failed": ExitCode.SOFTWARE, "message": message}))
                raise
            self._store.set(f"{name}/{self.rank}", json.dumps(outcome))
        self.on_rank_zero(work_and_collect)
        return cast(T, value)

    def _await_from(self, rank: int, key: str, should_stop: Callable[[], bool]) -> bytes:
        """A key that another rank will set, for as long as that rank's heartbeat goes on."""
        last_beat, last_change = -1, time.monotonic()
        while not self._store.check([key]):
            if should_stop():
                raise StopRequested
            beat = self._beats.add(f"beat/{rank}", 0)
            if beat != last_beat:
                last_beat, last_change = beat, time.monotonic()
            elif time.monotonic() - last_change > self._timeout_seconds:
                raise RankLost(f"rank {rank} has been silent for {self._timeout_seconds:g} s", [rank])
            time.sleep(POLL_SECONDS)
        return self._store.get(key)

    def fail_together(self, error: UserError) -> NoReturn:
        """Leave for a reason that every rank has found by itself; rank 0 says it. Collective."""
        self.failure_is_shared = True
        if self.is_zero:
            raise error
        raise RankZeroFailed(error.exit_code)

    def report_failure(self, exit_code: int, reason: str) -> None:
        """Leave word of why this rank ends alone; rank 0 finds it in `reported_failure`."""
        if self.world_size > 1 and not self.is_zero:
            with contextlib.suppress(RuntimeError):
                self._store.set("failure", json.dumps([exit_code, self.rank, reason]))

    def reported_failure(self) -> Failure | None:
        """Of a rank that ended alone, if one left word."""
        if self.world_size == 1:
            return None
        with contextlib.suppress(RuntimeError):
            if self._store.check(["failure"]):
                exit_code, rank, reason = json.loads(self._store.get("failure"))
                return Failure(exit_code, f"rank {rank}: {reason}", (rank,))
        return None

    def lost(self, error: BaseException) -> RankLost:
        """The error of a collective, with the names of the ranks that give no sign of life. Takes seconds."""
        who, ranks = "", getattr(error, "ranks", ())
        if self.watchdog is not None:
            self.watchdog.disarm()
            who = f"; {self.watchdog.who_is_silent()}"
            ranks = self.watchdog.silent or ranks
        return RankLost(f"lost contact to another rank ({' '.join(str(error).split())}){who}", ranks)

    def leave(self) -> None:
        """Ends the process group once every rank is here, so that no rank exits under another. Collective."""
        if self.world_size == 1:
            return
        if self.watchdog is not None:
            self.watchdog.disarm()
        self._finish_pending_wish()
        self._count_to("arrived", self.world_size)
        if self.is_zero:
            self._count_to("left", self.world_size)  # it may host the store, so it goes last
        else:
            self._store.add("left", 1)
        if self.watchdog is not None:
            self.watchdog.close()
        dist.destroy_process_group()

    def _count_to(self, key: str, number: int) -> None:
        """Add one and wait, outside of any collective, until the key has reached the number or time is up."""
        deadline = time.monotonic() + self._timeout_seconds
        self._store.add(key, 1)
        while self._store.add(key, 0) < number and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
