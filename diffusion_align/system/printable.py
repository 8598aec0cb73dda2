"""Untrusted text made safe for a terminal or a log, where control characters would take effect."""

from __future__ import annotations

import unicodedata

# Controls, formats such as direction marks, lone surrogates, line and paragraph separators, unassigned characters.
_ESCAPED = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp", "Cn"))
_JOINER = "\u200d"  # harmless, and needed by emoji and whole scripts


def printable(text: str) -> str:
    """The text on one line: characters that could move the cursor, or turn or end a line, become escapes.

    >>> printable("a cat\\x1b[2J\\n")
    'a cat\\\\x1b[2J\\\\n'
    """
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character == _JOINER or unicodedata.category(character) not in _ESCAPED:
        return character
    return repr(character)[1:-1]
