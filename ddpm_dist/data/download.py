"""Fetching a data set, safely if several jobs do so at the same time."""

from __future__ import annotations

import http.client
import os
import shutil
import tempfile
from pathlib import Path

from ddpm_dist.errors import DataError


def download_once(name: str, root: Path) -> None:
    """Fetch a data set into a private folder, checked by torchvision's checksums, then move its files into place.

    Each move is a rename: a reader on any rank or node sees a whole file or none, and a second job that fetches
    at the same time replaces each file by an equal one.

    Args:
        name: "mnist", "fashion-mnist" or "cifar10".
        root: data.root.

    Raises:
        DataError: says what could not be fetched or written.
    """
    from torchvision import datasets

    kind, folder = {
        "mnist": (datasets.MNIST, "MNIST"),
        "fashion-mnist": (datasets.FashionMNIST, "FashionMNIST"),
        "cifar10": (datasets.CIFAR10, datasets.CIFAR10.base_folder),
    }[name]
    try:
        root.mkdir(parents=True, exist_ok=True)
        private = Path(tempfile.mkdtemp(prefix=".download-", dir=root))
    except OSError as error:
        reason = "it is a file, not a folder" if root.is_file() else error.strerror
        raise DataError(f"data.root={root}: cannot be written ({reason}), so {name} cannot go there") from None
    try:
        kind(str(private), train=True, download=True)
        for source in sorted(path for path in private.rglob("*") if path.is_file()):
            target = root / source.relative_to(private)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    except (RuntimeError, OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"data.name={name}: download into {root} failed ({reason}); without a network here, run "
            f"`python -m ddpm_dist.fetch {name}` on a machine that has one and copy its folder data/{folder} to "
            f"{root.absolute() / folder}, or set data.root to a folder that holds {folder}"
        ) from None
    finally:
        shutil.rmtree(private, ignore_errors=True)
