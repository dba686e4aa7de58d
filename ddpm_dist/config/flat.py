"""Configs as {dotted key: value}, and what is known about each key."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddpm_dist.config.schema import Config
from ddpm_dist.errors import ConfigError


@dataclass(frozen=True)
class Key:
    """A config key.

    Attributes:
        name: the dotted key, section.key.
        type: the declared type of its values.
        field: the dataclass field; its metadata hold what `key` was given.
    """

    name: str
    type: Any
    field: dataclasses.Field[Any]

    @property
    def free(self) -> bool:
        """Whether the key may change when a run is resumed."""
        return bool(self.field.metadata["free"])

    @property
    def help(self) -> str:
        """The line for `--help-config`."""
        return str(self.field.metadata["help"])


@functools.cache
def keys() -> Mapping[str, Key]:
    """All keys by their dotted name, in the order of `config/schema.py`."""
    found = {}
    for section, section_type in typing.get_type_hints(Config).items():
        hints = typing.get_type_hints(section_type)
        for item in dataclasses.fields(section_type):
            name = f"{section}.{item.name}"
            found[name] = Key(name, hints[item.name], item)
    return types.MappingProxyType(found)


def is_list(name: str) -> bool:
    """Whether there is such a key, and it takes a list."""
    return name in keys() and any(
        typing.get_origin(each) is tuple for each in (keys()[name].type, *typing.get_args(keys()[name].type))
    )


def from_flat(values: Mapping[str, Any]) -> Config:
    """A config from {dotted key: value of the right type}. Keys that are left out keep their defaults.

    A list may be given as a list, as `to_flat` and JSON have it, or as the tuple that the config holds.

    Raises:
        ConfigError: there is no such key. The checkpoint of a later version may hold keys that this one does not know.
    """
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in keys():
            raise ConfigError(f"unknown key {name!r}")
        section, item = name.split(".")
        sections.setdefault(section, {})[item] = tuple(value) if isinstance(value, list) else value
    section_types = typing.get_type_hints(Config)
    return Config(**{name: section_types[name](**given) for name, given in sections.items()})


def to_flat(config: Config) -> dict[str, Any]:
    """{dotted key: value} of every key, in the order of `keys`. The values are plain JSON: a tuple becomes a list."""
    flat = {name: getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in keys()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}


def named_parts(config: Config) -> dict[str, str]:
    """{dotted key: name} of all keys whose value is a name in a table of the package."""
    flat = to_flat(config)
    return {name: flat[name] for name, item in keys().items() if item.field.metadata["named"]}
