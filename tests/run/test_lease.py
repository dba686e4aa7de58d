"""One writer: of many claims one succeeds. A dead holder is followed at once, a silent one soon, a living one never."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from ddpm_dist.errors import ConfigError, StopRequested, TakenOver
from ddpm_dist.run import lease as leases
from ddpm_dist.run.lease import Lease, claim, read_attempts

_CONTEXT = multiprocessing.get_context("fork")  # no torch and no threads in these processes


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(leases, "STALE_SECONDS", 1.5)
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.05)


def try_to_claim(directory: Path, result: Path, hold: float) -> None:
    """A process that tries to claim, writes how that went, and if it holds the claim sleeps for `hold` seconds."""
    try:
        lease = claim(directory, {}, 1)
    except ConfigError as error:
        result.write_text(f"refused: {error}")
        return
    result.write_text(f"holds {lease.number}")
    time.sleep(hold)
    with contextlib.suppress(TakenOver):
        lease.check()
        result.write_text(f"still holds {lease.number}")
        return
    result.write_text(f"lost {lease.number}")


@contextlib.contextmanager
def process(function: Callable[..., None], *args: Any) -> Iterator[BaseProcess]:
    one = _CONTEXT.Process(target=function, args=args)
    one.start()
    try:
        yield one
    finally:
        one.kill()
        one.join(30)


def wait_for(path: Path, text: str, timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists() or not path.read_text().startswith(text):
        assert time.monotonic() < deadline, path.read_text() if path.exists() else f"no {path}"
        time.sleep(0.02)


@contextlib.contextmanager
def held(directory: Path, **facts: Any) -> Iterator[Lease]:
    lease = claim(directory, facts, 1)
    try:
        yield lease
    finally:
        lease.release()


@pytest.mark.slow
def test_of_100_simultaneous_claims_exactly_one_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again one when all find the same dead holder."""
    monkeypatch.setattr(leases, "STALE_SECONDS", 60.0)  # among 100 processes the holder's thread may wait for a core
    for number in (1, 2):
        folder = tmp_path / f"results-{number}"
        folder.mkdir()
        with contextlib.ExitStack() as stack:
            for index in range(100):
                stack.enter_context(process(try_to_claim, tmp_path / "attempts", folder / str(index), 60))
            deadline = time.monotonic() + 60
            while len(list(folder.iterdir())) < 100:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            words = sorted(path.read_text() for path in folder.iterdir())
        assert [word for word in words if word.startswith("holds")] == [f"holds {number}"]
        assert all(f"is being trained by attempt {number}" in word for word in words if "refused" in word)
        assert len(list((tmp_path / "attempts").glob("*.json"))) == number


def test_who_claims_a_moment_later_does_not_overwrite_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our look and our claim another attempt has claimed the same number, and ended."""
    first, write_bytes = tmp_path / "00001.json", Path.write_bytes

    def slowly(path: Path, data: bytes) -> int:
        written = write_bytes(path, data)
        if not first.exists():
            write_bytes(first, b'{"attempt": 1, "ended": 1.0}')
        return written

    monkeypatch.setattr(Path, "write_bytes", slowly)
    with held(tmp_path) as lease:
        assert lease.number == 2
        lease.check()
        assert first.read_bytes() == b'{"attempt": 1, "ended": 1.0}'


def test_a_second_start_is_told_who_holds_it(tmp_path: Path) -> None:
    with held(tmp_path):
        with process(try_to_claim, tmp_path, tmp_path / "result", 0) as other:
            other.join(20)
        said = (tmp_path / "result").read_text()
        assert "attempt 1 " in said
        assert f"host {os.uname().nodename}, pid {os.getpid()}" in said


def test_who_has_ended_is_succeeded_at_once(tmp_path: Path) -> None:
    with held(tmp_path) as first:
        pass
    begun = time.monotonic()
    with held(tmp_path) as second:
        assert time.monotonic() - begun < 1
        assert (first.number, second.number) == (1, 2)
    assert [facts["ended"] is not None for facts in read_attempts(tmp_path)] == [True, True]


def test_a_dead_process_of_this_machine_is_succeeded_at_once(tmp_path: Path) -> None:
    with process(try_to_claim, tmp_path / "attempts", tmp_path / "result", 60) as holder:
        wait_for(tmp_path / "result", "holds 1")
        holder.kill()
        holder.join(20)
        begun = time.monotonic()
        with held(tmp_path / "attempts") as lease:
            assert time.monotonic() - begun < 1
            assert lease.number == 2


@pytest.mark.parametrize("changed", [{"host": "node7"}, {"boot": "another"}, {"pid_namespace": "pid:[1]"}])
@pytest.mark.slow
def test_a_holder_elsewhere_is_waited_for_by_our_own_clock(tmp_path: Path, changed: dict[str, str]) -> None:
    """Its pid says nothing on this machine, and its clock may be years off."""
    with held(tmp_path):
        pass
    path = tmp_path / "00001.json"
    facts = json.loads(path.read_text()) | changed
    path.write_text(json.dumps(facts | {"ended": None, "pid": 2**22 + 1, "started": 9e9}))
    begun = time.monotonic()
    with held(tmp_path) as lease:
        assert leases.STALE_SECONDS < time.monotonic() - begun < leases.STALE_SECONDS + 2
        assert lease.number == 2


def test_a_pid_that_was_given_to_another_process_does_not_keep_the_dead_alive(tmp_path: Path) -> None:
    with held(tmp_path):
        pass
    path = tmp_path / "00001.json"
    facts = json.loads(path.read_text()) | {"ended": None, "pid": 1}
    path.write_text(json.dumps(facts))
    begun = time.monotonic()
    with held(tmp_path):
        assert time.monotonic() - begun < 1


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\x00" * 64])
@pytest.mark.slow
def test_a_claim_that_a_power_failure_garbled_is_succeeded(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "00001.json").write_bytes(content)
    with held(tmp_path) as lease:
        assert lease.number == 2


@pytest.mark.slow
def test_a_stopped_holder_is_taken_over_and_notices_when_it_wakes_up(tmp_path: Path) -> None:
    attempts, result = tmp_path / "attempts", tmp_path / "result"
    with process(try_to_claim, attempts, result, 4) as holder:
        wait_for(result, "holds 1")
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGSTOP)
        with held(attempts) as lease:
            assert lease.number == 2
            frozen = (attempts / "00001.json").read_bytes()
            os.kill(holder.pid, signal.SIGCONT)
            wait_for(result, "lost 1")
            lease.check()
            assert (attempts / "00001.json").read_bytes() == frozen, "it writes nothing any more"


def test_a_living_holder_is_never_taken_over(tmp_path: Path) -> None:
    with held(tmp_path, world_size=2) as lease:
        for _ in range(3):
            with process(try_to_claim, tmp_path, tmp_path / "result", 0) as other:
                other.join(20)
            assert (tmp_path / "result").read_text().startswith("refused")
        lease.note(step=7)
        lease.check()
    assert [(facts["attempt"], facts["world_size"], facts["step"]) for facts in read_attempts(tmp_path)] == [(1, 2, 7)]


def test_waiting_can_be_cut_short(tmp_path: Path) -> None:
    def stop(seconds: float) -> None:
        raise StopRequested

    with held(tmp_path), pytest.raises(StopRequested):
        claim(tmp_path, {}, 1, stop)


def test_attempts_that_are_known_from_elsewhere_are_not_counted_again(tmp_path: Path) -> None:
    lease = claim(tmp_path, {}, at_least=7)
    assert lease.number == 7
    lease.release(reason="enough")
    assert read_attempts(tmp_path)[0]["reason"] == "enough"


def test_a_disk_without_room_does_not_end_the_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    with held(tmp_path) as lease:
        monkeypatch.setattr(leases, "replacing", full)
        time.sleep(0.5)
        lease.check()
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("job", "restart", "is_free"), [("7", "1", True), ("7", "0", False), ("8", "1", False), ("", "1", False)]
)
def test_an_earlier_restart_of_this_job_is_over_wherever_it_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, restart: str, is_free: bool
) -> None:
    """SLURM has started the job again, so it holds the attempt before for dead, though its node may be cut off."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with held(tmp_path):
        pass
    facts = json.loads((tmp_path / "00001.json").read_text()) | {"host": "elsewhere", "ended": None}
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    assert leases.seems_alive(facts) is not is_free
