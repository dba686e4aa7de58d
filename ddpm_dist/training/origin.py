"""What a new run starts from if not from random weights: others' weights (init.weights), or another run (init.run).

Rank 0 finds the source before the first step; the other ranks read the same file, by its hash. From the first
checkpoint of the new run on, the source is not looked at again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ddpm_dist.config import Config
from ddpm_dist.errors import ConfigError, DataError
from ddpm_dist.loading import weights_of
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.directory import RunDirectory, no_run
from ddpm_dist.run.files import sha256_of
from ddpm_dist.run.store import CheckpointStore
from ddpm_dist.run.weights_file import read_tensors

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
IN_FOLDERS = ("unet/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class Origin:
    """What a new run starts from. Its fields are plain JSON, since rank 0 sends them to the other ranks.

    Attributes:
        key: `init.run` or `init.weights`.
        path: the run directory, or the file of weights.
        step: of the checkpoint; None for a file of weights.
        sha256: of the checkpoint's file, or of the file of weights.
        weights: which weights of the checkpoint are taken; "" where there is no choice.
        lineage: what the source itself started from, as in its contract.
    """

    key: Literal["init.run", "init.weights"]
    path: str
    step: int | None
    sha256: str
    weights: str = ""
    lineage: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def first_step(self) -> int:
        """The step at which the new run begins."""
        return self.step if self.key == "init.run" and self.step is not None else 0

    def terms(self) -> list[dict[str, Any]]:
        """The contract's term `lineage`, oldest first. It names the source, and not the folder in which it lies."""
        facts = {"weights": self.weights} if self.weights else {}
        here = {"key": self.key, "source": Path(self.path).name, "step": self.step, "sha256": self.sha256, **facts}
        return [*self.lineage, here]

    def __str__(self) -> str:
        which = f"{self.weights} of " if self.weights else ""
        step = "" if self.step is None else f"step {self.step} of "
        return f"{which}{step}{self.path} (sha256 {self.sha256[:12]})"


def find_origin(config: Config, before: Origin | None) -> tuple[Origin | None, list[Checkpoint]]:
    """Rank 0: what a new run with this config starts from; None for random weights.

    Args:
        before: what an earlier attempt of this run began from, before it was killed without a checkpoint. It is taken
            again, though the source may have newer checkpoints now.

    Returns:
        the origin, and a list with the checkpoint of a run that is branched, else an empty list.

    Raises:
        UserError: there is no such source, or it cannot be used, or it is not what it was.
    """
    if before is None:
        return _find(config, None)
    try:
        origin, parent = _find(config, before.step)
        if origin is not None and origin.sha256 == before.sha256:
            return origin, parent
        found = "other content is there now"
    except DataError as error:
        found = str(error)
    raise DataError(
        f"{before.key}={before.path}: this run began from {before}, and has no checkpoint of its own yet: {found}; "
        f"restore that, or remove {config.directory} to start anew"
    )


def _find(config: Config, step_before: int | None) -> tuple[Origin | None, list[Checkpoint]]:
    init = config.init
    if init.run is not None:
        path, step = _split("init.run", init.run)
        if path.resolve() == config.directory.resolve():
            raise ConfigError(f"init.run={init.run}: is this run itself; give the branch another run.name")
        checkpoint, sha256 = _checkpoint(path, step if step_before is None else step_before)
        lineage = checkpoint.contract.get("lineage", [])
        return Origin("init.run", str(path), checkpoint.step, sha256, lineage=lineage), [checkpoint]
    if init.weights is None:
        return None, []
    path, step = _split("init.weights", init.weights)
    if (path / "config.yaml").exists():
        checkpoint, sha256 = _checkpoint(path, step if step_before is None else step_before)
        weights_of(checkpoint, init.average, RunDirectory(path))  # refuses a wrong name before anything is written
        lineage = checkpoint.contract.get("lineage", [])
        return Origin("init.weights", str(path), checkpoint.step, sha256, init.average, lineage), []
    file = _weights_file(path, init.weights)
    return Origin("init.weights", str(file), None, sha256_of(file)), []


def read_parent(origin: Origin) -> list[Checkpoint]:
    """Other ranks: the checkpoint that rank 0 chose, if the new run is a branch. Raises DataError."""
    if origin.key != "init.run":
        return []
    return [CheckpointStore(RunDirectory(Path(origin.path)).checkpoints).load(origin.first_step, origin.sha256)]


def read_weights(origin: Origin) -> Mapping[str, Tensor]:
    """Others' weights, verified, on the CPU. Raises DataError or ConfigError."""
    path = Path(origin.path)
    if origin.step is not None:
        directory = RunDirectory(path)
        checkpoint = CheckpointStore(directory.checkpoints).load(origin.step, origin.sha256)
        return weights_of(checkpoint, origin.weights, directory)
    tensors, _ = read_tensors(path)
    if sha256_of(path) != origin.sha256:
        raise DataError(f"init.weights={path}: is another file on this node, or was changed meanwhile")
    return tensors


def _split(key: str, text: str) -> tuple[Path, int | None]:
    """The path and the step of `RUN_DIR@STEP`; no step without the `@STEP`."""
    path, at, step = text.rpartition("@")
    if not at or Path(text).exists():
        return Path(text), None
    if not step.isdigit():
        raise ConfigError(f"{key}={text}: expected the number of a step after the @, like {path}@1000")
    return Path(path), int(step)


def _checkpoint(path: Path, step: int | None) -> tuple[Checkpoint, str]:
    """A checkpoint of a run, by default the newest valid one, and the hash of its file. Raises DataError."""
    directory = RunDirectory(path)
    if not directory.config_file.exists():
        raise no_run(path)
    store = CheckpointStore(directory.checkpoints)
    if step is not None:
        return store.load(step), str(store.read_manifest(step)["sha256"])
    found = store.newest_valid()
    if found is None:
        raise DataError(f"{directory.checkpoints}: no checkpoint yet")
    return found.checkpoint, found.sha256


def _weights_file(path: Path, given: str) -> Path:
    """The .safetensors file that is meant by a file or by a folder of diffusers.

    Raises:
        DataError: there is none.
    """
    expected = "expected a run directory, RUN_DIR@STEP, a .safetensors file, or a folder that diffusers saved"
    if path.suffix == ".safetensors" and path.is_file():
        return path
    for name in IN_FOLDERS:
        if (path / name).is_file():
            return path / name
    pickles = [path] if path.suffix in PICKLES else [file for file in path.glob("**/*.bin") if file.is_file()]
    if pickles and pickles[0].is_file():
        if pickles[0].parent.name == "checkpoints" and (pickles[0].parent.parent / "config.yaml").exists():
            step = int("".join(filter(str.isdigit, pickles[0].stem)) or 0)
            raise DataError(f"init.weights={given}: is a part of a run; give {pickles[0].parent.parent}@{step}")
        raise DataError(
            f"init.weights={given}: {pickles[0].name} is a pickle, which can run code when it is read, so it is not "
            "read; where you trust it, convert it first: safetensors.torch.save_file(torch.load(FILE, "
            "weights_only=True), 'weights.safetensors')"
        )
    if path.exists() and not (path / "status.json").exists() and not (path / "attempts").is_dir():
        raise DataError(f"init.weights={given}: holds no weights that can be read; {expected}")
    raise no_run(path) if path.exists() or not path.suffix else DataError(f"init.weights={given}: missing; {expected}")
