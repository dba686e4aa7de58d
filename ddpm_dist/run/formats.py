"""What a checkpoint file holds, and the way up from every older format.

A checkpoint file is one dict of tensors and plain values. Its entry "format" is a number that says which further
entries there are and what they mean. Every format that was ever released stays readable: a file of format n passes
through UPGRADES[n], UPGRADES[n + 1], ... until it looks as if this version had written it.

To change what a checkpoint holds:
1. Raise FORMAT by one, from n to n + 1.
2. Add `UPGRADES[n]`: a function from the dict of format n to the dict of format n + 1. Names of config keys that
   have changed are changed there too. New config keys need nothing: keys that a file lacks get their defaults.
3. Commit a small checkpoint of the new format as tests/run/format-(n + 1)/, and leave the older ones alone.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ddpm_dist.errors import DataError

Values = dict[str, Any]

FORMAT = 1  # the format that this version writes
UPGRADES: dict[int, Callable[[Values], Values]] = {}  # from format n, which is the key, to format n + 1

FOREIGN = "not a checkpoint of ddpm_dist"
USE_ANOTHER_VERSION = "use the version of ddpm_dist that wrote it, or a later one"


class Damaged(DataError):
    """A checkpoint that no save of ours leaves behind: missing, truncated, changed, or made by another program."""


def read_values(path: Path) -> Values:
    """The content of a checkpoint file, in today's format; tensors on the CPU. Nothing in the file is executed.

    Raises:
        Damaged: the file is missing, or is no file that torch.save made of tensors and plain values.
        DataError: the file is whole, but another program or a later version wrote it.
        OSError, MemoryError, RuntimeError: this machine cannot read it now, which says nothing about the file.
    """
    values = load_plain(path)
    try:
        return upgrade(values)
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from None


def load_plain(path: Path) -> Any:
    """What torch.save has put into a file, tensors on the CPU. Nothing in the file is executed.

    Raises:
        Damaged: the file is missing, or is no file that torch.save made of tensors and plain values.
        OSError, MemoryError, RuntimeError: as in `read_values`.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError):
        raise Damaged(f"{path.name}: missing") from None
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError:  # torch's own message tells the user how to execute the file all the same
        raise Damaged(f"{path.name}: holds more than tensors and plain values, nothing of it was executed") from None
    except Exception as error:  # torch.load raises half a dozen types for files that are not its own
        if "memory" in str(error):  # torch's allocator raises RuntimeError
            raise
        raise Damaged(f"{path.name}: not a checkpoint ({_first_line(error)})") from None


def upgrade(values: Any) -> Values:
    """The content of a checkpoint file of any format up to FORMAT, as this version would have written it.

    Args:
        values: what the file holds. The format number is looked at first: what else belongs to a checkpoint
            depends on it.

    Raises:
        DataError: these are not the values of a checkpoint, or a later version wrote them.
    """
    number = values.get("format") if isinstance(values, dict) else None
    if type(number) is not int or number < 1:
        raise DataError(FOREIGN)
    if number > FORMAT:
        raise DataError(f"format {number}, this version reads {FORMAT} and below; {USE_ANOTHER_VERSION}")
    for older in range(number, FORMAT):
        try:
            values = {**UPGRADES[older](values), "format": older + 1}
        except KeyError as error:
            raise DataError(f"{FOREIGN} (format {older} without {error})") from None
    return dict(values)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"
