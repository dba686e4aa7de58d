"""Images as a job of one or more ranks: each draws blocks of its own, at its own speed, and rank 0 writes the result.

Whatever happens to the ranks, the blocks that are drawn stay, and the same command goes on with those that are
missing, on any number of ranks. Which rank draws a block changes nothing in it.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from ddpm_dist.backends import configure_backends
from ddpm_dist.config import Config
from ddpm_dist.errors import ConfigError, DataError, ExitCode, StopRequested
from ddpm_dist.evaluation.drawing import Drawing, Request, device_for, draw_grid
from ddpm_dist.evaluation.image_files import Target
from ddpm_dist.evaluation.parts import Parts
from ddpm_dist.parallel.environment import RankEnvironment, cpu_threads
from ddpm_dist.parallel.failures import is_lost_contact
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.run.preemption import StopSignal

SAY_SECONDS = 60.0  # between two lines of progress in a log
ShouldStop = Callable[[], bool]


def draw_on_ranks(request: Request, env: RankEnvironment, stop: StopSignal) -> Path:
    """Draw the images of a request, and write them. Collective.

    Args:
        request: the same on every rank.
        env: this process among its peers.
        stop: knows whether a stop signal has come.

    Returns:
        the file or folder that was written.

    Raises:
        StopRequested: a rank was asked to stop. If the images are a data set, those that are drawn are kept.
        UserError: something that the user can mend; the caller prints it.
        FailedElsewhere: on other ranks, for the error that one rank reports.
    """
    # Nothing is computed together, so the ranks are connected by their CPUs.
    ranks = Ranks(env, torch.device("cpu"), Config().distributed.timeout_seconds, stop.requested)
    try:
        if request.is_data_set:
            path = DataSet(request, env, ranks).draw()
        else:
            path = Path(ranks.on_rank_zero(lambda should_stop: str(draw_grid(request, env, _stopping(should_stop)))))
    except StopRequested:
        ranks.leave()
        raise
    except BaseException as raised:
        _fail(raised, ranks)
    ranks.leave()
    return path


def _fail(raised: BaseException, ranks: Ranks) -> NoReturn:
    """Leave, together with the other ranks where they know of the error, and raise it."""
    error = ranks.lost(raised) if is_lost_contact(raised) else raised
    if ranks.failure_is_shared:
        ranks.leave()
    if error is raised:
        raise raised
    raise error from raised


def _stopping(should_stop: ShouldStop) -> Callable[[], None]:
    """A function that raises StopRequested once the work is to stop."""

    def look() -> None:
        if should_stop():
            raise StopRequested

    return look


class DataSet:
    """A folder of images or an .npz file that is being drawn, as one rank sees it.

    Args:
        request: which images.
        env: this process among its peers.
        ranks: the ranks that draw them.
    """

    def __init__(self, request: Request, env: RankEnvironment, ranks: Ranks) -> None:
        assert request.target is not None
        self._request, self._env, self._ranks = request, env, ranks
        self._target: Target = request.target
        self._parts = Parts(self._target)
        self._device = torch.device("cpu")
        self._drawing: Drawing | None = None

    def draw(self) -> Path:
        """Draw all images that are missing, and write the data set. Collective. Raises as `draw_on_ranks` does."""
        self._device = self._ranks.all_succeed(lambda: device_for(self._request.device, self._env))
        try:
            begun = self._ranks.on_rank_zero(self._begin)
            if begun is not None:
                drawing = self._ranks.all_succeed(lambda: self._join(begun))
                self._ranks.in_shares(lambda should_stop: self._draw_share(drawing, begun["missing"], should_stop))
                self._ranks.on_rank_zero(self._finish)
        except StopRequested:
            self._say_how_far()
            raise
        finally:
            self._parts.release()
        return self._target.path

    def _begin(self, should_stop: ShouldStop) -> dict[str, Any] | None:
        """On rank 0: find the checkpoint, claim the folder of the parts, and look which blocks are missing.

        Returns:
            what the other ranks need to know; None if all is written already.
        """

        def wait(seconds: float) -> None:
            time.sleep(seconds)
            _stopping(should_stop)()

        drawing = self._drawing = self._load_for_all()
        try:
            self._target.probe(self._request.num)
            self._parts.claim(wait)
            if self._parts.is_written(drawing.stamp(), self._request.num):
                self._parts.remove()
                return None
            self._parts.begin(drawing.stamp())
            missing = self._parts.missing(self._request.num)
            self._parts.refuse_without_space(self._request.num, missing)
        except OSError as error:
            raise self._target.cannot_be_written(error) from None
        drawing.say_what_is_drawn(self._parts.num_drawn(self._request.num))
        return {"step": drawing.run.step, "stamp": drawing.stamp(), "attempt": self._parts.attempt, "missing": missing}

    def _load_for_all(self) -> Drawing:
        """On rank 0: load the checkpoint that the data set was begun with; else the one that is asked for."""
        stamp = self._parts.read_stamp()
        if self._request.step is not None or stamp.get("run") != self._request.run.resolve().name:
            return Drawing.of(self._request, self._device, self._request.step)
        try:  # a run that still trains has newer checkpoints by now
            return Drawing.of(self._request, self._device, stamp["step"])
        except DataError as error:
            raise DataError(
                f"{error}. {self._parts.folder} was begun with step {stamp['step']}: restore that checkpoint to go on, "
                "or remove that folder to start anew; weights that are exported stay as they are while a run trains on"
            ) from None

    def _join(self, begun: dict[str, Any]) -> Drawing:
        """Load the run as rank 0 has done."""
        drawing = self._drawing or Drawing.of(self._request, self._device, begun["step"])
        self._parts.attempt, self._parts.stamp = begun["attempt"], begun["stamp"]
        if drawing.stamp() != begun["stamp"]:
            raise ConfigError(f"{self._request.run}: is not the same for all ranks; they need one file system")
        # On a CPU the number of threads changes the rounding, and so the images would depend on the number of ranks.
        threads = 1 if self._device.type == "cpu" else cpu_threads(self._env)
        configure_backends(drawing.run.config.train, threads)
        return drawing

    def _draw_share(self, drawing: Drawing, missing: list[int], should_stop: ShouldStop) -> None:
        """Draw every n-th of the missing blocks, where n is the number of ranks. Raises StopRequested."""
        mine, look = missing[self._ranks.rank :: self._ranks.world_size], _stopping(should_stop)
        with self._progress(len(mine) * drawing.num_calls()) as bar, _as_failed_disk():

            def on_step() -> None:
                bar.update()
                look()

            said = time.monotonic()
            for block in mine:
                self._parts.write(block, drawing.block(block, on_step))
                if self._ranks.is_zero and bar.disable and time.monotonic() - said > SAY_SECONDS:
                    said = time.monotonic()
                    drawn = self._parts.num_drawn(self._request.num)
                    print(f"{drawn} of {self._request.num} images are drawn", file=sys.stderr, flush=True)

    def _progress(self, num_calls: int) -> Any:
        """A bar on a terminal, for the share of rank 0."""
        disable = None if self._ranks.is_zero else True
        return tqdm(total=num_calls, unit="call", desc=f"{self._request.num} images", disable=disable)

    def _finish(self, should_stop: ShouldStop) -> None:
        """On rank 0: write the data set from its blocks, and remove them."""
        num = self._request.num
        with _as_failed_disk():
            self._target.write(self._parts.images(num, _stopping(should_stop)), num)
            self._parts.say_written(num)
            self._parts.remove()

    def _say_how_far(self) -> None:
        """On rank 0: print how many images are drawn when a stop signal ends this attempt."""
        if self._ranks.is_zero:
            num, drawn = self._request.num, ""
            if self._drawing is not None:
                self._parts.stamp = self._drawing.stamp()
                begun = self._parts.read_stamp() == self._parts.stamp
                drawn = f"; {self._parts.num_drawn(num) if begun else 0} of {num} images are drawn"
            print(f"stopped{drawn}. The same command goes on", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _as_failed_disk() -> Iterator[None]:
    """Report an error of the disk as one that the same command may get over, as it keeps what is drawn."""
    try:
        yield
    except OSError as error:
        failed = ConfigError(f"{error.filename}: {error.strerror}")
        failed.exit_code = ExitCode.SOFTWARE
        raise failed from None
