"""The files in attempts/, read afterwards: which attempts died, and files that are damaged."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ddpm_dist.history import attempts
from ddpm_dist.history.attempts import read_records, record_of
from ddpm_dist.run import lease
from ddpm_dist.run.lease import claim

ELSEWHERE: dict[str, Any] = {"host": "another-host", "boot": "x", "pid_namespace": "y", "pid": 1, "pid_started": 1}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "WATCH_SECONDS", 0.6)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.02)


def write(directory: Path, number: int, age: float = 0.0, **facts: Any) -> Path:
    path = directory / f"{number:05d}.json"
    directory.mkdir(exist_ok=True)
    path.write_text(json.dumps({"attempt": number, "started": 1e9, "beat": 0, "ended": None, **facts}))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def hows(directory: Path, status: dict[str, Any] | None = None) -> list[str]:
    return [record.how for record in read_records(directory, status or {})]


def test_a_living_holder_runs_and_one_that_left_says_how(tmp_path: Path) -> None:
    first = claim(tmp_path, {"world_size": 1, "nodes": ["n1"]}, 1)
    assert hows(tmp_path) == ["running"]
    first.note(start_step=0, step=20)
    first.release(state="preempted", reason="stopped by SIGTERM", exit_code=75)
    (record,) = read_records(tmp_path, {})
    assert (record.how, record.reason, record.exit_code, record.nodes) == (
        "preempted",
        "stopped by SIGTERM",
        75,
        ("n1",),
    )
    assert (record.start_step, record.saved_step) == (0, 20)
    second = claim(tmp_path, {}, 1)
    second.release()
    assert hows(tmp_path) == ["preempted", "left"]


def test_a_dead_process_of_this_machine_died_without_a_word(tmp_path: Path) -> None:
    alive = claim(tmp_path, {}, 1)
    facts = json.loads((tmp_path / "00001.json").read_text())
    alive.release()
    write(tmp_path, 1, **facts | {"pid_started": 1})
    assert hows(tmp_path) == ["died"]


def test_another_machine_is_judged_by_its_heartbeat(tmp_path: Path) -> None:
    write(tmp_path, 1, age=5, **ELSEWHERE)
    assert hows(tmp_path) == ["running"]
    write(tmp_path, 1, age=3600, **ELSEWHERE)
    assert hows(tmp_path) == ["died"]


def test_a_heartbeat_counts_even_if_the_clocks_are_an_hour_apart(tmp_path: Path) -> None:
    write(tmp_path, 1, age=3600, **ELSEWHERE)
    beat = threading.Timer(0.2, lambda: write(tmp_path, 1, age=3600, **ELSEWHERE | {"beat": 1}))
    beat.start()
    assert hows(tmp_path) == ["running"]
    beat.join()


def test_who_was_succeeded_died_however_fresh_its_file_is(tmp_path: Path) -> None:
    write(tmp_path, 1, **ELSEWHERE)
    write(tmp_path, 2, **ELSEWHERE)
    assert hows(tmp_path) == ["died", "running"]


def test_status_speaks_for_an_attempt_that_found_no_room_for_its_last_word(tmp_path: Path) -> None:
    write(tmp_path, 1, age=3600, **ELSEWHERE)
    said = {"attempt": 1, "state": "failed", "reason": "no space", "exit_code": 70, "time": 1e9 + 60}
    (record,) = read_records(tmp_path, said)
    assert (record.how, record.reason, record.exit_code, record.last_sign) == ("failed", "no space", 70, 1e9 + 60)
    assert hows(tmp_path, said | {"attempt": 2}) == ["died"]
    assert hows(tmp_path, said | {"state": ["failed"]}) == ["died"]


def test_the_life_of_the_dead_is_counted_in_heartbeats() -> None:
    record = record_of(1, {"started": 1e9, "beat": 30, "ended": None}, alive=False)
    assert record.last_sign == 1e9 + 30 * lease.BEAT_SECONDS


@pytest.mark.parametrize(
    ("facts", "nodes"),
    [
        ({"nodes": ["n2", "n1", "n2"], "world_size": 3}, ("n2", "n1")),
        ({"host": socket.gethostname(), "world_size": 1}, (socket.gethostname(),)),  # of an older version
        ({"host": "n1", "world_size": 2}, ()),  # rank 0's host is not the whole story
        ({"nodes": "n1"}, ()),
        ({"nodes": []}, ()),
        ({"nodes": ["n1", 2]}, ()),
    ],
)
def test_nodes_of_an_attempt(facts: dict[str, Any], nodes: tuple[str, ...]) -> None:
    assert record_of(1, facts, alive=False).nodes == nodes


@pytest.mark.parametrize(
    ("facts", "died"),
    [
        ({}, True),
        ({"state": "failed", "exit_code": 70}, True),
        ({"state": "preempted", "exit_code": 75}, False),
        ({"state": "finished", "exit_code": 0}, False),
        ({"state": "failed", "exit_code": 78}, None),
        ({"state": "failed", "exit_code": 65}, None),
        ({"state": "failed", "exit_code": 76}, None),
        ({"ended": 1e9}, None),
    ],
)
def test_which_endings_speak_against_a_node(facts: dict[str, Any], died: bool | None) -> None:
    outcome = record_of(1, {"nodes": ["n1"], **facts}, alive=False).outcome
    assert (outcome.died if outcome else None) == died


def test_a_running_attempt_says_nothing_about_its_node_yet() -> None:
    assert record_of(1, {"nodes": ["n1"]}, alive=True).outcome is None


NONSENSE: tuple[Any, ...] = (None, [], {}, "x", -1, 1.5, True, 1e400, 10**40, "\ud800\n\x1b[31m")


@pytest.mark.parametrize("name", ["started", "ended", "beat", "step", "start_step", "state", "reason", "nodes", "pid"])
def test_nonsense_in_a_file_is_not_known(name: str) -> None:
    for value in NONSENSE:
        record = record_of(1, {name: value}, alive=False)
        assert "\x1b" not in record.reason


@pytest.mark.parametrize("value", [*NONSENSE[:-1], "\0", "\ud800"])
def test_a_process_number_that_is_none_is_nobody_alive(tmp_path: Path, value: Any) -> None:
    alive = claim(tmp_path, {}, 1)
    facts = json.loads((tmp_path / "00001.json").read_text())
    alive.release()
    write(tmp_path, 1, **facts | {"pid": value})
    assert hows(tmp_path) == ["died"]


def test_damaged_files_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 1, **ELSEWHERE)
    (tmp_path / "00002.json").write_text('{"attempt": 2,')
    (tmp_path / "00003.json").write_text("[]")
    (tmp_path / "notes.json").write_text("{}")
    assert hows(tmp_path) == ["died", "unknown", "unknown"]
