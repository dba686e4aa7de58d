"""metrics.jsonl stays readable whatever tears it, and says of each step what was last true."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from ddpm_dist.errors import TakenOver
from ddpm_dist.tracking.journal import Journal, read_lines, read_metrics


def append(path: Path, *records: dict[str, float]) -> None:
    journal = Journal(path)
    for record in records:
        journal.append(record)
    journal.sync()
    journal.close()


def test_what_is_appended_is_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    append(path, *records[:2])
    append(path, records[2])
    assert [record for record, _ in read_lines(path)] == records == read_metrics(path)
    assert len(path.read_bytes().splitlines()) == 3


def test_each_record_is_readable_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        journal.append({"step": step})
        assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": step}
    journal.close()


def test_a_line_torn_anywhere_harms_no_other_line(tmp_path: Path) -> None:
    whole = json.dumps({"step": 2, "loss": 0.25, "name": "é"}, ensure_ascii=False).encode()
    for length in range(1, len(whole)):
        path = tmp_path / f"{length}.jsonl"
        append(path, {"step": 1})
        with open(path, "ab") as file:
            file.write(whole[:length])
        assert read_metrics(path) == [{"step": 1}], "a torn line is not read"
        append(path, {"step": 2, "loss": 0.5})
        assert read_metrics(path) == [{"step": 1}, {"step": 2, "loss": 0.5}]


def test_lines_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\x00\x00\n[1]\n"x"\n{"loss": 1}\n\xff\n\n{"step": 7}\nnull\n')
    assert read_metrics(path) == [{"step": 7}]


def test_opening_an_intact_journal_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, {"step": 1})
    before = path.read_bytes()
    append(path)
    assert path.read_bytes() == before


def test_the_last_line_of_a_step_counts_and_steps_ascend(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first: list[dict[str, float]] = [{"step": step, "attempt": 1} for step in (1, 2, 3, 4)]
    second: list[dict[str, float]] = [{"step": step, "attempt": 2} for step in (3, 4, 5)]
    append(path, *first)
    append(path, *second)
    assert [(record["step"], record["attempt"]) for record in read_metrics(path)] == [
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 2),
        (5, 2),
    ]


def test_reading_resumes_at_any_offset_that_was_given(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, {"step": 1}, {"step": 2})
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "lo')
    append(path, {"step": 4}, {"step": 5})
    everything = list(read_lines(path))
    assert [record["step"] for record, _ in everything] == [1, 2, 4, 5]
    assert everything[-1][1] == path.stat().st_size
    for index, (_, offset) in enumerate(everything):
        assert list(read_lines(path, offset)) == everything[index + 1 :]


def test_a_line_still_being_written_is_read_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, {"step": 1})
    ((_, offset),) = read_lines(path)
    with open(path, "ab", buffering=0) as file:
        file.write(b'{"step"')
        assert list(read_lines(path, offset)) == []
        file.write(b": 2}\n")
    assert [record for record, _ in read_lines(path, offset)] == [{"step": 2}]


def test_no_journal_is_an_empty_one(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_journal_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        Journal(tmp_path / "none" / "metrics.jsonl")


def test_figures_that_are_no_finite_numbers_are_null_and_each_line_is_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, {"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-4})
    assert list(read_metrics(path)) == [{"step": 1, "loss": None, "grad_norm": None, "lr": 1e-4}]
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()


def test_who_was_taken_over_appends_nothing_not_even_at_the_end(tmp_path: Path) -> None:
    path, taken_over = tmp_path / "metrics.jsonl", False

    def fence() -> None:
        if taken_over:
            raise TakenOver("by another")

    journal = Journal(path, fence)
    journal.append({"step": 1})
    taken_over = True
    with pytest.raises(TakenOver):
        journal.append({"step": 2})
    with pytest.raises(TakenOver):
        journal.sync()
    journal.close()
    assert [record["step"] for record in read_metrics(path)] == [1]


def test_a_line_that_a_full_disk_refused_is_written_before_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = tmp_path / "metrics.jsonl", os.write
    journal = Journal(path)
    room = [5, 0]

    def nearly_full(descriptor: int, data: bytes) -> int:
        size = room.pop(0) if room else len(data)
        if not size:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:size])

    monkeypatch.setattr(os, "write", nearly_full)
    with pytest.raises(OSError, match=r"No space.*metrics\.jsonl"):
        journal.append({"step": 1})
    journal.append({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    journal.close()


def test_a_line_appended_while_another_thread_syncs_is_neither_lost_nor_doubled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = tmp_path / "metrics.jsonl", os.write
    journal = Journal(path)
    full, syncs = threading.Event(), threading.Event()

    def slow(descriptor: int, data: bytes) -> int:
        if full.is_set():
            raise OSError(28, "No space left on device")
        syncs.set()
        time.sleep(0.2)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", slow)
    full.set()
    with pytest.raises(OSError, match="No space"):
        journal.append({"step": 1})
    full.clear()
    saver = threading.Thread(target=journal.sync)
    saver.start()
    assert syncs.wait(10)
    journal.append({"step": 2})
    saver.join()
    journal.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
