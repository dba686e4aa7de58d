"""What was saved is what is loaded; whatever is damaged is noticed; a save that fails costs nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import pickle
import random
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Job, differences, snapshot

from ddpm_dist.config import Config, to_flat
from ddpm_dist.errors import DataError, Diverged, ExitCode, TakenOver
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.files import replacing, sha256_of
from ddpm_dist.run.formats import FORMAT
from ddpm_dist.run.store import CheckpointStore, Found


def trained_state(seed: int, channels: int = 8) -> tuple[dict[str, Any], dict[str, Any]]:
    """State dicts of a small NHWC model and its Adam after two updates."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, channels, 3), torch.nn.GroupNorm(2, channels))
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 4, 5, 5)).square().sum().backward()
        optimizer.step()
    return model.state_dict(), optimizer.state_dict()


def make(step: int, channels: int = 8, **changes: Any) -> Checkpoint:
    model, optimizer = trained_state(step, channels)
    values = {
        "step": step,
        "model": model,
        "ema": {name: 0.5 * value for name, value in model.items()},
        "optimizer": optimizer,
        "scaler": {"scale": 2.0**16, "_growth_tracker": step},
        "window": torch.tensor([0.1, 0.2, step], dtype=torch.float64),
        "config": to_flat(Config()),
        "contract": {"image_shape": [1, 28, 28], "decay_steps": None, "images": "abc"},
    }
    return Checkpoint(**{**values, **changes})


def store_with(directory: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(directory / "checkpoints")
    for step in steps:
        store.save(make(step), {"attempt": 1})
    return store


def pt(store: CheckpointStore, step: int) -> Path:
    return store.directory / f"step-{step:08d}.pt"


def manifest(store: CheckpointStore, step: int) -> Path:
    return pt(store, step).with_suffix(".json")


def find(store: CheckpointStore) -> Found:
    found = store.newest_valid()
    assert found is not None
    return found


def newest(store: CheckpointStore) -> int:
    return find(store).checkpoint.step


def commit(store: CheckpointStore, step: int, content: bytes) -> None:
    """Any bytes, with a manifest that agrees with them."""
    store.directory.mkdir(exist_ok=True)
    pt(store, step).write_bytes(content)
    facts = {"step": step, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest(store, step).write_text(json.dumps(facts))


# Round trip


def test_everything_comes_back_to_the_bit_and_in_its_memory_format(tmp_path: Path) -> None:
    saved = make(7)
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(saved, {})
    loaded = store.load(7)
    assert differences(vars(saved), vars(loaded)) == []
    assert loaded.model["0.weight"].is_contiguous(memory_format=torch.channels_last)
    assert not loaded.model["0.weight"].is_contiguous()
    moment = loaded.optimizer["state"][0]["exp_avg"]
    assert moment.stride() == saved.optimizer["state"][0]["exp_avg"].stride()
    assert moment.abs().sum() > 0


def test_a_checkpoint_is_a_plain_dict_for_anybody_to_read(tmp_path: Path) -> None:
    store = store_with(tmp_path, 7)
    values = torch.load(pt(store, 7), weights_only=True)
    assert type(values) is dict
    assert {"format", "step", "model", "ema", "optimizer", "scaler", "config", "contract"} <= set(values)
    assert (values["format"], values["step"]) == (FORMAT, 7)


def test_the_manifest_says_what_the_file_is(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    path = store.save(make(200), {"attempt": 3, "world_size": 4})
    assert path == pt(store, 200)
    facts = json.loads(manifest(store, 200).read_text())
    content = path.read_bytes()
    assert facts == {
        "step": 200,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "attempt": 3,
        "world_size": 4,
    }
    assert find(store).sha256 == facts["sha256"]


def test_a_rank_loads_only_the_very_file_that_rank_zero_chose(tmp_path: Path) -> None:
    store = store_with(tmp_path, 4)
    chosen = find(store).sha256
    assert store.load(4, chosen).step == 4
    store.save(make(4, scaler={"scale": 1.0}), {})  # somebody else wrote it anew
    with pytest.raises(DataError, match=r"step-00000004\.pt"):
        store.load(4, chosen)


def test_no_checkpoint_is_not_an_error(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.newest_valid() is None
    assert store.committed() == []
    store.sweep()


# Pruning


def test_the_newest_by_step_stay_whatever_their_times(tmp_path: Path) -> None:
    store = store_with(tmp_path, 2, 4, 6)
    os.utime(manifest(store, 2), (2e9, 2e9))
    os.utime(pt(store, 2), (2e9, 2e9))
    os.utime(manifest(store, 6), (1, 1))
    store.save(make(8), {})
    store.prune(8, keep_last=3)
    assert store.committed() == [4, 6, 8]
    assert sorted(path.name for path in store.directory.iterdir()) == sorted(
        f"step-{step:08d}.{suffix}" for step in (4, 6, 8) for suffix in ("pt", "json")
    )


def test_steps_of_more_than_eight_digits_are_the_newest(tmp_path: Path) -> None:
    store = store_with(tmp_path, 99_999_999, 100_000_000)
    assert store.committed() == [99_999_999, 100_000_000]
    assert newest(store) == 100_000_000


def test_pruning_never_takes_what_was_just_saved_while_only_damaged_ones_are_newer(tmp_path: Path) -> None:
    """The run fell back to step 2 and saves more often now: the newer, damaged ones must not displace the good ones."""
    store = store_with(tmp_path, 2, 8, 10)
    for step in (8, 10):
        pt(store, step).write_bytes(b"damaged")
    assert newest(store) == 2
    store.save(make(4), {})
    store.prune(4, keep_last=2)
    assert newest(store) == 4


def test_multiples_of_keep_every_stay_for_ever(tmp_path: Path) -> None:
    store = store_with(tmp_path, 2, 5, 7, 10, 12, 14)
    store.prune(14, keep_last=2, keep_every=5)
    assert store.committed() == [5, 10, 12, 14]


def test_a_checkpoint_that_reads_back_differently_is_noticed(tmp_path: Path) -> None:
    store = store_with(tmp_path, 2, 4, 6)
    flip_a_bit(store)
    for step in (2, 6):
        store.verify(step)
    with pytest.raises(DataError, match="reads back differently"):
        store.verify(4)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = store_with(tmp_path, 2, 4)

    def failing(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("ddpm_dist.run.store.sha256_of", failing)
    with pytest.raises(OSError, match=os.strerror(number)):
        store.newest_valid()


def test_one_wrong_reading_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, answers = store_with(tmp_path, 2, 4), iter(["0" * 64])
    monkeypatch.setattr("ddpm_dist.run.store.sha256_of", lambda path: next(answers, None) or sha256_of(path))
    assert newest(store) == 4


def test_damaged_ones_are_set_aside_under_a_name_that_says_so(tmp_path: Path) -> None:
    store = store_with(tmp_path, 2, 4, 6)
    content = {path.name: path.read_bytes() for path in store.directory.iterdir()}
    assert [path.name for path in store.set_aside(newer_than=2)] == ["step-00000004.pt", "step-00000006.pt"]
    assert store.committed() == [2]
    kept = {path.name.removesuffix(".damaged"): path.read_bytes() for path in store.directory.iterdir()}
    assert kept == content
    store.sweep()
    assert len(list(store.directory.glob("*.damaged"))) == 4


def test_a_disk_that_is_too_full_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with(tmp_path, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    before = snapshot(tmp_path)
    with pytest.raises(OSError, match=r"No space left on device: 0 MB free, 1 MB needed"):
        store.save(make(4), {})
    assert snapshot(tmp_path) == before


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    store, bad = store_with(tmp_path, 2), make(4)
    next(iter(bad.ema.values())).fill_(float("nan"))
    before = snapshot(tmp_path)
    with pytest.raises(Diverged, match=r"step 4: ema\..* NaN or inf"):
        store.save(bad, {})
    assert snapshot(tmp_path) == before


def test_who_was_taken_over_commits_and_prunes_nothing(tmp_path: Path) -> None:
    store_with(tmp_path, 1, 2, 3)

    def fence() -> None:
        raise TakenOver("by another")

    store = CheckpointStore(tmp_path / "checkpoints", fence)
    before = snapshot(tmp_path)
    with pytest.raises(TakenOver):
        store.save(make(4), {})
    with pytest.raises(TakenOver):
        store.prune(3, keep_last=2)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("allowed", [0, 1])
def test_who_is_taken_over_while_it_saves_commits_nothing(tmp_path: Path, allowed: int) -> None:
    """The fence is asked before each of the two renames, of the content and of the manifest that commits it."""
    store_with(tmp_path, 1, 2)
    calls = 0

    def fence() -> None:
        nonlocal calls
        calls += 1
        if calls > allowed:
            raise TakenOver("by another")

    store = CheckpointStore(tmp_path / "checkpoints", fence)
    with pytest.raises(TakenOver):
        store.save(make(4), {})
    assert store.committed() == [1, 2]


# Damage


def truncate(store: CheckpointStore) -> None:
    os.truncate(pt(store, 4), pt(store, 4).stat().st_size - 1)


def halve(store: CheckpointStore) -> None:
    os.truncate(pt(store, 4), pt(store, 4).stat().st_size // 2)


def empty(store: CheckpointStore) -> None:
    os.truncate(pt(store, 4), 0)


def grow(store: CheckpointStore) -> None:
    with open(pt(store, 4), "ab") as file:
        file.write(b"\0")


def flip_a_bit(store: CheckpointStore) -> None:
    content = bytearray(pt(store, 4).read_bytes())
    content[len(content) // 2] ^= 4
    pt(store, 4).write_bytes(content)


def zero_a_page(store: CheckpointStore) -> None:
    content = bytearray(pt(store, 4).read_bytes())
    assert len(content) > 8192
    assert any(content[4096:8192])
    content[4096:8192] = bytes(4096)
    pt(store, 4).write_bytes(content)


def remove_content(store: CheckpointStore) -> None:
    pt(store, 4).unlink()


def replace_by_folder(store: CheckpointStore) -> None:
    pt(store, 4).unlink()
    pt(store, 4).mkdir()


def empty_manifest(store: CheckpointStore) -> None:
    manifest(store, 4).write_bytes(b"")


def garbage_manifest(store: CheckpointStore) -> None:
    manifest(store, 4).write_bytes(b"\xff\x00{")


def list_as_manifest(store: CheckpointStore) -> None:
    manifest(store, 4).write_text("[1, 2]")


def manifest_without_hash(store: CheckpointStore) -> None:
    manifest(store, 4).write_text(json.dumps({"step": 4, "size": pt(store, 4).stat().st_size}))


def manifest_with_numbers_as_text(store: CheckpointStore) -> None:
    manifest(store, 4).write_text(json.dumps({"step": "4", "size": "many", "sha256": "0" * 64}))


def another_steps_content(store: CheckpointStore) -> None:
    """Copied by hand: a whole and consistent checkpoint, but of step 2."""
    commit(store, 4, pt(store, 2).read_bytes())


DAMAGES = [
    truncate,
    halve,
    empty,
    grow,
    flip_a_bit,
    zero_a_page,
    remove_content,
    replace_by_folder,
    empty_manifest,
    garbage_manifest,
    list_as_manifest,
    manifest_without_hash,
    manifest_with_numbers_as_text,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_valid_one_is_taken_and_the_damaged_one_is_named(
    tmp_path: Path, damage: Callable[[CheckpointStore], None]
) -> None:
    store = store_with(tmp_path, 2, 4)
    assert newest(store) == 4
    damage(store)
    assert newest(store) == 2
    with pytest.raises(DataError, match="step-00000004") as caught:
        store.load(4)
    assert len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_that_was_copied_to_another_step_is_not_taken_for_it(tmp_path: Path) -> None:
    store = store_with(tmp_path, 2, 4)
    another_steps_content(store)
    with pytest.raises(DataError, match="step-00000004"):
        store.load(4)


def test_each_of_200_flipped_bits_is_noticed(tmp_path: Path) -> None:
    store = store_with(tmp_path, 4)
    original = pt(store, 4).read_bytes()
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    random_, missed = random.Random(seed), []
    for _ in range(200):
        content, bit = bytearray(original), random_.randrange(8 * len(original))
        content[bit // 8] ^= 1 << bit % 8
        pt(store, 4).write_bytes(content)
        try:
            store.load(4)
            missed.append(bit)
        except DataError:
            continue
    assert missed == []
    pt(store, 4).write_bytes(original)
    assert newest(store) == 4


def test_all_damaged_is_an_error_that_names_them_and_touches_nothing(tmp_path: Path) -> None:
    store = store_with(tmp_path, 2, 4)
    pt(store, 2).write_bytes(b"")
    truncate(store)
    before = snapshot(tmp_path)
    with pytest.raises(DataError, match=r"no usable checkpoint.*step-00000004.*step-00000002") as caught:
        store.newest_valid()
    assert caught.value.exit_code == ExitCode.DATA
    assert len(str(caught.value).splitlines()) == 1
    assert snapshot(tmp_path) == before


# Strangers


class Payload:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return pathlib.Path.touch, (self.marker,)


def hostile(marker: Path, kind: str) -> bytes:
    path = marker.with_suffix(".tmp")
    if kind == "pickle":
        return pickle.dumps(Payload(marker), protocol=2)
    torch.save({**vars(make(4)), "scaler": Payload(marker)}, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path: Path, kind: str) -> None:
    marker, store = tmp_path / "executed", store_with(tmp_path, 2)
    commit(store, 4, hostile(marker, kind))
    with pytest.raises(DataError, match="step-00000004") as caught:
        store.load(4)
    assert len(str(caught.value).splitlines()) == 1
    assert newest(store) == 2
    assert not marker.exists()


def test_the_hostile_pickles_above_are_hostile(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (tmp_path / "zip.pt").write_bytes(hostile(marker, "zip"))
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert marker.exists()
    marker.unlink()
    pickle.loads(hostile(marker, "pickle"))
    assert marker.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04garbage"])
def test_a_file_that_never_was_a_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    store = store_with(tmp_path, 2)
    commit(store, 4, content)
    with pytest.raises(DataError, match="step-00000004"):
        store.load(4)
    assert newest(store) == 2


@pytest.mark.parametrize("values", [{"model": {}}, [1, 2], {"state_dict": {}, "epoch": 3}])
def test_a_checkpoint_of_another_program_is_refused(tmp_path: Path, values: Any) -> None:
    store = store_with(tmp_path)
    torch.save(values, tmp_path / "other.pt")
    commit(store, 4, (tmp_path / "other.pt").read_bytes())
    with pytest.raises(DataError, match=r"step-00000004.*not a checkpoint of ddpm_dist"):
        store.load(4)


def test_another_format_is_refused_with_both_numbers(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(make(4, format=FORMAT + 1), {})
    with pytest.raises(DataError, match=f"format {FORMAT + 1}"):
        store.newest_valid()  # an older checkpoint is not used instead: the steps of the newer version would be lost
    with pytest.raises(DataError, match=rf"format {FORMAT + 1}, this version reads {FORMAT}"):
        store.load(4)


# What killed saves leave behind


def test_what_was_never_committed_is_not_a_checkpoint_and_is_swept(tmp_path: Path) -> None:
    store = store_with(tmp_path, 2)
    kept = snapshot(tmp_path)
    pt(store, 4).write_bytes(pt(store, 2).read_bytes())
    (store.directory / ".step-00000006.pt.123.tmp").write_bytes(b"half")
    (store.directory / ".step-00000002.json.123.tmp").write_bytes(b"half")
    assert newest(store) == 2
    store.sweep()
    assert snapshot(tmp_path) == kept


def test_the_sweep_leaves_what_is_not_ours(tmp_path: Path) -> None:
    store = store_with(tmp_path, 2)
    for name in ("notes.txt", "best.pt", "step-2.pt", "step-00000002.pt.bak"):
        (store.directory / name).write_text("mine")
    before = snapshot(tmp_path)
    store.sweep()
    assert snapshot(tmp_path) == before
    assert store.committed() == [2]


# Saves that fail


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_full_disk_costs_no_checkpoint_and_leaves_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """fsync of the content, its folder, the manifest, its folder: whichever fails."""
    store = store_with(tmp_path, 1, 2)
    before = snapshot(tmp_path)
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left on device") as caught:
        store.save(make(4), {})
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert len(calls) == call
    after = snapshot(tmp_path)
    assert {name: after.get(name) for name in before} == before, "older checkpoints are untouched"
    assert [name for name in after if ".tmp" in name] == []
    assert newest(store) == (2 if call < 4 else 4)
    store.sweep()
    store.save(make(4), {})  # somebody made room
    assert newest(store) == 4


def save_against_limits(directory: str, limits: list[int]) -> int:
    """A rank of the harness: real write errors, at various places of the file."""
    store, saved = CheckpointStore(Path(directory)), make(4, channels=64)
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            store.save(saved, {})
            print("saved", flush=True)
        except OSError as error:
            print(errno.errorcode[error.errno or 0], error.strerror, Path(str(error.filename)).name, flush=True)
    return 0


def test_a_real_write_error_anywhere_is_an_oserror_that_says_why(tmp_path: Path) -> None:
    store = store_with(tmp_path, 2)
    store.save(make(4, channels=64), {})
    size = pt(store, 4).stat().st_size
    manifest(store, 4).unlink()
    pt(store, 4).unlink()
    before = snapshot(tmp_path / "checkpoints")
    limits = [1000, 5000, size // 2, size - 200, size - 1]  # the log of the rank is shorter than all of them
    log = tmp_path / "rank.log"
    with Job(1, log, save_against_limits, (str(store.directory), limits)) as job:
        assert job.wait(60) == [0], job.output()
    assert job.output().splitlines() == ["EFBIG File too large step-00000004.pt"] * len(limits)
    assert snapshot(tmp_path / "checkpoints") == before
    assert newest(store) == 2


def test_an_error_of_ours_while_saving_is_not_taken_for_one_of_the_disk(tmp_path: Path) -> None:
    store = store_with(tmp_path, 2)
    before = snapshot(tmp_path)
    with pytest.raises(Exception, match="pickle") as caught:
        store.save(make(4, scaler={"function": lambda: None}), {})
    assert not isinstance(caught.value, OSError)
    assert snapshot(tmp_path) == before


def test_replacing_keeps_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half_and_fail() -> None:
        with replacing(path) as file:
            file.write(b"ne")
            assert path.read_bytes() == b"old"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half_and_fail()
    assert path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"n")
        file.write(b"ew")
    assert path.read_bytes() == b"new"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_the_content_is_on_disk_before_its_manifest_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that makes a manifest a promise: content, fsync, rename; only then the manifest."""
    store, events = CheckpointStore(tmp_path / "checkpoints"), []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        events.append(f"fsync {name.replace(f'.{os.getpid()}-{threading.get_ident()}', '')}")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        events.append(f"rename to {Path(target).suffix}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    store.save(make(4), {})
    assert events == [
        *("fsync .step-00000004.pt.tmp", "rename to .pt", "fsync checkpoints"),
        *("fsync .step-00000004.json.tmp", "rename to .json", "fsync checkpoints"),
    ]


# Earlier versions


def test_a_checkpoint_of_format_1_is_read_for_ever() -> None:
    """The file is as version 0.1.0 wrote it. A later format adds a folder; it never changes this one."""
    checkpoint = CheckpointStore(Path(__file__).parent / "format-1").load(4)
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert checkpoint.step == 4
    assert torch.equal(checkpoint.model["head.weight"], weight)
    assert torch.equal(checkpoint.ema["head.weight"], 3 * weight)
    assert torch.equal(checkpoint.optimizer["state"][0]["exp_avg_sq"], weight**2)
    assert checkpoint.optimizer["param_groups"][0]["betas"] == (0.9, 0.999)
    assert checkpoint.scaler["scale"] == 65536.0
    assert checkpoint.window.tolist() == [1, 2, 3, 0, 0, 0]
    assert checkpoint.config["data.batch_size"] == 128
    assert checkpoint.contract["channels_last"] is True
