"""Makes the harness and launch/ importable from every test folder, and keeps the test process itself at one thread.

`make test` runs the tests in two processes; lanes.py says which of them may run beside each other.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # launch/ is used from the checkout
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("MLFLOW_TRACKING_URI", None)

from ddpm_dist.parallel import local  # noqa: E402

# Each process has ports of its own: a server of the other one may not listen yet on a port that seems to be free.
PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
local.PORTS = local.PORTS[PROCESS::8]


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scratch checkout in which the commands of the documents are executed; each test takes a copy of it."""
    from scratch import make_checkout

    folder = tmp_path_factory.mktemp("documents") / "ddpm_dist"
    folder.mkdir()
    make_checkout(folder)
    return folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    from lanes import Lanes

    config.option.loadscopereorder = False  # keep the order of pytest_collection_modifyitems
    return Lanes(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests on SLURM come first."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/slurm/"))
