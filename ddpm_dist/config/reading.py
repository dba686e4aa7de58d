"""Reads a YAML file and dotted overrides into a validated config. Overrides beat the file, which beats the defaults.

Values are read as text, or as a list of texts; `config/values.py` converts them to the type that their key declares.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ddpm_dist.config.checks import check_together
from ddpm_dist.config.flat import Key, from_flat, is_list, keys
from ddpm_dist.config.schema import Config
from ddpm_dist.config.values import Given, convert, given_in
from ddpm_dist.errors import ConfigError


def load_config(file: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """The defaults, changed by the file and then by the overrides, and validated.

    Args:
        file: a YAML file that holds the differences from the defaults; None for none.
        overrides: each `section.key=value`; if a key is given twice, the last value counts.

    Raises:
        ConfigError: the message names the place, the key, the value and what would be valid.
    """
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for place, name, given in [*(_read_file(Path(file)) if file else ()), *_read_overrides(list(overrides))]:
        values[name] = convert(_known(name, place), given, place)
        places[name] = place
    config = from_flat(values)
    try:
        check_together(config)
    except ConfigError as error:
        named = [place for name, place in places.items() if f"{name}=" in str(error)]
        where = ", ".join(dict.fromkeys(named))  # each place once; none if the defaults contradict each other
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None
    return config


def _read_file(path: Path) -> list[tuple[str, str, Given]]:
    """(place, dotted key, text or list of texts) of each value in the file.

    It reads the nodes of the YAML document and makes no Python objects of them, so that no tag can do any harm.
    """
    root = _compose(path)
    sections = [item.name for item in dataclasses.fields(Config)]
    found: list[tuple[str, str, Given]] = []
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
            found.append((inner_place, name, given_in(value, f"{inner_place}: {name}", is_list(name))))
    return found


def _compose(path: Path) -> yaml.Node | None:
    """The YAML document in the file; None if it is empty. Raises ConfigError."""
    try:
        return yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file{_other_files(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"--config {path}: is a folder, not a YAML file{_files_in(path)}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {path}: is no text (UTF-8); expected a YAML file") from None
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"{path}:{mark.line + 1}" if mark else f"--config {path}"
        if problem and "'\\t'" in problem:
            raise ConfigError(f"{where}: not valid YAML: a tab; indent with blanks") from None
        raise ConfigError(
            f"{where}: not valid YAML ({problem or ' '.join(str(error).split())}); "
            "look at the indentation, the brackets, and the blank after each colon"
        ) from None


def _other_files(path: Path) -> str:
    """What may have been meant by a file that is not there: one with a similar name, else what lies in its folder."""
    names = sorted(str(other) for suffix in ("*.yaml", "*.yml") for other in path.parent.glob(suffix))
    near = difflib.get_close_matches(str(path), names, n=1, cutoff=0.8)
    if near:
        return f"; did you mean {near[0]}?"
    return _files_in(path.parent) if path.parent.is_dir() else f", and no folder {path.parent.absolute()}"


def _files_in(folder: Path) -> str:
    names = sorted(str(path) for suffix in ("*.yaml", "*.yml") for path in folder.glob(suffix))
    there = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"; there are {there}" if names else f" (no YAML file is in {folder.absolute()})"


def _entries(path: Path, node: yaml.Node, prefix: str) -> list[tuple[str, str, yaml.Node]]:
    """(place, prefixed key, node) of each entry of a mapping. Refuses a key that is given twice."""
    where = f"{path}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode) or node.tag != "tag:yaml.org,2002:map":
        found = f"found {_shortened(node.value)!r}, " if isinstance(node, yaml.ScalarNode) else ""
        raise ConfigError(
            f"{where}: {prefix.rstrip('.') or 'the file'}: {found}expected keys with values, like `optim: {{lr: 2e-4}}`"
        )
    entries: dict[str, tuple[str, str, yaml.Node]] = {}
    for name_node, value in node.value:
        place = f"{path}:{name_node.start_mark.line + 1}"
        if not isinstance(name_node, yaml.ScalarNode):
            raise ConfigError(f"{place}: a key must be a plain word")
        name = prefix + name_node.value
        if name in entries:
            raise ConfigError(f"{place}: {name} is given twice (first at {entries[name][0]})")
        entries[name] = (place, name, value)
    return list(entries.values())


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."


def _read_overrides(overrides: Sequence[str]) -> list[tuple[str, str, Given]]:
    found: list[tuple[str, str, Given]] = []
    for place, text in enumerate(overrides):
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"command line: {_instead_of(overrides, place)}")
        found.append(("command line", name.strip(), value.strip()))
    return found


def _instead_of(words: Sequence[str], place: int) -> str:
    """What is wrong with a word that is no section.key=value, and what to write."""
    word, following = words[place], words[place + 1] if place + 1 < len(words) else ""
    pieces = [word]  # of what a blank beside the = has torn apart
    if place and words[place - 1].endswith("="):
        pieces = [words[place - 1], word]
    elif following.startswith("="):
        pieces = list(words[place : place + (3 if following == "=" else 2)])
    joined = "".join(pieces)
    if joined.partition("=")[0] in keys() and len(pieces) > 1:
        return f"{' '.join(pieces)!r}: there must be no blanks around the =; write {joined}"
    opened = next((number for number in range(place - 1, -1, -1) if "=[" in words[number]), None)
    closed = next((number for number in range(place, len(words)) if "]" in words[number]), None)
    if opened is not None and closed is not None and "]" not in "".join(words[opened:place]):
        torn = words[opened : closed + 1]
        return f"{' '.join(torn)!r}: the shell tears a list apart at its blanks; write {''.join(torn)}"
    if word.endswith((".yaml", ".yml")):
        return f"{word!r} is no section.key=value; for a config file write --config {word}"
    return f"{word!r}: expected section.key=value, for example optim.lr=1e-4"


def _known(name: str, place: str) -> Key:
    if name not in keys():
        raise ConfigError(f"{place}: unknown key {name!r}{_suggest(name)}")
    return keys()[name]


def nearest_key(name: str) -> str | None:
    """The key that is most likely meant by a name that is no key; None if none is near.

    That is a key with the same last word, else one of the same section with a similar last word, else one with a
    similar name, else one with a similar last word.
    """
    section, _, last = name.rpartition(".")
    by_word = {known.rpartition(".")[2]: known for known in keys()}
    of_section = {known.rpartition(".")[2]: known for known in keys() if known.startswith(f"{section}.")}
    same_word = [known for known in keys() if known.endswith(f".{last}")]
    near = difflib.get_close_matches(name, same_word, n=1, cutoff=0.0)
    near = near or [of_section[word] for word in difflib.get_close_matches(last, of_section, n=1)]
    near = near or difflib.get_close_matches(name, keys(), n=1, cutoff=0.8)
    near = near or [by_word[word] for word in difflib.get_close_matches(last, by_word, n=1)]
    return near[0] if near else None


def _suggest(name: str) -> str:
    """'; did you mean ...?' with the nearest key, else the keys of its section, else where all keys are listed."""
    near = nearest_key(name)
    of_section = [known for known in keys() if known.startswith(f"{name.partition('.')[0]}.")]
    if near is None and of_section:
        return f"; valid: {', '.join(of_section)}"
    return _did_you_mean([near] if near else [])


def _did_you_mean(near: list[str]) -> str:
    return f"; did you mean {near[0]!r}?" if near else "; `--help-config` lists all keys"
