"""The collapse alarm: warns when preferred pictures get worse, or when the pictures of a prompt become too similar.

It reads only the rows of metrics.jsonl, so a resumed run raises the same alarms as an uninterrupted one. Two metrics:

winner_error_gap: squared error on preferred pictures, policy minus reference, mean over dims. A preference loss can
    fall while both errors rise, the loser's faster (Pal et al. 2024, arXiv 2402.13228, for language models).
diversity: distance between the pictures of a prompt, compared with the first rows of the run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

FIRST = 5  # rows whose mean diversity is the baseline
REMEDY = "lower learning_rate, raise beta, or go back to an earlier checkpoint"


class CollapseError(RuntimeError):
    """The run collapsed, and its options say to stop then."""


class CollapseAlarm:
    """Compares means over the last `patience` rows with two limits; reports each metric once.

    winner_error: largest mean winner_error_gap. diversity: smallest mean diversity, as a fraction of the mean over the
    first 5 rows.
    """

    def __init__(self, winner_error: float, diversity: float, patience: int, past: Iterable[Mapping[str, Any]] = ()):
        self.winner_error, self.diversity = winner_error, diversity
        self.errors: deque[float] = deque(maxlen=patience)
        self.distances: deque[float] = deque(maxlen=patience)
        self.first: list[float] = []
        self.reported: set[str] = set()
        for row in past:
            self.check(row)

    def check(self, row: Mapping[str, Any]) -> str | None:
        """Add a row; the alarms that it raises, with their remedy, or None."""
        both = self._errors(_finite(row.get("winner_error_gap"))), self._distances(_finite(row.get("diversity")))
        return "; and ".join(filter(None, both)) or None

    def _errors(self, gap: float | None) -> str | None:
        if gap is None:
            return None
        self.errors.append(gap)
        mean = sum(self.errors) / len(self.errors)
        if len(self.errors) < (self.errors.maxlen or 1) or mean <= self.winner_error:
            return None
        return self._once(
            "winner_error_gap",
            f"the error on preferred pictures is {mean:.3g} above the reference's, over {len(self.errors)} steps (more "
            f"than {self.winner_error:g}): preferred pictures get less likely; {REMEDY}",
        )

    def _distances(self, distance: float | None) -> str | None:
        if distance is None:
            return None
        if len(self.first) < FIRST:
            self.first.append(distance)
            return None
        self.distances.append(distance)
        mean, start = sum(self.distances) / len(self.distances), sum(self.first) / FIRST
        if len(self.distances) < (self.distances.maxlen or 1) or mean >= self.diversity * start:
            return None
        return self._once(
            "diversity",
            f"the pictures of a prompt differ by {mean:.3g}, over {len(self.distances)} steps, where they differed by "
            f"{start:.3g} at first (less than {self.diversity:g} of it): the pictures become too similar; {REMEDY}",
        )

    def _once(self, metric: str, message: str) -> str | None:
        if metric in self.reported:
            return None
        self.reported.add(metric)
        return message


def _finite(value: float | None) -> float | None:
    """None for a value that was not logged or is not finite; skipped steps are counted elsewhere."""
    return value if value is not None and math.isfinite(value) else None
