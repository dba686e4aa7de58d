"""A scratch checkout in which tests execute what the documents print, as a reader would.

It holds the files of this checkout, an environment `.venv`, a small MNIST where the real one would lie (nothing is
downloaded), and what a command needs to be there before: a small trained run, a folder of pictures.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from documents import ROOT, Entry, configs_in_documents
from PIL import Image

from ddpm_dist.parallel.local import free_port

TINY = "data.image_size=8 model.channels=8 diffusion.num_timesteps=4 optim.warmup_steps=1"
SHORT = "train.max_steps=20 checkpoint.every=10 preview.num_images=4 preview.steps=2"
TRAIN_TINY = f"python -m ddpm_dist.train --config configs/quickstart.yaml {TINY} {SHORT}"
SECONDS = 500.0  # for any one command


def make_checkout(folder: Path) -> None:
    """Fill a folder with the files of this checkout, an environment, data, and a small trained run."""
    argv = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(argv, cwd=ROOT, capture_output=True, check=True, timeout=60).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    make_environment(folder)
    for name, text in configs_in_documents().values():
        if name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{text}\n", encoding="utf-8")
    write_data(folder)
    code, output = execute(folder, TRAIN_TINY)
    assert code == 0, output


def make_environment(folder: Path) -> None:
    """Make `.venv` of links to the environment of the tests. Nothing seems to be missing, or can be installed."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    for part in ("lib", "pyvenv.cfg"):
        (folder / ".venv" / part).symlink_to(Path(sys.prefix) / part)
    for program in (Path(sys.prefix) / "bin").iterdir():
        if not program.name.startswith("pip"):
            (folder / ".venv" / "bin" / program.name).symlink_to(program)
    (folder / ".venv" / "bin" / "pip").symlink_to("/bin/false")
    makefile = (folder / "Makefile").read_text()
    for stamp in re.findall(r"^\w+ :?= \$\(VENV\)/([\w-]+)$", makefile, re.MULTILINE):
        (folder / ".venv" / stamp).touch()
    argv = ["make", "--dry-run", "install", "train"]
    planned = subprocess.run(argv, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=60)
    assert planned.returncode == 0, planned.stderr
    assert "pip install" not in planned.stdout, f"make would install something:\n{planned.stdout}"


def write_data(folder: Path) -> None:
    """Noise in place of MNIST's pixels, in its file format, and a folder of pictures."""
    random = np.random.default_rng(0)
    file = folder / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.parent.mkdir(parents=True)
    pixels = random.integers(0, 256, (2000, 28, 28), dtype=np.uint8)
    file.write_bytes(struct.pack(">4i", 0x803, *pixels.shape) + pixels.tobytes())


def pictures(folder: Path, count: int = 200) -> None:
    """Colour pictures of several sizes, for `data.name=folder`."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        size = (40 + number % 5, 50, 3)
        Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number:04d}.png")


def copy_of(checkout: Path, folder: Path, entry: Entry) -> Path:
    """A copy of the scratch checkout for one command, with what is given for it."""
    shutil.copytree(checkout, folder, symlinks=True, ignore=shutil.ignore_patterns("runs", "data"))
    (folder / "data").symlink_to(checkout / "data")
    (folder / "runs").mkdir()
    shutil.copy2(checkout / "runs" / "mlflow.db", folder / "runs")  # MLflow takes seconds to make one
    for name in entry.given:
        if name.startswith("runs/"):
            shutil.copytree(checkout / "runs" / "quickstart", folder / name)
        else:
            pictures(folder / name)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """What a reader has after `. .venv/bin/activate`, on a machine without GPUs, with ports that nobody else uses."""
    outer = (
        "SLURM",
        "SBATCH",
        "SRUN",
        "SALLOC",
        "PET_",
        "MASTER_",
        "OMP_",
        "MLFLOW_",
        "DDPM_",
        "PYTEST",
        "MAKE",
        "ARGS",
    )
    found = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    found["PATH"] = os.pathsep.join((str(folder / ".venv" / "bin"), os.environ["PATH"]))
    found |= {"PYTHONPATH": str(folder), "VIRTUAL_ENV": str(folder / ".venv"), "CUDA_VISIBLE_DEVICES": ""}
    found |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # other tests may compute beside this one
    return found | {"MLFLOW_PORT": str(free_port()), "PET_MASTER_PORT": str(free_port())}


def execute(
    folder: Path, text: str, *, until: str = "", extra: Mapping[str, str] | None = None, seconds: float = SECONDS
) -> tuple[int, str]:
    """Execute a command in a shell, and end it as Ctrl-C does once `until` is found in its output.

    Returns:
        (exit code as a shell has it, standard output and error together).
    """
    log = folder.parent / f"{folder.name}.log"
    with log.open("wb") as file:
        shell = subprocess.Popen(
            ["bash", "-c", text],
            cwd=folder,
            env=environment(folder) | dict(extra or {}),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
    deadline = time.monotonic() + seconds
    try:
        while shell.poll() is None:
            shown = log.read_text(errors="replace")
            assert time.monotonic() < deadline, f"{text}: not within {seconds} s\n{shown}"
            if until and re.search(until, shown, re.MULTILINE):
                os.killpg(shell.pid, signal.SIGINT)  # Ctrl-C goes to all that the terminal's foreground runs
                until = ""
            time.sleep(0.1)
    finally:
        if shell.returncode is None:
            os.killpg(shell.pid, signal.SIGKILL)
            shell.wait(30)
    shown = log.read_text(errors="replace")
    assert not until, f"{text}: {until!r} did not come\n{shown}"
    return shell.returncode if shell.returncode >= 0 else 128 - shell.returncode, shown


def _heed_interrupts() -> None:
    """The tests may run under nohup or in the background, where SIGINT is ignored; a reader's shell does not do so."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
