"""What MLflow's page of a run says about it beside curves and parameters: who, from which code, on which images.

All of it comes from small files of the run directory and from git; no image is read, and what is not known is left out.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ddpm_dist
from ddpm_dist.config import Config
from ddpm_dist.run.directory import RunDirectory
from ddpm_dist.run.files import read_json

CHECKOUT = Path(ddpm_dist.__file__).resolve().parents[1]
GIT_SECONDS = 5.0
MODIFIED = "-dirty"  # git's mark of a commit with changes that were not committed


@dataclass(frozen=True)
class Dataset:
    """The images that a run is trained on.

    Attributes:
        name: data.name.
        digest: their fingerprint, as in the contract of each checkpoint.
        source: data.root, an absolute path where the working directory is known.
        profile: their number (num_rows, as MLflow calls it), their shape [C, H, W], and values in all of them.
    """

    name: str
    digest: str
    source: str
    profile: dict[str, int | list[int]]


def commit_of(checkout: Path) -> str | None:
    """The commit that a folder has checked out, with MODIFIED at its end where files differ from it.

    None where the folder is no git checkout itself (a package inside somebody's repository is not that repository's
    code), where git is not installed, or where it does not answer in time.
    """
    if not (checkout / ".git").exists():
        return None
    # The checkout may belong to another user, as it does in a container: we run its code, so we trust it.
    command = ["git", "-c", f"safe.directory={checkout}", "-C", str(checkout)]
    command += ["describe", "--always", f"--dirty={MODIFIED}", "--abbrev=40", "--exclude=*"]
    # A git hook or a caller may have these set for a repository of its own.
    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            check=True,
            env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout.strip() or None


def surroundings() -> dict[str, str]:
    """Host, working directory and commit of the attempt whose shipper this process is."""
    found = {"host": socket.gethostname()}
    with contextlib.suppress(OSError):
        found["working_directory"] = str(Path.cwd())
    commit = commit_of(CHECKOUT)
    return found | ({"commit": commit} if commit else {})


def user_of(directory: RunDirectory) -> str:
    """Whose run it is: the owner of its config.yaml, by name, or by number where the number has no name."""
    try:
        return directory.config_file.owner()
    except KeyError:
        return str(directory.config_file.stat().st_uid)


def tags_of(config: Config, directory: RunDirectory, origin: dict[str, str]) -> dict[str, str]:
    """MLflow's own tags, which its page shows as user, source, commit and description."""
    tags = {
        "mlflow.user": user_of(directory),
        "mlflow.source.name": "ddpm_dist.train",
        "mlflow.source.type": "LOCAL",
        "mlflow.note.content": describe(config, directory, origin),
    }
    commit = origin.get("commit", "").removesuffix(MODIFIED)
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def describe(config: Config, directory: RunDirectory, origin: dict[str, str]) -> str:
    """What the run is, where it lies, and how to go on with it and sample from it. Markdown."""
    path = directory.path.resolve()
    place, host = shlex.quote(str(path)), origin.get("host")
    resume = f"python -m ddpm_dist.train --config {shlex.quote(str(path / 'config.yaml'))}"
    if "working_directory" in origin:  # run.root and data.root may be relative to it
        resume = f"cd {shlex.quote(origin['working_directory'])} && {resume}"
    lines = [
        f"Run `{config.run.name}` of ddpm_dist: a denoising diffusion model, trained on `{config.data.name}`.",
        "",
        f"* Directory: `{path}`{f' on host `{host}`' if host else ''}",
        f"* More images: `python -m ddpm_dist.sample {place}`",
        f"* What happened to it: `python -m ddpm_dist.status {place}`",
        f"* Resume: the same command again, or with one process: `{resume}`",
    ]
    if config.init.run is not None:
        lines.append(f"* A branch of: `{config.init.run}`")
    if config.init.weights is not None:
        lines.append(f"* Started from the weights: `{config.init.weights}`")
    if commit := origin.get("commit"):
        modified = ", with changes that were not committed" if commit.endswith(MODIFIED) else ""
        lines.append(f"* Code: commit `{commit.removesuffix(MODIFIED)}`{modified}")
    return "\n".join(lines)


def _newest_contract(directory: RunDirectory) -> dict[str, Any] | None:
    """The contract in the newest readable checkpoint manifest; None before the first checkpoint."""
    for manifest in sorted(directory.checkpoints.glob("step-*.json"), reverse=True):
        contract = (read_json(manifest) or {}).get("contract")
        if isinstance(contract, dict) and {"images", "num_images", "image_shape"} <= set(contract):
            return contract
    return None


def lineage_of(directory: RunDirectory) -> dict[str, str]:
    """A tag that says what the run started from, as its contract does: source, step and hash; oldest first.

    Empty for random weights, and before the first checkpoint.
    """
    lineage = (_newest_contract(directory) or {}).get("lineage")
    return {"ddpm_dist.lineage": json.dumps(lineage)} if lineage else {}


def dataset_of(config: Config, directory: RunDirectory, origin: dict[str, str]) -> Dataset | None:
    """The images, as the newest readable checkpoint manifest knows them; None before the first checkpoint."""
    contract = _newest_contract(directory)
    if contract is None:
        return None
    number, shape = int(contract["num_images"]), [int(size) for size in contract["image_shape"]]
    return Dataset(
        name=config.data.name,
        digest=str(contract["images"]),
        source=str(Path(origin.get("working_directory", ""), config.data.root)),
        profile={"num_rows": number, "image_shape": shape, "num_elements": number * math.prod(shape)},
    )
