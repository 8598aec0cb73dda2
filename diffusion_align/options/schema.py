"""Options as data: every option of a verb is one field of a frozen dataclass.

The field has the name, the type and the default; its metadata has the section, the help and the permitted values.
Flags, dotted keys, help texts, checks and the saved configuration are made from them.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Size:
    """The kind of an option `int | str`: the size of pictures, as `picture_size.read_size` reads it."""


@dataclass(frozen=True)
class Option:
    """One option, as read from a dataclass field."""

    name: str
    kind: type  # bool, int, float, str, tuple for a list of strings, or Size
    default: Any
    nullable: bool
    section: str
    help: str
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    fault: Callable[[Any], str | None] | None = None  # value -> what is wrong with it, or None
    one_of: str = ""  # a group of options: one in a later layer replaces the others of earlier layers
    path: str = ""  # the kind of file or folder that it names: see `paths`
    # By choice: values of other options that come with it and replace those of earlier layers.
    brings: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    unused: str = ""  # why the option is accepted without effect; printed if it is set
    saved: bool = True  # False: not in a saved configuration, because it is secret or belongs to one start

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def expected(self) -> str:
        """The valid values, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list of texts"}
        words[Size] = "a whole number, or width x height as in 768x512, with sides"
        bounds = [
            f"{phrase} {bound:g}"
            for phrase, bound in (
                ("at least", self.at_least),
                ("above", self.above),
                ("at most", self.at_most),
                ("below", self.below),
            )
            if bound is not None
        ]
        return words[self.kind] + (" " + " and ".join(bounds) if bounds else "")


def option(default: Any, section: str, help: str, **described: Any) -> Any:
    """Declare one option as a dataclass field; `described` are fields of `Option` (an unknown one raises)."""
    return dataclasses.field(default=default, metadata={"section": section, "help": help, **described})


@functools.cache
def options_of(options_class: type) -> dict[str, Option]:
    """All options of a verb by name, in the order of declaration.

    >>> from diffusion_align.options.train.dpo import TrainDpo
    >>> options_of(TrainDpo)["rank"].key
    'adapter.rank'
    """
    hints = typing.get_type_hints(options_class)
    found = {}
    for field in dataclasses.fields(options_class):
        hint = hints[field.name]
        nullable = isinstance(hint, types.UnionType)
        kinds = [part for part in typing.get_args(hint) if part is not type(None)] if nullable else [hint]
        kind = Size if kinds == [int, str] else kinds[0]
        kind = typing.get_origin(kind) or kind
        found[field.name] = Option(field.name, kind, field.default, nullable, **field.metadata)
    return found


def by_any_name(options_class: type) -> dict[str, Option]:
    """Options by name, dotted key and alias: everything that is valid to the left of an equals sign."""
    names: dict[str, Option] = {}
    for described in options_of(options_class).values():
        for word in (described.name, *described.aliases):
            names[word] = described
            names[f"{described.section}.{word}"] = described
    return names
