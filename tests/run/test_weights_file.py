"""Weights in a .safetensors file come back to the bit, with their config; a file that is none is refused in a line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from harness import differences
from safetensors.torch import save_file

from ddpm_dist.config import Config, from_flat, to_flat
from ddpm_dist.errors import ConfigError, DataError
from ddpm_dist.run.directory import is_weights_file
from ddpm_dist.run.weights_file import WeightsFile, read_weights_file, write_weights_file


def content() -> WeightsFile:
    """Weights in both memory formats, two of them in the same memory."""
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    state = {"image": image, "whole": torch.arange(6), "half": torch.ones(2, dtype=torch.float16)}
    state |= {"tied": state["whole"], "part": state["whole"][2:4], "empty": torch.zeros(0), "minus": torch.tensor(-0.0)}
    config = {**to_flat(Config()), "optim.lr": 1e-4}
    return WeightsFile(state, config, {"image_shape": [3, 4, 4], "canary": "ab"}, 7, "ema", "c0ffee")


def test_all_comes_back_to_the_bit(tmp_path: Path) -> None:
    path, written = tmp_path / "weights.safetensors", content()
    write_weights_file(path, written)
    read = read_weights_file(path)
    assert differences(dict(read.state), dict(written.state)) == []
    assert from_flat(read.config) == from_flat(written.config)
    assert (read.contract, read.step, read.weights) == (written.contract, 7, "ema")
    assert read.source_sha256 == "c0ffee"
    assert is_weights_file(path)
    assert not is_weights_file(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_what_is_no_such_file_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(DataError, match="holds weights but no config"):
        read_weights_file(path)
    save_file({"a": torch.zeros(2)}, path, {"ddpm_dist.format": "2"})
    with pytest.raises(DataError, match="format 2, this version reads 1"):
        read_weights_file(path)
    write_weights_file(path, content())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        read_weights_file(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConfigError, match="needs the safetensors package; pip install 'ddpm_dist\\[diffusers\\]'"):
        read_weights_file(path)


def test_a_file_that_cannot_be_written_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_weights_file(tmp_path / "gone" / "weights.safetensors", content())
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_weights_file(tmp_path / "taken.safetensors", content())
    assert [each.name for each in tmp_path.iterdir()] == ["taken.safetensors"]
