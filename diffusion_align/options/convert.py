"""From what a person wrote (a word on the command line, a YAML value) to a value of the option's type."""

from __future__ import annotations

import math
from typing import Any

from .brought import brought_value
from .names import UsageError, nearest
from .paths import expanded
from .schema import Option

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
NULL = ("none", "null", "")


def convert(option: Option, value: Any, origin: str) -> Any:
    """The value in the option's own type. `origin` says where it was written, for the error.

    Raises:
        UsageError: naming the key, the value and what was expected.
    """
    if option.nullable and (value is None or (isinstance(value, str) and value.lower() in NULL)):
        return None
    try:
        converted = CONVERTERS[option.kind](value)
        for one in (converted if option.kind is tuple else (converted,)) if option.choices else ():
            if one not in option.choices:
                match = brought_value(option.name, one) or nearest(str(one), option.choices)
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
    numbers = [value] if isinstance(value, int | float) and not isinstance(value, bool) else []
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
    # 1e4 steps are a whole number too, although int() does not say so.
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


CONVERTERS = {bool: _bool, int: _int, float: _float, str: _str, tuple: _texts}
