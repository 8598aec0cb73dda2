"""The prompt syntax of A1111's web UI: weights of words, and BREAK.

    (word)       1.1 times the attention      (word:1.3)   1.3 times
    [word]       1 / 1.1 times                \\( \\) \\[ \\]  the character itself
    BREAK        the rest goes into the next chunk

Brackets multiply where they are nested, and one that is not closed reaches to the end. What the syntax has beyond that
changes the prompt while a picture is drawn, or names a file: it has no single encoding and is refused.
"""

from __future__ import annotations

import re

UP, DOWN = 1.1, 1 / 1.1
_WEIGHT = r":\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
_MARK = re.compile(rf"\\(?P<literal>[()\[\]\\])|(?P<open>[(\[])|{_WEIGHT}|(?P<close>[)\]])|(?P<stop>\s*\bBREAK\b\s*)")
_STEP = r":\s*\d*\.?\d+\s*\]"
_BEYOND = (
    (re.compile(r"<(lora|lyco|hypernet):[^>]*>"), "a LoRA or hypernetwork by name"),
    (re.compile(rf"\[[^\[\]:]*:[^\[\]]*{_STEP}|\[[^\[\]:]*{_STEP}"), "a change of words at a step"),
    (re.compile(r"\[[^\[\]|]*\|[^\[\]]*\]"), "words that alternate from step to step"),
    (re.compile(r"\bAND\b"), "two prompts joined by AND"),
)


def words_of(prompt: str) -> list[tuple[str, float] | None]:
    """The parts of a prompt with their weights, in order; None is a BREAK.

    Raises:
        ValueError: the prompt has syntax that has no single encoding.
    """
    for pattern, what in _BEYOND:
        if found := pattern.search(prompt):
            raise ValueError(
                f"prompt {prompt[:60]!r} has {what} ({found[0][:40]!r}), which has no single encoding: take it out, or "
                "read prompts as they are with --prompt_syntax plain"
            )
    parts: list[tuple[str, float] | None] = []
    opened: list[tuple[str, int]] = []  # brackets that are not closed, and the part that follows each

    def weigh(first: int, factor: float) -> None:
        for place in range(first, len(parts)):
            part = parts[place]
            parts[place] = part and (part[0], part[1] * factor)

    def close(bracket: str, factor: float) -> bool:
        if not opened or opened[-1][0] != bracket:
            return False
        weigh(opened.pop()[1], factor)
        return True

    at = 0
    for mark in _MARK.finditer(prompt):
        parts.append((prompt[at : mark.start()], 1.0))
        at = mark.end()
        if mark["open"]:
            opened.append((mark["open"], len(parts)))
        elif mark["stop"]:
            parts.append(None)
        elif mark["literal"]:
            parts.append((mark["literal"], 1.0))
        elif not (
            close("(", float(mark["weight"]))
            if mark["weight"]
            else close("(", UP)
            if mark["close"] == ")"
            else close("[", DOWN)
        ):
            parts.append((mark[0], 1.0))  # closes nothing, so it is text
    parts.append((prompt[at:], 1.0))
    while opened:
        bracket, first = opened.pop()
        weigh(first, UP if bracket == "(" else DOWN)
    return _joined(parts)


def _joined(parts: list[tuple[str, float] | None]) -> list[tuple[str, float] | None]:
    """Neighbours of one weight as one part: the tokenizer must see words whole. Empty parts are left out."""
    out: list[tuple[str, float] | None] = []
    for part in parts:
        if part is not None and not part[0]:
            continue
        last = out[-1] if out else None
        if part is not None and last is not None and last[1] == part[1]:
            out[-1] = (last[0] + part[0], part[1])
        else:
            out.append(part)
    return out
