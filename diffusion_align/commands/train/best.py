"""The best checkpoint of a run by one of its metrics, which is never removed as too old."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Best:
    """Compares the mean of a metric since the last checkpoint with the best such mean so far. Higher is better; with
    "-", lower is better.

    `state` is saved in checkpoints; None if no metric is set or none was seen yet.
    """

    def __init__(self, metric: str | None, state: Mapping[str, Any] | None = None):
        self.metric = metric
        self.state = dict(state) if state and state["metric"] == metric else None
        self.sum, self.count = 0.0, 0

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Add the metrics of one step.

        Raises:
            ValueError: there is no such metric; the message lists those that exist.
        """
        if self.metric is None:
            return
        name = self.metric.removeprefix("-")
        if name not in metrics and not math.isfinite(metrics.get("loss", 0.0)):
            return  # a step without items lacks most metrics
        if name not in metrics:
            raise ValueError(f"--keep_best {self.metric}: this run has no such metric; it has {', '.join(metrics)}")
        if math.isfinite(metrics[name]):
            self.sum, self.count = self.sum + metrics[name], self.count + 1

    def updated(self, step: int) -> dict[str, Any] | None:
        """The state including a checkpoint of this step; `accept` it after that is written."""
        if not self.count:
            return self.state
        sign = -1 if (self.metric or "").startswith("-") else 1
        mean = self.sum / self.count
        if self.state is not None and sign * mean <= sign * self.state["value"]:
            return self.state
        return {"metric": self.metric, "value": mean, "step": step}

    def accept(self, state: dict[str, Any] | None) -> None:
        """Take over the state of a written checkpoint; the next one is judged by the steps after it."""
        self.state, self.sum, self.count = state, 0.0, 0
