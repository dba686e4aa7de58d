"""How an attempt ends that was not broken off: what rank 0 writes, and what a person may want to do next."""

from __future__ import annotations

from ddpm_dist.command import as_typed
from ddpm_dist.errors import ExitCode
from ddpm_dist.evaluation.pictures import save_curves
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.run.outcome import Attempt
from ddpm_dist.run.preemption import StopSignal
from ddpm_dist.tracking.journal import read_metrics
from ddpm_dist.training.recorder import RankZeroRecorder


def conclude(code: ExitCode, stop: StopSignal, attempt: Attempt, recorder: RankZeroRecorder) -> None:
    """Rank 0: write to disk and print how this attempt ended."""
    directory, finished = attempt.directory, code == ExitCode.FINISHED
    reason = "target reached" if finished else f"stopped: {recorder.why_stopped()}"
    if not finished and not recorder.why_stopped():
        reason = f"stopped by {name_of(stop)}"
    if finished:
        try:
            save_curves(read_metrics(directory.metrics_file), directory.path / "curves.png")
        except Exception as error:  # the run is safe on disk: a missing picture must not make it fail
            recorder.say(f"warning: curves.png was not drawn ({type(error).__name__}: {error})")
    attempt.end(code, reason)
    recorder.say(f"{directory.path}: {reason} at step {attempt.step}")
    for line in _what_next(directory, attempt, finished):
        recorder.say(f"  {line}")


def _what_next(directory: RunDirectory, attempt: Attempt, finished: bool) -> list[str]:
    """What there is to look at, and the commands that a person may want next."""
    python = as_typed("python")
    if not finished and attempt.step == attempt.target:
        return ["resume    all steps are trained; the same command again draws what is missing and ends the run"]
    if not finished:
        return [f"resume    the same command again: it goes on after step {attempt.step} of {attempt.target}"]
    pictures = [directory.samples / f"step-{attempt.step:08d}.png", directory.path / "curves.png"]
    shown = ", ".join(str(path) for path in pictures if path.exists())
    return [
        *([f"pictures  {shown}"] if shown else []),
        f"more      {python} -m ddpm_dist.sample {directory.path} --num 1000 --out images.npz",
        f"history   {python} -m ddpm_dist.status {directory.path}",
    ]


def name_of(stop: StopSignal) -> str:
    """The stop signal, for a person."""
    return stop.received.name if stop.received else "a signal to another rank"
