"""What a user sees of a mistake: the right exit code, and one line that names the thing to mend; never a traceback.

Most mistakes stand in the table of mistakes.txt. Here are those that need several ranks, links, damaged or hostile
files.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from harness import committed, metrics, snapshot, start, status, train

from ddpm_dist.config import DataConfig
from ddpm_dist.data.datasets import IDX_FILES, load

ROOT = Path(__file__).parent.parent


# What a user sees


def call_sample(argv: Sequence[str]) -> int:
    from ddpm_dist import sample

    torch.set_num_threads(1)
    return sample.main(argv)


def assert_one_line(output: str, *words: object, alone: bool = True) -> str:
    """The one error line of an output; `alone` if nothing else may be there (gloo says that it connected)."""
    lines = output.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert "Traceback" not in output
    assert "Warning" not in output
    assert not alone or lines == errors, output
    for word in words:
        assert str(word) in errors[0]
    return errors[0]


def refused(code: int, world_size: int, root: Path, *overrides: str, words: Sequence[object]) -> str:
    """The error line of a training command that every rank leaves with this exit code."""
    with start(world_size, root, *overrides) as job:
        assert job.wait(60) == [code] * world_size, job.output()
        return assert_one_line(job.output(), *words, alone=world_size == 1)


def command(
    *arguments: str, module: str = "train", environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own, for errors that are found before torch is imported."""
    return subprocess.run(
        [sys.executable, "-m", f"ddpm_dist.{module}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )


def assert_refused(done: subprocess.CompletedProcess[str], code: int, *words: object) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert_one_line(done.stderr, *words)


# Data and a tiny run on them


def write_idx(root: Path, pixels: np.ndarray) -> Path:
    path = root / IDX_FILES["mnist"]
    path.parent.mkdir(parents=True)
    path.write_bytes(struct.pack(">4i", 0x803, *pixels.shape) + pixels.tobytes())
    return path


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """uint8 [64, 28, 28], real digits."""
    return load(DataConfig(name="mnist5k")).fetch(range(0, 5000, 79))[:64, 0].numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> Path:
    """A run root with `run`, trained for 4 steps with checkpoints at 2 and 4, and the `data` that it saw."""
    root = tmp_path_factory.mktemp("trained")
    write_idx(root / "data", pixels)
    run = train(1, root, "train.max_steps=4", "checkpoint.every=2", "data.name=mnist", f"data.root={root / 'data'}")
    assert committed(run) == [2, 4]
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    """A copy of it for this test."""
    shutil.copytree(trained, tmp_path / "root")
    (tmp_path / "root" / "run.log").unlink()
    return tmp_path / "root"


def go_on(root: Path, *overrides: str) -> tuple[str, ...]:
    """The overrides that continue the copied run to step 6."""
    return ("train.max_steps=6", "checkpoint.every=2", "data.name=mnist", f"data.root={root / 'data'}", *overrides)


def checkpoint(root: Path, step: int) -> Path:
    return root / "run" / "checkpoints" / f"step-{step:08d}.pt"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


# Configuration


def test_impossible_number_of_ranks_is_said_once_for_all(tmp_path: Path) -> None:
    line = refused(78, 3, tmp_path, words=["3 ranks", "elastic.shards=4", "1, 2, 4"])
    assert "8" not in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "x"},
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "x", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "x", "SLURM_LOCALID": "0"},
    ],
    ids=lambda environment: next(name for name, value in environment.items() if value == "x"),
)
def test_launcher_that_says_nonsense(environment: dict[str, str]) -> None:
    assert_refused(command("--dry-run", environment=environment), 78, "'x'")


# Data


def test_missing_data_that_must_not_be_downloaded(tmp_path: Path) -> None:
    for world_size in (1, 2):
        overrides = ("data.name=mnist", f"data.root={tmp_path / 'data'}", "data.download=false")
        words = [tmp_path / "data", "missing", "data.root", "data.download=true"]
        refused(65, world_size, tmp_path / str(world_size), *overrides, words=words)
    assert not (tmp_path / "data").exists()


def test_truncated_data(tmp_path: Path, pixels: np.ndarray) -> None:
    path = write_idx(tmp_path / "data", pixels)
    size = path.stat().st_size
    truncate(path)
    for world_size in (1, 2):
        overrides = ("data.name=mnist", f"data.root={tmp_path / 'data'}")
        words = [path, size, size - 1000]
        refused(65, world_size, tmp_path / str(world_size), *overrides, words=words)


def test_fewer_images_than_one_step_needs(tmp_path: Path, pixels: np.ndarray) -> None:
    write_idx(tmp_path / "data", pixels[:7])
    overrides = ("data.name=mnist", f"data.root={tmp_path / 'data'}")
    refused(65, 1, tmp_path, *overrides, words=["7 images", "data.batch_size=8"])


def test_other_images_than_the_run_was_trained_on(root: Path, pixels: np.ndarray) -> None:
    other = pixels.copy()
    other[63, 27, 27] ^= 1
    write_idx(root / "other", other)
    before = snapshot(root / "run")
    refused(65, 1, root, *go_on(root, f"data.root={root / 'other'}"), words=[f"data.root={root / 'other'}", "images"])
    after = snapshot(root / "run")
    attempt = after.pop(str(root / "run" / "attempts" / "00002.json"))
    assert json.loads(attempt[2])["exit_code"] == 65
    for each in (after, before):
        del each[str(root / "run" / "status.json")]
    assert after == before


def test_fewer_images_than_the_run_was_trained_on(root: Path, pixels: np.ndarray) -> None:
    write_idx(root / "other", pixels[:60])
    refused(65, 2, root, *go_on(root, f"data.root={root / 'other'}"), words=["num_images: 64 -> 60"])


# Where the run lives


@pytest.mark.parametrize("world_size", [1, 2])
def test_run_root_that_cannot_be_made(tmp_path: Path, world_size: int) -> None:
    (tmp_path / "file").write_text("not a folder")
    impossible = tmp_path / "file" / "runs"
    refused(78, world_size, tmp_path, f"run.root={impossible}", words=[f"run.root={impossible}"])
    assert (tmp_path / "file").read_text() == "not a folder"


def test_run_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    refused(78, 1, tmp_path, words=[tmp_path / "run"])
    assert (tmp_path / "run").read_text() == "not a folder"


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_run_directory_that_is_a_link_out_of_the_root(tmp_path: Path, target: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run").symlink_to(tmp_path / target)
    refused(78, 1, tmp_path / "runs", words=[tmp_path / "runs" / "run"])
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert not (tmp_path / "nowhere").exists()


def test_checkpoints_that_are_a_link_out_of_the_root(root: Path, tmp_path: Path) -> None:
    (root / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    (root / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path / "elsewhere")
    refused(78, 1, root, *go_on(root), words=[root / "run" / "checkpoints", "symbolic link"])
    assert snapshot(tmp_path / "elsewhere") == before


def test_a_run_root_that_is_itself_a_link_is_fine(root: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").symlink_to(root)
    assert committed(train(1, tmp_path / "scratch", *go_on(root)))[-1] == 6


# Checkpoints


class Payload:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return pathlib.Path.touch, (self.marker,)


@pytest.fixture
def marker(root: Path, tmp_path: Path) -> Path:
    """The only checkpoint of the copied run is hostile, and its manifest agrees; the file that it would make."""
    marker, path = tmp_path / "executed", checkpoint(root, 4)
    values = torch.load(path, weights_only=True)
    torch.save({**values, "scaler": Payload(marker)}, path)
    torch.load(path, weights_only=False)
    assert marker.exists(), "the payload is a payload"
    marker.unlink()
    content = path.read_bytes()
    facts = {"step": 4, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(facts))
    for suffix in (".pt", ".json"):
        checkpoint(root, 2).with_suffix(suffix).unlink()
    return marker


def test_hostile_checkpoint_is_not_executed_by_training(root: Path, marker: Path) -> None:
    before = snapshot(root / "run" / "checkpoints")
    line = refused(65, 1, root, *go_on(root), words=["step-00000004.pt", root / "run" / "checkpoints"])
    assert not marker.exists()
    assert "can still be loaded" not in line, "nobody is told how to execute it"
    assert line.isprintable(), "a log has no use for colours"
    assert snapshot(root / "run" / "checkpoints") == before


def test_hostile_checkpoint_is_not_executed_by_sampling(root: Path, marker: Path) -> None:
    assert_refused(command(str(root / "run"), module="sample"), 65, "step-00000004.pt")
    assert not marker.exists()


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_checkpoints_truncated(root: Path, world_size: int) -> None:
    for step in (2, 4):
        truncate(checkpoint(root, step))
    before = snapshot(root / "run" / "checkpoints")
    words = ["step-00000004.pt", "step-00000002.pt", root / "run" / "checkpoints", "move the run directory away"]
    refused(65, world_size, root, *go_on(root), words=words)
    assert snapshot(root / "run" / "checkpoints") == before


@pytest.mark.parametrize("world_size", [1, 2])
def test_newest_checkpoint_truncated_goes_on_from_the_older(root: Path, world_size: int) -> None:
    truncate(checkpoint(root, 4))
    run = train(world_size, root, *go_on(root))
    assert [record["step"] for record in metrics(run) if record["attempt"] == 2] == [3, 4, 5, 6]
    assert committed(run) == [2, 4, 6]
    assert torch.load(checkpoint(root, 4), weights_only=True)["step"] == 4, "it was mended on the way"
    assert status(run)["state"] == "finished"


@pytest.mark.parametrize("with_folder", [True, False])
def test_checkpoints_gone_although_the_status_knows_of_one(root: Path, with_folder: bool) -> None:
    shutil.rmtree(root / "run" / "checkpoints")
    if with_folder:
        (root / "run" / "checkpoints").mkdir()
    refused(65, 1, root, *go_on(root), words=[root / "run" / "checkpoints", "step 4", "move the run directory away"])
    assert committed(root / "run") == []


@pytest.mark.parametrize(
    "garbage", [b"\x00" * 100, b'{"attempt": "two", "state": 7}', b'{"attempt": 1, "saved_step": {}}']
)
def test_status_that_is_garbage_does_not_stop_a_run_whose_checkpoints_are_good(root: Path, garbage: bytes) -> None:
    (root / "run" / "status.json").write_bytes(garbage)
    run = train(1, root, *go_on(root))
    assert committed(run)[-1] == 6
    assert metrics(run)[4]["step"] == 5


# Resuming with another configuration


def test_a_file_of_the_run_that_cannot_be_used(root: Path) -> None:
    (root / "run" / "metrics.jsonl").unlink()
    (root / "run" / "metrics.jsonl").mkdir()
    with start(1, root, *go_on(root, "train.max_steps=8")) as job:
        assert job.wait(60) == [70], job.output()
        assert_one_line(job.output(), root / "run" / "metrics.jsonl", "Is a directory", alone=False)


@pytest.mark.parametrize("world_size", [1, 2])
def test_changed_fixed_keys_are_all_named_with_old_and_new_value(root: Path, world_size: int) -> None:
    before = snapshot(root / "run")
    changed = ("optim.lr=1e-3", "model.channels=16", "data.flip=yes")
    words = ["optim.lr: 0.0002 -> 0.001", "model.channels: 8 -> 16", "data.flip: false -> true", root / "run"]
    line = refused(78, world_size, root, *go_on(root, *changed, "train.log_every=2"), words=words)
    assert "log_every" not in line, "a key that may change is no reason"
    assert snapshot(root / "run") == before


def test_config_of_the_run_that_is_damaged(root: Path) -> None:
    (root / "run" / "config.yaml").write_text("optim: [")
    refused(78, 1, root, *go_on(root), words=[root / "run" / "config.yaml"])


@pytest.mark.parametrize("with_file", [True, False])
def test_the_config_in_the_checkpoint_binds_whatever_became_of_config_yaml(root: Path, with_file: bool) -> None:
    saved = root / "run" / "config.yaml"
    text = saved.read_text()
    saved.unlink()
    if with_file:
        saved.write_text(text.replace("lr: 0.0002", "lr: 5.0"))
        assert "lr: 5.0" in saved.read_text()
    refused(78, 1, root, *go_on(root, "optim.lr=5"), words=["optim.lr: 0.0002 -> 5.0"])


def test_a_finished_run_needs_no_images_any_more(root: Path) -> None:
    run = train(1, root, *go_on(root))
    shutil.move(root / "data", root / "moved")
    before = snapshot(run)
    assert train(1, root, *go_on(root, "data.download=no")) == run
    assert snapshot(run) == before


def test_a_device_that_is_not_there_is_said_once_for_all_ranks(tmp_path: Path) -> None:
    refused(78, 2, tmp_path, "train.device=cuda", words=["train.device=cuda", "valid here: auto, cpu"])


def test_a_folder_that_nobody_may_enter(tmp_path: Path) -> None:
    """Links in a circle stand for it: root, who may run these tests, may enter everything."""
    (tmp_path / "circle").symlink_to("circle")
    refused(78, 1, tmp_path, f"run.root={tmp_path / 'circle'}", words=[f"run.root={tmp_path / 'circle'}"])
    long = tmp_path / ("x" * 300)
    refused(78, 1, tmp_path / "1", f"run.root={long}", words=["run.root=", "File name too long"])
    data = ("data.name=folder", "data.image_size=8", f"data.root={long}")
    refused(65, 1, tmp_path / "2", *data, words=["data.root=", "File name too long"])


def test_status_says_how_a_start_failed_before_its_first_step(root: Path) -> None:
    """torchrun flattens exit codes: a script that found the words of the attempt before would requeue for ever."""
    for step in committed(root / "run"):
        truncate(checkpoint(root, step))
    refused(65, 1, root, *go_on(root), words=["no usable checkpoint"])
    ended = status(root / "run")
    assert (ended["state"], ended["exit_code"], ended["attempt"], ended["saved_step"]) == ("failed", 65, 2, 4)


@pytest.mark.parametrize(
    ("key", "valid"),
    [
        ("diffusion.schedule", "linear, scaled_linear, cosine, sigmoid"),
        ("diffusion.prediction", "eps, x0, v"),
        ("loss.weighting", "simple, min_snr, p2, vlb"),
        ("loss.timestep_sampler", "uniform"),
        ("model.name", "unet, unet2d, or package.module:function"),
        ("preview.sampler", "ddim, ddpm, dpm++, heun; or diffusers:CLASS, a scheduler of diffusers"),
    ],
)
def test_name_that_is_in_no_table_is_refused_with_the_valid_ones(
    capsys: pytest.CaptureFixture[str], key: str, valid: str
) -> None:
    """By --dry-run, which writes nothing, as by the run itself (which calls the same function)."""
    from ddpm_dist.train import main

    assert main(["--dry-run", f"{key}=nonsense"]) == 78
    said = capsys.readouterr()
    assert said.err.strip() == f"error: {key}=nonsense: expected one of {valid}"
    assert said.out == ""
