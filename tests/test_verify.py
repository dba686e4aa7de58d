"""The proof: equal where runs are equal, and not where they are not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from harness import TINY, call_train, snapshot, wait_until

from ddpm_dist import verify

SHORT = ("--kills", "2", "--steps", "36", "--seed", "3", *TINY, "elastic.mode=bitwise")


def run(*arguments: str) -> int:
    return verify.main([*SHORT, *arguments])


@pytest.mark.slow
def test_a_killed_and_moved_run_is_shown_to_be_equal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--worlds", "1,2,4", "--keep", str(tmp_path)) == 0
    said = capfd.readouterr().out
    assert "EQUAL: killed 2 times, ranks 1->2->4: the same bits" in said
    assert said.count(" equal") == 4
    for name in ("undisturbed", "disturbed"):
        state = torch.load(tmp_path / name / "checkpoints" / "step-00000036.pt", weights_only=True)
        assert state["step"] == 36
    before = snapshot(tmp_path)
    assert run("--keep", str(tmp_path)) == 78
    assert "exists already" in capfd.readouterr().err
    assert snapshot(tmp_path) == before


@pytest.mark.slow
def test_a_cosine_with_a_warm_up_longer_than_the_rehearsal_is_proved(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The config of the quick start: its learning rates, not those of a run of 24 steps."""
    overrides = ("optim.schedule=cosine", "optim.warmup_steps=100", "train.max_steps=1800")
    argv = ("--kills", "1", "--steps", "24", "--seed", "3", *TINY, "elastic.mode=bitwise", *overrides)
    assert verify.main([*argv, "--worlds", "1,2", "--keep", str(tmp_path)]) == 0
    assert "EQUAL: killed 1 times, ranks 1->2: the same bits" in capfd.readouterr().out
    lines = (tmp_path / "disturbed" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["lr"] == pytest.approx(2e-4 * 24 / 100)


@pytest.mark.slow
def test_stream_mode_is_proved_on_one_number_of_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--worlds", "2", "elastic.mode=stream") == 0
    assert "EQUAL" in capfd.readouterr().out
    assert run("--worlds", "1,2", "elastic.mode=stream") == 78
    assert "on one number of ranks" in capfd.readouterr().err


def rounds_otherwise_on_two_ranks(argv: Sequence[str]) -> int:
    if os.environ["WORLD_SIZE"] == "2":
        from ddpm_dist.data.batches import Inputs
        from ddpm_dist.training.step import Trainer

        step = Trainer.train_step

        def nudged(self: Trainer, micro_batches: Sequence[Inputs]) -> None:
            step(self, micro_batches)
            next(iter(self.model.parameters())).data.view(-1)[0] += 1e-6

        Trainer.train_step = nudged  # type: ignore[method-assign]
    return call_train(argv)


@pytest.mark.slow
def test_a_difference_in_the_last_digits_is_found(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "COMMAND", f"{__name__}:rounds_otherwise_on_two_ranks")
    assert run("--worlds", "1,2") == 1
    said = capfd.readouterr().out
    assert "DIFFERENT" in said
    assert "NOT EQUAL" in said


def starts_over(argv: Sequence[str]) -> int:
    root = next(word for word in argv if word.startswith("run.root=")).removeprefix("run.root=")
    if "run.name=disturbed" in argv:
        for folder in ("checkpoints", "status.json"):
            path = Path(root) / "disturbed" / folder
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return call_train(argv)


@pytest.mark.slow
def test_a_run_that_starts_over_is_no_proof(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(verify, "COMMAND", f"{__name__}:starts_over")
    assert run("--worlds", "1") == 1
    assert "started at step 0 instead of" in capfd.readouterr().out


def dies_of_another_hand(argv: Sequence[str]) -> int:
    if "run.name=disturbed" in argv:
        os.kill(os.getpid(), signal.SIGKILL)
    return call_train(argv)


@pytest.mark.slow
def test_a_rank_that_somebody_else_kills_is_no_kill_of_ours(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "COMMAND", f"{__name__}:dies_of_another_hand")
    assert run("--worlds", "1") == 70
    said = capfd.readouterr()
    assert "EQUAL" not in said.out
    assert "disturbed: the ranks ended with -9" in said.err
    assert "Traceback" not in said.err


def lingers(argv: Sequence[str]) -> int:
    code = call_train(argv)
    if "run.name=disturbed" in argv:
        time.sleep(3)
    return code


@pytest.mark.slow
def test_a_kill_that_comes_after_the_end_is_none(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "COMMAND", f"{__name__}:lingers")
    assert run("--worlds", "1", "--kills", "1", "--steps", "4") in (0, 1), "perhaps it was done before it was killed"
    said = capfd.readouterr().out
    assert "instead of" not in said
    assert said.count(" equal") == 4


@pytest.mark.slow
def test_sigterm_leaves_no_rank_behind(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "ddpm_dist.verify", *SHORT, "--worlds", "2", "--keep", str(tmp_path)]
    lines = tmp_path / "undisturbed" / "metrics.jsonl"
    with subprocess.Popen([*argv, "--steps", "100000"], stdout=subprocess.DEVNULL) as command:
        try:
            wait_until(lambda: lines.exists() and lines.stat().st_size > 0, lambda: "no step within a minute")
            command.terminate()
            assert command.wait(30) == 128 + signal.SIGTERM
        finally:
            command.kill()
    size = lines.stat().st_size
    time.sleep(1)
    assert lines.stat().st_size == size, "its ranks train on"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--worlds", "1,3"), "valid numbers of ranks: 1, 2, 4"),
        (("--worlds", "one"), "expected numbers of ranks, like 1,2,4"),
        (("--kills", "0"), "at least 1 kill"),
        (("--kills", "-1"), "at least 1 kill"),
        (("--keep", __file__), "test_verify.py"),
        (("--steps", "5"), "6 steps"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
        (("data.name=folder", "data.image_size=32", "data.root=nowhere", "--worlds", "1"), "nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) in (65, 70, 78)
    said = capfd.readouterr().err
    assert words in said
    assert "Traceback" not in said
