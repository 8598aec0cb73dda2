"""Which layout a table has, by its columns; where none fits, which one is nearest and what it lacks."""

import difflib
from collections.abc import Collection, Iterable

from diffusion_align.data.known_layouts import FORMATS, Format
from diffusion_align.data.records import PROMPTS

# A table with one of these means to compare pictures, so it is not taken for a list of prompts with more beside them.
_COMPARE = {name for known in FORMATS[:-2] for names in known.needs for name in names} - set(PROMPTS) - {"prompt_id"}


def match(columns: Collection[str]) -> Format | None:
    """The first layout whose columns are all there."""
    for known in FORMATS:
        if all(any(name in columns for name in names) for names in known.needs):
            return known if known.holds in ("pairs", "rankings") or not _COMPARE & set(columns) else None
    return None


def wanted(known: Format, columns: Iterable[str]) -> list[str]:
    """The columns of a table that its layout reads, in the table's order."""
    columns = list(columns)
    named = set(known.may)
    for names in known.needs:
        present = [name for name in names if name in columns]
        named |= set(present[:1] if set(names) <= set(PROMPTS) else present)
    return [column for column in columns if column in named]


def missing(columns: Collection[str]) -> str:
    """Why no layout fits: what the nearest one misses, the columns present, and the name that was perhaps meant."""

    def share(known: Format) -> float:
        return sum(any(name in columns for name in names) for names in known.needs) / len(known.needs)

    nearest = max(FORMATS[:-1], key=share)
    lacks = next((names for names in nearest.needs if not any(name in columns for name in names)), nearest.needs[0])
    present = ", ".join(map(repr, columns)) or "none"
    for name in lacks:
        near = difflib.get_close_matches(name, list(columns), n=1, cutoff=0.6)
        if near:
            return (
                f"column {name!r} is missing; it has {present}; did you mean {near[0]!r}? rename it to {name!r} "
                f"(nearest layout: {nearest.name})"
            )
    others = f" (or {', '.join(map(repr, lacks[1:]))})" if lacks[1:] else ""
    return f"column {lacks[0]!r}{others} is missing; it has {present} (nearest layout: {nearest.name})"
