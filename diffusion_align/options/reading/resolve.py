"""Merges defaults < preset < configuration file < command line; what comes later replaces what came before."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from diffusion_align.picture_size import read_size, sides

from ..names import UsageError, nearest
from ..schema import Option, Size, by_any_name, options_of
from .files import config_path, preset_path, read_yaml, settings_of
from .other_tools import value_hint
from .paths import expanded
from .place import output_of

Options = TypeVar("Options")
COMMAND_LINE = "command line"
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
NULL = ("none", "null", "")


@dataclass(frozen=True)
class Resolved(Generic[Options]):
    """The options of a command, and the layer that set each; options at their default are not listed."""

    options: Options
    origins: dict[str, str]
    moved: str = ""  # the folder of the run in its configuration, if it is in another now

    def given(self) -> set[str]:
        """The options that the user set: all of the command line, and those of files that differ from the default
        (because the configuration of a run contains all options)."""
        described = options_of(type(self.options))
        return {
            name
            for name, origin in self.origins.items()
            if origin == COMMAND_LINE or getattr(self.options, name) != described[name].default
        }

    def notes(self) -> list[str]:
        """One line for each option that was set and has no effect, and one if the run was moved."""
        described = options_of(type(self.options))
        moved = [f"the run is in {getattr(self.options, 'output_dir', '')}; it was in {self.moved}"]
        return (moved if self.moved else []) + [
            f"{name} has no effect: {described[name].unused}"
            for name in self.origins
            if described[name].unused and getattr(self.options, name) != described[name].default
        ]


def _refuse_program(name: str, value: Any, origin: str) -> None:
    """Raise UsageError for a Python reward in a file: it is a program, and only the command line may name one."""
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and ("reward" in name or name == "relabel") and "python:" in text:
            raise UsageError(f"{origin} names a program to run; if you trust it, name it yourself: --{name} {text}")


def resolve(
    options_class: type[Options],
    verb: str,
    *,
    preset: str | None = None,
    config: str | None = None,
    settings: list[tuple[str, Any]] | None = None,
) -> Resolved[Options]:
    """Merge the layers and build the options; every value is converted and checked, in every layer.

    Args:
        settings: (key, value) from the command line, by bare name, dotted key or alias.

    Raises:
        UsageError: with the layer, the key and the valid values.
    """
    layers: list[tuple[str, list[tuple[str, Any]]]] = []
    if preset is not None:
        origin = f"preset {preset}"
        content = read_yaml(preset_path(preset, verb), as_text=True)
        layers.append((origin, settings_of(content, options_class, verb, origin)))
    path = config_path(config, verb) if config is not None else None
    if path is not None:
        layers.append((str(path), settings_of(read_yaml(path, as_text=True), options_class, verb, str(path))))
    layers.append((COMMAND_LINE, settings or []))

    names, options = by_any_name(options_class), options_of(options_class)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        in_this_layer: dict[str, Any] = {}
        for key, written in layer:
            name = names[key].name
            value = convert(names[key], written, origin)
            if origin != COMMAND_LINE:
                _refuse_program(name, value, origin)
            if in_this_layer.setdefault(name, value) != value:
                both = f"{in_this_layer[name]!r} and to {value!r}"
                raise UsageError(f"{origin}: {names[key].key} is set twice, to {both}")
        for name in _replaced(in_this_layer, options):
            values.pop(name, None)
            origins.pop(name, None)
        for name, value in _with_choices(in_this_layer, values, options).items():
            values[name] = value
            origins.pop(name, None)
        values |= in_this_layer
        origins |= dict.fromkeys(in_this_layer, origin)
    stored = values.get("output_dir")
    place = output_of(values, origins, path) if "overwrite_output_dir" in options else None
    if place is None:
        return Resolved(options_class(**values), origins)
    values["output_dir"], origins["output_dir"] = place
    stays = stored is None or os.path.realpath(stored) == os.path.realpath(place[0])
    return Resolved(options_class(**values), origins, "" if stays else str(stored))


def _replaced(layer: dict[str, Any], options: dict[str, Option]) -> list[str]:
    """The options that a layer replaces: of a group, the option that is given later counts."""
    groups = {options[name].one_of for name, value in layer.items() if value is not None} - {""}
    return [name for name, option in options.items() if option.one_of in groups and name not in layer]


def _with_choices(layer: dict[str, Any], earlier: dict[str, Any], options: dict[str, Option]) -> dict[str, Any]:
    """The constants that come with the choices of a layer, unless the earlier choice has the same constants: then the
    values that earlier layers set for them are kept."""
    found: dict[str, Any] = {}
    for name, value in layer.items():
        brings = options[name].brings
        if brings and brings[value] != brings[earlier.get(name, options[name].default)]:
            found |= brings[value]
    return found


def convert(option: Option, value: Any, origin: str) -> Any:
    """The value in the type of the option. `origin`: the layer, for error messages.

    Raises:
        UsageError: naming the key, the value and what was expected.
    """
    if option.nullable and (value is None or (isinstance(value, str) and value.lower() in NULL)):
        return None
    try:
        converted = CONVERTERS[option.kind](value)
        for one in (converted if option.kind is tuple else (converted,)) if option.choices else ():
            if one not in option.choices:
                match = value_hint(option.name, one) or nearest(str(one), option.choices)
                raise ValueError(f"did you mean {match}?" if match else "")
        _check_range(option, converted)
    except (ValueError, TypeError, OverflowError) as error:
        hint = str(error) if "did you mean" in str(error) else ""
        message = f"{origin}: {option.key} must be {option.expected}, not {value!r}"
        raise UsageError(f"{message}; {hint}" if hint else message) from None
    if option.fault is not None and (fault := option.fault(converted)) is not None:
        raise UsageError(f"{origin}: {option.key} {fault}")
    return expanded(option, converted, origin)


def _check_range(option: Option, value: Any) -> None:
    numbers: list[float] = [value] if isinstance(value, int | float) and not isinstance(value, bool) else []
    if option.kind is Size:
        numbers = [*sides(str(value))]
    for number in numbers:
        if (
            not math.isfinite(number)
            or (option.at_least is not None and number < option.at_least)
            or (option.above is not None and number <= option.above)
            or (option.at_most is not None and number > option.at_most)
            or (option.below is not None and number >= option.below)
        ):
            raise ValueError


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if word not in TRUE + FALSE:
        raise ValueError
    return word in TRUE


def _int(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, str) and value.lstrip("+-").isdigit():
        return int(value)
    # 1e4 is a whole number too, although int() does not accept it.
    number = float(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def _str(value: Any) -> str:
    if isinstance(value, list | dict) or value is None:
        raise ValueError
    return str(value)


def _texts(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str | int | float) for item in items):
        raise ValueError
    return tuple(str(item) for item in items)


def _size(value: Any) -> int | str:
    return read_size(value) if isinstance(value, str) and not _number(value) else _int(value)


def _number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


CONVERTERS = {bool: _bool, int: _int, float: _float, str: _str, tuple: _texts, Size: _size}
