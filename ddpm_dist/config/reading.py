"""Reads a YAML file and dotted overrides into a validated config. Overrides beat the file, which beats the defaults.

Values are read as text and converted to the type that their key declares. So `1e-4` is a number where a key wants a
number, and `no` is a boolean only where a key wants a boolean.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml

from ddpm_dist.config.checks import check_together
from ddpm_dist.config.schema import Config, Key, from_flat, keys
from ddpm_dist.errors import ConfigError

PATHS = ("run.root", "data.root")  # keys in whose values `~` stands for the home folder


def load_config(file: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """The defaults, changed by the file and then by the overrides, and validated.

    Args:
        file: a YAML file that holds the differences from the defaults; None for none.
        overrides: each `section.key=value`; if a key is given twice, the last value counts.

    Raises:
        ConfigError: the message names the place, the key, the value and what would be valid.
    """
    values: dict[str, Any] = {}
    for place, name, text in [*(_read_file(Path(file)) if file else ()), *_read_overrides(overrides)]:
        values[name] = _convert(_known(name, place), text, place)
    config = from_flat(values)
    check_together(config)
    return config


def _read_file(path: Path) -> list[tuple[str, str, str]]:
    """(place, dotted key, text) of each value in the file.

    It reads the nodes of the YAML document and makes no Python objects of them, so that no tag can do any harm.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({error})") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    sections = [item.name for item in dataclasses.fields(Config)]
    found: list[tuple[str, str, str]] = []
    if root is None:
        return found
    for place, section, node in _entries(path, root, ""):
        if section not in sections:
            near = difflib.get_close_matches(section, sections, n=1)
            hint = _did_you_mean(near) if near else _suggest(section)
            if section in keys():
                hint = "; write it as `{}: {{{}: ...}}`".format(*section.split("."))
            raise ConfigError(f"{place}: unknown section {section!r}{hint}")
        if isinstance(node, yaml.ScalarNode) and node.value in ("", "null", "~"):
            continue  # a section whose keys are all commented out
        for inner_place, name, value in _entries(path, node, f"{section}."):
            if not isinstance(value, yaml.ScalarNode) or not value.tag.startswith("tag:yaml.org,2002:"):
                raise ConfigError(f"{inner_place}: {name}: expected one plain value")
            if value.tag.startswith("tag:yaml.org,2002:python"):
                raise ConfigError(f"{inner_place}: {name}: YAML tags are not obeyed; expected one plain value")
            found.append((inner_place, name, value.value))
    return found


def _entries(path: Path, node: yaml.Node, prefix: str) -> list[tuple[str, str, yaml.Node]]:
    """(place, prefixed key, node) of each entry of a mapping. Refuses a key that is given twice."""
    where = f"{path}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode) or node.tag != "tag:yaml.org,2002:map":
        raise ConfigError(f"{where}: {prefix.rstrip('.') or 'the file'}: expected a mapping like `optim: {{lr: 2e-4}}`")
    found: dict[str, tuple[str, str, yaml.Node]] = {}
    for name_node, value in node.value:
        place = f"{path}:{name_node.start_mark.line + 1}"
        if not isinstance(name_node, yaml.ScalarNode):
            raise ConfigError(f"{place}: a key must be a plain word")
        name = prefix + name_node.value
        if name in found:
            raise ConfigError(f"{place}: {name} is given twice (first at {found[name][0]})")
        found[name] = (place, name, value)
    return list(found.values())


def _read_overrides(overrides: Iterable[str]) -> list[tuple[str, str, str]]:
    found = []
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"command line: {text!r}: expected section.key=value, for example optim.lr=1e-4")
        found.append(("command line", name.strip(), value.strip()))
    return found


def _known(name: str, place: str) -> Key:
    if name not in keys():
        raise ConfigError(f"{place}: unknown key {name!r}{_suggest(name)}")
    return keys()[name]


def _suggest(name: str) -> str:
    """'; did you mean ...?' with the nearest key.

    That is a key with the same last word, else one with a similar name, else one with a similar last word.
    """
    last = name.rpartition(".")[2]
    by_word = {known.rpartition(".")[2]: known for known in keys()}
    same_word = [known for known in keys() if known.endswith(f".{last}")]
    near = difflib.get_close_matches(name, same_word, n=1, cutoff=0.0)
    near = near or difflib.get_close_matches(name, keys(), n=1, cutoff=0.5)
    near = near or [by_word[word] for word in difflib.get_close_matches(last, by_word, n=1)]
    return _did_you_mean(near)


def _did_you_mean(near: list[str]) -> str:
    return f"; did you mean {near[0]!r}?" if near else "; `--help-config` lists all keys"


_BOOLEANS = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}


def _convert(item: Key, text: str, place: str) -> Any:
    """The text, converted to the declared type of the key. Refuses a value outside the bounds of the key."""
    wanted, optional = item.type, False
    if isinstance(wanted, types.UnionType):
        optional = True
        (wanted,) = (arg for arg in typing.get_args(wanted) if arg is not type(None))
    if optional and text.lower() in ("null", "none", "~", ""):
        return None
    or_null = " or null" if optional else ""

    def refuse(expected: str) -> ConfigError:
        return ConfigError(f"{place}: {item.name}={text}: expected {expected}{or_null}")

    if typing.get_origin(wanted) is Literal:
        choices = typing.get_args(wanted)
        # Users of YAML write booleans as `no` and `yes` too, so a choice of auto, true and false accepts them.
        text = str(_BOOLEANS.get(text.lower(), text)).lower() if "true" in choices else text
        if text not in choices:
            raise refuse(f"one of {', '.join(choices)}")
        return text
    if wanted is bool:
        if text.lower() not in _BOOLEANS:
            raise refuse("true or false")
        return _BOOLEANS[text.lower()]
    if wanted is str:
        if not text:
            raise refuse("some text")
        return os.path.expanduser(text) if item.name in PATHS else text
    name = {int: "a whole number", float: "a number"}[wanted]
    try:
        value = wanted(text)
    except ValueError:
        raise refuse(name) from None
    bounds = item.field.metadata
    if value != value or value in (float("inf"), float("-inf")):
        raise refuse("a finite number")
    for passes, words in (
        (bounds["minimum"] is None or value >= bounds["minimum"], f"of at least {bounds['minimum']}"),
        (bounds["above"] is None or value > bounds["above"], f"above {bounds['above']}"),
        (bounds["below"] is None or value < bounds["below"], f"below {bounds['below']}"),
    ):
        if not passes:
            raise refuse(f"{name} {words}")
    return value
