"""Ranks on this machine that Python code starts, kills and waits for. `verify` rehearses accidents with them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import multiprocessing
import os
import secrets
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

# A server process imports torch once, and every rank is a fork of it, which starts in a fraction of a second.
_CONTEXT = multiprocessing.get_context("forkserver")


PORTS = range(10000, 15000)
"""From 32768 on Linux gives ports to whoever asks for any, and ours might be taken before a rank listens on it."""

_next = itertools.count(secrets.randbelow(len(PORTS)))


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now, and another one at each call.

    Raises:
        OSError: all of PORTS are taken.
    """
    for _ in PORTS:
        port = PORTS[next(_next) % len(PORTS)]
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError(errno.EADDRINUSE, f"no free port from {PORTS.start} to {PORTS.stop - 1}")


class LocalRanks:
    """Processes with torchrun's variables, each of which calls the same function.

    As a context manager it kills those that are still alive at the end.

    Args:
        world_size: how many processes.
        log: a file to which all that they print is appended.
        function: must be importable by name; called with `args`, returns an exit code.
        preload: modules that the fork server imports at its first use.
    """

    def __init__(
        self,
        world_size: int,
        log: Path,
        function: Callable[..., int],
        args: Sequence[Any],
        preload: Sequence[str] = (),
    ) -> None:
        self.log = log
        _CONTEXT.set_forkserver_preload(list(preload))
        shared: dict[str, object] = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        self.processes = []
        for rank in range(world_size):
            variables = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            process = _CONTEXT.Process(target=_rank_main, args=(variables, log, function, args))
            process.start()
            self.processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self, rank: int | None = None) -> None:
        """Send SIGKILL to one rank, or to all at once as when a node dies, and wait until they are gone."""
        victims = self.processes if rank is None else [self.processes[rank]]
        for process in victims:
            process.kill()
        for process in victims:
            process.join(30)

    def alive(self) -> bool:
        """Whether any of them still runs."""
        return any(process.is_alive() for process in self.processes)

    def exit_codes(self, timeout_seconds: float) -> list[int | None]:
        """Wait for all; the exit codes by rank, None for a rank that still runs, -9 for one that was killed."""
        deadline = time.monotonic() + timeout_seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def output(self) -> str:
        """What the log holds so far: all that these ranks have printed, and others before them."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _rank_main(variables: dict[str, str], log: Path, function: Callable[..., int], args: Sequence[Any]) -> None:
    os.environ.update(variables)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    code = 1
    try:
        code = function(*args)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
