"""A data set of images is a job: on any number of ranks, and whatever happens to them, its bytes are the same."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Job, committed, train, wait_until
from PIL import Image

NUM = 200  # images, in four blocks
QUICK = ("diffusion.num_timesteps=20", "preview.steps=5", "train.max_steps=3", "checkpoint.every=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(1, tmp_path_factory.mktemp("job"), *QUICK)


def call_sample(argv: Sequence[str]) -> int:
    """The sample command. Returns its exit code."""
    from ddpm_dist.sample import main

    return main(argv)


def call_sample_and_halt(argv: Sequence[str]) -> int:
    """The sample command, each rank of which draws one block, and is then busy with the next until it is stopped."""
    from ddpm_dist.evaluation import generate
    from ddpm_dist.run import lease

    lease.BEAT_SECONDS = 0.1
    draw, drawn = generate.generate_block, 0

    def draw_one(*args: Any, **options: Any) -> Any:
        nonlocal drawn
        drawn += 1
        while drawn > 1:
            options["on_step"]()
            time.sleep(0.02)
        return draw(*args, **options)

    generate.generate_block = draw_one
    return call_sample(argv)


def call_sample_on_full_disk(argv: Sequence[str]) -> int:
    """The sample command, where the last rank finds the disk full when it writes its first block."""
    if os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1):
        from ddpm_dist.evaluation.parts import Parts

        def write(self: Parts, block: int, images: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder / f"{block:06d}.npy"))

        Parts.write = write  # type: ignore[method-assign]
    return call_sample(argv)


def call_sample_with_a_bug(argv: Sequence[str]) -> int:
    """The sample command, whose last rank meets a bug of ours."""
    if os.environ.get("RANK") == "1":
        from ddpm_dist.evaluation import generate

        generate.generate_block = None  # type: ignore[assignment]
    return call_sample(argv)


def start(
    world_size: int, run: Path, out: str, *flags: str, function: Callable[[Sequence[str]], int] = call_sample
) -> Job:
    """Start the sample command for NUM images; what it says goes into out.log."""
    argv = [str(run), "--num", str(NUM), "--steps", "2", "--device", "cpu", "--out", out, *flags]
    return Job(world_size, Path(f"{out.rstrip('/')}.log"), function, (argv,))


def draw(world_size: int, run: Path, out: str, *flags: str, codes: Sequence[int] | None = None) -> str:
    """Draw to the end. Returns what was said."""
    with start(world_size, run, out, *flags) as job:
        assert job.wait() == list(codes or [0] * world_size), job.output()
        return job.output()


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if "rror" in line]


def wait_for_blocks(job: Job, parts: Path, count: int) -> None:
    wait_until(lambda: len(list(parts.glob("*.npy"))) >= count or not job.alive(), job.output)
    assert job.alive(), job.output()


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What one undisturbed process writes."""
    out = tmp_path_factory.mktemp("whole") / "images.npz"
    draw(1, run, str(out))
    assert sorted(path.name for path in out.parent.iterdir()) == ["images.npz", "images.npz.log"]
    return out.read_bytes()


def images(path: Path) -> np.ndarray:
    with np.load(path) as file:
        return np.array(file["arr_0"])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_writes_the_same_bytes_and_leaves_nothing_behind(
    run: Path, tmp_path: Path, whole: bytes, world_size: int
) -> None:
    said = draw(world_size, run, f"{tmp_path}/images.npz")
    assert (tmp_path / "images.npz").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npz", "images.npz.log"]
    assert said == f"drawing {NUM} images of 28 x 28 from step 3\n{tmp_path}/images.npz\n"


@pytest.mark.slow
def test_folder_of_two_ranks_has_the_same_images_and_fewer_are_the_first_of_more(
    run: Path, tmp_path: Path, whole: bytes
) -> None:
    (tmp_path / "whole.npz").write_bytes(whole)
    draw(2, run, f"{tmp_path}/folder/", "--num", "70")
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert names == [f"{index:05d}.png" for index in range(70)]
    drawn = np.stack([np.asarray(Image.open(tmp_path / "folder" / name)) for name in names])
    assert (drawn == images(tmp_path / "whole.npz")[:70, :, :, 0]).all()


@pytest.mark.slow
def test_killed_and_moved_to_other_ranks_it_writes_what_an_undisturbed_job_writes(
    run: Path, tmp_path: Path, whole: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "images.npz"
    parts = tmp_path / "images.npz.parts"
    with start(2, run, str(out), function=call_sample_and_halt) as job:
        wait_for_blocks(job, parts, 2)
        job.kill()
    assert not out.exists()
    before = {path: path.stat().st_mtime_ns for path in parts.glob("*.npy")}
    assert sorted(path.stem for path in before) == ["000000", "000001"]
    # Another data set is refused, and nothing of this one is touched.
    said = draw(1, run, str(out), "--seed", "7", codes=[78])
    assert errors(said) == [
        f"error: {parts}: was begun with something else: seed: 0 -> 7. Its images stay as they are; give the old "
        "values to go on, another --out, or remove that folder to start anew"
    ]
    assert {path: path.stat().st_mtime_ns for path in parts.glob("*.npy")} == before
    with start(1, run, str(out), function=call_sample_and_halt) as job:
        wait_for_blocks(job, parts, len(before) + 1)
        assert {path: path.stat().st_mtime_ns for path in before} == before
        job.kill()
    said = draw(4, run, str(out))
    assert "of which 192 are drawn already" in said
    assert out.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npz", "images.npz.log"]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (1, signal.SIGUSR2)])
def test_a_stop_signal_to_any_rank_ends_all_with_75_and_the_same_command_goes_on(
    run: Path, tmp_path: Path, whole: bytes, rank: int, number: signal.Signals
) -> None:
    out = tmp_path / "images.npz"
    with start(2, run, str(out), function=call_sample_and_halt) as job:
        wait_for_blocks(job, tmp_path / "images.npz.parts", 1)
        # While it runs, nobody else may draw into the same file.
        with start(1, run, str(out)) as second:
            assert second.wait() == [78]
            (line,) = errors(second.output())
            assert line.startswith(f"error: {out}.parts: is being filled by attempt 1 (host ")
            assert line.endswith("stop that one first, or give another --out")
        job.signal(rank, number)
        assert job.wait() == [75, 75], job.output()
    assert f"of {NUM} images are drawn. The same command goes on\n" in job.output()
    assert not out.exists()
    draw(1, run, str(out))
    assert out.read_bytes() == whole


@pytest.mark.slow
def test_a_job_stays_with_its_checkpoint_when_the_run_trains_on(run: Path, tmp_path: Path) -> None:
    moving, out = tmp_path / "run", f"{tmp_path}/images.npz"
    shutil.copytree(run, moving)
    older, newer = committed(run)[-2:]
    newest = moving / "checkpoints" / f"step-{newer:08d}.json"
    newest.rename(tmp_path / "hidden")
    with start(1, moving, out, function=call_sample_and_halt) as job:
        wait_for_blocks(job, Path(f"{out}.parts"), 1)
        job.signal(0, signal.SIGINT)
        assert job.wait() == [75], job.output()
    (tmp_path / "hidden").rename(newest)
    assert f"step: {older} -> {newer}; sha256: " in draw(1, moving, out, "--step", str(newer), codes=[78])
    pruned = moving / "checkpoints" / f"step-{older:08d}.json"
    pruned.rename(tmp_path / "hidden")
    line = errors(draw(1, moving, out, codes=[65]))[-1]
    assert f"{out}.parts was begun with step {older}: restore that checkpoint to go on, or remove that folder" in line
    (tmp_path / "hidden").rename(pruned)
    assert f"from step {older}, of which" in draw(1, moving, out)
    assert not Path(f"{out}.parts").exists()


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_keeps_what_is_drawn(run: Path, tmp_path: Path, whole: bytes) -> None:
    out = f"{tmp_path}/images.npz"
    with start(2, run, out, function=call_sample_on_full_disk) as job:
        assert job.wait() == [70, 70], job.output()
        assert errors(job.output()) == [f"error: {out}.parts/000001.npy: No space left on device (seen by rank 1)"]
    with start(1, run, out, function=call_sample_on_full_disk) as job:
        assert job.wait() == [70], job.output()
    draw(1, run, out)
    assert Path(out).read_bytes() == whole


@pytest.mark.slow
def test_a_bug_on_one_rank_ends_all_of_them(run: Path, tmp_path: Path) -> None:
    with start(2, run, f"{tmp_path}/images.npz", function=call_sample_with_a_bug) as job:
        assert job.wait() == [70, 70], job.output()
    assert "error: rank 1: TypeError: 'NoneType' object is not callable" in job.output()
    assert job.output().count("Traceback") == 1


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["--out", "--step", "--steps"])
def test_what_no_rank_can_do_is_said_once(run: Path, tmp_path: Path, mistake: str) -> None:
    (tmp_path / "file").write_text("")
    out, code, says = f"{tmp_path}/images.npz", 78, f"error: {mistake} 77: expected 1 to 20"
    flags = [mistake, "77"]
    if mistake == "--out":
        out = f"{tmp_path}/file/images.npz"
        flags, says = [], f"error: --out {out}: cannot be written ({tmp_path}/file: Not a directory)"
    if mistake == "--step":
        code, says = 65, f"error: {run}/checkpoints: no checkpoint of step 77; there are: "
    argv = [str(run), "--num", "9", "--steps", "2", "--device", "cpu", "--out", out, *flags]
    with Job(2, tmp_path / "said", call_sample, (argv,)) as job:
        assert job.wait() == [code, code], job.output()
        (line,) = job.output().splitlines()
    assert line.startswith(says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "said"]
