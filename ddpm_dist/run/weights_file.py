"""Weights in one .safetensors file, with all that is needed to use them: config, contract, step and their origin.

The tensors have the names of the network's state_dict. What else there is stands in the header of the file, as text.
Reading one executes nothing of it, whoever has written it. The package safetensors is an optional extra.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_dist.errors import ConfigError, DataError
from ddpm_dist.run.files import replacing
from ddpm_dist.run.formats import USE_ANOTHER_VERSION

FORMAT = 1  # the version of what the header says
TO_INSTALL = "pip install 'ddpm_dist[diffusers]'"
_FORMAT_ENTRY = "ddpm_dist.format"


@dataclass(frozen=True)
class WeightsFile:
    """What such a file holds.

    Attributes:
        state: the weights, by the names of the network's state_dict; on the CPU.
        config: {dotted key: value} of the run, resolved.
        contract: what was decided at step 0 of the run, with the shape of the images and the number of classes.
        step: of the checkpoint that they come from.
        weights: which weights of it they are: `ema`, `model`, ...
        source_sha256: of the file of that checkpoint.
    """

    state: Mapping[str, Tensor]
    config: Mapping[str, Any]
    contract: Mapping[str, Any]
    step: int
    weights: str
    source_sha256: str


def write_weights_file(path: Path, content: WeightsFile) -> None:
    """Write the file, which appears under `path` whole or not at all.

    Raises:
        ConfigError: the package safetensors is not installed.
        OSError: it cannot be written.
    """
    try:
        from safetensors.torch import save
    except ImportError:
        raise ConfigError(f"{path}: writing it needs the safetensors package; {TO_INSTALL}") from None

    header = {
        "format": "pt",  # the frameworks' mark of tensors of torch
        _FORMAT_ENTRY: str(FORMAT),
        "config": json.dumps(dict(content.config)),
        "contract": json.dumps(dict(content.contract)),
        "step": str(content.step),
        "weights": content.weights,
        "source_sha256": content.source_sha256,
    }
    with replacing(path) as file:
        file.write(save(plain(content.state), header))


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors on the CPU, row by row in memory, none of them sharing its memory: what safetensors takes."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors of any .safetensors file by their names, on the CPU, and the texts in its header.

    Raises:
        ConfigError: the package safetensors is not installed.
        DataError: the file is damaged.
        OSError: it cannot be read.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ConfigError(f"{path}: reading it needs the safetensors package; {TO_INSTALL}") from None

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise DataError(f"{path}: not a whole safetensors file ({error})") from None


def read_weights_file(path: Path) -> WeightsFile:
    """Read a file that `write_weights_file` wrote.

    Raises:
        ConfigError: the package safetensors is not installed.
        DataError: the file is damaged, another program wrote it, or a later version.
        OSError: it cannot be read.
    """
    state, header = read_tensors(path)
    if _FORMAT_ENTRY not in header:
        raise DataError(
            f"{path}: holds weights but no config; expected a file that `python -m ddpm_dist.export RUN_DIR "
            "--to safetensors` wrote"
        )
    if header[_FORMAT_ENTRY] != str(FORMAT):
        raise DataError(f"{path}: format {header[_FORMAT_ENTRY]}, this version reads {FORMAT}; {USE_ANOTHER_VERSION}")
    config, contract = json.loads(header["config"]), json.loads(header["contract"])
    return WeightsFile(state, config, contract, int(header["step"]), header["weights"], header["source_sha256"])
