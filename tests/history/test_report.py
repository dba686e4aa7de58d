"""The report of attempts and metrics: steps lost, goodput, what is left. Damaged files cost facts, no traceback."""

from __future__ import annotations

from typing import Any

import pytest

from ddpm_dist.history.attempts import AttemptRecord, How
from ddpm_dist.history.report import Logged, Report, kept_steps, make_report, seconds_per_step

NOW = 2e9
BATCH = 10


def record(number: int, how: How, start: int | None, saved: int | None, seconds: float = 10.0, **facts: Any) -> Any:
    begun = 1e9 + 1000 * number
    facts = {"started": begun, "last_sign": begun + seconds, "start_step": start, "saved_step": saved, **facts}
    return AttemptRecord(number, how, **facts)


def lines(attempt: int, first: int, last: int, every: int = 1, seconds: float = 0.1) -> list[Logged]:
    """Steps first+1 .. last, each of which takes so long."""
    steps = range(first + every, last + 1, every)
    return [Logged(step, 1e9 + 1000 * attempt + seconds * (step - first), BATCH / seconds) for step in steps]


def report(records: list[AttemptRecord], logged: dict[int, list[Logged]], **status: Any) -> Report:
    return make_report("run", {"target": 100, **status}, records, logged, BATCH, NOW)


def lost(made: Report) -> list[int]:
    return [each.lost for each in made.attempts]


def test_steps_beyond_the_checkpoint_that_a_later_attempt_began_with_are_lost() -> None:
    records = [record(1, "died", 0, 20), record(2, "preempted", 20, 47), record(3, "finished", 47, 100)]
    made = report(records, {1: lines(1, 0, 27), 2: lines(2, 20, 47), 3: lines(3, 47, 100)})
    assert lost(made) == [7, 0, 0]
    assert [each.reached for each in made.attempts] == [27, 47, 100]
    assert (made.state, made.step, made.steps_left) == ("finished", 100, None)


def test_steps_of_a_dead_attempt_are_lost_before_anybody_trains_them_again() -> None:
    made = report([record(1, "died", 0, 20)], {1: lines(1, 0, 27)}, state="running", saved_step=20)
    assert lost(made) == [7]
    assert (made.state, made.step, made.saved_step, made.steps_left) == ("died", 27, 20, 80)


def test_a_damaged_checkpoint_costs_the_steps_of_several_attempts() -> None:
    records = [record(1, "died", 0, 20), record(2, "died", 20, 30), record(3, "running", 10, 10)]
    made = report(records, {1: lines(1, 0, 25), 2: lines(2, 20, 35)})
    assert lost(made) == [15, 15, 0]


def test_an_attempt_that_found_no_start_loses_nothing() -> None:
    records = [record(1, "died", 0, 20), record(2, "died", None, None), record(3, "running", 20, 20)]
    assert kept_steps(records, {}) == [20, 20, float("inf")]
    assert kept_steps(records[:2], {}) == [20, 20]


def test_goodput_is_the_share_of_time_in_steps_that_counted() -> None:
    """Two attempts of 10 s with 0.1 s a step: 50 and 60 steps, of which 10 were trained twice."""
    records = [record(1, "died", 0, 40), record(2, "finished", 40, 100)]
    made = report(records, {1: lines(1, 0, 50, every=5), 2: lines(2, 40, 100, every=5)})
    assert made.seconds == 20
    assert made.goodput == pytest.approx(0.5)
    assert made.lost_share == pytest.approx(0.05)


def test_an_interval_of_the_log_may_be_lost_in_part() -> None:
    records = [record(1, "died", 0, 15), record(2, "finished", 15, 100, seconds=0.0)]
    made = report(records, {1: lines(1, 0, 20, every=10)})
    assert made.goodput == pytest.approx(0.15)
    assert made.lost_share == pytest.approx(0.05)


def test_time_of_the_dead_ends_with_their_last_sign() -> None:
    made = report([record(1, "died", 0, 0, seconds=0.0)], {1: lines(1, 0, 30)})
    assert made.seconds == pytest.approx(3.0)


def test_a_running_attempt_counts_until_now_and_from_where_it_is() -> None:
    running = record(1, "running", 0, 20, started=NOW - 60)
    made = report([running], {1: lines(1, 0, 30)}, state="running")
    assert (made.state, made.seconds, made.steps_left) == ("running", 60, 70)
    assert made.seconds_left == pytest.approx(7.0)


def test_pace_is_that_of_the_last_attempt_with_pauses() -> None:
    assert seconds_per_step({}, BATCH) is None
    assert seconds_per_step({1: lines(1, 0, 9), 2: lines(2, 5, 9, seconds=0.5)}, BATCH) == pytest.approx(0.5)
    assert seconds_per_step({1: [Logged(1, 5.0, 20.0)]}, BATCH) == 0.5
    assert seconds_per_step({1: [Logged(1, 5.0, 0.0)]}, BATCH) is None


def test_a_new_attempt_beats_the_word_of_an_old_status() -> None:
    records = [record(1, "preempted", 0, 20), record(2, "running", None, None)]
    assert report(records, {}, state="preempted").state == "running"
    assert report([*records[:1], record(2, "left", None, None)], {}, state="preempted").state == "preempted"


def test_a_run_that_diverged_has_no_eta() -> None:
    assert report([record(1, "failed", 0, 20, exit_code=76)], {1: lines(1, 0, 25)}).steps_left is None


def test_nodes_are_judged_by_what_ended_the_attempts() -> None:
    on: dict[str, Any] = {"nodes": ("a", "x")}
    records = [record(1, "died", 0, 0, **on), record(2, "failed", 0, 0, exit_code=70, **on)]
    records += [record(3, "failed", 0, 0, exit_code=78, nodes=("x",)), record(4, "running", 0, 0, nodes=("b",))]
    assert "all 2 ran on the same nodes (a,x)" in report(records, {}).nodes_note
    made = report([*records[:3], record(4, "preempted", 0, 9, nodes=("a", "b"))], {})
    assert [each.nodes for each in made.suspicions] == [("x",)]
    assert made.nodes_note == ""


def test_a_run_of_which_hardly_anything_is_known_is_reported_all_the_same() -> None:
    damaged = AttemptRecord(1, "unknown")
    for status in ({}, {"state": [], "step": "x", "target": -1}, {"state": "preempted", "step": 5}):
        made = make_report("run", status, [damaged], {}, None, NOW)
        assert (made.goodput, made.seconds_left, made.attempts[0].lost) == (None, None, 0)
        assert made.as_json()["attempts"][0]["how"] == "unknown"
