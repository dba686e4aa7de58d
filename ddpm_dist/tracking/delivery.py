"""When a run is shipped: all the time beside its trainer, from a process of its own, or once, by `ddpm_dist.sync`.

python -m ddpm_dist.tracking.delivery RUN_DIR --follow PID

The trainer never imports MLflow, and waits for it only at the end of a run (see tracking.process).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

from ddpm_dist.output import drop_what_cannot_be_written
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.run.lease import is_held
from ddpm_dist.tracking.description import surroundings
from ddpm_dist.tracking.destination import prepare_client
from ddpm_dist.tracking.locks import locked
from ddpm_dist.tracking.shipper import NotDelivered, Shipper
from ddpm_dist.tracking.signs import NOT_YET, UNANSWERED, Sign, no_sign, sign_into

POLL_SECONDS = 2.0
LAST_TRIES_SECONDS = 60.0
SYNC_PATIENCE_SECONDS = LAST_TRIES_SECONDS + 15.0  # a request of the shipper that gives up may take that long


def true_state(directory: RunDirectory, trainer_alive: bool) -> str:
    """What status.json says, except that a run whose trainer is dead is not running: it has failed."""
    state = str(directory.read_status().get("state", "running"))
    return "failed" if state == "running" and not trainer_alive else state


def sync(directory: RunDirectory) -> str:
    """Ship everything at once, and the true state.

    Where the shipper of an attempt that has ended is still trying, it is waited for.

    Returns:
        the state that MLflow was told.

    Raises:
        NotDelivered: try again later.
    """

    def state() -> str:
        running = directory.read_status().get("state", "running") == "running"
        return true_state(directory, trainer_alive=running and is_held(directory.attempts))

    prepare_client()
    patience = 0.0 if state() == "running" else SYNC_PATIENCE_SECONDS
    try:
        with locked(directory.path / ".shipper.lock", patience):
            told = state()
            Shipper(directory).ship(told)
            return told
    except TimeoutError:
        raise NotDelivered("the shipper of this run is at work on it") from None


def follow(directory: RunDirectory, trainer_pid: int, sign: Sign = no_sign) -> int:
    """Ship until the trainer is gone and all is delivered, or the last tries are over.

    Args:
        sign: told when MLflow is asked and when it answers (see tracking.signs).

    Returns:
        an exit code: 0 if all is delivered.
    """
    shipper = Shipper(directory, surroundings(), sign)
    give_up: list[float] = []
    trouble = ""
    while True:
        state = true_state(directory, trainer_alive=os.getppid() == trainer_pid)
        ended = state != "running"
        try:
            shipper.ship(state)
            if ended:
                return 0
            wait = POLL_SECONDS
        except NotDelivered as error:
            if str(error) != trouble:  # it is asked again every few seconds, perhaps for days
                print(f"{time.strftime('%F %T')} {NOT_YET}{error}", flush=True)
            trouble = str(error)
            wait = POLL_SECONDS / 2 if ended else 2 * POLL_SECONDS  # at the end somebody may be waiting
        if ended:
            give_up = give_up or [time.monotonic() + LAST_TRIES_SECONDS]
            if time.monotonic() > give_up[0]:
                print(f"gave up; later: python -m ddpm_dist.sync {directory.path}", flush=True)
                return 1
        _sleep_while_running(wait, directory, trainer_pid)


def _sleep_while_running(seconds: float, directory: RunDirectory, trainer_pid: int) -> None:
    """Sleep, but wake early when the attempt ends: the trainer may be waiting for us."""
    was_running = true_state(directory, os.getppid() == trainer_pid) == "running"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if was_running and true_state(directory, os.getppid() == trainer_pid) != "running":
            return
        time.sleep(min(0.2, seconds))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ddpm_dist.tracking.delivery", description=__doc__)
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("--follow", type=int, required=True, metavar="PID", help="the trainer, our parent")
    parser.add_argument("--signs", type=int, metavar="FD", help="a pipe to the trainer, for signs")
    args = parser.parse_args()
    drop_what_cannot_be_written("stdout", "stderr")  # shipper.log may lie on a full disk
    prepare_client()
    directory, sign = RunDirectory(args.run_directory), no_sign if args.signs is None else sign_into(args.signs)
    with contextlib.ExitStack() as held:
        lock = directory.path / ".shipper.lock"
        try:
            held.enter_context(locked(lock, patience_seconds=0))
        except TimeoutError:  # the shipper of the last attempt may still be trying a server that is down
            sign(UNANSWERED)
            held.enter_context(locked(lock))
        return follow(directory, args.follow, sign)


if __name__ == "__main__":
    sys.exit(main())
