"""The flags by which a command line chooses classes and guidance, and what they mean for a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ddpm_dist.errors import ConfigError

if TYPE_CHECKING:
    from ddpm_dist.evaluation.classes import Classes
    from ddpm_dist.loading import LoadedRun

ALL = "all"
MOST_NAMED = 20  # classes that a message lists


@dataclass(frozen=True)
class ClassChoice:
    """The classes that a command line asks for.

    Attributes:
        name: a class, by its name or number, or `all`; None if the flag is not given, which means `all` in a run with
            labels.
        guidance: how far from unconditional images those of a class are; see `diffusion/guidance.py`.
        interval: the first and the last timestep that are guided; None for all timesteps.
    """

    name: str | None = None
    guidance: float = 1.0
    interval: tuple[int, int] | None = None

    def classes(self, run: LoadedRun) -> Classes | None:
        """Of which class each image is; None in a run without labels.

        Raises:
            ConfigError: the run has no such class, or knows no labels, or cannot be guided.
        """
        from ddpm_dist.evaluation.classes import Classes

        given = self._given()
        if not run.num_classes:
            if given:
                raise ConfigError(f"{given[0]}: {run.path} was trained without labels; leave {given[0].split()[0]} out")
            return None
        if self.guidance != 1 and not run.config.model.label_dropout:
            raise ConfigError(
                f"--guidance {self.guidance:g}: must be 1, since {run.path} was trained with model.label_dropout=0 and "
                "never learned what an image of no class in particular is"
            )
        last = run.process.num_timesteps - 1
        if self.interval is not None and not 0 <= self.interval[0] <= self.interval[1] <= last:
            low, high = self.interval
            raise ConfigError(f"--guidance-interval {low} {high}: expected two timesteps in 0 to {last}, in this order")
        if self.name in (None, ALL):
            return Classes(run.num_classes)
        return Classes(run.num_classes, number_of(str(self.name), run.num_classes, run.class_names))

    def choices(self) -> dict[str, Any]:
        """All that was chosen, by the name of its flag, as plain JSON; None where it is the default."""
        interval = None if self.interval is None else list(self.interval)
        guidance = None if self.guidance == 1 else self.guidance
        return {"class": self.name, "guidance": guidance, "guidance_interval": interval}

    def _given(self) -> list[str]:
        """The flags that say something else than their defaults, as they are written."""
        flags = {
            f"--class {self.name}": self.name is not None,
            f"--guidance {self.guidance:g}": self.guidance != 1,
            f"--guidance-interval {' '.join(map(str, self.interval or ()))}": self.interval is not None,
        }
        return [flag for flag, is_given in flags.items() if is_given]


def number_of(name: str, num_classes: int, names: Sequence[str]) -> int:
    """The number of the class that a user calls by this name or number.

    Where names look like numbers, as those of folders 1, 2, 3 do, only the names count.

    Args:
        names: of the classes, in the order of their numbers; empty if they have none.

    Raises:
        ConfigError: there is no such class.
    """
    if name in names:
        return list(names).index(name)
    by_number = not any(each.isdecimal() for each in names)
    if by_number and name.isdecimal() and int(name) < num_classes:
        return int(name)
    listed = [*names[:MOST_NAMED], *([f"... ({num_classes} in all)"] if len(names) > MOST_NAMED else [])]
    numbers = [f"0 to {num_classes - 1}"] if by_number else []
    raise ConfigError(f"--class {name}: there is no such class; valid: {', '.join([ALL, *numbers, *listed])}")


def add_class_flags(parser: argparse.ArgumentParser) -> None:
    """Give a command the flags by which classes are chosen; `class_choice` reads them."""
    parser.add_argument(
        "--class",
        dest="class_name",
        metavar="NAME",
        help="draw one class, by name or number; all: each in turn, a row each [all]",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        metavar="W",
        help="how clearly an image shows its class; 0: not at all, 1: as trained [1]",
    )
    parser.add_argument(
        "--guidance-interval",
        type=int,
        nargs=2,
        metavar=("LO", "HI"),
        help="the first and last timestep at which --guidance is used [all]",
    )


def class_choice(args: argparse.Namespace) -> ClassChoice:
    """What the flags of `add_class_flags` say. Raises ConfigError for what cannot be right in any run."""
    if not 0 <= args.guidance < float("inf"):
        raise ConfigError(f"--guidance {args.guidance:g}: expected a number of at least 0")
    if args.guidance_interval is not None and args.guidance == 1:
        low, high = args.guidance_interval
        raise ConfigError(f"--guidance-interval {low} {high}: needs a --guidance other than 1, like --guidance 2")
    interval = None if args.guidance_interval is None else (args.guidance_interval[0], args.guidance_interval[1])
    return ClassChoice(args.class_name, args.guidance, interval)
