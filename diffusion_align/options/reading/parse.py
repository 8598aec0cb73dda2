"""Parses the command line of a verb into flags, `key=value` overrides and positional words. Values stay text."""

from __future__ import annotations

import argparse
import re
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from ..names import UsageError, nearest, unknown
from ..schema import Option, Size, by_any_name, options_of
from .files import unknown_key
from .other_tools import flag_hint
from .resolve import FALSE, TRUE

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
FLAG = re.compile(r"--[A-Za-z_][\w.-]*(=.*)?", re.DOTALL)
# These flags take one text each: a second word is most likely the rest of an unquoted prompt.
ONE_PROMPT = ("prompt", "validation_prompt")
TEXTS = ("preset", "config")
# Flags that every verb with options has.
START_FLAGS = {
    "preset": "start from a named preset (`diffusion-align presets ls`)",
    "config": "read options from a YAML file, or from a run folder's config.yaml",
    "dry_run": "print what would be done, and stop",
    "traceback": "show the full traceback of an error",
    "help": "show this help",
}


@dataclass(frozen=True)
class Parsed:
    preset: str | None = None
    config: str | None = None
    dry_run: bool = False
    settings: list[tuple[str, Any]] = field(default_factory=list)


def build_parser(options_class: type, prog: str, about: str, positional: str = "") -> argparse.ArgumentParser:
    """The argparse parser of one verb, of which only the help is used; `parse` reads the command line."""
    several = " ..." if positional and options_of(options_class)[positional].kind is tuple else ""
    word = f"{positional.upper()}{several} " if positional else ""
    usage = f"{prog} {word}[--preset NAME] [--config FILE] [--flag VALUE | key=value ...]"
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=usage,
        description=about,
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    start = parser.add_argument_group("start")
    for name, text in START_FLAGS.items():
        if name in ("preset", "config"):
            start.add_argument(f"--{name}", metavar="NAME" if name == "preset" else "FILE", help=text)
        else:
            start.add_argument(*(["-h"] if name == "help" else []), f"--{name}", action="store_true", help=text)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in options_of(options_class).values():
        if option.section not in groups:
            groups[option.section] = parser.add_argument_group(option.section)
        groups[option.section].add_argument(
            *(f"--{word}" for word in (option.name, *option.aliases)),
            dest=option.name,
            action="append" if option.kind is tuple else "store",
            nargs="?" if option.kind is bool else None,
            metavar="{" + ",".join(option.choices) + "}" if option.choices else METAVARS[option.kind],
            help=_help(option).replace("%", "%%"),
        )
    return parser


METAVARS = {bool: "false", int: "N", float: "X", str: "TEXT", tuple: "TEXT", Size: "N or WxH"}


def _help(option: Option) -> str:
    default = "" if option.default in (None, False, ()) else f" (default: {option.default})"
    return f"{option.help}{default}" + (f" [no effect: {option.unused}]" if option.unused else "")


def parse(options_class: type, argv: list[str], verb: str, positional: str = "") -> Parsed:
    """Parse the command line of a verb.

    `--learning_rate` and `--learning-rate` are the same, and so are `train.learning_rate=...` and `learning_rate=...`.
    The word after a flag is the flag's value, even if that begins with a dash or contains an equals sign. Another flag
    is no value.

    Args:
        positional: the option that a word without a flag sets ("": none); a list takes several words.

    Raises:
        UsageError: an unknown flag or key (the message names the nearest valid one), a missing value, an unexpected
            word, or two different values of --preset or of --config.
    """
    names, words = by_any_name(options_class), deque(argv)
    start: dict[str, str] = {}
    values: dict[str, Any] = {}
    prompted = ""  # the prompt just read: a word without a flag is probably its unquoted rest
    while words:
        word = words.popleft()
        key, equals, value = word.partition("=")
        flag = FLAG.fullmatch(word) is not None
        if flag:
            key = _spelled(word)
        if key in START_FLAGS and flag:
            given = value if equals else _value_of(key, key not in TEXTS, words, positional)
            if start.setdefault(key, given) != given and key in TEXTS:
                raise UsageError(f"--{key} is given twice, as {start[key]} and {given}; give one of them")
            start[key] = given
        elif key in names and (flag or OVERRIDE.match(word)):
            option = names[key]
            given = value if equals else _value_of(key, option.kind is bool, words, positional)
            if option.kind is tuple:
                more = _more(key, option, words, names, positional) if flag else []
                values.setdefault(option.name, []).extend([given, *more])
            else:
                values[option.name] = given
            prompted = given if key in ONE_PROMPT else ""
        elif word.startswith("-") and len(word) > 1:
            raise unknown_flag(word, options_class, verb)
        elif OVERRIDE.match(word):
            raise unknown_key(key, options_class, verb)
        elif prompted:
            raise UsageError(
                f'{word!r} is neither a flag nor key=value; quote a prompt of several words: "{prompted} {word} ..."'
            )
        elif not positional or (positional in values and names[positional].kind is not tuple):
            raise UsageError(f"{word!r} is neither a flag nor key=value; {_see_help(verb)}")
        elif names[positional].kind is tuple:
            values.setdefault(positional, []).append(word)
        else:
            values[positional] = word
    dry = start.get("dry_run", "false").lower() in TRUE
    return Parsed(start.get("preset"), start.get("config"), dry, list(values.items()))


def _value_of(key: str, switch: bool, words: deque[str], positional: str) -> str:
    """The value of a flag without an equals sign: the next word. A switch takes it only if it is a truth value."""
    if switch:
        # If positional words are expected, 1 may be one of them.
        values = ("true", "false") if positional else TRUE + FALSE
        return words.popleft() if words and words[0].lower() in values else "true"
    if not words or FLAG.fullmatch(words[0]):
        raise UsageError(f"--{key} needs a value")
    return words.popleft()


def _more(key: str, option: Option, words: deque[str], names: dict[str, Option], positional: str) -> list[str]:
    """Further words of a list. If the verb has a positional option, only words that are choices of the list."""
    taken: list[str] = []
    while words and key not in ONE_PROMPT and not words[0].startswith("-"):
        if OVERRIDE.match(words[0]) and words[0].partition("=")[0] in names:
            break
        if positional and words[0] not in option.choices:
            break
        taken.append(words.popleft())
    return taken


def unknown_flag(word: str, options_class: type, verb: str) -> UsageError:
    """The error for a flag that the verb does not have; it names the equivalent option, or the nearest flag."""
    names, key = by_any_name(options_class), _spelled(word)
    if not word.startswith("--") and (key in names or key in START_FLAGS):
        return UsageError(f"unknown flag -{key}; a flag has two dashes: --{key}")
    if (hint := flag_hint(key, names)) is not None:
        return UsageError(f"unknown flag --{key}; {hint}")
    # Flags without effect are suggested only if the spelling is very similar.
    useful = [f"--{name}" for name, option in names.items() if "." not in name and not option.unused]
    useful += [f"--{name}" for name in START_FLAGS]
    unused = [f"--{name}" for name, option in names.items() if "." not in name and option.unused]
    near = nearest(f"--{key}", unused, cutoff=0.85)
    if near is not None and nearest(f"--{key}", [near, *useful]) == near:
        return UsageError(f"unknown flag --{key}; did you mean {near}?")
    return unknown("flag", f"--{key}", useful, otherwise=_see_help(verb))


def _see_help(verb: str) -> str:
    return f"`diffusion-align {verb} --help` lists all flags"


def _spelled(word: str) -> str:
    return word.lstrip("-").partition("=")[0].replace("-", "_")
