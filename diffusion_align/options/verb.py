"""A verb of the command line as data: its options, their check, and the function that runs it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from typing import Any


def no_notes(options: Any, given: Collection[str]) -> list[str]:
    """The notes of a verb without any."""
    return []


@dataclass(frozen=True)
class Verb:
    """`run` and `plan` are "module:function" in `diffusion_align.commands`, imported when they are called. A training
    has `method` instead, the name of a file in `diffusion_align.methods`."""

    words: str
    options: type
    check: Callable[[Any], None]
    about: str
    run: str = ""
    plan: str = ""  # what --dry-run calls; without one it prints the options
    method: str = ""
    positional: str = ""
    notes: Callable[[Any, Collection[str]], list[str]] = no_notes

    def entry(self) -> Any:
        """The `methods.entry.Entry` of a training."""
        return import_module(f"diffusion_align.methods.{self.method}").METHOD

    def start(self, options: Any) -> int:
        if self.method:
            return _function("commands.train.train:train")(self.entry(), options)
        return _function(f"commands.{self.run}")(options)

    def dry_run(self, options: Any) -> int:
        if self.method:
            return _function("commands.train.plan:dry_run")(self.entry(), options)
        if self.plan:
            return _function(f"commands.{self.plan}")(options)
        from .reading.files import to_yaml

        print(to_yaml(options, self.words), end="")
        return 0


def _function(where: str) -> Callable[..., int]:
    module, _, name = where.partition(":")
    return getattr(import_module(f"diffusion_align.{module}"), name)
