"""The collapse alarm: a run that is getting worse at what people like, or draws ever the same, says so.

It reads the rows of metrics.jsonl and nothing else, so a resumed run hears what the whole run would have. Two signs:

winner_error_gap: the policy's squared error on preferred pictures above the reference's, mean over dims. A preference
    loss is content if both errors rise, the loser's faster (Pal et al. 2024, arXiv 2402.13228, for language models).
diversity: distance between the pictures of a prompt, against the run's own first rows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

FIRST = 5  # rows that diversity is compared with
REMEDY = "lower --learning_rate, raise --beta, or go back to an earlier checkpoint"


class CollapseError(RuntimeError):
    """The run collapsed and was asked to stop when it does."""


class CollapseAlarm:
    """Judges means over the last `patience` rows; hears each sign once.

    winner_error: the mean winner_error_gap may not be above it. diversity: the mean may not be below this share of that
    of the first 5 rows.
    """

    def __init__(self, winner_error: float, diversity: float, patience: int, past: Iterable[Mapping[str, Any]] = ()):
        self.winner_error, self.diversity = winner_error, diversity
        self.errors: deque[float] = deque(maxlen=patience)
        self.distances: deque[float] = deque(maxlen=patience)
        self.first: list[float] = []
        self.said: set[str] = set()
        for row in past:
            self.hear(row)

    def hear(self, row: Mapping[str, Any]) -> str | None:
        """What this row, with those before it, gives alarm for, with its cure; None if nothing new."""
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
            f"than {self.winner_error:g}): the model is unlearning what people like; {REMEDY}",
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
            f"{start:.3g} at first (less than {self.diversity:g} of it): the model draws ever the same; {REMEDY}",
        )

    def _once(self, sign: str, message: str) -> str | None:
        if sign in self.said:
            return None
        self.said.add(sign)
        return message


def _finite(value: float | None) -> float | None:
    """None for what was not logged, or is no number: that is another alarm's business."""
    return value if value is not None and math.isfinite(value) else None
