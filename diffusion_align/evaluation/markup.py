"""HTML out of the templates in `templates/`. Every value that a template shows passes `escape`.

Captions come from strangers and are hostile until escaped, so Jinja calls `escape` on each value, whether or not the
template asks for it. Only text of this project's own is marked as HTML already (`Markup`).
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

LIMIT = 600  # characters of one value that a page shows
FOLDER = Path(__file__).with_name("templates")
STYLE = Markup((FOLDER / "report.css").read_text(encoding="utf-8"))


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


def escape(value: object, limit: int = LIMIT) -> Markup:
    """`str(value)` for an HTML text or a quoted attribute, shown verbatim and never acted upon; `Markup` stays.

    Printable text survives as it is. Control characters, marks that turn the direction of writing, and other
    characters that cannot be seen are named, as [U+202E]. A value longer than `limit` characters is cut, and says so.
    """
    if isinstance(value, Markup):
        return value
    text = str(value)
    shown = html.escape("".join(map(_visible, text[:limit])), quote=True)
    return Markup(shown if len(text) <= limit else f"{shown}… [cut: {limit:,} of {len(text):,} characters]")


def templates(folder: Path) -> Environment:
    """The templates of a folder. A name that a template uses and nobody gave is an error."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        finalize=escape,  # applied before Jinja's own escaping, which leaves Markup alone
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def number(value: float | None, share: bool = False, signed: bool = False) -> str:
    """A figure as a page shows it: fractions in percent, others to four digits, a dash for nothing."""
    if value is None:
        return "–"
    return (f"{100 * value:{'+' * signed}.1f}" if share else f"{value:{'+' * signed}.4g}").replace("-", "−")


def interval(ends: tuple[float | None, float | None], share: bool = False, signed: bool = False) -> str:
    """Both ends of an interval, a dash where there is none."""
    return "–" if None in ends else " to ".join(number(end, share, signed) for end in ends)


_REPORT = templates(FOLDER)
_REPORT.filters |= {"number": number, "interval": interval, "pixel": "{:.1f}".format}


def render(template: str, values: Mapping[str, Any]) -> Markup:
    """A template of the report, filled in."""
    return Markup(_REPORT.get_template(template).render(values))
