"""A job whose PYTHONPATH begins with this folder trains in slow motion, until its first restart.

Python imports `sitecustomize` before anything else. As long as the file $SLOW_MOTION exists, each step begins with a
pause of as many seconds as the file says. So the run is still under way when a test has seen a step of it and does
something to it, however fast the machine is, and the pauses cost no processor time. Nothing else of the trainer is
changed.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

FILE = os.environ.get("SLOW_MOTION", "")
IS_FIRST = os.environ.get("SLURM_RESTART_COUNT", "0") == "0" and "DDPM_CHAIN" not in os.environ


class SlowMotion(importlib.abc.MetaPathFinder):
    """Finds the module of the trainer as everybody does, and puts the pause into it once it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "ddpm_dist.training.step":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        load = loader.exec_module

        def load_and_slow_down(module: Any) -> None:
            load(module)
            train_step = module.Trainer.train_step

            def after_a_pause(*args: Any) -> None:
                with contextlib.suppress(FileNotFoundError), open(FILE, encoding="utf-8") as file:
                    time.sleep(float(file.read()))
                train_step(*args)

            module.Trainer.train_step = after_a_pause

        loader.exec_module = load_and_slow_down
        return spec


if FILE and IS_FIRST:
    sys.meta_path.insert(0, SlowMotion())
