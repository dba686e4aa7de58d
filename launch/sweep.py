"""A grid of runs from one request."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence

from ddpm_dist.config import load_config
from ddpm_dist.errors import ConfigError
from launch.request import Request, check_config


def grid(request: Request, sweep: Sequence[str]) -> list[Request]:
    """One request per point of the grid, with a run.name that says which; the request itself without a sweep.

    Raises:
        ConfigError: a key twice, or a point whose config is refused.
    """
    axes: dict[str, list[str]] = {}
    for text in sweep:
        key, _, listed = text.partition("=")
        if not listed or key in axes or key == "run.name":
            why = "is there twice" if key in axes else "valid is KEY=A,B,... with any key but run.name"
            raise ConfigError(f"--sweep {text}: {why}")
        axes[key] = _values(listed)
    if not axes:
        return [request]
    points = []
    for values in itertools.product(*axes.values()):
        chosen = [f"{key}={value}" for key, value in zip(axes, values, strict=True)]
        suffix = "-".join(_as_name(text) for text in _shortened(chosen))
        overrides = (*request.overrides, *chosen, f"run.name={request.config.run.name}-{suffix}")
        config = load_config(request.config_file, overrides)
        check_config(config, request.world_size)
        points.append(dataclasses.replace(request, overrides=overrides, config=config))
    if len({point.config.directory for point in points}) < len(points):
        raise ConfigError(f"--sweep {' --sweep '.join(sweep)}: two points have one name; give each value once")
    return points


def _values(listed: str) -> list[str]:
    """`A,B` -> its values. A comma inside the brackets of a list parts nothing: `[1,2],[3,4]` are two values."""
    return re.split(r",(?![^\[]*\])", listed)


def _as_name(text: str) -> str:
    """As a part of a run's name: `ema.more=[0.9, 0.99]` -> `ema.more=0.9_0.99`."""
    return re.sub(r"[^A-Za-z0-9.=+_-]", "_", re.sub(r"[\[\] ]", "", text))


def _shortened(chosen: Sequence[str]) -> list[str]:
    """`optim.lr=1e-4` -> `lr=1e-4`; whole keys where the last parts are not unique."""
    short = [text.partition("=")[0].rpartition(".")[2] + "=" + text.partition("=")[2] for text in chosen]
    unique = len({text.partition("=")[0] for text in short}) == len(short)
    return short if unique else list(chosen)
