"""Text from strangers on its way to a terminal or a log, where a control character would act instead of being read."""

from __future__ import annotations

import unicodedata

# Controls, direction marks and the like, lone surrogates, line and paragraph ends, and what has no meaning yet.
_ACTS = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp", "Cn"))
_JOINER = "\u200d"  # builds emoji and whole scripts, and does nothing else


def printable(text: str) -> str:
    """The text on one line, with every character that could move a cursor, turn or end a line written as its escape.

    >>> printable("a cat\\x1b[2J\\n")
    'a cat\\\\x1b[2J\\\\n'
    """
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character == _JOINER or unicodedata.category(character) not in _ACTS:
        return character
    return repr(character)[1:-1]
