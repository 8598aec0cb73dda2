"""The collapse alarm that a run's options ask for."""

from __future__ import annotations

from pathlib import Path

from diffusion_align.options import TrainCommon
from diffusion_align.train import record
from diffusion_align.train.alarm import CollapseAlarm


def alarm_of(o: TrainCommon, metrics: Path) -> CollapseAlarm | None:
    """The alarm, with what the run wrote to its metrics.jsonl before it was resumed; None where it is off."""
    if o.collapse_alarm == "off":
        return None
    past = record.read(metrics) if metrics.exists() else []
    return CollapseAlarm(o.collapse_winner_error, o.collapse_diversity, o.collapse_patience, past)
