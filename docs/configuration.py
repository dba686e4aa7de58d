"""Writes the tables of docs/configuration.md from the dataclasses of the config: `make docs`.

The introduction of the page is written by hand, in the page itself. All that follows the mark is made here.
"""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

from ddpm_dist.build import TABLES
from ddpm_dist.config import Config, keys
from ddpm_dist.config.flat import Key

PAGE = Path(__file__).with_suffix(".md")
MARK = "<!-- `make docs` writes all that follows, from ddpm_dist/config/schema.py: change it there. -->\n"


def page(text: str) -> str:
    """The page with its tables made anew. What stands above the mark stays as it is."""
    introduction, mark, _ = text.partition(MARK)
    if not mark:
        raise ValueError(f"{PAGE}: the line {MARK!r} is missing, so nobody knows where the tables begin")
    return introduction + mark + "".join(f"\n{section(name)}" for name in typing.get_type_hints(Config))


def section(name: str) -> str:
    """The heading of a section of the config, what it is about, and the table of its keys."""
    about = typing.get_type_hints(Config)[name].__doc__
    rows = [row(item) for item in keys().values() if item.name.startswith(f"{name}.")]
    header = "| key | default | valid | on resume | meaning |\n|---|---|---|---|---|\n"
    return f"## {name}\n\n{about}\n\n{header}{''.join(rows)}"


def row(item: Key) -> str:
    """The line of one key."""
    on_resume = "may change" if item.free else "fixed"
    cells = [f"`{item.name}`", f"`{as_yaml(item.field.default)}`", valid(item), on_resume, meaning(item)]
    return f"| {' | '.join(cells)} |\n"


def as_yaml(value: Any) -> str:
    """A value as one writes it in a config: null, true, 0.0001, mnist, [1, 2]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def valid(item: Key) -> str:
    """In words, the values that a key takes."""
    arguments = typing.get_args(item.type) if isinstance(item.type, types.UnionType) else (item.type,)
    (wanted,) = (argument for argument in arguments if argument is not types.NoneType)
    or_null = ", or `null`" if types.NoneType in arguments else ""
    if item.name in TABLES:
        return ", ".join(f"`{name}`" for name in TABLES[item.name])
    if typing.get_origin(wanted) is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(wanted)) + or_null
    if typing.get_origin(wanted) is tuple:
        words = {str: "words", int: "whole numbers", float: "numbers"}[typing.get_args(wanted)[0]]
        each = f", each{bounds(item)}" if bounds(item) else ""
        return f"list of {words}{each}{or_null}"
    words = {bool: "`true`, `false`", str: "text", int: "whole number", float: "number"}[wanted]
    return f"{words}{bounds(item)}{or_null}"


def bounds(item: Key) -> str:
    """In words, the bounds of a number, such as ` above 0 and below 1`; nothing if it has none."""
    names = {"minimum": "of at least", "above": "above", "below": "below"}
    given = {words: item.field.metadata[name] for name, words in names.items()}
    return " and".join(f" {words} {as_yaml(float(bound))}" for words, bound in given.items() if bound is not None)


def meaning(item: Key) -> str:
    """The help of a key, with the names of keys in backticks."""
    text = re.sub(r"\b[a-z_]+\.[a-z_]+\b", lambda word: f"`{word[0]}`" if word[0] in keys() else word[0], item.help)
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
