"""Columns by other names than ours: those that a person maps, and the usual ones."""

import re
from collections.abc import Collection, Mapping, Sequence

from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.rows.known_layouts import CAPTIONS, PREFERENCES, PROMPT_LIST, Layout, layout_of

# Chosen and rejected, as people name them; both of a pair must be there.
_CHOSEN_REJECTED = (
    ("chosen", "rejected"), ("winner", "loser"), ("win", "lose"), ("preferred", "dispreferred"),
    ("preferred", "rejected"), ("accepted", "rejected"), ("better", "worse"), ("good", "bad"), ("best", "worst"),
)  # fmt: skip
_WHAT = ("", "image", "img", "picture", "path", "file", "file_name", "filename", "image_path")
_NUMBERED = ("image", "img", "picture", "jpg", "png")
_PROMPTS = (
    "prompt", "caption", "text", "original_prompt", "prompts", "captions", "prompt_text", "text_prompt", "image_prompt",
    "description",
)  # fmt: skip
_OURS = {name for known in (*PREFERENCES, CAPTIONS, PROMPT_LIST) for names in known.needs for name in names}
_OURS |= {name for known in PREFERENCES for name in known.may}


def unknown_column(asked: Mapping[str, str]) -> str | None:
    """What is wrong with our names for columns (ours -> theirs): one that no layout has; None if nothing is."""
    for ours, theirs in asked.items():
        if ours not in _OURS:
            known = f"they have {', '.join(sorted(_OURS))}"
            cure = f"did you mean {theirs}={ours}?" if theirs in _OURS else known
            return f"{ours!r} is no column of a layout; {cure}"
    return None


def renaming(file: object, columns: Sequence[str], asked: Mapping[str, str]) -> dict[str, str]:
    """Their names for columns -> ours: those that are asked for (ours -> theirs), and usual names where no layout fits.

    Raises:
        DataError: a column that is asked for is missing, or two columns could both be meant.
    """
    given: dict[str, str] = {}
    for ours, theirs in asked.items():
        if theirs not in columns:
            has = ", ".join(map(repr, columns)) or "none"
            raise DataError(f"{file}: has no column {theirs!r} to read as {ours}; it has {has}")
        given[theirs] = ours
    named = renamed(columns, given)
    before = layout_of(named)
    if before is not None and before.compares:
        return given
    usual = _usual_names(file, [name for name in named if name not in asked], set(asked))
    after = layout_of(renamed(named, usual))
    return {**given, **usual} if _is_better(after, before) else given


def renamed(columns: Collection[str], names: Mapping[str, str]) -> dict[str, str]:
    """Our names for the columns -> theirs. A column whose name is given to another keeps out of the way."""
    taken = set(names.values())
    return {names.get(name, name): name for name in columns if name in names or name not in taken}


def _is_better(after: Layout | None, before: Layout | None) -> bool:
    return after is not None and (before is None or (after.compares and not before.compares))


def _usual_names(file: object, columns: Sequence[str], settled: set[str]) -> dict[str, str]:
    """Their names -> ours, for names of which it is known what they mean."""
    plain: dict[str, str] = {}
    for name in columns:
        key = re.sub(r"[\s.\-]+", "_", name.strip().casefold())
        if key not in plain or name == key:
            plain[key] = name
    found: dict[str, str] = {}
    sides = [pair for pair in _pairs_of_names() if set(pair) <= set(plain)]
    if len(sides) > 1 and not settled & {"chosen", "rejected"}:
        said = " and ".join(f"{plain[a]!r} with {plain[b]!r}" for a, b in sides[:2])
        raise DataError(f"{file}: {said} could both be chosen and rejected: say which with chosen=... and rejected=...")
    if sides:
        found |= {plain[name]: ours for name, ours in zip(sides[0], ("chosen", "rejected"), strict=True)}
    for what in _NUMBERED:
        numbered = [f"{what}{mark}{n}" for mark in ("_", "") for n in (0, 1)]
        for pair in (numbered[:2], numbered[2:]):
            if set(pair) <= set(plain) and {"label_0", "label_1"} <= set(plain):
                found |= {plain[pair[n]]: f"jpg_{n}" for n in (0, 1)}
    prompt = next((plain[name] for name in _PROMPTS if name in plain), None)
    if prompt is not None and not settled & {"prompt", "caption"}:
        found[prompt] = "prompt"
    for key, name in plain.items():
        if key in _OURS and name not in found and key not in (*found.values(), *settled, "prompt", "caption", "text"):
            found[name] = key
    return {theirs: ours for theirs, ours in found.items() if theirs != ours}


def _pairs_of_names() -> list[tuple[str, str]]:
    pairs = []
    for a, b in _CHOSEN_REJECTED:
        for what in _WHAT:
            pairs += [(f"{a}_{what}", f"{b}_{what}"), (f"{what}_{a}", f"{what}_{b}")] if what else [(a, b)]
    pairs += [(f"{what}_{a}", f"{what}_{b}") for what in ("image", "img") for a, b in (("w", "l"), ("win", "lose"))]
    return list(dict.fromkeys(pairs))
