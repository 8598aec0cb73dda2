"""The command line of one verb: flags, `key=value` overrides and positionals, taken apart but not yet interpreted."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

from .files import unknown_key
from .names import UsageError, unknown
from .schema import Option, by_any_name, options_of

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
# Flags that every verb with options has: how to start, not what to do.
START_FLAGS = {
    "preset": "start from a named preset (`diffusion-align presets ls`)",
    "config": "read options from a YAML file, or from a run folder's config.yaml",
    "dry_run": "print what would be done, and stop",
    "traceback": "show the whole traceback of an error",
    "help": "show this help",
}


@dataclass(frozen=True)
class Parsed:
    preset: str | None = None
    config: str | None = None
    dry_run: bool = False
    settings: list[tuple[str, Any]] = field(default_factory=list)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        match = re.match(r"argument (\S+): expected one argument", message)
        raise UsageError(f"{match[1].split('/')[0]} needs a value" if match else message)


def build_parser(options_class: type, prog: str, about: str, positional: str = "") -> argparse.ArgumentParser:
    """The parser of one verb. Values stay text here: files and flags are converted in one place."""
    several = " ..." if positional and options_of(options_class)[positional].kind is tuple else ""
    word = f"{positional.upper()}{several} " if positional else ""
    usage = f"{prog} {word}[--preset NAME] [--config FILE] [--flag VALUE | key=value ...]"
    parser = _Parser(
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


METAVARS = {bool: "false", int: "N", float: "X", str: "TEXT", tuple: "TEXT"}


def _help(option: Option) -> str:
    default = "" if option.default in (None, False, ()) else f" (default: {option.default})"
    return f"{option.help}{default}" + (f" [no effect: {option.unused}]" if option.unused else "")


def parse(
    parser: argparse.ArgumentParser, options_class: type, argv: list[str], verb: str, positional: str = ""
) -> Parsed:
    """Take one verb's command line apart.

    Both `--learning_rate` and `--learning-rate` are read, and so are `train.learning_rate=...` and `learning_rate=...`.

    Args:
        positional: the option that a bare word sets, or "" where no bare word is expected; a list takes several.

    Raises:
        UsageError: an unknown flag or key (with the nearest valid one), a missing value, a word that belongs nowhere.
    """
    names = by_any_name(options_class)
    flags = {word for word in names if "." not in word} | set(START_FLAGS)
    found, rest = parser.parse_known_args([_as_flag(word, names) for word in argv])
    values = vars(found)
    settings = [(name, value) for name, value in values.items() if name not in START_FLAGS]
    bare: list[str] = []
    for word in rest:
        if word.startswith("-"):
            raise unknown("flag", f"--{_spelled(word)}", [f"--{name}" for name in flags], otherwise=_see_help(verb))
        if OVERRIDE.match(word):
            raise unknown_key(word.partition("=")[0], options_class, verb)
        if not positional or (bare and names[positional].kind is not tuple):
            raise UsageError(f"{word!r} is neither a flag nor key=value; {_see_help(verb)}")
        bare.append(word)
    if bare:
        settings.append((positional, bare if names[positional].kind is tuple else bare[0]))
    return Parsed(values.get("preset"), values.get("config"), values.get("dry_run", False), settings)


def _see_help(verb: str) -> str:
    return f"`diffusion-align {verb} --help` lists what there is"


def _spelled(word: str) -> str:
    return word.lstrip("-").partition("=")[0].replace("-", "_")


def _as_flag(word: str, names: dict[str, Option]) -> str:
    """`--learning-rate=1` and `train.learning_rate=1` as `--learning_rate=1`, `--scale_lr` as `--scale_lr=true`.

    One form keeps the order, so that the last word on the command line wins however it is spelled. What is no option of
    the verb, such as a prompt, is left alone.
    """
    key, equals, value = word.partition("=")
    if word.startswith("--"):
        key = _spelled(word)
        if key in START_FLAGS:
            return f"--{key}{equals}{value}"
        if key in names and names[key].kind is bool and not equals:
            equals, value = "=", "true"
    elif not OVERRIDE.match(word):
        return word
    return f"--{names[key].name}{equals}{value}" if key in names else word
