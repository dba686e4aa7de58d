"""Stop signals. Handlers only set a flag; what is to be done is decided between steps. No torch here."""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


class StopSignal:
    """Remembers the first stop signal that this process received. Install it before `import torch`."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._pid = os.getpid()

    def install(self, *, under_launcher: bool) -> StopSignal:
        """Take over the stop signals.

        Args:
            under_launcher: also ask the kernel for SIGTERM when the launcher dies, so that no worker outlives it.
        """
        for number in SIGNALS:
            # Under nohup a hang-up is ignored, and is to stay so.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        if under_launcher:
            self._follow_launcher()
        return self

    def requested(self) -> bool:
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A forked child that has not reset its handlers must not believe that it is the trainer.
        if os.getpid() == self._pid and self.received is None:
            self.received = signal.Signals(number)

    def _follow_launcher(self) -> None:
        launcher = os.getppid()
        try:
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        except (OSError, AttributeError):  # not Linux
            return
        if os.getppid() != launcher:  # it died before we asked
            self.received = signal.SIGTERM


def ignore_in_child(worker_id: int = 0) -> None:
    """A loader worker's `worker_init_fn`. torchrun and terminals signal whole process groups: a worker that
    obeyed would die under the trainer before it could save. It ends when its trainer closes it or is gone.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
