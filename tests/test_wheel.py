"""The package as `pip install .` brings it: built, installed into a Python of its own, used away from a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from harness import TINY, status

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def call(argv: Sequence[str | Path], folder: Path, expected: int = 0) -> str:
    """Run a command in a folder, with nothing of the checkout on Python's path. Returns all of its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    output = subprocess.STDOUT
    done = subprocess.run(
        argv, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=output, text=True, timeout=300
    )
    assert done.returncode == expected, done.stdout
    return done.stdout


def build(kind: str, source: Path, into: Path) -> Path:
    """What build_sdist or build_wheel makes of the sources. Nothing is downloaded for it."""
    return into / call([sys.executable, "-c", BUILD, kind, into], source).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, which so is seen to hold all that it takes."""
    folder = tmp_path_factory.mktemp("build")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    for name in ("ddpm_dist", "launch", "tests"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    with tarfile.open(build("build_sdist", checkout, folder)) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return build("build_wheel", source, folder)


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the wheel, and the packages of this one but for ddpm_dist (a .pth file leads to them)."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    call([sys.executable, "-m", "venv", "--without-pip", folder], ROOT)
    (packages,) = folder.glob("lib/python*/site-packages")
    call([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", packages, wheel], ROOT)
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "bin" / "python"


def test_the_wheel_holds_the_package_its_types_and_its_licence_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
        (licence,) = (archive.read(name) for name in names if name.endswith(".dist-info/licenses/LICENSE"))
    info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
    assert {name.partition("/")[0] for name in names} == {"ddpm_dist", info}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "ddpm_dist").rglob("*.py")} | {"ddpm_dist/py.typed"}
    assert {name for name in names if name.startswith("ddpm_dist/")} == sources
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Project-URL" not in metadata


def test_an_installed_package_trains_and_draws_from_any_directory(python: Path, tmp_path: Path) -> None:
    where = call([python, "-c", "import ddpm_dist; print(ddpm_dist.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(python.parents[1])
    training: list[str | Path] = [python, "-m", "ddpm_dist.train", *TINY, "run.name=mine", "train.max_steps=3"]
    call(training, tmp_path)
    assert status(tmp_path / "runs" / "mine")["state"] == "finished"
    drawn = call([python, "-m", "ddpm_dist.sample", "runs/mine", "--num", "1", "--steps", "2"], tmp_path)
    assert (tmp_path / drawn.splitlines()[-1]).is_file()


def test_help_says_where_to_get_what_is_not_in_the_package(python: Path, tmp_path: Path) -> None:
    assert "No module named launch" in call([python, "-m", "launch.submit"], tmp_path, expected=1).replace("'", "")
    text = call([python, "-m", "ddpm_dist.train", "--help"], tmp_path)
    assert "configs/, launch/" in text
    assert "in a checkout of the project" in " ".join(text.split())
