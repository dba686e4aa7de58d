"""How a config key is declared: its default, help and bounds, and what a resume may do with it."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def key(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    free: bool = False,
    named: bool = False,
) -> Any:
    """Declare a config key.

    Args:
        default: the value in the reference recipe.
        help: one line for `--help-config`.
        minimum, above, below: a number must be at least `minimum`, more than `above` and less than `below`; so must
            each number of a list.
        free: whether the key may change when a run is resumed. All other keys shape what is learned.
        named: whether the value is a name in a table of the package, to which anybody may add one (see build.py).
    """
    bounds = {"minimum": minimum, "above": above, "below": below}
    return field(default=default, metadata={"help": help, "free": free, "named": named, **bounds})
