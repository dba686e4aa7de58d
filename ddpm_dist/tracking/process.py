"""The shipper as the trainer sees it: a process that is started, revived and, at the end, waited for."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.tracking import address
from ddpm_dist.tracking.signs import ANSWERED, LOCAL, NOT_YET, REFUSED, UNANSWERED, read_signs

REVIVE_SECONDS = 5.0
SILENCE_SECONDS = 5.0
_LOOK_SECONDS = 0.05


class ShipperProcess:
    """Mirrors a run directory into MLflow while the trainer lives, and up to a minute longer."""

    def __init__(self, run_directory: Path) -> None:
        self._directory = RunDirectory(run_directory)
        self._process, self._signs = self._spawn()
        self._started = time.monotonic()

    @classmethod
    def start(cls, run_directory: Path) -> ShipperProcess:
        """Start it in a session of its own, since launchers signal whole process groups."""
        return cls(run_directory)

    def revive(self) -> None:
        """Start it again if it was killed. Cheap enough for every line that is logged."""
        if self._process.poll() is None or time.monotonic() - self._started < REVIVE_SECONDS:
            return
        self._started = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk, perhaps: the next attempt or `sync` delivers
            process, signs = self._spawn()
            os.close(self._signs)
            self._process, self._signs = process, signs

    def _spawn(self) -> tuple[subprocess.Popen[bytes], int]:
        """The process, and our end of the pipe for its signs."""
        # It is no rank, and must not take cores from one.
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, "-m", "ddpm_dist.tracking.delivery", str(self._directory.path)]
        with open(self._directory.path / "shipper.log", "ab") as log:
            signs, theirs = os.pipe()
            os.set_blocking(signs, False)
            try:
                process = subprocess.Popen(
                    [*command, "--follow", str(os.getpid()), "--signs", str(theirs)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    pass_fds=(theirs,),
                    start_new_session=True,
                )
            except OSError:
                os.close(signs)
                raise
            finally:
                os.close(theirs)
        return process, signs

    def wait(self, timeout_seconds: float) -> None:
        """Until everything is delivered, for as long as MLflow answers; the shipper goes on without us for a minute.

        A shipper that has not asked yet (importing mlflow takes seconds, making a database too), or that writes into
        a database file, is given the whole time. A server that was asked gets SILENCE_SECONDS for each answer, so one
        that is down or hangs costs the trainer no more than that. A server that refuses this user is not waited for.

        Args:
            timeout_seconds: no longer than this in any case.
        """
        if self._delivers(timeout_seconds):
            return
        path = self._directory.path
        words = (path / "shipper.log").read_text(errors="replace").splitlines() or ["shipper.log says nothing"]
        reason = words[-1].rpartition(NOT_YET)[2]
        print(
            f"MLflow has not got everything: {reason}. To deliver it later: python -m ddpm_dist.sync {path}", flush=True
        )

    def _delivers(self, timeout_seconds: float) -> bool:
        """Whether the shipper ends well, in time."""
        give_up = deadline = time.monotonic() + timeout_seconds
        # The first reading goes back to the start of the attempt: what was refused then may be allowed by now.
        signs = read_signs(self._signs).replace(REFUSED, UNANSWERED)
        while self._process.poll() is None:
            now = time.monotonic()
            if signs.endswith(REFUSED):
                return False
            if signs.endswith(LOCAL):
                give_up = deadline
            elif ANSWERED in signs or (signs and give_up == deadline):  # further tries in vain give no further time
                give_up = min(deadline, now + SILENCE_SECONDS)
            if now >= give_up:
                return False
            time.sleep(_LOOK_SECONDS)
            signs = read_signs(self._signs)
        return self._process.returncode == 0

    def how_to_look(self) -> str:
        """A command and a link for a person. The link is known once the run is in MLflow, so ask after `wait`."""
        return address.how_to_look(self._directory)
