"""The files that drawn images go into, and the folder that keeps blocks until they are all there."""

from __future__ import annotations

import io
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_dist.errors import ConfigError, DataError, TakenOver
from ddpm_dist.evaluation.generate import BLOCK_SIZE
from ddpm_dist.evaluation.image_files import Target
from ddpm_dist.evaluation.parts import Parts

STAMP = {"run": "mnist", "step": 4, "seed": 0, "sha256": "a" * 64, "shape": [3, 2, 4]}


def block(seed: int, size: int = BLOCK_SIZE) -> Tensor:
    return torch.randint(0, 256, (size, 3, 2, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def no_wait(seconds: float) -> None:
    raise AssertionError("nobody holds the folder")


def never() -> None:
    """Nobody asks to stop."""


def killed(path: Path, missing_ok: bool = False) -> None:
    raise KeyboardInterrupt


def begin(out: Path, **changes: object) -> Parts:
    parts = Parts(Target.named(str(out)))
    parts.claim(no_wait)
    parts.begin({**STAMP, **changes})
    return parts


def test_npz_has_the_bytes_of_savez_and_no_more_than_two_blocks_are_in_memory(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def blocks() -> Iterator[Tensor]:
        for seed in range(5):
            one = block(seed, 3 if seed == 4 else 8)
            assert sum(reference() is not None for reference in alive) <= 1
            alive.append(weakref.ref(one))
            yield one
            del one

    Target.named(str(tmp_path / "images.npz")).write(blocks(), 35)
    expected = io.BytesIO()
    images = torch.cat([block(seed, 3 if seed == 4 else 8) for seed in range(5)])
    np.savez(expected, arr_0=images.permute(0, 2, 3, 1).contiguous().numpy())
    assert (tmp_path / "images.npz").read_bytes() == expected.getvalue()


def test_blocks_come_back_in_order_whoever_wrote_them_and_the_last_is_cut(tmp_path: Path) -> None:
    parts, num = begin(tmp_path / "images.npz"), 2 * BLOCK_SIZE + 7
    assert parts.missing(num) == [0, 1, 2]
    for index in (2, 0):
        parts.write(index, block(index))
    assert parts.missing(num) == [1]
    assert parts.num_drawn(num) == BLOCK_SIZE + 7
    parts.write(1, block(1))
    found = list(parts.images(num, never))
    assert torch.equal(torch.cat(found), torch.cat([block(index) for index in range(3)])[:num])
    parts.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_block_is_named_and_drawn_again(tmp_path: Path) -> None:
    parts = begin(tmp_path / "images.npz")
    parts.write(0, block(0))
    path = parts.folder / "000000.npy"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(DataError, match=r"000000\.npy: missing or damaged"):
        list(parts.images(9, never))
    assert parts.missing(9) == [0]
    path.write_bytes(b"\0")
    assert parts.missing(9) == [0]
    parts.release()


def test_folder_of_another_data_set_is_refused_with_what_differs_and_kept(tmp_path: Path) -> None:
    first = begin(tmp_path / "images.npz")
    first.write(0, block(0))
    first.release()
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1; sha256: a{12} -> b{12}; eta: default -> 0\.5\. Its images"):
        begin(tmp_path / "images.npz", seed=1, sha256="b" * 64, eta=0.5)
    assert (first.folder / "000000.npy").exists()


def test_blocks_without_a_stamp_are_of_no_known_data_set(tmp_path: Path) -> None:
    first = begin(tmp_path / "folder")
    first.write(0, block(0))
    first.release()
    (tmp_path / "folder" / "parts" / "stamp.json").unlink()
    second = begin(tmp_path / "folder", seed=1)
    assert second.missing(9) == [0]
    second.release()


def test_a_rank_that_was_taken_over_writes_nothing_any_more(tmp_path: Path) -> None:
    old = begin(tmp_path / "images.npz")
    old.release()
    new = begin(tmp_path / "images.npz")
    with pytest.raises(TakenOver, match="attempt 1 was taken over by attempt 2"):
        old.write(0, block(0))
    new.remove()
    third = begin(tmp_path / "images.npz", seed=5)  # its number is 1 again
    with pytest.raises(TakenOver, match="another data set is being drawn there now"):
        old.write(0, block(0))
    assert third.missing(9) == [0]
    third.release()


def test_whoever_is_killed_while_it_cleans_up_has_only_the_rest_to_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "images.npz"
    parts = begin(out)
    parts.write(0, block(0))
    out.write_bytes(b"the data set")
    parts.say_written(9)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            parts.remove()
    parts.release()  # as the end of the process does
    after = Parts(Target.named(str(out)))
    after.claim(no_wait)
    assert after.is_written(STAMP, 9)
    after.remove()
    assert list(tmp_path.iterdir()) == [out]


def leave_written(out: Path, num: int) -> None:
    """What an attempt leaves behind that is killed right after it has noted that its data set is written."""
    parts = begin(out)
    parts.write(0, block(0))
    Target.named(str(out)).write([block(0)[:num]], num)
    parts.say_written(num)
    parts.release()


@pytest.mark.parametrize("name", ["images.npz", "folder"])
@pytest.mark.parametrize("other", ["seed", "num", "gone"])
def test_what_is_left_of_a_written_data_set_is_not_taken_for_another(tmp_path: Path, name: str, other: str) -> None:
    out = tmp_path / name
    leave_written(out, 9)
    if other == "gone":
        (out / "00008.png" if name == "folder" else out).unlink()
    stamp, num = {**STAMP, "seed": 1 if other == "seed" else 0}, 8 if other == "num" else 9
    parts = Parts(Target.named(str(out)))
    assert parts.read_stamp() == {}  # whose step would be gone on with
    parts.claim(no_wait)
    assert parts.is_written(STAMP, 9) == (other != "gone")
    assert not parts.is_written(stamp, num)
    parts.begin(stamp)
    assert parts.missing(num) == [0]
    assert parts.read_stamp() == stamp
    parts.remove()
    assert not parts.folder.exists()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", ["notes.txt", "attempts/diary.txt", "stamp.json", "mine/00001.json", "000000.npy", "000000.npy/x", ".x.tmp"]
)
def test_a_folder_with_files_of_others_is_refused_and_stays_as_it_is(tmp_path: Path, name: str) -> None:
    mine = tmp_path / "shots" / "parts" / name
    mine.parent.mkdir(parents=True)
    mine.write_text('{"a": "diary"}')
    before = files_of(tmp_path)
    found = name.partition("/")[0] if not name.startswith("attempts") else name
    with pytest.raises(ConfigError, match=f"but {found} in it was not written by this command; give another --out"):
        begin(tmp_path / "shots")
    assert files_of(tmp_path) == before


def test_files_of_others_that_come_later_stay_and_end_nothing(tmp_path: Path) -> None:
    parts = begin(tmp_path / "shots")
    parts.write(0, block(0))
    others = ("notes.txt", "attempts/diary.txt", "mine/000000.npy", ".x.tmp", "0.npy")
    for name in others:
        (parts.folder / name).parent.mkdir(exist_ok=True)
        (parts.folder / name).write_text(name)
    parts.release()
    again = begin(tmp_path / "shots")
    assert again.missing(9) == []
    again.say_written(9)
    again.remove()
    assert files_of(parts.folder) == {name: name.encode() for name in others}


def test_two_attempts_may_clean_up_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, unlink = begin(tmp_path / "images.npz"), Path.unlink
    parts.write(0, block(0))
    parts.say_written(9)

    def unlink_twice(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok=True)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_twice)
    parts.remove()
    parts.remove()
    assert list(tmp_path.iterdir()) == []
    parts.attempt, parts.stamp = 1, STAMP
    with pytest.raises(TakenOver, match="another attempt has written the same data set, and removed it"):
        parts.say_written(9)


def test_a_picture_of_any_name_may_lie_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "².png").write_text("")
    Target(tmp_path, "folder").probe(1)


def test_a_disk_without_room_is_noticed_before_the_first_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = begin(tmp_path / "images.npz")
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    parts.refuse_without_space(9, [0])
    with pytest.raises(OSError, match="No space left on device: 1 MB free, 2 MB needed"):
        parts.refuse_without_space(50_000, range(782))
    parts.release()
