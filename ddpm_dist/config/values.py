"""Converts the text of a value to the type that its key declares.

So `1e-4` is a number where a key wants a number, and `no` is a boolean only where a key wants a boolean. A list is
written as in YAML, `[128, 256]`, in a file and on the command line.
"""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

import yaml

from ddpm_dist.config.flat import Key
from ddpm_dist.errors import ConfigError

Given = str | tuple[str, ...]
"""A value as the user wrote it: a text, or the texts of a list."""

PATHS = ("run.root", "data.root", "init.weights", "init.run")  # keys in whose values `~` stands for the home folder
_BOOLEANS = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}
_NULLS = ("null", "none", "~", "")
_LISTS = {
    int: "a list of whole numbers, like [128, 256]",
    float: "a list of numbers, like [0.9, 0.99]",
    str: "a list of words, like [a, b]",
}
_Refuse = Callable[[str], ConfigError]


def given_in(node: yaml.Node, name: str, is_list: bool) -> Given:
    """The text of a node of a YAML document, or the texts of a list.

    Args:
        node: a value in the document.
        name: place and key, for messages.
        is_list: whether the key takes a list.

    Raises:
        ConfigError: the node is a mapping, a list where none belongs, or a list of more than plain values; or it has a
            tag, which is never obeyed.
    """
    if isinstance(node, yaml.SequenceNode) and is_list and node.tag == "tag:yaml.org,2002:seq":
        return tuple(_plain(element, name, "a list of plain values") for element in node.value)
    return _plain(node, name, "a list of plain values, like [1, 2]" if is_list else "one plain value")


def _plain(node: yaml.Node, name: str, expected: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or not node.tag.startswith("tag:yaml.org,2002:"):
        raise ConfigError(f"{name}: expected {expected}")
    if node.tag.startswith("tag:yaml.org,2002:python"):
        raise ConfigError(f"{name}: YAML tags are not obeyed; expected {expected}")
    return str(node.value)


def convert(item: Key, given: Given, place: str) -> Any:
    """The value of the type that the key declares; for a list, a tuple.

    Args:
        item: the key.
        given: what the user wrote.
        place: where, for messages.

    Raises:
        ConfigError: the type is wrong, or a bound of the key is not kept. For a list, the message names the element.
    """
    wanted, optional = item.type, False
    if isinstance(wanted, types.UnionType):
        optional = True
        (wanted,) = (arg for arg in typing.get_args(wanted) if arg is not type(None))
    if optional and isinstance(given, str) and given.lower() in _NULLS:
        return None
    or_null = " or null" if optional else ""
    shown = given if isinstance(given, str) else f"[{', '.join(given)}]"

    def refuse(expected: str) -> ConfigError:
        return ConfigError(f"{place}: {item.name}={shown}: expected {expected}{or_null}")

    if typing.get_origin(wanted) is not tuple:
        assert isinstance(given, str)  # given_in lets no list through for such a key
        return _convert_one(item, wanted, given, refuse)
    inner = typing.get_args(wanted)[0]
    texts = _elements(given) if isinstance(given, str) else given
    if texts is None:
        raise refuse(_LISTS[inner])

    def refuse_element(number: int, text: str) -> _Refuse:
        named = f"{place}: {item.name}={shown}: element {number} is {text!r}"
        return lambda expected: ConfigError(f"{named}; expected {expected}")

    return tuple(
        _convert_one(item, inner, text, refuse_element(number, text)) for number, text in enumerate(texts, start=1)
    )


def _elements(text: str) -> tuple[str, ...] | None:
    """The texts of a list that is written as in YAML; None if the text is no list of plain values."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        given = given_in(node, "", is_list=True) if isinstance(node, yaml.SequenceNode) else None
    except (yaml.YAMLError, RecursionError, ConfigError):
        return None
    return given if isinstance(given, tuple) else None


def _convert_one(item: Key, wanted: Any, text: str, refuse: _Refuse) -> Any:
    """One text, converted to a type that is no list. Refuses a value outside the bounds of the key."""
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
    return _convert_number(item, wanted, text, refuse)


def _convert_number(item: Key, wanted: type[int] | type[float], text: str, refuse: _Refuse) -> int | float:
    name = "a whole number" if wanted is int else "a number"
    try:
        value = wanted(text)
    except ValueError:
        raise refuse(f"{name}{_in_digits(text) if wanted is int else ''}") from None
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


def _in_digits(text: str) -> str:
    """', like 1000000' for `1e6`, which people write for large whole numbers; '' for what is no whole number."""
    try:
        number = float(text)
    except ValueError:
        return ""
    return f" in digits, like {int(number)}," if number.is_integer() and number < 1e15 else ""
