"""docs/architecture.md shows how to add a network and a sampler: its text, put where it says, works.

The package is copied, so that the examples change nothing in the checkout. The commands are those of the page.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
# So that a test takes seconds: what is given last wins.
SHORT = (
    "train.max_steps=6", "optim.warmup_steps=1", "train.log_every=2", "train.threads=1", "train.device=cpu",
    "preview.num_images=2", "preview.steps=2", "tracking.enabled=false",
)  # fmt: skip


def section(title: str) -> str:
    return re.split(r"^## ", PAGE.partition(f"\n## {title}\n")[2], flags=re.MULTILINE)[0]


def examples(text: str) -> list[tuple[bool, str, str]]:
    """(whether the file is new, its path, the code) of each block of Python, as the sentence before it says."""
    pattern = r"(In a new file|At the end of),? `?([\w/]+\.py)`?:\n\n```python\n(.*?)^```"
    found = re.findall(pattern, text, re.DOTALL | re.MULTILINE)
    assert len(found) == text.count("```python"), "a block of Python without a sentence that says where it goes"
    return [(where == "In a new file", path, code) for where, path, code in found]


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line) for line in re.findall(r"^ {4}(python .*)$", text, re.MULTILINE)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of package and configs with the examples of the page in it."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("ddpm_dist", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    found = examples(section("Add a network")) + examples(section("Add a sampler"))
    assert [is_new for is_new, _, _ in found] == [True, False, True, False]
    for is_new, path, code in found:
        file = copy / path
        assert file.exists() != is_new, path
        with file.open("a", encoding="utf-8") as writer:
            writer.write(code if is_new else f"\n\n{code}")
    return copy


def call(checkout: Path, argv: list[str]) -> subprocess.CompletedProcess[str]:
    assert argv[0] == "python"
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *argv[1:]], cwd=checkout, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_examples_of_the_page_work_by_its_own_commands(checkout: Path) -> None:
    given = commands(section("Add a network")) + commands(section("Add a sampler"))
    assert len(given) == 4
    for argv in given:
        trains = "ddpm_dist.train" in argv
        done = call(checkout, [*argv, *SHORT] if trains else argv)
        assert done.returncode == 0, f"{shlex.join(argv)}\n{done.stdout}{done.stderr}"
    assert (checkout / "grid.png").exists()
    assert np.load(checkout / "runs" / "plain" / "renoise.npz")["arr_0"].shape[0] == 16
    assert (checkout / "runs" / "renoise" / "samples" / "step-00000006.png").exists()


def test_a_name_that_is_misspelt_is_refused_with_the_new_one_in_the_list(checkout: Path) -> None:
    done = call(checkout, ["python", "-m", "ddpm_dist.train", "--dry-run", "model.name=plein"])
    assert done.returncode == 78
    assert "plain" in done.stderr


def test_the_code_of_the_page_is_checked_as_that_of_the_project_is(checkout: Path) -> None:
    if (ROOT / ".mypy_cache").exists():  # what mypy knows of torch, which takes it 14 s of a core
        shutil.copytree(ROOT / ".mypy_cache", checkout / ".mypy_cache")
    for command in (["ruff", "check"], ["ruff", "format", "--check"], ["mypy", "--strict"]):
        files = ["ddpm_dist/models", "ddpm_dist/diffusion"]
        settings = ["--config-file" if command[0] == "mypy" else "--config", str(ROOT / "pyproject.toml")]
        argv = [sys.executable, "-m", *command, *settings, *files]
        done = subprocess.run(argv, cwd=checkout, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"
