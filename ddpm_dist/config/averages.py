"""The names of the averages of the weights, which follow from the config."""

from __future__ import annotations

from ddpm_dist.config.schema import Config

POWER = "power-"  # begins the names of power-function averages; their width follows
MAX_WIDTH = 0.28  # of such an average; one that weighs all steps alike has the width 1 / √12 = 0.2887


def averages_of(config: Config) -> dict[str, float]:
    """{name: decay or width} of each average that a run keeps: `ema`, ones like `ema-0.999` and like `power-0.05`."""
    widths = config.ema.widths if config.checkpoint.ema_snapshots else ()
    return {
        "ema": config.ema.decay,
        **{f"ema-{decay}": decay for decay in config.ema.more},
        **{f"{POWER}{width}": width for width in widths},
    }


def width_of(average: str) -> float | None:
    """The width in the name of a power-function average, like `power-0.05`; None for any other name."""
    try:
        return float(average.removeprefix(POWER)) if average.startswith(POWER) else None
    except ValueError:
        return None
