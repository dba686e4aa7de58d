"""What of a run may be given away with its weights: all that shapes what was learned, no place and no password."""

from __future__ import annotations

from typing import Any

from ddpm_dist.config import Config, to_flat

PLACES = ("run.root", "data.root", "tracking.uri", "tracking.experiment", "init.weights", "init.run")
"""Keys that name folders and servers of those who trained. An address may hold a password."""


def shareable_config(config: Config) -> dict[str, Any]:
    """{dotted key: value} of every key. Those in PLACES have their defaults."""
    default = to_flat(Config())
    return {name: default[name] if name in PLACES else value for name, value in to_flat(config).items()}
