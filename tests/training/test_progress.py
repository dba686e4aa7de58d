"""What a person reads while a run trains: how long it will take, and lines that are not too many."""

from __future__ import annotations

from typing import Any

import pytest

from ddpm_dist.training import progress
from ddpm_dist.training.progress import Progress


class Clock:
    """A clock that a test sets."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def record(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": step / 100, "loss": 0.5, "lr": 1e-3, "images_per_second": 320.0}


def lines_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: int, every: int, seconds_a_step: float
) -> list[str]:
    """What is printed in a run whose first steps are five times as slow as all others."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    shown = Progress(0, target)
    for step in range(every, target + 1, every):
        clock.now += every * seconds_a_step * (5 if step == every else 1)
        shown.update(record(step))
    shown.close()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(("seconds_a_step", "expected"), [(0.05, "46 s"), (0.5, "8 min"), (10.0, "2.7 h")])
def test_the_time_that_it_will_take_is_said_once_and_early(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds_a_step: float, expected: str
) -> None:
    lines = lines_of(monkeypatch, capsys, target=1000, every=10, seconds_a_step=seconds_a_step)
    said = [number for number, line in enumerate(lines) if "on this machine" in line]
    assert said == [1], lines[:5]  # after the first line, and before ten seconds have passed
    assert f"about {expected} more to step 1000" in lines[1]


def test_the_time_left_does_not_count_the_slow_first_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of(monkeypatch, capsys, target=1000, every=10, seconds_a_step=0.1)
    assert next(line for line in lines if line.startswith("step 110/")).endswith("89 s left")
    assert lines[-1].startswith("step 1000/1000")
    assert lines[-1].endswith("0 s left")


def test_a_log_file_gets_a_line_every_ten_seconds_and_the_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        line for line in lines_of(monkeypatch, capsys, target=1000, every=10, seconds_a_step=0.05) if line[:4] == "step"
    ]
    assert len(lines) == 1 + 4 + 1
