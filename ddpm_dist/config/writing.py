"""A config as text: as YAML, as the list of all keys, and how it differs from the defaults or from another one."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any, Literal

import yaml

from ddpm_dist.config.flat import keys, to_flat
from ddpm_dist.config.schema import Config


def to_yaml(config: Config) -> str:
    """The config as YAML with every key. `load_config` makes an equal config of it."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_ListsOnOneLine, sort_keys=False, default_flow_style=False)


class _ListsOnOneLine(yaml.SafeDumper):
    """Writes a list as `[a, b]`."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)


def unlike_the_defaults(config: Config) -> list[str]:
    """`key=value` for each key whose value is not the default."""
    default = to_flat(Config())
    different = {name: value for name, value in to_flat(config).items() if value != default[name]}
    return [f"{name}={_as_typed(value)}" for name, value in different.items()]


def _as_typed(value: Any) -> str:
    """A value as a person writes it: null, true, [1, 2]."""
    return value if isinstance(value, str) else json.dumps(value)


def describe_keys() -> str:
    """One line for each key, with its name, default and help: the answer to `--help-config`."""
    lines = []
    for item in keys().values():
        default = "null" if item.field.default is None else item.field.default
        default = json.dumps(default) if isinstance(default, tuple) else default
        choices = "|".join(typing.get_args(item.type)) if typing.get_origin(item.type) is Literal else ""
        lines.append(f"  {item.name}={default}  {item.help}{f' [{choices}]' if choices else ''}")
    return "\n".join(lines)


def changes(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """The differences between the config of a run and the one that it is resumed with, as `key: old -> new`.

    Returns:
        (refused, free): the keys that shape what is learned, and those that may change.
    """
    before, after = to_flat(old), to_flat(new)
    refused: list[str] = []
    free: list[str] = []
    for name, item in keys().items():
        if before[name] != after[name]:
            (free if item.free else refused).append(f"{name}: {_as_typed(before[name])} -> {_as_typed(after[name])}")
    return refused, free
