"""Data that cannot be used: the error that ends the reading, rows that are left out, and how many are allowed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from diffusion_align.system.printable import printable


class DataError(ValueError):
    """Data that cannot be used. One line: the file, the row or key, and the cure."""

    def __init__(self, message: str):
        super().__init__(printable(message))


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was left out: its id (file:row) and the reason."""

    row: str
    reason: str

    def __post_init__(self) -> None:
        # Names inside archives and tables are strangers' text, and these two are printed.
        for name in ("row", "reason"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.row} {self.reason}"


def bad_row_lines(bad: Sequence[BadRow]) -> str:
    """Bad rows as the lines of a bad_rows.jsonl."""
    return "".join(json.dumps({"row": row.row, "reason": row.reason}) + "\n" for row in bad)


@dataclass(frozen=True, slots=True)
class Counts:
    """How many rows were used, tied or bad. A row that ranks K pictures gives several pairs, so `used` may be more
    than there are rows."""

    rows: int
    used: int
    ties: int
    broken: int
    bad_rows: tuple[BadRow, ...] = ()
    what: str = "pairs"

    def __str__(self) -> str:
        return f"{self.rows} rows: {self.used} {self.what}, {self.ties} ties dropped, {self.broken} bad"


def require_usable(source: str, counts: Counts, tie: str, max_bad_fraction: float) -> None:
    """Raise DataError if the rows leave nothing to learn from, or too many are bad. `tie`: what a tie is."""
    if counts.rows == 0:
        raise DataError(f"{source}: holds no rows; is this the right file?")
    if counts.ties == counts.rows:
        raise DataError(f"{source}: all {counts.ties} rows are ties ({tie}); there is no preference to learn from")
    require_few_bad(source, counts.bad_rows, counts.rows, max_bad_fraction)
    if not counts.used:
        one = counts.what.removesuffix("s")
        raise DataError(f"{source}: no {one} is left ({counts}); the first bad row: {counts.bad_rows[0]}")


def require_few_bad(source: str, bad: Sequence[BadRow], rows: int, max_bad_fraction: float) -> None:
    """Raise DataError, naming the first bad row, if more than `max_bad_fraction` of the rows are bad."""
    if len(bad) > max_bad_fraction * rows:
        raise DataError(
            f"{source}: {len(bad)} of {rows} rows are bad, more than max_bad_fraction={max_bad_fraction:g} allows; "
            f"the first: {bad[0]}; repair or remove them, or raise max_bad_fraction"
        )
