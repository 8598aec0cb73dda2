"""The one function through which text enters a report. Captions come from strangers and are hostile until escaped."""

from __future__ import annotations

import html
import unicodedata

LIMIT = 600  # characters of one value that a page shows


def _visible(character: str) -> str:
    """Names what cannot be seen or would act in a page: controls, direction marks, lone surrogates, non-characters."""
    if character in "\n\t":
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # the control pictures: NUL becomes one visible sign
    # The zero-width joiner stays: it builds emoji and whole scripts.
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character != "\u200d"
    if hidden or (code & 0xFFFE) == 0xFFFE or 0xFDD0 <= code <= 0xFDEF:
        return f"[U+{code:04X}]"
    return character


def escape(value: object, limit: int = LIMIT) -> str:
    """`str(value)` for an HTML text or a quoted attribute, shown verbatim and never acted upon.

    Printable text survives as it is. Control characters, marks that turn the direction of writing, and other
    characters that cannot be seen are named, as [U+202E]. A value longer than `limit` characters is cut, and says so.
    """
    text = str(value)
    shown = html.escape("".join(map(_visible, text[:limit])), quote=True)
    return shown if len(text) <= limit else f"{shown}… [cut: {limit:,} of {len(text):,} characters]"
