"""Every format that a version ever wrote stays loadable, and a later one is named by its number."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import differences

from ddpm_dist.config import from_flat
from ddpm_dist.errors import ConfigError, DataError
from ddpm_dist.run import checkpoint as checkpoints
from ddpm_dist.run import formats
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.formats import FORMAT
from ddpm_dist.run.store import CheckpointStore

HERE = Path(__file__).parent
Values = dict[str, Any]


def format_1() -> Values:
    """The content of the committed checkpoint of format 1."""
    values = torch.load(HERE / "format-1" / "step-00000004.pt", weights_only=True)
    assert isinstance(values, dict)
    return values


def store_of(directory: Path, values: Any) -> CheckpointStore:
    """A store whose only checkpoint, of step 4, holds these values."""
    path = directory / "step-00000004.pt"
    torch.save(values, path)
    content = path.read_bytes()
    facts = {"step": 4, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(facts))
    return CheckpointStore(directory)


def without(values: Values, name: str) -> Values:
    return {other: value for other, value in values.items() if other != name}


LATER = {
    "same fields": format_1(),
    "a field more": format_1() | {"averages": {}},
    "a field less": without(format_1(), "window"),
    "only the number": {},
}


@pytest.mark.parametrize("change", LATER)
def test_a_later_format_is_refused_by_its_number_whatever_its_fields_are(tmp_path: Path, change: str) -> None:
    store = store_of(tmp_path, LATER[change] | {"format": FORMAT + 1})
    for read in (store.newest_valid, lambda: store.load(4)):
        with pytest.raises(DataError, match=rf"step-00000004\.pt.*format {FORMAT + 1}, this version reads {FORMAT}"):
            read()


def test_a_config_key_of_a_later_version_is_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim\.warp"):
        from_flat({"optim.warp": 9})
    values = format_1()
    store = store_of(tmp_path, values | {"config": values["config"] | {"optim.warp": 9}})
    with pytest.raises(DataError, match=r"step-00000004\.pt.*optim\.warp") as caught:
        store.newest_valid()
    assert len(str(caught.value).splitlines()) == 1


def test_a_field_that_this_version_does_not_know_is_named_rather_than_lost(tmp_path: Path) -> None:
    store = store_of(tmp_path, format_1() | {"teachers": {}})
    with pytest.raises(DataError, match=r"step-00000004\.pt: holds teachers, which this version does not know"):
        store.newest_valid()


@pytest.mark.parametrize("number", [None, 0, -1, True, 1.0, "1", [1]])
def test_what_has_no_format_number_is_of_another_program(tmp_path: Path, number: Any) -> None:
    with pytest.raises(DataError, match=r"step-00000004\.pt: not a checkpoint of ddpm_dist"):
        store_of(tmp_path, format_1() | {"format": number}).newest_valid()


@pytest.mark.parametrize("missing", [name for name in format_1() if name != "format"])
def test_a_checkpoint_without_one_of_its_fields_is_of_another_program(tmp_path: Path, missing: str) -> None:
    with pytest.raises(DataError, match=r"step-00000004\.pt: not a checkpoint of ddpm_dist"):
        store_of(tmp_path, without(format_1(), missing)).newest_valid()


# The way up

COMMITTED = sorted(HERE.glob("format-*"), key=lambda folder: int(folder.name.removeprefix("format-")))


def test_a_checkpoint_of_each_format_is_committed() -> None:
    """Whoever raises FORMAT adds a folder, and leaves the older ones as they are."""
    assert [folder.name for folder in COMMITTED] == [f"format-{number}" for number in range(1, FORMAT + 1)]
    assert sorted(formats.UPGRADES) == list(range(1, FORMAT))


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_each_committed_format_is_loaded_as_one_of_today(folder: Path) -> None:
    found = CheckpointStore(folder).newest_valid()
    assert found is not None
    checkpoint = found.checkpoint
    assert checkpoint.format == FORMAT
    assert checkpoint.step > 0
    assert all(isinstance(value, torch.Tensor) for value in [*checkpoint.model.values(), checkpoint.window])
    assert checkpoint.model.keys() == checkpoint.ema.keys()
    assert from_flat(checkpoint.config).run.name


def test_an_optional_field_is_left_out_where_it_is_empty_and_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    values = Checkpoint.from_values(format_1()).to_values()
    assert list(values) == list(format_1())
    monkeypatch.setattr(checkpoints, "_OPTIONAL", checkpoints._OPTIONAL | {"scaler"})
    monkeypatch.setattr(checkpoints, "_REQUIRED", set(values) - {"scaler"})
    empty = dataclasses.replace(Checkpoint.from_values(values), scaler={})
    assert list(empty.to_values()) == list(without(values, "scaler"))


def up_from_average(old: Values) -> Values:
    """The second implementation: in this pretended history format 1 wrote other names than today's format 2."""
    new = {**old, "ema": old["average"], "config": {**old["config"], "optim.lr": old["config"]["optim.rate"]}}
    del new["average"], new["config"]["optim.rate"]
    return new


def test_a_new_format_takes_a_number_and_one_function_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    today = format_1()
    old = without(today, "ema") | {"average": today["ema"]}
    old["config"] = without(today["config"], "optim.lr") | {"optim.rate": 3e-5}
    monkeypatch.setattr(formats, "FORMAT", 2)
    monkeypatch.setitem(formats.UPGRADES, 1, up_from_average)

    store = store_of(tmp_path, old)
    found = store.newest_valid()
    assert found is not None
    expected = today | {"format": 2, "config": today["config"] | {"optim.lr": 3e-5}}
    assert differences(expected, found.checkpoint.to_values()) == []

    store.save(dataclasses.replace(found.checkpoint, step=5), {})
    assert torch.load(tmp_path / "step-00000005.pt", weights_only=True)["format"] == 2
    assert differences(expected | {"step": 5}, store.load(5).to_values()) == []

    (tmp_path / "foreign").mkdir()
    with pytest.raises(DataError, match=r"step-00000004\.pt: not a checkpoint of ddpm_dist"):
        store_of(tmp_path / "foreign", {"format": 1, "state_dict": {}}).newest_valid()


def test_the_steps_up_are_taken_one_after_the_other_from_where_a_file_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    def step_up(name: str) -> Callable[[Values], Values]:
        return lambda old: {**old, "path": [*old["path"], name]}

    monkeypatch.setattr(formats, "FORMAT", 4)
    monkeypatch.setattr(formats, "UPGRADES", {number: step_up(f"{number} to {number + 1}") for number in (3, 1, 2)})
    for start, path in ((1, ["1 to 2", "2 to 3", "3 to 4"]), (2, ["2 to 3", "3 to 4"]), (4, [])):
        given = {"format": start, "path": list[str]()}
        assert formats.upgrade(given) == {"format": 4, "path": path}
        assert given == {"format": start, "path": []}
