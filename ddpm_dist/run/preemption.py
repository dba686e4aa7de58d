"""Stop signals. A handler only sets a flag; the training loop looks at it between steps. No torch is imported here."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from ddpm_dist.errors import ExitCode

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT)
_PR_SET_PDEATHSIG = 1
LAUNCHER_GONE_SECONDS = 4.5  # for the save, after the launcher has died; then the process ends itself


class StopSignal:
    """Remembers the first stop signal that this process received. Install it before `import torch`."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._pid = os.getpid()

    def install(self, *, under_launcher: bool) -> StopSignal:
        """Take over the stop signals.

        Args:
            under_launcher: also have the kernel send SIGTERM when the launcher dies, so that no rank outlives it.
        """
        for number in SIGNALS:
            # nohup has SIGHUP ignored, and it stays ignored.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        launcher = self._follow_launcher() if under_launcher else None
        self._listen(launcher)
        return self

    @contextlib.contextmanager
    def installed(self, *, under_launcher: bool) -> Iterator[StopSignal]:
        """Take over the stop signals for a block of code; afterwards they do what they did before. See `install`."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            yield self.install(under_launcher=under_launcher)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(signal.set_wakeup_fd(-1))  # which ends the thread that listens

    def requested(self) -> bool:
        """Whether a stop signal has come."""
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A forked child inherits this handler until it resets it. A signal to the child is none to this process.
        if os.getpid() == self._pid:
            self._remember(number)

    def _remember(self, number: int) -> None:
        if number in SIGNALS and self.received is None:
            self.received = signal.Signals(number)

    def _follow_launcher(self) -> int:
        """Have the kernel send SIGTERM when the launcher dies; returns the launcher's pid."""
        launcher = os.getppid()
        try:
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        except (OSError, AttributeError):  # not Linux
            return launcher
        if os.getppid() != launcher:  # it died before we asked
            self.received = signal.SIGTERM
        return launcher

    def _listen(self, launcher: int | None) -> None:
        """Watch for signals in a thread, too.

        Python runs a handler only in the main thread, and only once that comes back from a collective. The thread
        reads the numbers of the signals from a pipe at once, and ends the process if the launcher is gone.
        """
        readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1) and None)  # not the children's signals

        def listen() -> None:
            while launcher is None or os.getppid() == launcher:
                if select.select([readable], [], [], None if launcher is None else 0.25)[0]:
                    numbers = os.read(readable, 64)
                    if not numbers:  # the other end was closed
                        return os.close(readable)
                    for number in numbers:
                        self._remember(number)
            self._remember(signal.SIGTERM)
            time.sleep(LAUNCHER_GONE_SECONDS)
            os._exit(ExitCode.SOFTWARE)

        threading.Thread(target=listen, daemon=True, name="signals").start()


def ignore_from_now_on() -> None:
    """For a process that is done and about to exit: a signal that comes late must not change its exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def ignore_in_child(worker_id: int = 0) -> None:
    """Ignore stop signals in a loader worker; for `worker_init_fn`.

    torchrun and terminals send a signal to a whole process group. A worker that obeyed it would die before its rank
    has saved, and the rank with it. The worker ends when its rank closes it or is gone.
    """
    ignore_from_now_on()
