"""Makes the harness and launch/ importable from every test folder, and keeps the test process itself at one thread."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # launch/ is used from the checkout
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scratch checkout in which the commands of the documents are executed; each test takes a copy of it."""
    from scratch import make_checkout

    folder = tmp_path_factory.mktemp("documents") / "ddpm_dist"
    folder.mkdir()
    make_checkout(folder)
    return folder
