"""What this machine measures: the run root, the size of a checkpoint, the tracking server, the network."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from ddpm_dist.config import Config, DataConfig
from ddpm_dist.errors import ConfigError
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.tracking.address import choose_uri

NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "cifs", "smb", "panfs", "weka", "9p", "virtiofs", "afs")
MAX_MEASURED_BYTES = 2**28
STATE_COPIES = 4  # weights, their average and Adam's two moments
IMAGE_SHAPE = (3, 32, 32)  # the size of the weights hardly depends on it


@dataclass(frozen=True)
class Site:
    """What SLURM does not know.

    Attributes:
        trouble: why run.root cannot be written; empty if it can be.
        file_system: of run.root, as /proc/mounts names it.
        links_are_exclusive: whether link(2) refuses a name that is taken. The lease of a run relies on it.
        save_seconds: how long it takes to write and fsync a checkpoint there.
        free_bytes: what is free there; quotas are not seen.
        python_file_system: where the interpreter lies.
        tracking_uri: None where the runs are tracked in mlflow.db in run.root.
        tracking_trouble: why the server cannot be reached; empty if it can be.
        missing_images: a file or folder of the data set that is not there; empty if nothing is missing.
        interfaces: the names of the network interfaces.
        environment: of the shell that is going to submit.
    """

    trouble: str
    file_system: str
    links_are_exclusive: bool
    checkpoint_bytes: int
    save_seconds: float
    free_bytes: int
    python_file_system: str
    tracking_uri: str | None
    tracking_trouble: str
    missing_images: str
    interfaces: tuple[str, ...]
    environment: dict[str, str]


def look(config: Config) -> Site:
    """Measure all of it. Writes into run.root for a moment, and leaves nothing there."""
    root, size = config.directory.parent, checkpoint_bytes(config)
    there = _nearest(root)
    trouble, save_seconds, exclusive = "", 0.0, True
    try:
        save_seconds, exclusive = measure(there, size)
    except OSError as error:
        trouble = f"{there}: {error.strerror or error}"
    uri, tracking_trouble = None, ""
    if config.tracking.enabled:
        try:
            uri = choose_uri(config, RunDirectory(config.directory))
            tracking_trouble = reach(uri)
        except ConfigError as error:
            tracking_trouble = str(error)
    return Site(
        trouble=trouble,
        file_system=file_system_of(there),
        links_are_exclusive=exclusive,
        checkpoint_bytes=size,
        save_seconds=save_seconds,
        free_bytes=shutil.disk_usage(there).free,
        python_file_system=file_system_of(Path(sys.executable)),
        tracking_uri=uri,
        tracking_trouble=tracking_trouble,
        missing_images=missing_images(config.data, config.model.class_labels),
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        environment=dict(os.environ),
    )


def checkpoint_bytes(config: Config) -> int:
    """The size of a checkpoint: weights, average and moments in float32. The network takes no memory here."""
    import torch

    from ddpm_dist.build import build_model, check_names

    check_names(config)
    with torch.device("meta"):
        model = build_model(config, IMAGE_SHAPE, 0, torch.device("meta"), channels_last=False)
    return STATE_COPIES * 4 * sum(parameter.numel() for parameter in model.parameters())


def missing_images(data: DataConfig, labels: bool) -> str:
    """The first file of the data set, or of its labels, that is not there, or the folder of pictures; else empty."""
    from ddpm_dist.data.datasets import missing_files

    if data.name == "folder":
        return "" if Path(data.root).exists() else str(Path(data.root))
    return next(map(str, missing_files(data, labels)), "")


def measure(folder: Path, size: int) -> tuple[float, bool]:
    """Returns (seconds to write and fsync so many bytes, whether link(2) is exclusive). Raises OSError."""
    probe, other = folder / f".doctor-{os.getpid()}", folder / f".doctor-{os.getpid()}-link"
    part = min(size, MAX_MEASURED_BYTES)
    try:
        data, begun = os.urandom(part), time.monotonic()
        with probe.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        seconds = (time.monotonic() - begun) * size / part
        os.link(probe, other)
        try:
            os.link(probe, other)
            return seconds, False
        except FileExistsError:
            return seconds, True
    finally:
        probe.unlink(missing_ok=True)
        other.unlink(missing_ok=True)


def file_system_of(path: Path) -> str:
    """The type of the file system that a path is on; `unknown` where /proc/mounts does not tell."""
    best, kind = "", "unknown"
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return kind
    for line in mounts:
        point, name = line.split()[1:3]
        if len(point) >= len(best) and path.resolve().is_relative_to(point.replace("\\040", " ")):
            best, kind = point, name
    return kind


def is_network(file_system: str) -> bool:
    return file_system.startswith(NETWORK)


def reach(uri: str | None) -> str:
    """Why a tracking server does not answer; empty if it does, or is a database."""
    parsed = urlparse(uri or "")
    if parsed.scheme not in ("http", "https"):
        return ""
    try:
        port = parsed.port or (443 if parsed.scheme == "https" else 80)
        with socket.create_connection((parsed.hostname or "", port), timeout=5):
            return ""
    except (OSError, ValueError) as error:
        return str(error)


def _nearest(path: Path) -> Path:
    """The folder itself, or the one that it would be made in."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
